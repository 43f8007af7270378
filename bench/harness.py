"""What the benches share: a setting becomes the very step that train.py takes; results as JSON."""

import argparse
import gc
import json
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from rich import box
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel

from phogpt_raw.cards import KNOWN, Card, dtype_name, known_card, this_card, training_dtype
from phogpt_raw.config import CHOICES, Config, Parser
from phogpt_raw.data.batches import Window, make_window
from phogpt_raw.data.prompt import Example
from phogpt_raw.meter import device_gib
from phogpt_raw.model.adapters import Adapters, new_adapters
from phogpt_raw.model.phogpt import PUBLISHED, PhoGPT
from phogpt_raw.model.weights import find_folder, frozen, place, read_model
from phogpt_raw.refusal import Refusal
from phogpt_raw.training.capture import Captured, why_not
from phogpt_raw.training.loss import chunk_rows
from phogpt_raw.training.optim import make_optimizer
from phogpt_raw.training.step import (
    StepStats,
    make_micro_step,
    make_scaler,
    train_step,
    unmarked,
)

ATTENTION = {"auto": nullcontext,
             "efficient": partial(sdpa_kernel, SDPBackend.EFFICIENT_ATTENTION)}
RESULTS = Path(__file__).parent / "results"


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


class Bench:
    """A model with adapters, and train_step over random tokens that all carry loss."""

    def __init__(self, options):
        self.card = this_card()
        self.dtype, _ = training_dtype(self.card, options.dtype)
        self.options = options
        self.model = self.load(options.model)
        self.adapters: Adapters = new_adapters(self.model, rank=options.rank, alpha=32)
        self.optimizer = make_optimizer(self.adapters.flat, options.optimizer, 1e-4, 0.0)
        self.scaler = make_scaler(self.dtype, self.card.device)
        self.chunk = chunk_rows(self.model.config.vocab_size, options.loss_mib)
        self.cap_for_torch = self.cap()

    def load(self, model: str) -> PhoGPT:
        if model in PUBLISHED:
            return random_base(model, self.dtype, self.card.device)
        return read_model(find_folder(model), nf4=True, dtype=self.dtype,
                          device=torch.device(self.card.device))

    def window(self, setting: Setting) -> Window:
        rows = tokens(self.model.config.vocab_size, setting.micro_batch * setting.accumulate,
                      setting.seq_len)
        return window(rows, setting.micro_batch)

    def told(self) -> dict:
        """What a result says beside its rows: the kernel asked for, the cap and what it leaves."""
        return {"attention": self.options.attention, "loss_mib": self.options.loss_mib,
                "cap_gib": self.options.cap or None, "cap_for_torch_gib": self.cap_for_torch}

    def cap(self) -> float | None:
        """Hold torch to --cap less CUDA's context and the optimizer's pages, which it does not see;
        the GiB left."""
        if not self.options.cap or self.card.device == "cpu":
            return None
        paged = self.options.optimizer.startswith("paged")
        pages = 2 * self.adapters.flat.numel() / 2**30 if paged else 0.0
        left = self.options.cap - context_gib() - pages
        if not 0 < self.options.cap <= self.card.memory_gib or left <= 0:
            raise Refusal(f"--cap {self.options.cap:g}: {self.card.name} has "
                          f"{self.card.memory_gib:.1f} GiB, and CUDA and the pages take "
                          f"{self.options.cap - left:.2f}")
        hold_to(left)
        return left

    def begin(self, setting: Setting, *, capture: bool) -> None:
        """Recompute as the setting says; eager, or captured from the second step on."""
        self.model.recompute = Config(recompute=setting.recompute).blocks_to_recompute(
            self.model.config.n_layers)
        uncaptured = why_not(self.model, self.card.device, capture)
        self.forward = self.model if uncaptured else Captured(self.model, self.adapters.flat)

    def run(self, window: Window, mark=unmarked) -> StepStats:
        """One optimizer step; raises torch.OutOfMemoryError where the card is too small."""
        micro_step = make_micro_step(self.forward, self.scaler, self.chunk, mark)
        return train_step(window, micro_step, self.adapters.flat, self.optimizer, self.scaler, 1.0,
                          mark)

    def rows(self, settings: list[Setting], measure):
        """(setting, what measure(bench, setting, window) gives, None: out of memory) of each."""
        for setting in settings:
            yield setting, self.attempt(measure, setting, self.window(setting))

    def attempt(self, measure, setting: Setting, window: Window):
        """What measure(bench, setting, window) gives; None where the card is too small for it.
        Nothing of it stays on the card."""
        self.model.train()
        try:
            with ATTENTION[self.options.attention]():
                result = measure(self, setting, window)
        except torch.OutOfMemoryError:
            result = None
        if self.card.device == "cuda":
            self.forward = None
            gc.collect()
            self.adapters.flat.grad.zero_()
            torch._C._cuda_clearCublasWorkspaces()  # one a stream; graphs have their own
            torch.cuda.empty_cache()
        return result

    @property
    def captured(self) -> bool:
        """Whether the steps run as graphs: asked for, possible, and there was room for them."""
        graphs = getattr(self.forward, "graphs", {})
        return bool(graphs) and all(graphs.values())


