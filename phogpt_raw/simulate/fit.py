"""How many blocks a card forces to be recomputed: `--recompute auto`.

Two simulated steps answer (plan.py). With N of n blocks recomputed the others keep what backward
needs, so the peak falls along a straight line from N = 0 to n - 1; the last block is recomputed
beside nothing but itself, so N = n saves no more than n - 1 does. The rest of the line is
arithmetic, and the choice is the least N below what the card has.

The surprise is what must not be asked: the memory that happens to be free. Two runs of the same
command would then choose differently. The card's whole memory decides, less what is stated here.
"""

import copy
import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn.attention import SDPBackend

from phogpt_raw.cards import GIB, Card
from phogpt_raw.config import Config
from phogpt_raw.data.batches import Window, make_window
from phogpt_raw.data.prompt import Example
from phogpt_raw.model.adapters import inject
from phogpt_raw.model.phogpt import PhoGPT
from phogpt_raw.simulate.ledger import Plan
from phogpt_raw.simulate.rates import CONTEXT, matmul_workspace
from phogpt_raw.simulate.trace import META, base_on_meta, simulate
from phogpt_raw.training.evaluate import CACHE_MIB
from phogpt_raw.training.loss import chunk_rows

# What CUDA graphs reserve above an eager step's peak, with its fragmentation: enough in 33 of 36
# measured settings (LOG.md). The others are micro-batches of 16,000 tokens and more, which run
# eagerly where the card is too full for graphs, and lose next to nothing by it.
GRAPHS, SHARE = 0.6 * GIB, 1.05


@dataclass(frozen=True)
class Fit:
    """`recompute` blocks of `blocks`; `gib` on the card at the peak, margins included, of `of`.
    `least`: with all blocks recomputed. None of these where nothing forces any."""

    recompute: int
    blocks: int
    gib: float | None = None
    least: float | None = None
    of: float | None = None

    def __str__(self) -> str:
        told = f"{self.recompute} of {self.blocks} blocks in backward"
        if self.gib is None:
            return told
        told += f" (auto): {self.gib:.1f} of {self.of:.1f} GiB with margins"
        if self.recompute:
            told += f", for {self.recompute / self.blocks / 2:.0%} more arithmetic in the blocks"
        if self.gib > self.of:
            told += "; it may not fit: a shorter --max-len or a smaller --micro-batch does"
        return told


class Simulation(Protocol):
    def __call__(self, recompute: int) -> Plan: ...


def fit(run_step: Simulation, blocks: int, card: Card) -> Fit:
    """The least recompute whose step fits `card`, from `run_step(N)`, a Plan of it."""
    none = needed(run_step(0), card)
    if none <= card.memory_gib:
        return Fit(0, blocks, none, None, card.memory_gib)
    least = needed(run_step(blocks - 1), card)
    slope = (none - least) / max(1, blocks - 1)
    depth = math.ceil((none - card.memory_gib) / slope) if slope > 0 else blocks
    depth = min(depth, blocks - 1) if least <= card.memory_gib else blocks
    return Fit(depth, blocks, max(least, none - depth * slope), least, card.memory_gib)


def needed(plan: Plan, card: Card) -> float:
    """GiB that a card must have for a plan's step, its graphs and an evaluation beside the model:
    the peak with margins, CUDA's context, the optimizer's pages."""
    allocator = plan.replay(workspace=matmul_workspace(card))
    peak = max(allocator.peak_allocated, plan.resident + CACHE_MIB * 2**20)
    return (SHARE * peak + GRAPHS + CONTEXT + plan.pages) / GIB


def choose(config: Config, card: Card, model: PhoGPT, examples: list[Example],
           dtype: torch.dtype) -> Fit:
    """--recompute for this run: as told, or by simulation of its longest rows on this card."""
    blocks = model.config.n_layers
    if config.recompute != "auto":
        return Fit(config.blocks_to_recompute(blocks), blocks)
    if not card.memory_gib:
        return Fit(0, blocks)  # the host's memory is not what is scarce
    twin = base_on_meta(model.config, dtype, nf4=config.nf4)
    with META:
        adapters = inject(twin, copy.deepcopy(model.peft_config["default"]))

    def run_step(recompute: int) -> Plan:
        twin.recompute = recompute
        return simulate(twin, adapters, longest(examples, config.micro_batch),
                        optimizer=config.optimizer, kernel=attention_kernel(card, dtype),
                        chunk=chunk_rows(model.config.vocab_size, config.loss_mib))

    return fit(run_step, blocks, card)


def longest(examples: list[Example], micro_batch: int) -> Window:
    """The micro-batch that takes most: the longest rows together."""
    ordered = sorted(examples, key=lambda e: (len(e.ids), e.answer))
    return make_window(ordered[-micro_batch:], micro_batch, pad_id=0)


def attention_kernel(card: Card, dtype: torch.dtype) -> SDPBackend:
    """What torch takes with a bias: in 16 bits cuDNN's on a Hopper and the large Blackwell, else
    the memory-efficient one (check_prefer_cudnn_attention in its sdp_utils.cpp)."""
    preferred = card.capability in ((9, 0), (10, 0)) and dtype.itemsize == 2
    return SDPBackend.CUDNN_ATTENTION if preferred else SDPBackend.EFFICIENT_ATTENTION
