"""Bench of saving: how much longer a run takes because it writes checkpoints.

    python bench/saving.py --model 7b5 --steps 500 --every 50 --save

train.py's loop runs over random rows with the lengths of 256 real pairs (lengths.json). It uses the
values of the preset t4: 8 examples a step, packed. Every --every steps it writes a checkpoint to
the disk, under --out. A checkpoint has the adapter, the optimizer state and hashes of its files.
The loop continues while a checkpoint is written, but the run ends only when the last checkpoint is
complete. The same run without checkpoints is measured too, with the same rows in the same order.
Runs with and without checkpoints alternate. The difference of their times is the cost of saving.
"""

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

from bench import epoch, report, results
from bench.command_line import MOST_STEPS, as_in_train, within
from bench.epoch_sides import Clock
from bench.sides import write_random_checkpoint
from bench.windows import all_train
from phogpt_raw.cards import DTYPES, this_card
from phogpt_raw.command_line import Parser
from phogpt_raw.config import Config
from phogpt_raw.model.phogpt import PUBLISHED
from phogpt_raw.refusal import Refusal, exits_cleanly
from phogpt_raw.show.console import out
from phogpt_raw.simulate.fit import choose
from phogpt_raw.training.metrics import Metrics
from phogpt_raw.training.setup import set_up
from phogpt_raw.training.shutdown import GracefulShutdown


def measure(options, folder: Path) -> dict:
    """Measure runs with and without checkpoints, alternately; return their seconds and the cost.

    A short run comes first. It measures how long the loop waits at the first checkpoint of a
    process. This wait is longer than the wait at a later checkpoint, because the process does some
    work only once, such as compiling kernels and allocating page-locked memory.
    """
    model = folder / "model"
    write_random_checkpoint(model, PUBLISHED[options.model])

    def one(number: int, steps: int, saving: bool) -> dict:
        return one_run(options, steps, model, folder / f"run-{number}", saving)

    first = one(0, options.every + 1, saving=True)["saves_s"][0]
    runs = [one(number, options.steps, saving=number % 2 == 0)
            for number in range(1, 1 + 2 * options.rounds)]
    plain, saving = runs[::2], runs[1::2]
    return {"steps": options.steps, "every": options.every, "first_save_s": first,
            "with": saving, "without": plain, **costs(saving, plain, first)}


def one_run(options, steps: int, model: Path, folder: Path, saving: bool) -> dict:
    """Do one run and return its times in seconds.

    whole_s: from the start of the loop until the last checkpoint is on the disk. end_s: the part of
    whole_s after the last step. saves_s: the time for which the loop waits at each checkpoint.
    """
    from train import train

    config = replace(epoch.config_of(options), model=str(model), steps=steps, epochs=None,
                     save_every=options.every, out=str(folder))
    job = set_up(config, all_train(epoch.examples_of(options, config)))
    choice = choose(job)
    job.pack(choice.packing)
    job.limits.recompute = choice.recompute
    saves, save = [], job.run.save

    def timed(training) -> None:
        if saving:
            begun = time.perf_counter()
            save(training)
            saves.append(time.perf_counter() - begun)

    job.run.save = timed
    with job.run.begun(job):
        begun = time.perf_counter()
        with GracefulShutdown() as shutdown:
            clock = Clock()
            train(job, Metrics(job.run.folder, job.run.state, job), clock, shutdown)
        job.run.settle()
        whole = time.perf_counter() - begun
    size = sum(f.stat().st_size for f in job.run.checkpoint.iterdir()) if saving else 0
    return {"whole_s": whole, "end_s": whole - sum(clock.seconds()), "saves_s": saves,
            "checkpoint_bytes": size}


def costs(saving: list[dict], plain: list[dict], first_save_s: float) -> dict:
    """The cost of saving, from the medians of the runs.

    cost_s: the additional seconds of a run with checkpoints. The longer wait at a process's first
    checkpoint is included. share: cost_s, divided by the seconds of a whole run with checkpoints.
    end_share: the additional seconds after the last step, in which the run waits for the last
    checkpoint, divided by the seconds of a whole run with checkpoints.

    >>> costs([{"whole_s": 9.9, "end_s": 0.5, "saves_s": [0.1, 0.1]}],
    ...       [{"whole_s": 9.0, "end_s": 0.0, "saves_s": []}], first_save_s=0.2)
    {'cost_s': 1.0, 'share': 0.1, 'end_share': 0.05}
    """
    more = first_save_s - median(wait for run in saving for wait in run["saves_s"])
    whole = median(run["whole_s"] for run in saving) + more
    cost = whole - median(run["whole_s"] for run in plain)
    end = median(run["end_s"] for run in saving) - median(run["end_s"] for run in plain)
    return {"cost_s": cost, "share": cost / whole, "end_share": end / whole}


def parse(arguments):
    parser = Parser(description=__doc__)
    parser.add_argument("--model", default="7b5", choices=tuple(PUBLISHED), help="that shape with "
                        "random weights (default 7b5)")
    parser.add_argument("--steps", type=within(1, MOST_STEPS), default=500, metavar="N",
                        help="steps of the run (default 500)")
    parser.add_argument("--every", type=within(1, MOST_STEPS), default=50, metavar="N",
                        help="steps between checkpoints (default 50)")
    parser.add_argument("--rounds", type=within(1, 100), default=2, metavar="N",
                        help="number of runs with checkpoints, and of runs without (default 2)")
    parser.add_argument("--dtype", default="fp16", choices=("fp16", "bf16"),
                        help="data type of activations (default fp16)")
    parser.add_argument("--rank", type=as_in_train("rank"), default=Config.rank, metavar="N",
                        help=f"LoRA rank (default {Config.rank})")
    parser.add_argument("--out", metavar="FOLDER", help="the runs are written here and then "
                        "deleted (default: the system's folder for temporary files)")
    parser.add_argument("--save", action="store_true", help="write the result to bench/results")
    options = parser.parse_args(arguments)
    # epoch.py's functions and results.save read these options; this bench has no flags for them
    options.data, options.packing, options.batch_tokens = None, True, None
    options.loss_mib, options.epochs, options.max_len = Config.loss_mib, None, 1024
    options.recompute = "auto"
    options.attention, options.optimizer, options.label = "auto", Config.optimizer, None
    return options


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    card = this_card()
    if card.device == "cpu":
        raise Refusal("saving.py: needs a GPU, and there is none here; on a CPU steps are too slow "
                      "to show the cost of saving")
    with tempfile.TemporaryDirectory(dir=options.out) as temporary:
        row = measure(options, Path(temporary))
    out.print(report.saving([row], f"measured on {card.name}: {options.model}, {options.dtype}, "
                                   f"rank {options.rank}"))
    if options.save:
        file = results.save("saving", card, options, DTYPES[options.dtype], [row])
        out.print(f"saved {file}")


if __name__ == "__main__":
    main()