def context_gib() -> float:
    """What is taken of the card beside torch's allocator: CUDA's context, other processes."""
    return device_gib() - torch.cuda.memory_reserved() / 2**30


def hold_to(gib: float) -> None:
    """Let torch's allocator have so much and no more; 0: all there is."""
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(gib * 2**30 / total if gib else 1.0)


def tokens(vocabulary: int, rows: int, length: int, seed: int = 0) -> list[list[int]]:
    """Random token ids, past the special ones."""
    dice = torch.Generator().manual_seed(seed)
    return torch.randint(4, vocabulary, (rows, length), generator=dice).tolist()


def window(rows: list[list[int]], micro_batch: int) -> Window:
    """A window of rows of token ids, all of which but the first carry loss."""
    examples = [Example(ids, len(ids) - 1, False, "random") for ids in rows]
    return make_window(examples, micro_batch, pad_id=3)


def random_base(name: str, dtype: torch.dtype, device: str) -> PhoGPT:
    """A published shape with random NF4 weights: as large and as slow as the real one."""
    with torch.device("meta"):
        phogpt = PhoGPT(PUBLISHED[name])
    for key, p in dict(phogpt.named_parameters()).items():
        weight = torch.randn(p.shape, dtype=torch.bfloat16, device=device) * 0.02
        if "norm" in key and key.endswith("weight"):
            weight.fill_(1)
        place(phogpt, key, weight, nf4=True, dtype=dtype, device=torch.device(device))
    return frozen(phogpt, nf4=True, device=device)


def parser(description: str) -> Parser:
    built = Parser(description=description, allow_abbrev=False,
                   formatter_class=argparse.RawDescriptionHelpFormatter)
    built.add_argument("--card", metavar="NAME,…", help=f"simulate it: {', '.join(KNOWN)} "
                       "(default without a GPU: t4,v100; with one: that one, beside measuring)")
    built.add_argument("--measured", action=argparse.BooleanOptionalAction, default=None,
                       help="measure here; with --cap under another card's memory")
    built.add_argument("--model", help="nano, a folder, a hub id, or 7b5 or 4b: that shape, random "
                       "weights (default 7b5; measured on a CPU: nano)")
    built.add_argument("--seq-len", "--seq_len", default="", metavar="N,N,…")
    built.add_argument("--micro-batch", "--micro_batch", default="1", metavar="N,N,…")
    built.add_argument("--accumulate", type=count, default=1, help="micro-batches a step")
    built.add_argument("--recompute", default="auto", metavar="auto,all,none,N,…",
                       help="blocks; auto: the least that the card forces")
    built.add_argument("--rank", type=count, default=16)
    built.add_argument("--dtype", default="auto", choices=CHOICES["dtype"])
    built.add_argument("--loss-mib", "--loss_mib", type=count, default=Config.loss_mib,
                       help=f"MiB of a chunk of logits (default {Config.loss_mib})")
    built.add_argument("--optimizer", default=Config.optimizer, choices=CHOICES["optimizer"])
    built.add_argument("--attention", default="auto", choices=ATTENTION,
                       help="efficient: the only fused kernel a T4 and a V100 have")
    built.add_argument("--cap", type=float, default=0, metavar="GIB",
                       help="run as on a card with this much usable memory, such as 14.56 (a T4)")
    built.add_argument("--capture", action=argparse.BooleanOptionalAction, default=True,
                       help="as CUDA graphs, on a GPU")
    built.add_argument("--save", action="store_true", help="write a JSON to bench/results")
    built.add_argument("--label", help="for the result's name; what the rows are for")
    return built


