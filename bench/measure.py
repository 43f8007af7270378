"""For the benches: measure train.py's own step over random tokens on this machine.

If a setting does not fit in memory, this is reported as a result and not as an error.
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
    """A model with adapters. It runs train_step over windows of random tokens (random_data.py)."""

    def __init__(self, options):
        self.options, self.card = options, this_card()
        self.dtype, _ = training_dtype(self.card, options.dtype)
        self.model = self.load(options.model)
        self.adapters = new_adapters(self.model, rank=options.rank, alpha=32)
        # measured before the optimizer exists: the optimizer's pages are counted separately
        self.context_gib = context_gib() if self.card.device == "cuda" else 0.0
        self.restart()
        self.cap_for_torch = self.cap()

    def load(self, model: str) -> PhoGPT:
        if model in PUBLISHED:
            return random_base(PUBLISHED[model], self.dtype, self.card.device)
        return read_model(find_folder(model), nf4=True, dtype=self.dtype,
                          device=torch.device(self.card.device))

    def restart(self) -> None:
        """Create a new optimizer and a new loss scale. The adapters keep their current values."""
        self.training = wire(self.model, self.adapters, optimizer=self.options.optimizer, lr=LR,
                             loss_mib=self.options.loss_mib)

    def window(self, setting: Setting) -> Window:
        rows = setting.micro_batch * setting.accumulate
        return window_of(random_rows(self.model.config.vocab_size, rows, setting.seq_len),
                         self.options.documents)

    def described(self) -> dict:
        """The fields that a result has in addition to its rows, such as the attention kernel, the
        cap, and the GiB that torch may use."""
        several = {"documents": self.options.documents} if self.options.documents > 1 else {}
        return {"attention": self.options.attention, **several, "loss_mib": self.options.loss_mib,
                "cap_gib": self.options.cap or None, "cap_for_torch_gib": self.cap_for_torch}

    def cap(self) -> float | None:
        """Limit torch's memory so that the whole process uses at most --cap GiB. Returns torch's
        limit in GiB.

        CUDA's context and the optimizer's pages are subtracted from --cap, because torch does not
        count them.
        """
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
        """Prepare steps with the rows of a micro-batch and the recomputed blocks of a setting.

        With capture=False the steps run eagerly. With capture=True they run as CUDA graphs from the
        second step on.
        """
        limits, depth = self.training.limits, Config(recompute=setting.recompute)
        limits.micro_batch = setting.micro_batch
        limits.recompute = depth.blocks_to_recompute(self.model.config.n_layers)
        limits.graphs = why_not(self.model, self.card.device, capture) is None
        self.training.forward = forward_of(self.model, self.adapters, limits)

    def run(self, window: Window, mark=unmarked) -> StepStats:
        """Run one optimizer step. Raises torch.OutOfMemoryError if memory is too small."""
        return train_step(self.training, window, mark)

    def rows(self, settings: list[Setting], measure):
        """Yield (setting, measure(bench, setting, window)) for each setting.

        The second value is None if the measurement ran out of memory.
        """
        for setting in settings:
            yield setting, self.attempt(measure, setting, self.window(setting))

    def attempt(self, measure, setting: Setting, window: Window):
        """The result of measure(bench, setting, window), or None if it runs out of memory.

        Afterwards the GPU memory that the measurement used is free again.
        """
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
        """Free the CUDA graphs and cuBLAS's workspaces. cuBLAS has one workspace for each CUDA
        stream, and the graphs use a stream of their own."""
        self.training.forward = self.model
        free_matmul_workspaces()

    @property
    def captured(self) -> bool:
        """True if the steps run as CUDA graphs and every shape has been captured."""
        graphs = getattr(self.training.forward, "graphs", {})
        return bool(graphs) and all(graphs.values())


def context_gib() -> float:
    """GiB of GPU memory in use outside torch's allocator: CUDA's context and other processes."""
    return device_gib() - torch.cuda.memory_reserved() / 2**30


def limit_torch_to(gib: float) -> None:
    """Limit torch's allocator to `gib` GiB. 0 removes the limit."""
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(gib * 2**30 / total if gib else 1.0)


# -- memory


@dataclass(frozen=True)
class Peaks:
    """The peak memory of a step.

    by_phase: {phase: {kind: GiB}} of the eager step; a kind is allocated, reserved or device. loss:
    the loss of the eager step. graphs: GiB that torch reserves if the step runs as CUDA graphs, or
    None if it does not run as graphs.
    """

    by_phase: dict[str, dict[str, float]]
    loss: float
    graphs: dict[str, float] | None


def peaks(bench: Bench, setting: Setting, window: Window) -> Peaks:
    """Measure the second eager step, because in the first step libraries allocate memory that they
    keep."""
    bench.begin(setting, capture=False)
    bench.run(window)
    meter = MemoryMeter()
    loss = float(bench.run(window, mark=meter).loss)
    return Peaks(meter.read(), loss, graph_memory(bench, setting, window))


def graph_memory(bench: Bench, setting: Setting, window: Window) -> dict[str, float] | None:
    """GiB that torch reserves after three steps with CUDA graphs, and the peak of the reserved GiB
    during these steps.

    The first of the three steps is eager. Returns None if the step does not run as
    graphs, or does not fit.
    """
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
    """The times of a step.

    phases: {phase: seconds} of each timed step. captured: whether the steps ran as CUDA graphs.
    flops: matmul FLOPs of a step. kernels_s: {family: seconds} of the kernels of one more step.
    kernels: the number of kernels in this step.
    """

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
    """{phase: seconds} of each of --steps steps. --warmup untimed steps run before them."""
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
    """Median seconds of a step over `window`, or None if it does not fit in memory."""
    phases = bench.attempt(phase_times, setting, window)
    return phases and statistics.median(step_times(phases))


def flops(bench: Bench, setting: Setting, window: Window) -> float:
    """Matmul FLOPs of a step.

    A token costs 4 FLOPs for each weight of a block's linear layers: 2 in forward, and 2 in
    backward for the gradient of the activations. The weights are frozen, so no gradient of the
    weights is computed. In a recomputed block a token costs 6 FLOPs for each weight, because
    forward runs twice. In the head, each token that carries loss costs 4 FLOPs for each weight.
    """
    config = bench.model.config
    block = (4 + 2 * config.expansion_ratio) * config.d_model**2
    recomputed = bench.training.limits.recompute / config.n_layers
    tokens = setting.tokens * config.n_layers * block * (4 + 2 * recomputed)
    return tokens + 4 * window.supervised * config.vocab_size * config.d_model
