"""How many blocks a GPU forces to be recomputed: `--recompute auto`.

Two simulated steps answer (trace.py). With N of n blocks recomputed the others keep what backward
needs, so the peak falls along a straight line from N = 0 to n - 1; the last block is recomputed
beside nothing but itself, so N = n saves no more than n - 1 does. The rest of the line is
arithmetic, and the choice is the least N below what the GPU has.

The memory that happens to be free is not asked for: two runs of the same command would then choose
differently. The GPU's whole memory decides, less the margins stated here.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend

from phogpt_raw.cards import GIB, Card
from phogpt_raw.data.batches import Window
from phogpt_raw.data.prompt import Example
from phogpt_raw.model.adapters import inject
from phogpt_raw.simulate.ledger import Trace
from phogpt_raw.simulate.rates import CONTEXT, matmul_workspace
from phogpt_raw.simulate.trace import META, base_on_meta, trace_step
from phogpt_raw.training.evaluate import CACHE_MIB
from phogpt_raw.training.setup import Job, wire

# What CUDA graphs reserve above an eager step's peak, with its fragmentation: enough in 33 of 36
# measured settings (LOG.md). The others are micro-batches of 16,000 tokens and more, which run
# eagerly where memory is too full for graphs, and lose next to nothing by it.
GRAPHS, SHARE = 0.6 * GIB, 1.05


@dataclass(frozen=True)
class RecomputeChoice:
    """`recompute` blocks of `blocks`; `gib` on the GPU at the peak, margins included, of `of`.
    `least`: with all blocks recomputed. None of these where nothing forces any."""

    recompute: int
    blocks: int
    gib: float | None = None
    least: float | None = None
    of: float | None = None


def choose_recompute(job: Job) -> RecomputeChoice:
    """--recompute as given, or by simulation of the run's longest rows on its GPU."""
    config, model, blocks = job.config, job.model, job.model.config.n_layers
    if config.recompute != "auto":
        return RecomputeChoice(config.blocks_to_recompute(blocks), blocks)
    if not job.card.memory_gib:
        return RecomputeChoice(0, blocks)  # the host's memory is not what is scarce
    dtype = model.head.dtype
    twin = base_on_meta(model.config, dtype, nf4=config.nf4)
    with META:
        adapters = inject(twin, copy.deepcopy(model.peft_config["default"]))
    training = wire(twin, adapters, optimizer=config.optimizer, micro_batch=config.micro_batch,
                    loss_mib=config.loss_mib)
    window = longest(job.examples.train, config.micro_batch)

    def trace(recompute: int) -> Trace:
        training.limits.recompute = recompute
        return trace_step(training, window, attention_kernel(job.card, dtype))

    return least_recompute(trace, blocks, job.card)


def least_recompute(trace: Callable[[int], Trace], blocks: int, card: Card) -> RecomputeChoice:
    """The least recompute whose step fits `card`; trace(N): a step with N blocks recomputed."""
    none = needed(trace(0), card)
    if none <= card.memory_gib:
        return RecomputeChoice(0, blocks, none, None, card.memory_gib)
    least = needed(trace(blocks - 1), card)
    slope = (none - least) / max(1, blocks - 1)
    depth = math.ceil((none - card.memory_gib) / slope) if slope > 0 else blocks
    depth = min(depth, blocks - 1) if least <= card.memory_gib else blocks
    return RecomputeChoice(depth, blocks, max(least, none - depth * slope), least, card.memory_gib)


def needed(trace: Trace, card: Card) -> float:
    """GiB that a GPU must have for a step, its graphs and an evaluation beside the model: the peak
    with margins, CUDA's context, the optimizer's pages."""
    allocator = trace.replay(workspace=matmul_workspace(card))
    peak = max(allocator.peak_allocated, trace.resident + CACHE_MIB * 2**20)
    return (SHARE * peak + GRAPHS + CONTEXT + trace.pages) / GIB


def longest(examples: list[Example], micro_batch: int) -> Window:
    """The micro-batch that takes most memory: the longest rows together."""
    ordered = sorted(examples, key=lambda e: (len(e.ids), e.supervised))
    return Window(ordered[-micro_batch:], pad_id=0)


def attention_kernel(card: Card, dtype: torch.dtype) -> SDPBackend:
    """What torch takes with a bias: in 16 bits cuDNN's on a Hopper and the large Blackwell, else
    the memory-efficient one (check_prefer_cudnn_attention in its sdp_utils.cpp)."""
    preferred = card.capability in ((9, 0), (10, 0)) and dtype.itemsize == 2
    return SDPBackend.CUDNN_ATTENTION if preferred else SDPBackend.EFFICIENT_ATTENTION
