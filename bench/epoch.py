"""Bench of an epoch of short rows: seconds per example of train.py's loop and of the Trainer.

    python bench/epoch.py --model 7b5 --save          measures on a GPU
    python bench/epoch.py --card t4,v100 --model 7b5  simulates on any computer
    python bench/epoch.py --data rows.jsonl           uses your rows

The rows have random token ids and the lengths of 256 real pairs (lengths.json). The loss is on the
answers. "Ours" is train.py with the values of the preset t4: 8 examples a step, packed, as CUDA
graphs. Ours may use --cap GiB of GPU memory. The Trainer is transformers' own, with the settings
that users usually choose: PEFT, bitsandbytes, gradient checkpointing and padding. If the Trainer
trains 1 row at a time, with 8 micro-batches a step, it may use --cap GiB too. If the Trainer trains
several rows at once, grouped by length, its memory is not limited.

`whole` is the time per example of a run of one epoch. Each of our runs is a new process, so its
time includes compiling, capturing CUDA graphs and warm-up. It does not include loading the weights
and choosing the lengths of rows. The Trainer's runs share one process. `steady` is a time per
example without warm-up. For ours, `steady` is measured in the last epoch of another run, of
--epochs epochs. For the Trainer, `steady` is measured in the run of one epoch, without the first
quarter of the steps.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch

from bench import dataset_time, report, results, turns
from bench.command_line import MOST_GIB, as_in_train, known_cards, several, within
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


def random_examples(vocabulary: int) -> list[Example]:
    """Examples of random token ids, with the lengths of the 256 pairs. Each example ends in </s>.
    """
    made = []
    for n, (prompt, answer) in enumerate(json.loads(LENGTHS.read_text("utf-8"))["lengths"]):
        [ids] = random_rows(vocabulary, 1, prompt + answer - 1, seed=n)
        ids.append(PINNED_IDS["eos"])
        made.append(Example(ids, next_tokens(ids, start=prompt), where=f"pair {n + 1}"))
    return made


def config_of(options) -> Config:
    """The config of a run: the preset t4, overridden by the flags. The run writes no checkpoints
    and evaluates nothing."""
    quiet = {"eval_every": 0, "save_every": 0}
    named = ("model", "data", "dtype", "rank", "packing", "batch_tokens", "recompute", "loss_mib",
             "epochs", "max_len")
    return Config(**{**read_preset("t4"), **quiet, **{n: getattr(options, n) for n in named}})


def examples_of(options, config: Config) -> list[Example]:
    """The examples of --data. Without --data, the examples are random.

    Raises Refusal if a token id is unknown to the model, or if an example is too long for a step.
    """
    vocabulary = shape_of(options.model).vocab_size
    if not options.data:
        examples = random_examples(vocabulary)
    else:
        examples, named = dataset_time.read_file(options, config)
        largest = max(max(e.ids) for e in examples)
        if largest >= vocabulary:
            raise Refusal(f"--tokenizer {named}: gives token {largest}, but {options.model} has "
                          f"only {vocabulary:,} tokens; name the tokenizer of that model")
    stream_of(examples, config)
    return examples


def simulate(options, config: Config, examples: list[Example]) -> None:
    for card, rates, traces in cards(options):
        epoch = plan(examples, config, card, traces.shape.n_layers, traces)
        simulation = Simulation(traces, epoch, card, rates)
        windows = epoch.some(dataset_time.SIMULATED)
        taken = [simulation.seconds(window) for window in windows]
        seen = sum(len(window.examples) for window in windows)
        row = {"who": "ours", **described(options, config), "micro_batch": config.micro_batch,
               **layout(epoch.windows, epoch.micro_batch),
               "steady_s": [sum(ends) / seen for ends in zip(*taken, strict=True)],
               **simulation.memory_row()}
        out.print(report.epoch([row], f"simulated for {card.name}: {options.model}, "
                                      f"{options.dtype}, rank {options.rank}, as CUDA graphs"))
        if options.save:
            file = results.save("epoch", card, options, traces.dtype, [row], source="simulated",
                                data=options.data, sources=rates.source)
            out.print(f"saved {file}")


def described(options, config: Config) -> dict:
    return {"packing": config.packing, "batch_size": config.batch_size,
            "batch_tokens": config.batch_tokens, "rank": options.rank}


def measure(options, config: Config, examples: list[Example]) -> None:
    card = this_card()
    if options.model not in PUBLISHED:
        raise Refusal(f"--model {options.model}: only 7b5 and 4b can be measured, with random "
                      f"weights")
    if card.device == "cpu":
        raise Refusal("epoch.py: the Trainer's paged optimizer needs a GPU, and there is none "
                      "here; --card t4 simulates a T4")
    if not 0 <= options.cap <= card.memory_gib:
        raise Refusal(f"--cap {options.cap:g}: {card.name} has {card.memory_gib:.1f} GiB")
    with tempfile.TemporaryDirectory() as temporary:
        runs = turns.Runs(options, config, Path(temporary), examples)
        out.print(f"writing random weights of {options.model}")
        write_random_checkpoint(Path(runs.config.model), PUBLISHED[options.model])
        torch.cuda.empty_cache()
        rows = turns.summary(turns.take(runs, options.trainer, options.pairs))
        runs.close()
    rows = [described(options, config) | row if row["who"] == "ours" else row for row in rows]
    out.print(report.epoch(rows, f"measured on {card.name}: {options.model}, {options.dtype}, "
                                 f"rank {options.rank}", options.cap))
    if options.save:
        file = results.save("epoch", card, options, DTYPES[options.dtype], rows, data=options.data,
                            cap_gib=options.cap or None, epochs=options.epochs,
                            pairs=options.pairs)
        out.print(f"saved {file}")


def trainers(text: str) -> list[int]:
    """The function for argparse's `type` of --trainer. It returns an empty list for `none`."""
    return [] if text == "none" else several(1, 1000)(text)


