"""What a server offers: adapters by name over one base, and the memory that answering takes.

Each adapter has a copy of the model's modules over the same weights (`same_base`) and an engine of
its own, so nothing has to be exchanged between two steps. What is not shared is the adapter, the
cache, the CUDA graphs, and on a CPU the dequantised weights.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from phogpt_raw.cards import Card, dtype_name, recorded_dtype
from phogpt_raw.config import check_nf4_cache, hub_id
from phogpt_raw.data.packing import round_up
from phogpt_raw.data.prompt import TEMPLATES, Template, choose_template, encode_text
from phogpt_raw.decode.engine import STEP, rows_that_fit
from phogpt_raw.decode.history import encode_history
from phogpt_raw.files import expanded
from phogpt_raw.messages import _
from phogpt_raw.model.adapter_config import Base, Origin, check_not_merged, chosen_base, read_origin
from phogpt_raw.model.adapters import load_adapters, same_base
from phogpt_raw.model.cache import cache_bytes
from phogpt_raw.model.nf4 import NF4_BYTES
from phogpt_raw.model.nf4_product import MOST
from phogpt_raw.model.phogpt import ModelConfig, PhoGPT
from phogpt_raw.model.weights import (
    WITHOUT_WEIGHTS,
    find_folder,
    load_base,
    read_config,
    read_tokenizer,
)
from phogpt_raw.refusal import Refusal
from phogpt_raw.serve.protocol import Conversation, ProtocolError

NAME = r"[\w.-]+"
SLOTS = 8  # unless --slots says otherwise, or fewer fit
RESERVE = 2**30  # bytes of a GPU for CUDA itself, its graphs, and prompts on their way through


@dataclass(frozen=True)
class Served:
    """A model that requests name."""

    name: str
    model: PhoGPT
    tokenizer: object
    template: Template

    def encode(self, prompt: Conversation | str | list[int]) -> list[int]:
        """Ids of a prompt; ProtocolError where it holds none, unknown ones or too many."""
        if isinstance(prompt, Conversation):
            ids = encode_history(self.tokenizer, self.template, list(prompt.turns), prompt.system)
        else:
            ids = encode_text(self.tokenizer, prompt) if isinstance(prompt, str) else prompt
        where, config = "messages" if isinstance(prompt, Conversation) else "prompt", \
            self.model.config
        if not ids:
            raise ProtocolError(f"'{where}' holds no token", param=where)
        if not 0 <= min(ids) <= max(ids) < config.vocab_size:
            raise ProtocolError(f"'{where}' holds a token id outside 0 to {config.vocab_size - 1}",
                                param=where)
        if len(ids) >= config.max_seq_len:
            raise ProtocolError(
                f"'{where}' has {len(ids)} tokens; the model was made for {config.max_seq_len}, "
                f"answer included: shorten it", param=where, code="context_length_exceeded")
        return ids


def named_adapters(given: Sequence[str]) -> dict[str, Path]:
    """The folders of --adapter, given as NAME=DIR or DIR, by name; DIR alone has its own name."""
    found = {}
    for text in given:
        name, folder = text.split("=", 1) if re.match(f"{NAME}=", text) else (None, text)
        path = expanded(folder)
        name = name or path.resolve().name
        if name in found:
            raise Refusal(f"--adapter {text}: there are two of the name {name}; name them with "
                          f"--adapter NAME=DIR")
        found[name] = path
    return found


class Found(NamedTuple):
    """A base and how it is used, found before any weights are read."""

    base: Base
    folder: Path
    config: ModelConfig
    nf4: bool
    dtype: torch.dtype
    template: str


@dataclass(frozen=True)
class Plan:
    """What will be loaded. adapters: folders by the model's name, None for the base alone."""

    found: Found
    adapters: dict[str, Path | None]
    templates: dict[str, str]
    slots: int
    device: str
    nf4_cache: str | None


