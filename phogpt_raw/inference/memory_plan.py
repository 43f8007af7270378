"""The GPU memory that is needed to answer questions.

generate.py prints this memory at its start, and stops then if --dry-run is given. If the GPU has
too little memory, an error is raised before any weights are read.
"""

from phogpt_raw.cards import GIB, capability, dtype_name
from phogpt_raw.decode.engine import PREFILL, rows_that_fit
from phogpt_raw.inference.loading import Found
from phogpt_raw.inference.streaming import Generation
from phogpt_raw.messages import _, plural
from phogpt_raw.model.nf4_product import MOST
from phogpt_raw.refusal import Refusal
from phogpt_raw.show.console import listing
from phogpt_raw.simulate.decoding import (
    DRAWN,
    GREEDY,
    Memory,
    Model,
    Work,
    adapter_bytes,
    adapter_weights,
    base_bytes,
    memory,
)
from phogpt_raw.simulate.rates import CONTEXT

CPU_MIB = 2048  # for keys and values on a CPU
SHORTER = "a smaller --context needs less memory"


def model_of(found: Found) -> Model:
    """The properties of a model from which its memory is computed."""
    return Model(found.shape, found.dtype, found.nf4,
                 adapter_weights(found.adapter) if found.adapter else 0)


def one_answer(how: Generation, prompt: int, most: int) -> Work:
    """The work of one answer of at most `most` tokens to a prompt of `prompt` tokens."""
    return Work(1, prompt + most, prompt, kinds=kinds(how))


def conversation(found: Found, how: Generation) -> Work:
    """The work of a conversation of the largest length that the model allows."""
    most = found.shape.max_seq_len
    return Work(1, most, most, kinds=kinds(how))


def file(found: Found, how: Generation, lengths: list[int]) -> Work:
    """The work of answering the prompts of a file, several at the same time.

    lengths: the number of tokens in each prompt.
    """
    longest = min(max(lengths) + how.most, found.shape.max_seq_len)
    model, card = model_of(found), found.card
    free = card.memory_gib * GIB - CONTEXT - base_bytes(model) - adapter_bytes(model)
    rows = rows_at_once(found, longest, len(lengths), int(free) // 2**21 if card.memory_gib
                        else CPU_MIB)
    return Work(rows, longest, min(PREFILL, rows * max(lengths)), kinds=kinds(how))


def rows_at_once(found: Found, longest: int, prompts: int, free_mib: int) -> int:
    """The number of prompts of a file that are answered at the same time.

    longest: the number of tokens in the longest prompt and its answer together. free_mib: the
    memory in MiB that all keys and values may use.
    """
    return min(rows_that_fit(found.shape, longest, found.dtype.itemsize, max(0, free_mib)),
               prompts, MOST)


def kinds(how: Generation) -> tuple[int, ...]:
    return (GREEDY if how.sampling.greedy else DRAWN,) if how.capture else ()


def check_fits(found: Found, work: Work, remedy: str = SHORTER) -> Memory:
    """The memory that the work needs. Raises Refusal with a remedy if the GPU has less."""
    used = memory(model_of(found), work, found.card)
    card = found.card
    if card.memory_gib and used.total > card.memory_gib * GIB:
        if used.base > card.memory_gib * GIB / 2 and not found.nf4:
            remedy = "without --no-nf4 the base takes a third of that"
        raise Refusal(f"{card.name} has {card.memory_gib:.1f} GiB, and this takes about "
                      f"{gib(used.total)}: {parts(used)}; {remedy}")
    return used


def parts(used: Memory) -> str:
    return _("base {base}, adapters {adapters}, cache {cache}, the rest {rest}",
             base=gib(used.base), adapters=gib(used.adapters), cache=gib(used.cache),
             rest=gib(used.prompts + used.graphs + used.cuda + used.dequantised))


def in_short(found: Found, work: Work, used: Memory) -> str:
    """The memory as one line of text, which is printed at the start on a GPU."""
    return _("({name}, {precision}: about {all} of {of:.1f} GiB, simulated: {parts})",
             name=found.card.name, precision=precision(found), all=gib(used.total),
             of=found.card.memory_gib, parts=parts(used))


def show(found: Found, work: Work, remedy: str = SHORTER) -> None:
    """Print the output of --dry-run. Raises Refusal if the GPU has too little memory."""
    used, card, gpu = memory(model_of(found), work, found.card), found.card, found.card.memory_gib
    adapter = (_("none") if not found.adapter else
               plural(work.models, f"{gib(used.adapters)} GiB",
                      _("{gib} GiB for {n}", gib=gib(used.adapters), n=work.models)))
    rows = _("{n} at once, of at most {tokens:,} tokens, prompt included", n=work.rows,
             tokens=work.positions)
    if work.models > 1:
        rows += _(", for each of {n} models", n=work.models)
    listing("PhoGPT raw", {
        _("model"): f"{found.base}: {precision(found)}",
        _("card"): _("{name}, {gib:.1f} GiB, compute capability {capability}", name=card.name,
                     gib=gpu, capability=capability(card)) if gpu else card.name,
        _("answers"): rows,
        _("base"): f"{gib(used.base)} GiB",
        _("adapter"): adapter,
        **({} if gpu else {_("dequantised"): f"{gib(used.dequantised)} GiB"}),
        _("cache"): _("{gib} GiB, if all answers are that long", gib=gib(used.cache)),
        _("prompts"): _("{gib} GiB while they are read", gib=gib(used.prompts)),
        **({_("CUDA graphs"): f"{gib(used.graphs)} GiB",
            _("CUDA"): _("{gib} GiB, with reserved memory that no tensor uses",
                         gib=gib(used.cuda))} if gpu else {}),
        _("in all"): _("about {gib} GiB, simulated", gib=gib(used.total)) + (
            _("; the card has {of:.1f}", of=gpu) if gpu else ""),
    })
    check_fits(found, work, remedy)


def gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def precision(found: Found) -> str:
    return ("NF4, " if found.nf4 else "") + dtype_name(found.dtype)
