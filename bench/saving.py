"""Bench of saving: the share of a run's time that its checkpoints take.

    python bench/saving.py --model 7b5 --steps 500 --every 50 --save

A run of train.py's loop over random rows with the lengths of 256 real pairs (lengths.json), with
the values of the preset t4: 8 examples a step, packed. Every --every steps it writes a checkpoint:
adapter, optimizer state and hashes, flushed to the disk under --out. A save counts until the loop
goes on. The rest is done while the next steps are computed and makes them slower: the first half of
the steps after each save is compared with the second half. The end of the run waits for the last
checkpoint.
"""

import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

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
from phogpt_raw.training.leaving import Leaving
from phogpt_raw.training.metrics import Metrics
from phogpt_raw.training.setup import set_up


def measure(options, folder: Path) -> dict:
    """Seconds of the whole run, of its saves, and of its steps, those right after a save apart."""
    from train import train

    model = folder / "model"
    write_random_checkpoint(model, PUBLISHED[options.model])
    config = replace(epoch.config_of(options), model=str(model), steps=options.steps, epochs=None,
                     save_every=options.every, out=str(folder / "run"))
    job = set_up(config, all_train(epoch.examples_of(options, config)))
    choice = choose(job)
    job.pack(choice.packing)
    job.limits.recompute = choice.recompute
    saves, save = [], job.run.save

    def timed(training) -> None:
        begun = time.perf_counter()
        save(training)
        saves.append(time.perf_counter() - begun)

    job.run.save = timed
    with job.run.begun(job):
        begun = time.perf_counter()
        with Leaving() as leave:
            clock = Clock()
            train(job, Metrics(job.run.folder, job.run.state, job), clock, leave)
        job.run.settle()
        whole = time.perf_counter() - begun
    return {"steps": options.steps, "every": options.every, "whole_s": whole, "saves_s": saves,
            **costs(clock.seconds(), saves, options.every, whole),
            "checkpoint_bytes": sum(f.stat().st_size for f in job.run.checkpoint.iterdir())}


def costs(steps: list[float], saves: list[float], every: int, whole: float) -> dict:
    """What saving costs. steps: seconds of each, from the end of the one before, which includes a
    save between the two; saves: seconds of each save; whole: seconds of the run.

    step_s: a step where nothing is written beside it. slowed_s: by how much a save slows down the
    steps after it. end_s: from the last step to the end, with the last save. share: of all of it;
    share_of_others: without the last save, which a run that saves at its end alone has too.

    >>> costs([1, 1, 1, 1, 1.5, 1.25, 1, 1], saves=[0.25, 0.5], every=4, whole=9.25)["share"]
    0.13513513513513514
    """
    half = every // 2
    after = range(every, len(steps), every)
    step = statistics.median(s for n, s in enumerate(steps) if n % every >= half)
    slowed = [sum(steps[n:n + half]) - saved - half * step
              for n, saved in zip(after, saves, strict=False)]
    end = whole - sum(steps)
    others = sum(saves[:len(slowed)]) + sum(slowed)
    return {"step_s": step, "slowed_s": slowed, "end_s": end, "share": (others + end) / whole,
            "share_of_others": others / whole}


def parse(arguments):
    parser = Parser(usage="%(prog)s [options]", description=__doc__)
    parser.add_argument("--model", default="7b5", choices=tuple(PUBLISHED), help="that shape with "
                        "random weights (default 7b5)")
    parser.add_argument("--steps", type=within(1, MOST_STEPS), default=500, metavar="N",
                        help="steps of the run (default 500)")
    parser.add_argument("--every", type=within(1, MOST_STEPS), default=50, metavar="N",
                        help="steps between checkpoints (default 50)")
    parser.add_argument("--dtype", default="fp16", choices=("fp16", "bf16"),
                        help="data type of activations (default fp16)")
    parser.add_argument("--rank", type=as_in_train("rank"), default=Config.rank, metavar="N",
                        help=f"LoRA rank (default {Config.rank})")
    parser.add_argument("--out", metavar="FOLDER", help="where the run is written and removed "
                        "again (default: the system's folder for temporary files)")
    parser.add_argument("--save", action="store_true", help="write the result to bench/results")
    options = parser.parse_args(arguments)
    # what epoch.py's rows and results take besides
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
        raise Refusal("saving.py: needs a GPU, and here is none: on a CPU a step takes so long "
                      "that no save counts")
    with tempfile.TemporaryDirectory(dir=options.out) as temporary:
        row = measure(options, Path(temporary))
    out.print(report.saving([row], f"measured on {card.name}: {options.model}, {options.dtype}, "
                                   f"rank {options.rank}"))
    if options.save:
        file = results.save("saving", card, options, DTYPES[options.dtype], [row])
        out.print(f"saved {file}")


if __name__ == "__main__":
    main()