def parse(arguments):
    parser = Parser(description=__doc__)
    parser.add_argument("--model", default="7b5", metavar="BASE", help="7b5 or 4b: that shape with "
                        "random weights; with --card also nano, a folder, a hub id (default 7b5)")
    parser.add_argument("--card", metavar="NAME,…", help="simulate these GPUs (default t4,v100; on "
                        "a computer with a GPU, its GPU is measured instead)")
    parser.add_argument("--data", metavar="FILE",
                        help="a file of rows (default: random tokens with the lengths of "
                        "lengths.json)")
    parser.add_argument("--tokenizer", metavar="BASE", help="its tokenizer counts the tokens of "
                        "--data (default the model's; for 7b5 and 4b nano's)")
    parser.add_argument("--max-len", type=as_in_train("max_len"), default=1024, metavar="N",
                        help="most tokens in one example (default 1024)")
    parser.add_argument("--dtype", default="fp16", choices=("fp16", "bf16"),
                        help="data type of activations (default fp16)")
    parser.add_argument("--rank", type=as_in_train("rank"), default=16, metavar="N",
                        help="LoRA rank (default 16)")
    parser.add_argument("--packing", action=argparse.BooleanOptionalAction, default=True,
                        help="this loop puts several examples into one row (default on)")
    parser.add_argument("--batch-tokens", type=as_in_train("batch_tokens"), metavar="N",
                        help="most tokens in one step of this loop (default: 8 examples)")
    parser.add_argument("--recompute", default="auto", metavar="auto,all,none,N",
                        help="blocks that this loop recomputes (default auto)")
    parser.add_argument("--loss-mib", type=as_in_train("loss_mib"), default=Config.loss_mib,
                        metavar="N", help="most MiB for one chunk of logits (default "
                        f"{Config.loss_mib})")
    parser.add_argument("--epochs", type=within(0.001, 1_000_000, float), default=4, metavar="X",
                        help="epochs of the run whose last epoch is the steady one (default 4)")
    parser.add_argument("--trainer", type=trainers, default=[1, 8, 16], metavar="N,…",
                        help="rows in a micro-batch of the Trainer; none: measure this loop only "
                        "(default 1,8,16)")
    parser.add_argument("--pairs", type=within(1, 1000), default=1, metavar="N",
                        help="number of times that both are measured, in turns (default 1)")
    parser.add_argument("--cap", type=within(0, MOST_GIB, float), default=14.56, metavar="GIB",
                        help="the most memory to use; 0: all (default 14.56, as on a T4)")
    parser.add_argument("--save", action="store_true", help="write the result to bench/results")
    options = parser.parse_args(arguments)
    if not options.card and not torch.cuda.is_available():
        options.card = "t4,v100"
    known_cards(options)
    # results.save reads these options; this bench has no flags for them
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
