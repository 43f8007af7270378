"""For the benches: simulate steps of a given size on GPUs that this computer does not have.

A trace is the recorded operations of a step. Steps with the same shapes share a trace.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import torch

from bench.command_line import Setting, known_cards
from bench.random_data import random_rows, window_of
from phogpt_raw.cards import GIB, Card, training_dtype
from phogpt_raw.config import Config
from phogpt_raw.data.batches import MicroBatch, Window
from phogpt_raw.model.adapters import new_adapters
from phogpt_raw.model.phogpt import PUBLISHED, ModelConfig
from phogpt_raw.model.weights import base_on_meta, find_folder, read_config
from phogpt_raw.refusal import Refusal
from phogpt_raw.simulate.fit import Choice, attention_kernels, least_recompute
from phogpt_raw.simulate.ledger import Trace
from phogpt_raw.simulate.rates import CONTEXT, Rates, matmul_workspace
from phogpt_raw.simulate.roofline import Seconds, by_phase, step_seconds
from phogpt_raw.simulate.trace import META, trace_step
from phogpt_raw.training.setup import wire

# Stands for any GPU on which torch has only the memory-efficient attention kernel.
EFFICIENT = Card("", "cuda", (7, 5))


def shape_of(model: str) -> ModelConfig:
    if model in PUBLISHED:
        return PUBLISHED[model]
    return read_config(find_folder(model, files=["config.json"]))  # without the weights


def check_fits(options, prompts: list[int]) -> None:
    """Raise Refusal if a prompt and --new together are longer than the model's context."""
    longest = shape_of(options.model).max_seq_len
    if max(prompts) + options.new > longest:
        raise Refusal(f"--prompt {max(prompts)} and --new {options.new}: {options.model} reads at "
                      f"most {longest} tokens in all")


@dataclass(frozen=True)
class GivenBatch:
    """An accumulation window that contains one given micro-batch, for a simulated step."""

    batch: MicroBatch
    supervised: int = 1  # divides the loss; a simulated step has no loss, so any number works

    def micro_batches(self, _size: int):
        yield self.batch


def shape_key(batch: MicroBatch) -> tuple:
    """A key of the micro-batch's shapes. Micro-batches with the same key have the same trace."""
    return (*batch.ids_BL.shape, len(batch.rows_T), batch.bounds)


class Traces:
    """Traces of steps of one model. GPUs with the same attention kernel share a trace."""

    def __init__(self, options, dtype: torch.dtype):
        self.options, self.shape, self.dtype = options, shape_of(options.model), dtype
        model = base_on_meta(self.shape, dtype)
        with META:
            adapters = new_adapters(model, rank=options.rank, alpha=32)
        self.training = wire(model, adapters, optimizer=options.optimizer,
                             loss_mib=options.loss_mib)
        self.trace = cache(self.trace)
        self.batches: dict[tuple, Trace] = {}

    def trace(self, setting: Setting, recompute: int, kernel) -> Trace:
        rows = setting.micro_batch * setting.accumulate
        window = window_of(random_rows(self.shape.vocab_size, rows, setting.seq_len),
                           self.options.documents)
        return self.trace_window(window, setting.micro_batch, recompute, kernel)

    def trace_window(self, window: Window, micro_batch: int, recompute: int, kernel) -> Trace:
        self.training.limits.micro_batch = micro_batch
        self.training.limits.recompute = recompute
        return trace_step(self.training, window, kernel)

    def trace_batch(self, batch: MicroBatch, recompute: int, kernel) -> Trace:
        """The trace of a step over one micro-batch."""
        key = (shape_key(batch), recompute, kernel)
        if key not in self.batches:
            self.batches[key] = self.trace_window(GivenBatch(batch), len(batch.ids_BL), recompute,
                                                  kernel)
        return self.batches[key]

    def kernel(self, card: Card):
        card = EFFICIENT if self.options.attention == "efficient" else card
        return attention_kernels(card, self.dtype)

    def recompute(self, setting: Setting, card: Card) -> int:
        """The number of blocks to recompute. If the setting is auto, this is the smallest number
        with which the step fits in the GPU's memory."""
        if setting.recompute != "auto":
            return Config(recompute=setting.recompute).blocks_to_recompute(self.shape.n_layers)
        return self.least(lambda n: self.trace(setting, n, self.kernel(card)), card).recompute

    def least(self, trace, card: Card) -> Choice:
        return least_recompute(trace, self.shape.n_layers, card)

    def on(self, card: Card, setting: Setting) -> "OnCard":
        depth = self.recompute(setting, card)
        return OnCard(card, setting, depth, self.trace(setting, depth, self.kernel(card)))


