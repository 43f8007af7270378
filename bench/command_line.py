"""The command line of memory.py and step_time.py: a model, a grid of settings, the cards."""

import argparse
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from phogpt_raw.command_line import Parser
from phogpt_raw.config import CHOICES, Config
from phogpt_raw.refusal import Refusal
from phogpt_raw.simulate.rates import KNOWN, Known, known

ATTENTION = {"auto": nullcontext,
             "efficient": partial(sdpa_kernel, SDPBackend.EFFICIENT_ATTENTION)}


@dataclass(frozen=True)
class Setting:
    """One row of a table: a step of `accumulate` micro-batches of micro_batch x seq_len tokens."""

    seq_len: int
    micro_batch: int
    accumulate: int
    recompute: str

    @property
    def tokens(self) -> int:
        return self.seq_len * self.micro_batch * self.accumulate


def parser(description: str) -> Parser:
    built = Parser(usage="%(prog)s [options]", description=description)
    built.add_argument("--card", metavar="NAME,…", help=f"simulate these GPUs: {', '.join(KNOWN)} "
                       "(default t4,v100; on a computer with a GPU that one is measured instead)")
    built.add_argument("--measured", action=argparse.BooleanOptionalAction, default=None,
                       help="measure on this computer (default where it has a GPU)")
    built.add_argument("--model", metavar="BASE", help="7b5 or 4b: that shape with random weights; "
                       "or nano, a folder, a hub id (default 7b5; measured on a CPU: nano)")
    built.add_argument("--seq-len", default="", metavar="N,N,…",
                       help="tokens in a row; one result for each length")
    built.add_argument("--micro-batch", default="1", metavar="N,N,…",
                       help="rows that go through the model at once (default 1)")
    built.add_argument("--accumulate", type=count, default=1, metavar="N",
                       help="micro-batches in one step (default 1)")
    built.add_argument("--documents", type=count, default=1, metavar="N",
                       help="examples of equal length that are packed into each row (default 1)")
    built.add_argument("--recompute", default="auto", metavar="auto,all,none,N,…",
                       help="blocks to recompute; auto: as few as memory allows (default auto)")
    built.add_argument("--rank", type=count, default=16, metavar="N", help="LoRA rank (default 16)")
    built.add_argument("--dtype", default="auto", choices=CHOICES["dtype"],
                       help="data type of activations (default auto: by GPU)")
    built.add_argument("--loss-mib", type=count, default=Config.loss_mib, metavar="N",
                       help=f"most MiB for one chunk of logits (default {Config.loss_mib})")
    built.add_argument("--optimizer", default=Config.optimizer, choices=CHOICES["optimizer"],
                       help=f"default {Config.optimizer}")
    built.add_argument("--attention", default="auto", choices=ATTENTION,
                       help="efficient: only the memory-efficient kernel, as on a T4 and a V100 "
                       "(default auto: what torch chooses)")
    built.add_argument("--cap", type=float, default=0, metavar="GIB",
                       help="with --measured: use only so much memory, such as 14.56 for a T4")
    built.add_argument("--capture", action=argparse.BooleanOptionalAction, default=True,
                       help="run as CUDA graphs on a GPU (default on)")
    built.add_argument("--save", action="store_true", help="write the result to bench/results")
    built.add_argument("--label", metavar="TEXT", help="with --save: a part of the file's name")
    return built


def parse(built: Parser, arguments) -> argparse.Namespace:
    """The parsed options, with defaults that depend on this machine filled in."""
    options = built.parse_args(arguments)
    gpu = torch.cuda.is_available()
    if options.measured is None:
        options.measured = gpu and not options.card
    if options.measured and options.card:
        raise Refusal("--card simulates and --measured measures here: give one of them")
    if options.cap and not options.measured:
        raise Refusal(f"--cap {options.cap:g} is for measuring on a GPU (--measured); a simulated "
                      f"card has the memory that it has")
    if not (options.measured or options.card):
        options.card = "t4,v100"
    known_cards(options)  # all of them, before the first is simulated
    options.model = options.model or ("nano" if options.measured and not gpu else "7b5")
    return options


def known_cards(options) -> list[Known]:
    """The cards of --card; empty where it is not given."""
    return [known(name.strip()) for name in options.card.split(",")] if options.card else []


def count(text: str) -> int:
    """argparse's type for an integer of at least 1."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def settings(options) -> list[Setting]:
    """The grid of settings; short rows by default where a CPU is measured."""
    if not options.measured:
        default = "256,512,1024,2048,4096,8192,16384"
    else:
        default = "256,512,1024,2048" if torch.cuda.is_available() else "64,128,256"
    return [
        Setting(length, micro_batch, options.accumulate, recompute.strip())
        for length in whole_numbers(options.seq_len or default, "--seq-len")
        for micro_batch in whole_numbers(options.micro_batch, "--micro-batch")
        for recompute in options.recompute.split(",")
    ]


def whole_numbers(text: str, flag: str) -> list[int]:
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        raise Refusal(f"{flag} {text}: whole numbers with commas between them") from None
    if min(values) < 1:
        raise Refusal(f"{flag} {text}: must be at least 1")
    return values
