"""The command-line flags of memory.py and step_time.py: a model, a grid of settings, the GPUs."""

import argparse
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from phogpt_raw.command_line import Parser
from phogpt_raw.config import CHOICES, RANGES, Config
from phogpt_raw.refusal import Refusal
from phogpt_raw.simulate.rates import KNOWN, Known, known

ATTENTION = {"auto": nullcontext,
             "efficient": partial(sdpa_kernel, SDPBackend.EFFICIENT_ATTENTION)}
MOST_TOKENS = 262_144  # largest number of tokens in one simulated or measured step
MOST_GIB = 10_000  # largest GPU memory that --cap accepts
MOST_STEPS = 100_000  # largest number of measured steps


@dataclass(frozen=True)
class Setting:
    """The size of a step, which becomes one row of a table of results.

    The step has `accumulate` micro-batches. A micro-batch has `micro_batch` rows of `seq_len`
    tokens.
    recompute: the value of the flag --recompute, as text.
    """

    seq_len: int
    micro_batch: int
    accumulate: int
    recompute: str

    @property
    def tokens(self) -> int:
        return self.seq_len * self.micro_batch * self.accumulate


def parser(description: str) -> Parser:
    built = Parser(description=description)
    built.add_argument("--card", metavar="NAME,…", help=f"simulate these GPUs: {', '.join(KNOWN)} "
                       "(default t4,v100; on a computer with a GPU, its GPU is measured instead)")
    built.add_argument("--measured", action=argparse.BooleanOptionalAction, default=None,
                       help="measure on this computer (default if it has a GPU)")
    built.add_argument("--model", metavar="BASE", help="7b5 or 4b: that shape with random weights; "
                       "or nano, a folder, a hub id (default 7b5; measured on a CPU: nano)")
    built.add_argument("--seq-len", type=several(2, MOST_TOKENS), metavar="N,N,…",
                       help="tokens in a row; one result for each length")
    built.add_argument("--micro-batch", type=several(*RANGES["micro_batch"]), default=[1],
                       metavar="N,N,…",
                       help="rows that go through the model at once (default 1)")
    built.add_argument("--accumulate", type=within(1, 64), default=1, metavar="N",
                       help="micro-batches in one step (default 1)")
    built.add_argument("--documents", type=within(1, 10_000), default=1, metavar="N",
                       help="examples of equal length that are packed into each row (default 1)")
    built.add_argument("--recompute", default="auto", metavar="auto,all,none,N,…",
                       help="blocks to recompute; auto: as few as memory allows (default auto)")
    built.add_argument("--rank", type=as_in_train("rank"), default=16, metavar="N",
                       help="LoRA rank (default 16)")
    built.add_argument("--dtype", default="auto", choices=CHOICES["dtype"],
                       help="data type of activations (default auto: by GPU)")
    built.add_argument("--loss-mib", type=as_in_train("loss_mib"), default=Config.loss_mib,
                       metavar="N", help="most MiB for one chunk of logits (default "
                       f"{Config.loss_mib})")
    built.add_argument("--optimizer", default=Config.optimizer, choices=CHOICES["optimizer"],
                       help=f"default {Config.optimizer}")
    built.add_argument("--attention", default="auto", choices=ATTENTION,
                       help="efficient: only the memory-efficient kernel, as on a T4 and a V100 "
                       "(default auto: what torch chooses)")
    built.add_argument("--cap", type=within(0, MOST_GIB, float), default=0, metavar="GIB",
                       help="with --measured: the most memory to use, such as 14.56 for a T4")
    built.add_argument("--capture", action=argparse.BooleanOptionalAction, default=True,
                       help="run as CUDA graphs on a GPU (default on)")
    built.add_argument("--save", action="store_true", help="write the result to bench/results")
    built.add_argument("--label", metavar="TEXT", help="with --save: a part of the file's name")
    return built


def parse(built: Parser, arguments) -> argparse.Namespace:
    """The parsed options. Defaults that depend on this machine are filled in."""
    options = built.parse_args(arguments)
    gpu = torch.cuda.is_available()
    if options.measured is None:
        options.measured = gpu and not options.card
    if options.measured and options.card:
        raise Refusal("--card simulates, --measured measures this computer; give one of them")
    if options.cap and not options.measured:
        raise Refusal(f"--cap {options.cap:g} is for measuring on a GPU (--measured); a simulated "
                      f"card always has its own memory")
    if not (options.measured or options.card):
        options.card = "t4,v100"
    known_cards(options)  # reports an unknown name before the first simulation
    options.settings = settings(options)
    options.model = options.model or ("nano" if options.measured and not gpu else "7b5")
    return options


def known_cards(options) -> list[Known]:
    """The GPUs that --card names; an empty list without --card."""
    return [known(name.strip()) for name in options.card.split(",")] if options.card else []


def within(low: float, high: float, kind: type = int) -> Callable[[str], float]:
    """A function for argparse's `type`: it reads a number of type `kind` from low to high.

    >>> within(1, 8)("3"), within(0, 1, float)("0.5")
    (3, 0.5)
    """
    def number(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:  # also true for nan
            raise argparse.ArgumentTypeError(
                f"{text!r}: must be a {'whole ' if kind is int else ''}number from {low:,} to "
                f"{high:,}")
        return value

    return number


def as_in_train(field: str) -> Callable[[str], float]:
    """A function for argparse's `type`: it reads a number in the range that train.py allows for
    this field."""
    return within(*RANGES[field])


def several(low: int, high: int) -> Callable[[str], list[int]]:
    """A function for argparse's `type`: it reads whole numbers with commas between them.

    >>> several(1, 8)("1, 4")
    [1, 4]
    """
    one = within(low, high)
    return lambda text: [one(part.strip()) for part in text.split(",")]


def settings(options) -> list[Setting]:
    """All combinations of the values of --seq-len, --micro-batch and --recompute.

    The default rows are longest if a GPU is simulated, shorter if a GPU is measured, and shortest
    if a CPU is measured. Raises Refusal for settings that are not possible.
    """
    if not options.measured:
        default = [256, 512, 1024, 2048, 4096, 8192, 16384]
    else:
        default = [256, 512, 1024, 2048] if torch.cuda.is_available() else [64, 128, 256]
    grid = [
        Setting(length, micro_batch, options.accumulate, recompute.strip())
        for length in options.seq_len or default
        for micro_batch in options.micro_batch
        for recompute in options.recompute.split(",")
    ]
    for setting in grid:
        Config(recompute=setting.recompute)  # raises Refusal for an invalid value
    shortest, largest = min(s.seq_len for s in grid), max(s.tokens for s in grid)
    if shortest // options.documents < 2:
        raise Refusal(f"--documents {options.documents}: each has at least 2 tokens, but a row of "
                      f"--seq-len has {shortest}")
    if largest > MOST_TOKENS:
        raise Refusal(f"--seq-len, --micro-batch and --accumulate: {largest:,} tokens in one step; "
                      f"at most {MOST_TOKENS:,} are allowed")
    return grid
