"""For the benches: measure train.py's own step over random tokens on this machine.

A setting that does not fit in memory is a result too.
"""

import gc
import statistics
from dataclasses import dataclass

import torch

from bench.command_line import ATTENTION, Setting
from bench.gpu_kernels import kernels
from bench.meter import MemoryMeter, Stopwatch, device_gib
from bench.random_data import random_base, random_rows, window_of
from phogpt_raw.cards import this_card, training_dtype
from phogpt_raw.config import Config
from phogpt_raw.data.batches import Window
from phogpt_raw.model.adapters import new_adapters
from phogpt_raw.model.phogpt import PUBLISHED, PhoGPT
from phogpt_raw.model.weights import find_folder, read_model
from phogpt_raw.private_apis import free_matmul_workspaces
from phogpt_raw.refusal import Refusal
from phogpt_raw.training.graphs import why_not
from phogpt_raw.training.optim import paged_bytes
from phogpt_raw.training.setup import forward_of, wire
from phogpt_raw.training.step import StepStats, train_step, unmarked

LR = 1e-4


class Bench:
    """A model with adapters, and train_step over random tokens that all carry loss."""

    def __init__(self, options):
        self.options, self.card = options, this_card()
        self.dtype, _ = training_dtype(self.card, options.dtype)
        self.model = self.load(options.model)
        self.adapters = new_adapters(self.model, rank=options.rank, alpha=32)
        # before the optimizer, whose pages are counted separately
        self.context_gib = context_gib() if self.card.device == "cuda" else 0.0
        self.restart()
        self.cap_for_torch = self.cap()

    def load(self, model: str) -> PhoGPT:
        if model in PUBLISHED:
            return random_base(PUBLISHED[model], self.dtype, self.card.device)
        return read_model(find_folder(model), nf4=True, dtype=self.dtype,
                          device=torch.device(self.card.device))

    def restart(self) -> None:
        """A new optimizer and loss scale over the current adapters."""
        self.training = wire(self.model, self.adapters, optimizer=self.options.optimizer, lr=LR,
                             loss_mib=self.options.loss_mib)

    def window(self, setting: Setting) -> Window:
        rows = setting.micro_batch * setting.accumulate
        return window_of(random_rows(self.model.config.vocab_size, rows, setting.seq_len),
                         self.options.documents)

    def described(self) -> dict:
        """What a result says in addition to its rows: attention kernel, cap, GiB left for torch."""
        several = {"documents": self.options.documents} if self.options.documents > 1 else {}
        return {"attention": self.options.attention, **several, "loss_mib": self.options.loss_mib,
                "cap_gib": self.options.cap or None, "cap_for_torch_gib": self.cap_for_torch}

    def cap(self) -> float | None:
        """Limit torch to --cap less CUDA's context and the optimizer's pages, which torch does not
        count; returns the remaining GiB."""
        if not self.options.cap or self.card.device == "cpu":
            return None
        pages = paged_bytes(self.training.optimizer) / 2**30
        left = self.options.cap - self.context_gib - pages
        if not 0 < self.options.cap <= self.card.memory_gib or left <= 0:
            raise Refusal(f"--cap {self.options.cap:g}: {self.card.name} has "
                          f"{self.card.memory_gib:.1f} GiB, of which CUDA and the optimizer's "
                          f"pages take {self.options.cap - left:.2f}; give a value between them")
        limit_torch_to(left)
        return left

    def begin(self, setting: Setting, *, capture: bool) -> None:
        """Set micro-batch and recompute; eager, or as graphs from the second step on."""
        limits, depth = self.training.limits, Config(recompute=setting.recompute)
        limits.micro_batch = setting.micro_batch
        limits.recompute = depth.blocks_to_recompute(self.model.config.n_layers)
        limits.graphs = why_not(self.model, self.card.device, capture) is None
        self.training.forward = forward_of(self.model, self.adapters, limits)

    def run(self, window: Window, mark=unmarked) -> StepStats:
        """One optimizer step; raises torch.OutOfMemoryError where memory is too small."""
        return train_step(self.training, window, mark)

    def rows(self, settings: list[Setting], measure):
        """Yields (setting, measure(bench, setting, window)) for each; the second is None if out of
        memory."""
        for setting in settings:
            yield setting, self.attempt(measure, setting, self.window(setting))

    def attempt(self, measure, setting: Setting, window: Window):
        """measure(bench, setting, window), or None if it runs out of memory. Frees what it used on
        the GPU."""
        self.model.train()
        try:
            with ATTENTION[self.options.attention]():
                result = measure(self, setting, window)
        except torch.OutOfMemoryError:
            result = None
        if self.card.device == "cuda":
            self.release()
            gc.collect()
            self.adapters.flat.grad.zero_()
            torch.cuda.empty_cache()
        return result

    def release(self) -> None:
        """Free the graphs and cuBLAS's workspaces; each stream has one, and graphs have their own
        stream."""
        self.training.forward = self.model
        free_matmul_workspaces()

    @property
    def captured(self) -> bool:
        """Whether the steps run as graphs: requested, possible, and every shape captured."""
        graphs = getattr(self.training.forward, "graphs", {})
        return bool(graphs) and all(graphs.values())


