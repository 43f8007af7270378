"""Seconds an example of an epoch of short rows: train.py's own loop, and transformers' Trainer.

    python bench/epoch.py --model 7b5 --save                on a GPU: both in turns, measured
    python bench/epoch.py --card t4,v100 --model 7b5        simulated, anywhere
    python bench/epoch.py --data rows.jsonl                 a file in place of random rows

The rows have random token ids and the lengths of 256 real pairs (lengths.json), with the loss on
the answer. Ours is train.py with the values of the preset t4 (8 examples a step, packed, as CUDA
graphs) on a card of --cap GiB. The Trainer, with PEFT and bitsandbytes as its users set it up, has
gradient checkpointing and pads: 1 row at a time, 8 times a step, under the same cap; or more at
once, grouped by length, without a cap.

`whole` is all of a run of one epoch in a new process: compiling, capturing and warming up included,
loading weights and choosing the rows' lengths not. `steady` is the last of --epochs epochs of
another run of ours; of the Trainer's one epoch it is the steps after the first quarter.
"""

import argparse
import json
import statistics
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import torch

from bench import items, report, results
from bench.command_line import count, known_cards, whole_numbers
from bench.epoch_sides import write_examples
from bench.peer import adapter_weights
from bench.process import Side
from bench.random_data import random_rows
from bench.sides import write_random_checkpoint
from bench.simulated import cards, shape_of
from bench.windows import Simulation, layout, plan, stream_of
from phogpt_raw.cards import DTYPES, this_card
from phogpt_raw.command_line import Parser, read_preset
from phogpt_raw.config import Config
from phogpt_raw.data.prompt import Example, next_tokens
from phogpt_raw.model.phogpt import PUBLISHED
from phogpt_raw.model.weights import PINNED_IDS
from phogpt_raw.refusal import Refusal, exits_cleanly
from phogpt_raw.show.console import out

LENGTHS = Path(__file__).parent / "lengths.json"
WARM = 4  # the Trainer's steady steps are those after the first of so many parts


def random_examples(vocabulary: int) -> list[Example]:
    """Random ids, each answer's last one </s>, in the lengths of the 256 pairs."""
    made = []
    for n, (prompt, answer) in enumerate(json.loads(LENGTHS.read_text("utf-8"))["lengths"]):
        [ids] = random_rows(vocabulary, 1, prompt + answer - 1, seed=n)
        ids.append(PINNED_IDS["eos"])
        made.append(Example(ids, next_tokens(ids, start=prompt), where=f"pair {n + 1}"))
    return made


def config_of(options) -> Config:
    """The preset t4, saving and evaluating only at the end, and what the flags say otherwise."""
    quiet = {"eval_every": 0, "save_every": 0}
    named = ("model", "data", "dtype", "rank", "packing", "batch_tokens", "recompute", "loss_mib",
             "epochs", "max_len")
    return Config(**{**read_preset("t4"), **quiet, **{n: getattr(options, n) for n in named}})


def examples_of(options, config: Config) -> list[Example]:
    """The rows of --data, or random ones; Refusal where the model has no such tokens, or one is
    longer than a window."""
    vocabulary = shape_of(options.model).vocab_size
    if not options.data:
        examples = random_examples(vocabulary)
    else:
        examples, named = items.read_file(options, config)
        largest = max(max(e.ids) for e in examples)
        if largest >= vocabulary:
            raise Refusal(f"--tokenizer {named}: gives token {largest}, and {options.model} has "
                          f"{vocabulary:,}; name the tokenizer of that model")
    stream_of(examples, config)
    return examples


# -- simulated


def simulate(options, config: Config, examples: list[Example]) -> None:
    for card, rates, traces in cards(options):
        epoch = plan(examples, config, card, traces.shape.n_layers, traces)
        simulation = Simulation(traces, epoch, card, rates)
        windows = epoch.some(items.SIMULATED)
        taken = [simulation.seconds(window) for window in windows]
        seen = sum(len(window.examples) for window in windows)
        row = {"who": "ours", **described(options, config), "micro_batch": config.micro_batch,
               **layout(epoch.windows, epoch.micro_batch),
               "steady_s": [sum(ends) / seen for ends in zip(*taken, strict=True)],
               **simulation.memory_row()}
        out.print(table([row], f"simulated for {card.name}: {options.model}, {options.dtype}, rank "
                               f"{options.rank}, as CUDA graphs"))
        if options.save:
            file = results.save("epoch", card, options, traces.dtype, [row], source="simulated",
                                data=options.data, sources=rates.source)
            out.print(f"saved {file}")


def described(options, config: Config) -> dict:
    return {"packing": config.packing, "batch_size": config.batch_size,
            "batch_tokens": config.batch_tokens, "rank": options.rank}


# -- measured