def resolved(traces: Traces | None, setting: Setting, card: Card) -> Setting:
    """The setting with a number in place of recompute="auto". On a CPU, this number is 0."""
    if setting.recompute != "auto":
        return setting
    return replace(setting, recompute=str(traces.recompute(setting, card) if traces else 0))


@dataclass(frozen=True)
class OnCard:
    """A simulated step on a GPU. trace: the recorded operations of the step. recompute: the number
    of recomputed blocks."""

    card: Card
    setting: Setting
    recompute: int
    trace: Trace

    @property
    def beside(self) -> int:
        """Bytes of GPU memory that torch's allocator does not count: CUDA's context and the
        optimizer's pages."""
        return CONTEXT + self.trace.pages

    @property
    def fits(self) -> bool:
        try:
            self.trace.replay(self.card.memory_gib * GIB - self.beside, matmul_workspace(self.card))
        except MemoryError:
            return False
        return True

    def memory_row(self) -> dict:
        """A row of the result: the peak GiB of each phase, and the GiB of each kind of memory at
        the peak of the step."""
        workspace = matmul_workspace(self.card)
        allocator = self.trace.replay(workspace=workspace)
        moments = self.trace.moments(workspace)
        phases: dict[str, dict[str, float]] = {}
        for moment in moments:
            seen = phases.setdefault(moment.phase, {"allocated": 0, "reserved": 0})
            for kind in seen:
                seen[kind] = max(seen[kind], getattr(moment, kind) / GIB)
        peak = max(moments, key=lambda m: m.allocated)
        return {
            "blocks_recomputed": self.recompute, "fits": self.fits,
            "allocated_gib": allocator.peak_allocated / GIB,
            "reserved_gib": allocator.peak_reserved / GIB,
            "device_gib": (allocator.peak_reserved + self.beside) / GIB,
            "peak_gib": phases, "peak_phase": peak.phase,
            "kinds_gib": {k: v / GIB for k, v in peak.kinds.items()},
            "blocks_gib": {k: v / GIB for k, v in peak.blocks.items()},
            "pages_gib": self.trace.pages / GIB, "context_gib": CONTEXT / GIB,
        }

    def time_row(self, rates: Rates) -> dict:
        """A row of the result: FLOPs and bytes of the step, and its seconds at the GPU's higher
        and lower rates."""
        ops, setting = self.trace.ops, self.setting
        seconds = step_seconds(ops, rates)
        step_s = both_ends(seconds)
        return {
            "blocks_recomputed": self.recompute, "fits": self.fits,
            "flops": sum(op.flops for op in ops), "bytes_moved": sum(op.moved for op in ops),
            "step_s": step_s, "tokens_per_s": [setting.tokens / s for s in step_s[::-1]],
            "example_s": [s / setting.micro_batch / setting.accumulate for s in step_s],
            "phases_s": {phase: both_ends(s) for phase, s in by_phase(ops, rates).items()},
            "host_bound_eager": seconds.host_bound,
        }


def both_ends(seconds: Seconds) -> tuple[float, float]:
    return seconds.low, seconds.high


def cards(options) -> Iterator[tuple[Card, Rates, Traces]]:
    """Yield each GPU of --card, with its rates and with traces in the dtype in which it trains."""
    traces: dict[torch.dtype, Traces] = {}
    for known in known_cards(options):
        dtype, _ = training_dtype(known.card, options.dtype)
        traces[dtype] = traces.get(dtype) or Traces(options, dtype)
        yield known.card, known.rates, traces[dtype]