def context_gib() -> float:
    """GPU memory in use outside torch's allocator: CUDA's context, other processes."""
    return device_gib() - torch.cuda.memory_reserved() / 2**30


def limit_torch_to(gib: float) -> None:
    """Limit torch's allocator to `gib` GiB; 0: no limit."""
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(gib * 2**30 / total if gib else 1.0)


# -- memory


@dataclass(frozen=True)
class Peaks:
    """Peak GiB of an eager step by phase and kind; its loss; what its graphs reserve (None where it
    does not run as graphs)."""

    by_phase: dict[str, dict[str, float]]
    loss: float
    graphs: dict[str, float] | None


def peaks(bench: Bench, setting: Setting, window: Window) -> Peaks:
    """Measure the second eager step: in the first, libraries allocate what they keep."""
    bench.begin(setting, capture=False)
    bench.run(window)
    meter = MemoryMeter()
    loss = float(bench.run(window, mark=meter).loss)
    return Peaks(meter.read(), loss, graph_memory(bench, setting, window))


def graph_memory(bench: Bench, setting: Setting, window: Window) -> dict[str, float] | None:
    """GiB reserved once the step runs as graphs, and the peak before that (the first step is
    eager); None where it does not run as graphs, or does not fit."""
    bench.begin(setting, capture=bench.options.capture)
    if bench.training.forward is bench.model:
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        for _ in range(3):
            bench.run(window)
    except torch.OutOfMemoryError:
        return None
    if not bench.captured:
        return None
    return {"graphs_reserved_gib": torch.cuda.memory_reserved() / 2**30,
            "graphs_reserved_peak_gib": torch.cuda.max_memory_reserved() / 2**30}


# -- time


@dataclass(frozen=True)
class Times:
    """Seconds by phase of each timed step; whether it ran as graphs; its matmul FLOPs; seconds and
    number of kernels in one further step."""

    phases: list[dict[str, float]]
    captured: bool
    flops: float
    kernels_s: dict[str, float]
    kernels: int


def times(bench: Bench, setting: Setting, window: Window) -> Times:
    phases = phase_times(bench, setting, window)
    on_gpu = kernels(bench, window) if bench.card.device == "cuda" else ({}, 0)
    return Times(phases, bench.captured, flops(bench, setting, window), *on_gpu)


def phase_times(bench: Bench, setting: Setting, window: Window) -> list[dict[str, float]]:
    """Seconds by phase of each of --steps steps, after --warmup untimed ones."""
    bench.begin(setting, capture=bench.options.capture)
    for _ in range(bench.options.warmup):
        bench.run(window)
    watch, taken = Stopwatch(), []
    for _ in range(bench.options.steps):
        bench.run(window, mark=watch)
        taken.append(watch.read())
    return taken


def step_times(phases: list[dict[str, float]]) -> list[float]:
    """Seconds of each step."""
    return [sum(seconds.values()) for seconds in phases]


def median_step(bench: Bench, setting: Setting, window: Window) -> float | None:
    """Median seconds of a step over `window`; None where it does not fit in memory."""
    phases = bench.attempt(phase_times, setting, window)
    return phases and statistics.median(step_times(phases))


def flops(bench: Bench, setting: Setting, window: Window) -> float:
    """Matmul FLOPs of a step: 4 for each weight of the blocks and token (6 where recomputed, for
    the second forward), 4 for each weight of the head and supervised row. Frozen weights have no
    gradient."""
    config = bench.model.config
    block = (4 + 2 * config.expansion_ratio) * config.d_model**2
    recomputed = bench.training.limits.recompute / config.n_layers
    tokens = setting.tokens * config.n_layers * block * (4 + 2 * recomputed)
    return tokens + 4 * window.supervised * config.vocab_size * config.d_model
