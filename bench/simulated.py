"""The step of a setting simulated for cards that need not be here: plans, made once each."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import torch

from bench import harness
from bench.command_line import Setting, known_cards
from phogpt_raw.cards import GIB, Card, training_dtype
from phogpt_raw.config import Config
from phogpt_raw.data.batches import Window
from phogpt_raw.data.prompt import Example
from phogpt_raw.model.adapters import new_adapters
from phogpt_raw.model.phogpt import PUBLISHED, ModelConfig
from phogpt_raw.model.weights import find_folder, read_config
from phogpt_raw.simulate.fit import Fit, attention_kernel, fit, longest
from phogpt_raw.simulate.ledger import Plan
from phogpt_raw.simulate.rates import CONTEXT, Rates, matmul_workspace
from phogpt_raw.simulate.trace import META, base_on_meta, simulate
from phogpt_raw.training.loss import chunk_rows

EFFICIENT = Card("", "cuda", (7, 5))  # a card that has only the memory-efficient kernel


def shape_of(model: str) -> ModelConfig:
    if model in PUBLISHED:
        return PUBLISHED[model]
    return read_config(find_folder(model, files=["config.json"]))  # not gigabytes of weights


class Plans:
    """Plans of settings of one model; cards with the same attention kernel share them."""

    def __init__(self, options, dtype: torch.dtype):
        self.options, self.shape, self.dtype = options, shape_of(options.model), dtype
        self.model = base_on_meta(self.shape, dtype)
        with META:
            self.adapters = new_adapters(self.model, rank=options.rank, alpha=32)
        self.plan = cache(self.plan)

    def plan(self, setting: Setting, recompute: int, kernel) -> Plan:
        rows = harness.tokens(self.shape.vocab_size, setting.micro_batch * setting.accumulate,
                              setting.seq_len)
        return self.plan_of(harness.window(rows, setting.micro_batch), recompute, kernel)

    def plan_of(self, window: Window, recompute: int, kernel) -> Plan:
        self.model.recompute = recompute
        return simulate(self.model, self.adapters, window, optimizer=self.options.optimizer,
                        chunk=chunk_rows(self.shape.vocab_size, self.options.loss_mib),
                        kernel=kernel)

    def kernel(self, card: Card):
        card = EFFICIENT if self.options.attention == "efficient" else card
        return attention_kernel(card, self.dtype)

    def fit(self, setting: Setting, card: Card) -> Fit:
        """The setting's recompute as a number of blocks; for auto what the card forces."""
        if setting.recompute != "auto":
            config = Config(recompute=setting.recompute)
            return Fit(config.blocks_to_recompute(self.shape.n_layers), self.shape.n_layers)
        return fit(lambda n: self.plan(setting, n, self.kernel(card)), self.shape.n_layers, card)

    def fit_rows(self, examples: list[Example], card: Card) -> Fit:
        """The same for the longest of these examples."""
        size, asked = int(self.options.micro_batch), self.options.recompute
        window = longest(examples, size)
        if asked != "auto":
            return self.fit(Setting(0, size, 1, asked), card)
        return fit(lambda n: self.plan_of(window, n, self.kernel(card)), self.shape.n_layers, card)

    def on(self, card: Card, setting: Setting) -> "OnCard":
        depth = self.fit(setting, card).recompute
        return OnCard(card, setting, depth, self.plan(setting, depth, self.kernel(card)))


def resolved(plans: Plans | None, setting: Setting, card: Card) -> Setting:
    """A setting whose recompute is definite; on a CPU memory is not what is scarce."""
    if setting.recompute != "auto":
        return setting
    return replace(setting, recompute=str(plans.fit(setting, card).recompute if plans else 0))


@dataclass(frozen=True)
class OnCard:
    """A setting's plan on a card, `recompute` blocks recomputed."""

    card: Card
    setting: Setting
    recompute: int
    plan: Plan

    @property
    def beside(self) -> int:
        """Bytes that torch's allocator does not see: CUDA's context, the optimizer's pages."""
        return CONTEXT + self.plan.pages

    @property
    def fits(self) -> bool:
        try:
            self.plan.replay(self.card.memory_gib * GIB - self.beside, matmul_workspace(self.card))
        except MemoryError:
            return False
        return True

    def row(self) -> dict:
        """The row of a result: GiB at the peak by phase and, for the whole step, by kind."""
        workspace = matmul_workspace(self.card)
        allocator = self.plan.replay(workspace=workspace)
        moments = self.plan.moments(workspace)
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
            "pages_gib": self.plan.pages / GIB, "context_gib": CONTEXT / GIB,
        }


def cards(options) -> Iterator[tuple[Card, Rates, Plans]]:
    """The cards of --card, with plans in the dtype that each trains in."""
    plans: dict[torch.dtype, Plans] = {}
    for known in known_cards(options):
        dtype, _ = training_dtype(known.card, options.dtype)
        plans[dtype] = plans.get(dtype) or Plans(options, dtype)
        yield known.card, known.rates, plans[dtype]