def parse(built: Parser, arguments) -> argparse.Namespace:
    """The options, those that depend on this machine made definite."""
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
    for name in options.card.split(",") if options.card else ():
        known_card(name.strip())  # all of them, before the first is simulated
    options.model = options.model or ("nano" if options.measured and not gpu else "7b5")
    return options


def count(text: str) -> int:
    """argparse's type of a number that is at least 1."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def settings(options) -> list[Setting]:
    """The grid of a command line; measured on a CPU short rows by default."""
    if not options.measured:
        default = "256,512,1024,2048,4096,8192,16384"
    else:
        default = "256,512,1024,2048" if torch.cuda.is_available() else "64,128,256"
    return [
        Setting(length, micro_batch, options.accumulate, recompute.strip())
        for length in numbers(options.seq_len or default, "--seq-len")
        for micro_batch in numbers(options.micro_batch, "--micro-batch")
        for recompute in options.recompute.split(",")
    ]


def numbers(text: str, flag: str) -> list[int]:
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        raise Refusal(f"{flag} {text}: whole numbers with commas between them") from None
    if min(values) < 1:
        raise Refusal(f"{flag} {text}: must be at least 1")
    return values


def remark(bench: Bench) -> str:
    """The line above a table: what was measured, on what."""
    line = f"measured on {bench.card.name}, {bench.options.model}, " \
           f"{dtype_name(bench.dtype)}, rank {bench.options.rank}"
    if bench.cap_for_torch:
        line += f"\nunder {bench.options.cap:g} GiB: {bench.cap_for_torch:.2f} for torch, the " \
                "rest for CUDA's context and the optimizer's pages, which torch does not see"
    if bench.card.device == "cpu":
        line += "\nno GPU here: this shows that the bench runs and says nothing about a card"
    return line


def table(title: str, columns: list[str], caption: str | None = None) -> Table:
    """A right-aligned table that fits 80 columns."""
    made = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, show_edge=False,
                 padding=(0, 0), title_justify="left", caption_justify="left")
    for column in columns:
        made.add_column(column, justify="right", no_wrap=True)
    return made


def save(what: str, card: Card, options, dtype: torch.dtype, rows: list[dict],
         source: str = "measured", **more) -> Path:
    """bench/results/<what>-<card>-<model>-<dtype>-<date>.json; `more` beside the rows."""
    parts = [what, *([] if source == "measured" else [source]), card.name.replace(" ", "-"),
             Path(options.model).name, dtype_name(dtype)]
    if options.attention != "auto":
        parts.append(options.attention)
    if options.rank != Config.rank:
        parts.append(f"rank-{options.rank}")
    if options.label:
        parts.append(options.label)
    file = RESULTS / f"{'-'.join(parts)}-{date.today()}.json"
    packages = ("torch", "transformers", "peft", "bitsandbytes")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True,
                            cwd=RESULTS.parent).stdout.strip()
    content = {
        "what": what, "source": source, "card": asdict(card),
        "versions": {name: version(name) for name in packages}, "commit": commit or None,
        "date": str(date.today()), "label": options.label, "command": "python bench/" + " ".join(
            [Path(sys.argv[0]).name, *sys.argv[1:]]),
        "model": options.model, "dtype": dtype_name(dtype), "rank": options.rank,
        "optimizer": options.optimizer, **more,
        "rows": rows,
    }
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content, indent=1) + "\n")
    return file
