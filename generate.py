"""Ask a fine-tuned PhoGPT a question, or a base without an adapter.

    python generate.py --adapter runs/nano-001 "Phở bò là gì?"
    python generate.py --model vinai/PhoGPT-4B-Chat "Phở bò là gì?"
    python generate.py --adapter runs/nano-001 --temperature 0.7 "Trà đá là gì?"

The answer is shown while it is written. It ends where the model writes its end token </s>. Without
--temperature each token is the most likely one.
"""

import argparse
import codecs
import os
import sys
import time
import unicodedata
from contextlib import suppress
from pathlib import Path

import torch

from phogpt_raw.cards import DTYPES, this_card, training_dtype
from phogpt_raw.command_line import Parser
from phogpt_raw.config import check_nf4_cache
from phogpt_raw.data.prompt import TEMPLATES, choose_template, encode_prompt
from phogpt_raw.decode.engine import Engine
from phogpt_raw.decode.sampling import Sampling
from phogpt_raw.decode.text import TextStream, loops
from phogpt_raw.messages import _, plural
from phogpt_raw.model.adapter_config import Origin, chosen_base, read_origin
from phogpt_raw.model.adapters import load_adapters
from phogpt_raw.model.weights import (
    WITHOUT_WEIGHTS,
    find_folder,
    load_base,
    read_config,
    read_tokenizer,
)
from phogpt_raw.refusal import Refusal, exits_cleanly


def parse(arguments):
    parser = Parser(usage="%(prog)s [options] question", description=__doc__)
    parser.add_argument("question", help="the question; - reads it from standard input")
    parser.add_argument("--adapter", type=Path, metavar="DIR",
                        help="folder of a run or of one of its checkpoints")
    parser.add_argument("--model", metavar="BASE", help="nano, a folder or a hub id (default: the "
                        "adapter's base; without --adapter nano)")
    parser.add_argument("--revision", metavar="TEXT",
                        help="branch, tag or commit of the hub repository")
    parser.add_argument("--template", default="auto", choices=["auto", *TEMPLATES],
                        help="prompt template (default: the run's; without a run the tokenizer's)")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N",
                        help="most tokens in the answer (default 256)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T",
                        help="draw each token at random. 1: with the model's probabilities; below "
                        "1: likely tokens more often (default 0: always the most likely token)")
    parser.add_argument("--top-k", type=int, default=0, metavar="K",
                        help="draw from the K most likely tokens only (default 0: from all)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P",
                        help="draw from the most likely tokens only, as many as have the "
                        "probability P together (default 1: from all)")
    parser.add_argument("--min-p", type=float, default=0.0, metavar="P",
                        help="draw only from tokens with at least P times the probability of the "
                        "most likely one (default 0: from all)")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R",
                        help="above 1: makes tokens that are already there less likely (default 1)")
    parser.add_argument("--seed", type=int, metavar="N",
                        help="with --temperature: the same seed draws the same answer (default 0)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT",
                        help="end the answer before this text; may be given several times")
    parser.add_argument("--stats", action="store_true",
                        help="print the speed, and on a GPU the memory")
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES],
                        help="data type of activations (default: the run's, if this computer "
                        "computes in it)")
    parser.add_argument("--nf4", action=argparse.BooleanOptionalAction,
                        help="keep the base in 4 bits (default: as in the run; without a run yes)")
    parser.add_argument("--nf4-cache", metavar="DIR",
                        help="folder that keeps the 4-bit base, for faster later starts")
    parser.add_argument("--no-capture", dest="capture", action="store_false",
                        help="on a GPU: do not use CUDA graphs")
    return parser.parse_args(arguments)


def from_stdin() -> str:
    """Standard input as text, with or without the mark that Windows puts before it."""
    read = getattr(sys.stdin, "buffer", None)
    if read is None:
        return sys.stdin.read()
    content = read.read()
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return content.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError:
        raise Refusal("the question is not UTF-8; save it as UTF-8, or type it anew") from None


def read_question(given: str) -> str:
    """The question of the command line, or of standard input for `-`; Refusal where it is empty or
    no text.

    Where the system's encoding is not UTF-8, Python hides the bytes of an argument that it cannot
    read in lone surrogates. They are read again as UTF-8.
    """
    question = from_stdin() if given == "-" else given
    try:
        question = os.fsencode(question).decode("utf-8") if broken(question) else question
    except UnicodeError:
        raise Refusal("the question is not UTF-8; convert it, or type it anew") from None
    question = question.removeprefix("\ufeff")
    lost = next((letter for letter in question if letter in "\0\ufffd\ufffe\uffff"), None)
    if lost:
        raise Refusal(f"the question holds U+{ord(lost):04X}, which no text has: it was saved or "
                      f"converted in another encoding; save it as UTF-8")
    if not question.strip():
        raise Refusal("the question is empty")
    return question


def broken(text: str) -> bool:
    """Whether a text has lone surrogates."""
    return any("\ud800" <= letter <= "\udfff" for letter in text)


def dtype_for(card, asked: str, of_the_run: str):
    """The dtype asked for; else the run's, unless the card at hand is of another kind and computes
    in another."""
    if asked == "auto" and of_the_run != "auto":
        with suppress(Refusal):
            return training_dtype(card, of_the_run)[0]
    return training_dtype(card, asked)[0]


