"""Choose the length of packed rows and the number of recomputed blocks, to fit a GPU's memory.

The peak memory of a step comes from a simulation (trace.py). Of the model's n blocks, backward
recomputes the activations of the first N. The other blocks keep their activations. The peak falls
linearly from N = 0 to N = n - 1, so two simulations give the peak for every N. Recomputing the last
block too does not lower the peak, because backward begins with this block and needs its activations
at once. `--recompute auto` chooses the smallest N with which the step fits in the GPU's memory.
Packed rows are as long as possible without recomputation, up to ROW tokens.

The peak plus the margins below is compared with the GPU's total memory. The free memory is not
used, because it depends on other programs. Two runs of the same command therefore make the same
choice.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch.nn.attention import SDPBackend

from phogpt_raw.cards import GIB, Card
from phogpt_raw.config import Config
from phogpt_raw.data.batches import Stream, Window
from phogpt_raw.data.packing import ALIGNED, Packing, choose_packing, round_up
from phogpt_raw.data.prompt import Example
from phogpt_raw.model.adapters import inject
from phogpt_raw.model.weights import base_on_meta
from phogpt_raw.simulate.ledger import Trace
from phogpt_raw.simulate.rates import CONTEXT, matmul_workspace
from phogpt_raw.simulate.trace import META, Kernels, trace_step
from phogpt_raw.training.evaluate import CACHE_MIB
from phogpt_raw.training.setup import Job, wire
from phogpt_raw.training.step import Training

# Margins for fragmentation, and for the memory that CUDA graphs reserve above the peak of an eager
# step: the peak is multiplied by SHARE, and GRAPHS bytes are added. The margins were enough in 33
# of 36 measured settings (LOG.md). The other three settings have micro-batches of 16,000 or more
# tokens. If memory is too full for the graphs, such micro-batches run eagerly, at nearly the same
# speed.
GRAPHS, SHARE = 0.6 * GIB, 1.05
ROW = 2048  # most tokens of a packed row; longer rows are hardly faster
SHORTER = 0.75  # if rows do not fit, SHORTER times their length is tried next


@dataclass(frozen=True)
class Choice:
    """The packing of rows and the recomputed blocks of a run.

    recompute: number of blocks to recompute. blocks: number of blocks in the model. gib: peak GPU
    memory in GiB, margins included. least: the same peak if all blocks are recomputed. of: the
    GPU's memory in GiB. gib, least and of are None if the choice did not need them. packing: how
    rows are packed; None if they are not packed. auto: True if `recompute` was chosen here, False
    if the user gave it.
    """

    recompute: int
    blocks: int
    gib: float | None = None
    least: float | None = None
    of: float | None = None
    packing: Packing | None = None
    auto: bool = True


def choose(job: Job) -> Choice:
    """Choose the packing and the recomputed blocks of a run.

    Values given by --pack-len and --recompute are kept. Values that are not given are chosen by
    simulating steps with the run's rows on its GPU.
    """
    longest = max(len(e.ids) for e in job.examples.train + job.examples.held_out)
    return choose_for(job.card, job.config, job.model.config.n_layers, job.stream,
                      job.planned(), longest, simulated(job))


def choose_for(card: Card, config: Config, blocks: int, stream: Stream, planned: range,
               longest: int, trace: Callable[[Window, int], Trace]) -> Choice:
    """Like `choose`, for any card and any stream of examples.

    planned: the steps whose accumulation windows are considered; such a window holds the examples
    of one step. The longest example of the stream is also considered, because it may be in a later
    window. longest: number of tokens in the longest example, held-out examples included.
    trace(window, recompute): a function that simulates a step of a model with `blocks` blocks; the
    window is one micro-batch.
    """
    windows = [stream.picked(step) for step in planned]
    windows.append([max(stream.examples, key=lambda e: len(e.ids))])

    @cache
    def largest_trace(packing: Packing | None, recompute: int) -> Trace:
        window = (largest(windows, packing, config.micro_batch) if packing
                  else longest_rows(stream.examples, config.micro_batch))
        return trace(window, recompute)

    packing = None
    if config.packing:
        fullest = max(sum(len(e.ids) for e in window) for window in windows)
        capacity = min(config.pack_len or ROW, round_up(fullest, ALIGNED))
        packing = choose_packing(windows, longest, capacity)
        while (config.pack_len is None and card.memory_gib and capacity > longest
               and needed(largest_trace(packing, least_asked(config, blocks)), card)
               > card.memory_gib):
            capacity = max(longest, int(SHORTER * packing.lengths[-1]))
            packing = choose_packing(windows, longest, capacity)
    return replace(choose_recompute(card, config, blocks, partial(largest_trace, packing)),
                   packing=packing)


def least_asked(config: Config, blocks: int) -> int:
    """The smallest number of recomputed blocks that --recompute allows."""
    return 0 if config.recompute == "auto" else config.blocks_to_recompute(blocks)


def choose_recompute(card: Card, config: Config, blocks: int,
                     trace: Callable[[int], Trace]) -> Choice:
    if config.recompute != "auto":
        depth = config.blocks_to_recompute(blocks)
        if config.dry_run and card.memory_gib:  # --dry-run prints whether the step fits
            gib = needed(trace(depth), card)
            return Choice(depth, blocks, gib, None, card.memory_gib, auto=False)
        return Choice(depth, blocks, auto=False)
    if not card.memory_gib:
        return Choice(0, blocks)  # on a CPU the time is the limit, not the memory
    return least_recompute(trace, blocks, card)


def simulated(job: Job) -> Callable[[Window, int], Trace]:
    """Return trace(window, recompute), which simulates a step of the run on the meta device."""
    @cache
    def twin() -> Training:
        config, dtype = job.config, job.model.head.dtype
        model = base_on_meta(job.model.config, dtype, nf4=config.nf4)
        with META:
            adapters = inject(model, copy.deepcopy(job.model.peft_config["default"]))
        return wire(model, adapters, optimizer=config.optimizer, micro_batch=config.micro_batch,
                    loss_mib=config.loss_mib)

    def trace(window: Window, recompute: int) -> Trace:
        training = twin()
        training.limits.recompute = recompute
        return trace_step(training, window, attention_kernels(job.card, job.model.head.dtype))

    return trace


def least_recompute(trace: Callable[[int], Trace], blocks: int, card: Card) -> Choice:
    """Choose the smallest number of recomputed blocks with which a step fits in the card's memory.
    If no number is enough, choose all blocks. trace(N): simulates a step that recomputes N blocks.
    """
    none = needed(trace(0), card)
    if none <= card.memory_gib:
        return Choice(0, blocks, none, None, card.memory_gib)
    least = needed(trace(blocks - 1), card)
    slope = (none - least) / max(1, blocks - 1)
    depth = math.ceil((none - card.memory_gib) / slope) if slope > 0 else blocks
    depth = min(depth, blocks - 1) if least <= card.memory_gib else blocks
    return Choice(depth, blocks, max(least, none - depth * slope), least, card.memory_gib)


def needed(trace: Trace, card: Card) -> float:
    """GiB of GPU memory that a run needs: the peak of a step or of an evaluation, whichever is
    higher, plus the margins, CUDA's context and the optimizer's pages."""
    allocator = trace.replay(workspace=matmul_workspace(card))
    peak = max(allocator.peak_allocated, trace.resident + CACHE_MIB * 2**20)
    return (SHARE * peak + GRAPHS + CONTEXT + trace.pages) / GIB


def largest(windows: list[list[Example]], packing: Packing, micro_batch: int) -> Window:
    """A window that contains only the micro-batch that takes the most memory. This is the
    micro-batch with the most tokens. Of several micro-batches with equally many tokens, the
    micro-batch with the most supervised tokens is chosen."""
    batches = (batch for examples in windows
               for batch in Window(examples, 0, packing).layout(micro_batch))
    rows, length = max(batches, key=lambda batch: (
        len(batch[0]) * batch[1], sum(e.supervised for row in batch[0] for e in row)))
    return Window([e for row in rows for e in row], 0, replace(packing, lengths=(length,)))


def longest_rows(examples: list[Example], micro_batch: int) -> Window:
    """A window that contains only one micro-batch, of the longest unpacked rows. It takes the most
    memory of all micro-batches."""
    ordered = sorted(examples, key=lambda e: (len(e.ids), e.supervised))
    return Window(ordered[-micro_batch:], pad_id=0)


def attention_kernels(card: Card, dtype: torch.dtype) -> Kernels:
    """The attention kernels that torch chooses on a card.

    In 16 bits and with a bias, torch uses cuDNN on compute capability 9.0 and 10.0. In 16 bits and
    without a bias, it uses flash attention from compute capability 8.0 on. In all other cases it
    uses the memory-efficient kernel. The source is check_prefer_cudnn_attention and the order of
    priorities in torch's sdp_utils.cpp.
    """
    efficient, short = SDPBackend.EFFICIENT_ATTENTION, dtype.itemsize == 2
    cudnn = short and card.capability in ((9, 0), (10, 0))
    flash = short and card.capability >= (8, 0)
    return Kernels(SDPBackend.CUDNN_ATTENTION if cudnn else efficient,
                   SDPBackend.FLASH_ATTENTION if flash else efficient)
