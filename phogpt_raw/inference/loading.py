"""Find and load the model that answers: a base, with or without an adapter.

All steps that need no weights come first, so that mistakes are reported before weights are read.
If there is an adapter, the template, precision, base and revision are those of its training run,
unless a flag gives another value.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from phogpt_raw.cards import Card, known_card, recorded_dtype, this_card
from phogpt_raw.config import check_nf4_cache
from phogpt_raw.data.chat_template import choose_template
from phogpt_raw.data.prompt import TEMPLATES, Template
from phogpt_raw.files import expanded
from phogpt_raw.model.adapter_config import (
    Origin,
    adapter_hash,
    check_not_merged,
    chosen_base,
    read_origin,
)
from phogpt_raw.model.adapters import load_adapters
from phogpt_raw.model.base_identity import say_if_another
from phogpt_raw.model.phogpt import ModelConfig, PhoGPT
from phogpt_raw.model.weights import (
    WITHOUT_WEIGHTS,
    find_folder,
    load_base,
    read_config,
    read_tokenizer,
    shape_alone,
)
from phogpt_raw.refusal import Refusal

LEAST_CONTEXT = 64  # tokens


@dataclass(frozen=True)
class Found:
    """A model whose weights have not been read. `load` reads them.

    shape: the base's shape; --context replaces its max_seq_len. tokenizer, template: None if the
    model is a built-in shape, which has no files.
    """

    base: str
    revision: str | None
    adapter: Path | None
    shape: ModelConfig
    tokenizer: object
    template: Template
    nf4: bool
    nf4_cache: str | None
    dtype: torch.dtype
    card: Card
    base_weights: str | None = None  # hash of the adapter's base, if known

    def identity(self) -> tuple:
        """The properties of the model that change its answers, as a tuple to be hashed.

        A base is identified by its name and revision, because its weights are not read here.
        """
        return (self.base, self.revision, self.adapter and adapter_hash(self.adapter),
                self.template.question, self.nf4, str(self.dtype), self.shape.max_seq_len)

    def say_if_over_others(self) -> None:
        if self.adapter:
            say_if_another(find_folder(self.base, self.revision), self.base_weights, self.adapter)

    def load(self) -> PhoGPT:
        """Read the weights. A warning is printed if the adapter was trained with other weights of
        the base."""
        self.say_if_over_others()
        model, _tokenizer = load_base(self.base, nf4=self.nf4, dtype=self.dtype,
                                      device=self.card.device, revision=self.revision,
                                      nf4_cache=self.nf4_cache)
        model.config = self.shape
        if self.adapter:
            load_adapters(model, self.adapter, trainable=False)
        return model


def find(options) -> Found:
    """The model that generate.py's flags name. Raises Refusal for invalid flags."""
    card = known_card(options.card) if options.card else this_card()
    adapter = options.adapter and expanded(options.adapter)
    made = read_origin(adapter) if adapter else Origin("nano")
    nf4 = options.nf4 if options.nf4 is not None else made.nf4
    check_nf4_cache(options.nf4_cache, nf4=nf4)
    dtype = recorded_dtype(card, options.dtype, made.dtype)
    base, revision, named = chosen_base(adapter, made, options.model, options.revision)
    shape = shape_alone(base, card, planned=options.dry_run)
    if shape:
        return Found(base, None, adapter, in_context(shape, options.context), None, None, nf4, None,
                     dtype, card)
    folder = find_folder(base, revision, WITHOUT_WEIGHTS, named)
    shape = read_config(folder)
    if adapter:
        check_not_merged(folder, adapter)
    tokenizer = read_tokenizer(folder, shape)
    template, _reason = choose_template(tokenizer, options.template, made.template)
    shape = in_context(shape, options.context)
    return Found(base, revision, adapter, shape, tokenizer, TEMPLATES[template], nf4,
                 options.nf4_cache, dtype, card, made.base_weights)


def in_context(shape: ModelConfig, most: int | None) -> ModelConfig:
    """The shape, with `most` as the limit of tokens for a prompt and its answer together.

    None keeps the model's own limit. Raises Refusal if `most` is below LEAST_CONTEXT or above the
    model's own limit.
    """
    if most is None:
        return shape
    if not LEAST_CONTEXT <= most <= shape.max_seq_len:
        raise Refusal(f"--context {most}: must be from {LEAST_CONTEXT} to {shape.max_seq_len:,}, "
                      f"the limit of the model")
    return replace(shape, max_seq_len=most)
