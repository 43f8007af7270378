"""The models of a server, which are named adapters over one base, and the memory that they need.

Each adapter has its own copy of the model's modules and its own engine. So no adapter has to be
exchanged between two steps. The copies share the base's weights (`same_base`). Each copy has its
own cache and CUDA graphs, and on a CPU also its own dequantised weights.
"""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from phogpt_raw.config import hub_id
from phogpt_raw.data.prompt import Template, encode_text
from phogpt_raw.decode.history import encode_history
from phogpt_raw.files import expanded
from phogpt_raw.inference import memory_plan
from phogpt_raw.inference.loading import Found, find
from phogpt_raw.inference.memory_plan import gib, precision
from phogpt_raw.messages import _, plural
from phogpt_raw.model.adapters import load_adapters, same_base
from phogpt_raw.model.nf4_product import MOST
from phogpt_raw.model.phogpt import PhoGPT
from phogpt_raw.refusal import Refusal
from phogpt_raw.serve.protocol import Conversation, ProtocolError
from phogpt_raw.simulate.decoding import DRAWN, GREEDY, Work, memory, most_rows

NAME = r"[\w.-]+"
# A slot is room for one answer. SLOTS is the default of --slots, if so many slots fit into memory.
SLOTS = 8
KINDS = (GREEDY, DRAWN, DRAWN)  # for greedy requests, sampled requests, and requests with top-p


@dataclass(frozen=True)
class Served:
    """A model that requests can name."""

    name: str
    model: PhoGPT
    tokenizer: object
    template: Template

    def encode(self, prompt: Conversation | str | list[int]) -> list[int]:
        """The token ids of a prompt.

        Raises ProtocolError if the prompt has no token, an unknown token id or too many tokens.
        """
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
                f"'{where}' has {len(ids):,} tokens; with the answer there can be at most "
                f"{config.max_seq_len:,}; shorten it", param=where, code="context_length_exceeded")
        return ids


def named_adapters(given: Sequence[str]) -> dict[str, Path]:
    """{name: folder} of the flags --adapter NAME=DIR. For --adapter DIR, the folder's name is used.
    """
    found = {}
    for text in given:
        name, folder = text.split("=", 1) if re.match(f"{NAME}=", text) else (None, text)
        path = expanded(folder)
        name = name or path.resolve().name
        if name in found:
            raise Refusal(f"--adapter {text}: two adapters have the name {name}; give each its own "
                          f"name with --adapter NAME=DIR")
        found[name] = path
    return found


def plan(options, adapters: dict[str, Path]) -> tuple[dict[str, Found], int]:
    """Return ({name: model}, number of slots of each model) for generate.py's options.

    Raises Refusal if the adapters do not have the same base, or if the slots do not fit into the
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
                raise Refusal(f"--adapter: {first} and {name} have different bases ({what}: "
                              f"{getattr(one, what)} and {getattr(other, what)}); choose one for "
                              f"all with {flag}, or run a server for each")
    return found, slots_for(options.slots, found, planned=options.dry_run)


def own_name(model: str | None) -> str:
    """The name of a base: a hub id unchanged, or the last part of a folder's path."""
    return model if model and hub_id(model) else expanded(model or "nano").resolve().name


def load(found: dict[str, Found]) -> list[Served]:
    """Load the models of a plan. They share one copy of the base's weights."""
    base = replace(next(iter(found.values())), adapter=None).load()
    served = []
    for name, one in found.items():
        model = same_base(base)
        if one.adapter:
            one.say_if_over_others()
            load_adapters(model, one.adapter, trainable=False)
        served.append(Served(name, model, one.tokenizer, one.template))
    return served


# -- memory


def slots_for(asked: int | None, found: dict[str, Found], *, planned: bool = False) -> int:
    """The number of slots of each model: --slots, or by default as many as fit, at most 8.

    Raises Refusal if the slots do not fit into the GPU's memory. With planned=True this error comes
    later: --dry-run first prints the memory that the slots would need.
    """
    if asked is not None and not 1 <= asked <= 1024:
        raise Refusal(f"--slots {asked}: must be from 1 to 1024")
    one = largest(found)
    if one.card.device == "cpu":
        return asked or SLOTS
    if asked and planned:
        return asked
    fit = most_rows(memory_plan.model_of(one), work_of(found, 1), one.card, asked or SLOTS)
    if not planned and (asked or 1) > fit:
        memory_plan.check_fits(one, work_of(found, asked or 1), remedy(found, fit))
    return asked or max(1, fit)


def remedy(found: dict[str, Found], fit: int) -> str:
    of = f" in each of {len(found)} models" if len(found) > 1 else ""
    return f"there is room for --slots {fit}{of}; a smaller --context makes each slot smaller"


def largest(found: dict[str, Found]) -> Found:
    """The model with the most adapter weights. Memory is computed as if all models had as many
    adapter weights."""
    return max(found.values(), key=lambda one: memory_plan.model_of(one).adapter)


def work_of(found: dict[str, Found], slots: int) -> Work:
    """The work that needs the most memory: every slot of each model has a conversation of the
    largest length."""
    return Work(slots, largest(found).shape.max_seq_len, models=len(found), kinds=KINDS)


def show_plan(found: dict[str, Found], slots: int) -> None:
    """Print the output of --dry-run."""
    one, work = largest(found), work_of(found, slots)
    fit = most_rows(memory_plan.model_of(one), work, one.card, slots)
    memory_plan.show(one, work, remedy(found, fit))


def memory_line(found: dict[str, Found], slots: int) -> str:
    """The memory of weights and slots as one line of text, which is printed at the start."""
    one, work = largest(found), work_of(found, slots)
    used = memory(memory_plan.model_of(one), work, one.card)
    answers = plural(slots, _("(1 slot for an answer"), _("({n:,} slots for answers", n=slots))
    text = answers + _(" of {tokens:,} tokens, prompt included", tokens=work.positions)
    if work.models > 1:
        text += _(", in each of {models} models", models=work.models)
    text += _(": cache at most {cache} GiB; base {weights} GiB, {precision}",
              cache=gib(used.cache), weights=gib(used.base), precision=precision(one))
    if one.card.memory_gib:
        text += _("; in all about {all} of {of:.1f} GiB, simulated", all=gib(used.total),
                  of=one.card.memory_gib)
    if one.card.device == "cuda" and slots > MOST:
        text += _("; more than {most} slots are slower: their kernels are not fused", most=MOST)
    return text + ")"