def plan(options, adapters: dict[str, Path], card: Card) -> Plan:
    """What generate.py's options ask for.

    Raises Refusal where the adapters are not over one base, or where the slots do not fit into the
    GPU's memory.
    """
    named = adapters or {own_name(options.model): None}
    found = {name: look(options, folder, card) for name, folder in named.items()}
    first, one = next(iter(found.items()))
    for name, other in found.items():
        for what, flag in (("folder", "--model"), ("nf4", "--nf4 or --no-nf4"),
                           ("dtype", "--dtype")):
            if getattr(one, what) != getattr(other, what):
                raise Refusal(f"--adapter: {first} and {name} are not over the same base ({what}: "
                              f"{getattr(one, what)} and {getattr(other, what)}); say one for all "
                              f"with {flag}, or serve each by itself")
    check_nf4_cache(options.nf4_cache, nf4=one.nf4)
    slots = slots_for(options.slots, one, card, len(named))
    return Plan(one, named, {name: other.template for name, other in found.items()}, slots,
                card.device, options.nf4_cache)


def own_name(model: str | None) -> str:
    """The name of a base: a hub id is its own, a folder's is its last part."""
    return model if model and hub_id(model) else expanded(model or "nano").resolve().name


def look(options, adapter: Path | None, card: Card) -> Found:
    """The base of an adapter, or the base alone; flags count more than what a run recorded."""
    made = read_origin(adapter) if adapter else Origin("nano")
    base = chosen_base(adapter, made, options.model, options.revision)
    folder = find_folder(base.model, base.revision, WITHOUT_WEIGHTS, base.named)
    config = read_config(folder)
    if adapter:
        check_not_merged(folder, adapter)
    template, _reason = choose_template(read_tokenizer(folder, config), options.template,
                                        made.template)
    return Found(base, folder, config, made.nf4 if options.nf4 is None else options.nf4,
                 recorded_dtype(card, options.dtype, made.dtype), template)


def load(made: Plan) -> list[Served]:
    """The models of a plan over one set of weights."""
    one = made.found
    base, tokenizer = load_base(one.base.model, nf4=one.nf4, dtype=one.dtype, device=made.device,
                                revision=one.base.revision, nf4_cache=made.nf4_cache)
    served = []
    for name, folder in made.adapters.items():
        model = same_base(base)
        if folder:
            load_adapters(model, folder, trainable=False)
        served.append(Served(name, model, tokenizer, TEMPLATES[made.templates[name]]))
    return served


# -- memory


def weight_bytes(found: Found) -> int:
    """Bytes of the base's weights."""
    config, itemsize = found.config, found.dtype.itemsize
    linears = config.linear_weights * (NF4_BYTES if found.nf4 else itemsize)
    return int(linears + config.vocab_size * config.d_model * itemsize)


def slot_bytes(found: Found) -> int:
    """Bytes of one slot's cache where a conversation is as long as the model was made for."""
    config = found.config
    return cache_bytes(config.n_layers, config.d_model, 1, round_up(config.max_seq_len, STEP),
                       found.dtype.itemsize)


def slots_for(asked: int | None, found: Found, card: Card, models: int) -> int:
    """--slots checked against the GPU's memory; by default 8, or as many as fit.

    Every model has its own slots. Raises Refusal where they do not fit.
    """
    if asked is not None and not 1 <= asked <= 1024:
        raise Refusal(f"--slots {asked}: must be from 1 to 1024")
    if card.device == "cpu":
        return asked or SLOTS
    free = card.memory_gib * 2**30 - weight_bytes(found) - RESERVE
    fit = rows_that_fit(found.config, found.config.max_seq_len, found.dtype.itemsize,
                        int(free / models / 2**20))
    if asked and asked > fit:
        raise Refusal(f"--slots {asked}: the cache of each takes {gib(slot_bytes(found))} GiB, and "
                      f"{card.name} has room for {fit}"
                      + (f" in each of {models} models" if models > 1 else ""))
    return asked or min(SLOTS, fit)


def gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


def memory_line(made: Plan) -> str:
    """What weights and slots take, as it is said at the start."""
    found, models = made.found, len(made.adapters)
    cache = made.slots * slot_bytes(found)
    text = _("(base {weights} GiB, {dtype}; {slots} answers of {tokens:,} tokens at once: cache at "
             "most {cache} GiB", weights=gib(weight_bytes(found)), dtype=precision(found),
             slots=made.slots, tokens=found.config.max_seq_len, cache=gib(cache))
    if models > 1:
        text += _(" for each of {models} models, {all} GiB in all", models=models,
                  all=gib(models * cache))
    if made.device == "cuda" and made.slots > MOST:
        text += _("; more than {most} slots are slower: their kernels are not fused", most=MOST)
    return text + ")"


def precision(found: Found) -> str:
    return ("NF4, " if found.nf4 else "") + dtype_name(found.dtype)