def sampling_of(options) -> Sampling:
    """The flags of drawing; Refusal for what cannot be, --max-new-tokens too."""
    bounds = {"temperature": (0, 100), "top_k": (0, 2**31), "top_p": (0, 1), "min_p": (0, 1),
              "repetition_penalty": (0, 100), "seed": (0, 2**63 - 1)}
    for name, (low, high) in bounds.items():
        value, flag = getattr(options, name), f"--{name.replace('_', '-')}"
        if value is None:
            continue
        if not low <= value <= high or (name in ("top_p", "repetition_penalty") and value == 0):
            raise Refusal(f"{flag} {value}: must be from {low} to {high}"
                          + (", and not 0" if low == value else ""))
        if name in ("top_k", "top_p", "min_p", "seed") and not options.temperature \
                and value != getattr(Sampling, name, None):
            raise Refusal(f"{flag} {value}: is for drawing at random; give --temperature too")
    if options.max_new_tokens < 1:
        raise Refusal(f"--max-new-tokens {options.max_new_tokens}: must be at least 1")
    return Sampling(options.temperature, options.top_k, options.top_p, options.min_p,
                    options.repetition_penalty)


def bounded(options, prompt: list[int], most: int) -> int:
    """Tokens that the answer may have, so that the model's `most` hold it and its prompt."""
    left = most - len(prompt)
    if left < 1:
        raise Refusal(f"the question is too long: {len(prompt):,} tokens of the {most:,} that the "
                      f"model was made for; shorten it")
    if options.max_new_tokens > left:
        say(_("(at most {n:,} tokens: the model was made for {most:,}, and the question has "
              "{prompt:,})", n=left, most=most, prompt=len(prompt)))
    return min(left, options.max_new_tokens)


def say(line: str) -> None:
    print(line, file=sys.stderr)


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    question, sampling = read_question(options.question), sampling_of(options)
    stops = [unicodedata.normalize("NFC", stop) for stop in options.stop]  # as answers are
    card = this_card()
    options.adapter = options.adapter and options.adapter.expanduser()
    made = read_origin(options.adapter) if options.adapter else Origin("nano")
    nf4 = options.nf4 if options.nf4 is not None else made.nf4
    check_nf4_cache(options.nf4_cache, nf4=nf4)
    dtype = dtype_for(card, options.dtype, made.dtype)
    base, revision = chosen_base(options.adapter, made, options.model, options.revision)
    folder = find_folder(base, revision, files=WITHOUT_WEIGHTS)
    shape = read_config(folder)
    tokenizer = read_tokenizer(folder, shape)
    template, _reason = choose_template(tokenizer, options.template, made.template)
    prompt = encode_prompt(tokenizer, TEMPLATES[template], question)
    most = bounded(options, prompt, shape.max_seq_len)
    model, tokenizer = load_base(base, nf4=nf4, dtype=dtype, device=card.device,
                                 revision=revision, nf4_cache=options.nf4_cache)
    if options.adapter:
        load_adapters(model, options.adapter, trainable=False)
    stream, ids, begun, first = TextStream(tokenizer, stops), [], time.perf_counter(), None
    with Engine(model, eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id, rows=1,
                sampling=sampling, capture=options.capture) as engine:
        engine.add(0, prompt, most, options.seed or 0)
        shown, ended = "", False
        try:
            for token in engine.run():
                first = first or time.perf_counter()
                if token.id is None:
                    ended = ended or token.stopped
                    continue
                ids.append(token.id)
                shown += show(stream.put(token.id), shown)
                if stream.stopped:
                    ended = True
                    engine.drop(0)
        except KeyboardInterrupt:
            print()
            say(_("(stopped by hand)"))
            sys.exit(130)
    show(stream.end(), shown)
    print()
    if not ended:
        text = _("(cut at {n}: raise --max-new-tokens for a longer answer)", n=tokens(most))
        full = _("(cut at {n}: the model was made for no more)", n=tokens(most))
        say(full if len(prompt) + most == shape.max_seq_len else text)
    if loops(ids):
        say(_("(the answer repeats itself; --repetition-penalty 1.2 may help, or more training)"))
    if options.stats:
        say(stats(card, len(prompt), len(ids), first - begun, time.perf_counter() - first))


def tokens(count: int) -> str:
    return plural(count, _("1 token"), _("{n:,} tokens", n=count))


def show(text: str, shown: str) -> str:
    """Print text, without the spaces before the first letter (4B's template begins with one)."""
    text = text if shown else text.lstrip()
    print(text, end="", flush=True)
    return text


def stats(card, prompt: int, written: int, first_s: float, then_s: float) -> str:
    text = _("({prompt} read, {written:,} written; the first after {first:.3f} s",
             prompt=tokens(prompt), written=written, first=first_s)
    if written > 1:
        text += _(", then {rate:,.1f} tokens/s", rate=(written - 1) / then_s)
    if card.device == "cuda":
        gib = torch.cuda.max_memory_allocated() / 2**30
        text += _("; at most {gib:.2f} GiB allocated", gib=gib)
    return text + ")"


if __name__ == "__main__":
    main()
