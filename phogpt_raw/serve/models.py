"""What a server offers: adapters by name over one base, and the memory that answering takes.

Each adapter has a copy of the model's modules over the same weights (`same_base`) and an engine of
its own, so nothing has to be exchanged between two steps. What is not shared is the adapter, the
cache, the CUDA graphs, and on a CPU the dequantised weights.
"""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from phogpt_raw.cards import dtype_name
from phogpt_raw.config import hub_id
from phogpt_raw.data.packing import round_up
from phogpt_raw.data.prompt import Template, encode_text
from phogpt_raw.decode.engine import STEP, rows_that_fit
from phogpt_raw.decode.history import encode_history
from phogpt_raw.files import expanded
from phogpt_raw.messages import _
from phogpt_raw.model.adapters import load_adapters, same_base
from phogpt_raw.model.cache import cache_bytes
from phogpt_raw.model.nf4 import NF4_BYTES
from phogpt_raw.model.nf4_product import MOST
from phogpt_raw.model.phogpt import PhoGPT
from phogpt_raw.refusal import Refusal
from phogpt_raw.serve.protocol import Conversation, ProtocolError
from phogpt_raw.talk.loading import Found, find

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


def plan(options, adapters: dict[str, Path]) -> tuple[dict[str, Found], int]:
    """What generate.py's options ask for: models by name, over one base, and slots of each.

    Raises Refusal where the adapters are not over one base, or where the slots do not fit into the
    GPU's memory.
    """
    named = adapters or {own_name(options.model): None}
    found = {name: find(argparse.Namespace(**{**vars(options), "adapter": folder}))
             for name, folder in named.items()}
    first, one = next(iter(found.items()))
    for name, other in found.items():
        for what, flag in (("base", "--model"), ("revision", "--revision"),
                           ("nf4", "--nf4 or --no-nf4"), ("dtype", "--dtype")):
            if getattr(one, what) != getattr(other, what):
                raise Refusal(f"--adapter: {first} and {name} are not over the same base ({what}: "
                              f"{getattr(one, what)} and {getattr(other, what)}); say one for all "
                              f"with {flag}, or serve each by itself")
    return found, slots_for(options.slots, one, len(found))


def own_name(model: str | None) -> str:
    """The name of a base: a hub id is its own, a folder's is its last part."""
    return model if model and hub_id(model) else expanded(model or "nano").resolve().name


def load(found: dict[str, Found]) -> list[Served]:
    """The models of a plan over one set of weights."""
    base = replace(next(iter(found.values())), adapter=None).load()
    served = []
    for name, one in found.items():
        model = same_base(base)
        if one.adapter:
            load_adapters(model, one.adapter, trainable=False)
        served.append(Served(name, model, one.tokenizer, one.template))
    return served


# -- memory


def weight_bytes(found: Found) -> int:
    """Bytes of the base's weights."""
    config, itemsize = found.shape, found.dtype.itemsize
    linears = config.linear_weights * (NF4_BYTES if found.nf4 else itemsize)
    return int(linears + config.vocab_size * config.d_model * itemsize)


def slot_bytes(found: Found) -> int:
    """Bytes of one slot's cache where a conversation is as long as the model was made for."""
    config = found.shape
    return cache_bytes(config.n_layers, config.d_model, 1, round_up(config.max_seq_len, STEP),
                       found.dtype.itemsize)


def slots_for(asked: int | None, found: Found, models: int) -> int:
    """--slots checked against the GPU's memory; by default 8, or as many as fit.

    Every model has its own slots. Raises Refusal where they do not fit.
    """
    if asked is not None and not 1 <= asked <= 1024:
        raise Refusal(f"--slots {asked}: must be from 1 to 1024")
    card = found.card
    if card.device == "cpu":
        return asked or SLOTS
    free = card.memory_gib * 2**30 - weight_bytes(found) - RESERVE
    fit = rows_that_fit(found.shape, found.shape.max_seq_len, found.dtype.itemsize,
                        int(free / models / 2**20))
    if asked and asked > fit:
        raise Refusal(f"--slots {asked}: the cache of each takes {gib(slot_bytes(found))} GiB, and "
                      f"{card.name} has room for {fit}"
                      + (f" in each of {models} models" if models > 1 else ""))
    return asked or min(SLOTS, fit)


def gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


def memory_line(found: dict[str, Found], slots: int) -> str:
    """What weights and slots take, as it is said at the start."""
    one, models = next(iter(found.values())), len(found)
    cache = slots * slot_bytes(one)
    text = _("(base {weights} GiB, {dtype}; slots for {slots} answers of {tokens:,} tokens: cache "
             "at most {cache} GiB", weights=gib(weight_bytes(one)), dtype=precision(one),
             slots=slots, tokens=one.shape.max_seq_len, cache=gib(cache))
    if models > 1:
        text += _(" for each of {models} models, {all} GiB in all", models=models,
                  all=gib(models * cache))
    if one.card.device == "cuda" and slots > MOST:
        text += _("; more than {most} slots are slower: their kernels are not fused", most=MOST)
    return text + ")"


def precision(found: Found) -> str:
    return ("NF4, " if found.nf4 else "") + dtype_name(found.dtype)