class Turns:
    """The runs of both sides over one checkpoint in a temporary folder, one at a time."""

    def __init__(self, options, config: Config, folder: Path, examples: list[Example]):
        self.options, self.folder, self.made = options, folder, 0
        self.config = replace(config, model=str(folder / "model"))
        self.pages = 2 * adapter_weights(PUBLISHED[options.model], options.rank) / 2**30
        write_examples(folder / "examples.json", examples)
        self.trainers: Side | None = None

    def start(self, name: str, config: Config) -> Side:
        """A process whose kernels are compiled anew."""
        self.made += 1
        return Side(name, "bench.epoch_sides", name, json.dumps(asdict(config)),
                    str(self.folder / "examples.json"),
                    TRITON_CACHE_DIR=str(self.folder / f"triton-{self.made}"))

    def cap(self, side: Side) -> float:
        """GiB for torch: --cap less CUDA's context and the optimizer's pages."""
        return self.options.cap and self.options.cap - side.context_gib - self.pages

    def ours(self) -> dict:
        """A run of one epoch and a run of --epochs, each in a new process."""
        whole, steady = (self.run_ours(epochs) for epochs in (1.0, self.options.epochs))
        if "seconds" not in whole or "seconds" not in steady:
            return {"fits": False}
        return steady | {
            "fits": True, "whole_s": item_seconds(whole), "whole_seconds": whole["seconds"],
            "steady_s": item_seconds(steady, after=len(steady["seconds"]) - steady["steps"]),
            "allocated_gib": max(run["allocated_gib"] for run in (whole, steady)),
            "reserved_gib": max(run["reserved_gib"] for run in (whole, steady))}

    def run_ours(self, epochs: float) -> dict:
        run = self.folder / f"run-{self.made + 1}"
        side = self.start("ours", replace(self.config, out=str(run), epochs=epochs))
        found = side.run(cap_gib=self.cap(side), memory_gib=self.options.cap)
        side.close()
        return found

    def trainer(self, micro_batch: int) -> dict:
        """An epoch of the Trainer; one row at a time under the cap, if that is enough."""
        self.trainers = self.trainers or self.start("trainer", self.config)
        cap = self.cap(self.trainers) if micro_batch == 1 else 0
        found = self.trainers.run(cap_gib=cap, micro_batch=micro_batch)
        if cap and "out_of_memory" in found:
            found, cap = self.trainers.run(cap_gib=0, micro_batch=micro_batch), 0
        if "seconds" not in found:
            return {"fits": False}
        return found | {
            "fits": bool(cap) or not self.options.cap, "whole_s": item_seconds(found),
            "steady_s": item_seconds(found, after=len(found["seconds"]) // WARM)}

    def close(self) -> None:
        if self.trainers:
            self.trainers.close()


def item_seconds(run: dict, after: int = 0) -> float:
    """Mean seconds an example over the steps after the first `after`."""
    return sum(run["seconds"][after:]) / sum(run["step_examples"][after:])


def take_turns(turns, trainers: list[int], pairs: int) -> dict[str, list[dict]]:
    """Runs of each side, ours before each of the Trainer's; ours alone where there is none."""
    runs: dict[str, list[dict]] = {}
    for _ in range(pairs):
        for micro_batch in trainers or [None]:
            runs.setdefault("ours", []).append(turns.ours())
            say("ours", runs["ours"][-1])
            if micro_batch:
                name = f"trainer {micro_batch}"
                runs.setdefault(name, []).append(turns.trainer(micro_batch))
                say(name, runs[name][-1])
    return runs


def say(name: str, run: dict) -> None:
    out.print(f"{name}: " + (f"{run['steady_s']:.4g} s an example, whole {run['whole_s']:.4g}"
                             if "steady_s" in run else "out of memory"))


EACH_STEP = ("seconds", "whole_seconds", "step_examples")  # of a run, not of a row


def summary(runs: dict[str, list[dict]]) -> list[dict]:
    """A row for each side: medians of its runs' seconds, the most memory, and how many times less
    time it took than the Trainer with one row at a time."""
    rows = []
    for name, those in runs.items():
        row = {"who": name.split()[0], "micro_batch": int(name.partition(" ")[2] or 1)}
        done = [run for run in those if "steady_s" in run]
        if done:
            row |= {k: v for k, v in done[-1].items() if k not in EACH_STEP}
            row |= {key: statistics.median(run[key] for run in done)
                    for key in ("whole_s", "steady_s")}
            row |= {key: max(run[key] for run in done)
                    for key in ("allocated_gib", "reserved_gib")}
        row["fits"] = all(run["fits"] for run in those)
        rows.append(row | {"runs": those})
    base = next((row.get("steady_s") for row in rows
                 if (row["who"], row["micro_batch"]) == ("trainer", 1)), None)
    for row in rows:
        if base and "steady_s" in row:
            row["times_faster"] = base / row["steady_s"]
    return rows


def measure(options, config: Config, examples: list[Example]) -> None:
    card = this_card()
    if options.model not in PUBLISHED:
        raise Refusal(f"--model {options.model}: measured is 7b5 or 4b, with random weights")
    if card.device == "cpu":
        raise Refusal("epoch.py: the Trainer's paged optimizer needs a GPU, here is none; "
                      "--card simulates")
    if not 0 <= options.cap <= card.memory_gib:
        raise Refusal(f"--cap {options.cap:g}: {card.name} has {card.memory_gib:.1f} GiB")
    with tempfile.TemporaryDirectory() as temporary:
        turns = Turns(options, config, Path(temporary), examples)
        out.print(f"writing random weights of {options.model}")
        write_random_checkpoint(Path(turns.config.model), PUBLISHED[options.model])
        torch.cuda.empty_cache()
        rows = summary(take_turns(turns, options.trainers, options.pairs))
        turns.close()
    rows = [described(options, config) | row if row["who"] == "ours" else row for row in rows]
    out.print(table(rows, f"measured on {card.name}: {options.model}, {options.dtype}, rank "
                          f"{options.rank}", options.cap))
    if options.save:
        file = results.save("epoch", card, options, DTYPES[options.dtype], rows, data=options.data,
                            cap_gib=options.cap or None, epochs=options.epochs,
                            pairs=options.pairs)
        out.print(f"saved {file}")


# -- shown


def who(row: dict) -> str:
    """
    >>> who({"who": "ours", "packing": False}), who({"who": "trainer", "micro_batch": 8})
    ('this loop, not packed', 'Trainer, 8 at once')
    """
    if row["who"] == "trainer":
        return f"Trainer, {row['micro_batch']} at once"
    return "this loop" + ("" if row["packing"] else ", not packed") + (
        f", {row['batch_tokens']:,} tokens a step" if row.get("batch_tokens") else "")


def seconds_of(value) -> str:
    """A measured time to three digits, a simulated one as a range."""
    return items.span(value) if isinstance(value, list) else f"{value:.3g}"


def table(rows: list[dict], title: str, cap: float = 0):
    made = report.table(title, ["", "rows", "examples", "fill", "steady", "whole", "GiB", "times"],
                        caption="rows: through the model in an epoch; examples: in a row; fill: "
                        "what is not padding; seconds an example, GiB allocated; times: faster "
                        "than the Trainer with 1 at once"
                        + (f". *: not under {cap:g} GiB" if cap else ""))
    for row in rows:
        name = who(row) + ("" if row["fits"] else "*")
        if "steady_s" not in row:
            made.add_row(name, *["-"] * 3, "out of", "memory")
            continue
        made.add_row(name, f"{row['rows']:,}", f"{row['examples_a_row']:.2f}", f"{row['fill']:.0%}",
                     seconds_of(row["steady_s"]),
                     seconds_of(row["whole_s"]) if "whole_s" in row else "",
                     f"{row['allocated_gib']:.2f}",
                     f"{row['times_faster']:.2f}" if "times_faster" in row else "")
    return made


def parse(arguments):
    parser = Parser(description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="7b5", help="7b5 or 4b: that shape, random weights; "
                        "simulated also nano, a folder or a hub id")
    parser.add_argument("--card", metavar="NAME,…", help="simulate it (default without a GPU: "
                        "t4,v100; with one: measure)")
    parser.add_argument("--data", help="a file of rows (default: random ids, lengths.json)")
    parser.add_argument("--tokenizer", help="that of --data's rows (default the model's; for 7b5 "
                        "and 4b nano's)")
    parser.add_argument("--max-len", "--max_len", type=count, default=1024)
    parser.add_argument("--dtype", default="fp16", choices=("fp16", "bf16"))
    parser.add_argument("--rank", type=count, default=16)
    parser.add_argument("--packing", action=argparse.BooleanOptionalAction, default=True,
                        help="the examples of a step of ours share rows")
    parser.add_argument("--batch-tokens", "--batch_tokens", type=count, metavar="N",
                        help="a step of ours: at most so many tokens, in place of 8 examples")
    parser.add_argument("--recompute", default="auto", metavar="auto,all,none,N", help="of ours")
    parser.add_argument("--loss-mib", "--loss_mib", type=count, default=Config.loss_mib)
    parser.add_argument("--epochs", type=float, default=4, help="of the run whose last one is "
                        "steady (default 4)")
    parser.add_argument("--trainer", default="1,8,16", metavar="N,…",
                        help="rows at once of the Trainer; none: ours alone (default 1,8,16)")
    parser.add_argument("--pairs", type=count, default=1, help="turns of each")
    parser.add_argument("--cap", type=float, default=14.56, metavar="GIB",
                        help="the card's usable memory; 0: all there is (default 14.56, a T4)")
    parser.add_argument("--save", action="store_true", help="write a JSON to bench/results")
    options = parser.parse_args(arguments)
    options.trainers = ([] if options.trainer == "none"
                        else whole_numbers(options.trainer, "--trainer"))
    if not options.card and not torch.cuda.is_available():
        options.card = "t4,v100"
    known_cards(options)
    # for the result's name, and what the other benches can choose
    options.attention, options.optimizer = "auto", Config.optimizer
    options.label = "-".join([*([] if options.packing else ["no-packing"]), *(
        [f"batch-tokens-{options.batch_tokens}"] if options.batch_tokens else [])]) or None
    return options


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    config = config_of(options)
    examples = examples_of(options, config)
    (simulate if options.card else measure)(options, config, examples)


if __name__ == "__main__":
    main()
