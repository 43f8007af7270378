"""What the benches share: a setting becomes the very step that train.py takes; results as JSON."""

import gc
import json
import subprocess
import sys
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
from rich import box
from rich.table import Table

from bench.command_line import ATTENTION, Setting
from bench.meter import device_gib
from bench.random_base import random_base
from phogpt_raw.cards import Card, dtype_name, this_card, training_dtype
from phogpt_raw.config import Config
from phogpt_raw.data.batches import Window, make_window
from phogpt_raw.data.prompt import Example
from phogpt_raw.model.adapters import Adapters, new_adapters
from phogpt_raw.model.phogpt import PUBLISHED, PhoGPT
from phogpt_raw.model.weights import find_folder, read_model
from phogpt_raw.refusal import Refusal
from phogpt_raw.training.graphs import Captured, why_not
from phogpt_raw.training.loss import chunk_rows
from phogpt_raw.training.optim import make_optimizer
from phogpt_raw.training.step import (
    StepStats,
    make_micro_step,
    make_scaler,
    train_step,
    unmarked,
)

RESULTS = Path(__file__).parent / "results"


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
            return random_base(PUBLISHED[model], self.dtype, self.card.device)
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
