"""Ask a fine-tuned PhoGPT, or the base alone:

    python generate.py --adapter runs/nano-001 "Phở bò là gì?"
    python generate.py --model vinai/PhoGPT-4B-Chat "Phở bò là gì?"
    python generate.py --adapter runs/nano-001 --temperature 0.7 --top-p 0.9 "Phở bò là gì?"
    python generate.py --adapter runs/nano-001 --serve 8000

Greedy unless --temperature is given, streamed as it is written, ended by the model's own </s>.
"""

import argparse
import codecs
import sys
import time
import unicodedata

import torch

from phogpt_raw.cards import DTYPES, recorded_dtype, this_card
from phogpt_raw.command_line import Parser
from phogpt_raw.config import check_nf4_cache
from phogpt_raw.data.prompt import TEMPLATES, choose_template, encode_prompt
from phogpt_raw.decode.engine import Engine
from phogpt_raw.decode.sampling import Sampling
from phogpt_raw.decode.text import TextStream, loops
from phogpt_raw.messages import _
from phogpt_raw.model.adapter_config import Origin, check_not_merged, chosen_base, read_origin
from phogpt_raw.model.adapters import load_adapters
from phogpt_raw.model.weights import (
    WITHOUT_WEIGHTS,
    find_folder,
    load_base,
    read_config,
    read_tokenizer,
)
from phogpt_raw.refusal import Refusal, exits_cleanly
from phogpt_raw.serve.models import named_adapters
from phogpt_raw.serve.start import serve


def parse(arguments):
    parser = Parser(description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", nargs="?", help="what to ask; - reads it from standard input")
    parser.add_argument("--adapter", action="append", default=[], metavar="[NAME=]DIR",
                        help="the folder of a run, or of a checkpoint; with --serve several, each "
                        "under a name")
    parser.add_argument("--model", help="the base (default: the one the adapter names, or nano)")
    parser.add_argument("--revision", help="the hub repository's branch, tag or commit")
    parser.add_argument("--template", default="auto", choices=["auto", *TEMPLATES],
                        help="around the question (default: the run's, else the tokenizer's)")
    parser.add_argument("--max-new-tokens", "--max_new_tokens", type=int, default=256,
                        help="tokens of the answer, at most (default 256)")
    parser.add_argument("--temperature", type=float, default=0.0,
                        help="draw tokens at random; 1: as the model weighs them, less: the "
                        "likelier ones more often (default 0: always the likeliest)")
    parser.add_argument("--top-k", "--top_k", type=int, default=0,
                        help="draw from the K likeliest tokens (default 0: from all)")
    parser.add_argument("--top-p", "--top_p", type=float, default=1.0,
                        help="draw from the likeliest that together have this probability")
    parser.add_argument("--min-p", "--min_p", type=float, default=0.0,
                        help="draw from those at least this likely, beside the likeliest")
    parser.add_argument("--repetition-penalty", "--repetition_penalty", type=float, default=1.0,
                        help="above 1: tokens that have been written become less likely")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default 0)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT",
                        help="end the answer before this text; may be given several times")
    parser.add_argument("--stats", action="store_true", help="say how fast it was, and the memory")
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES],
                        help="of the activations (default: the run's, where the card has it)")
    parser.add_argument("--nf4", action="store_true", default=None,
                        help="the base in 4 bits (default: as the run had it, else yes)")
    parser.add_argument("--no-nf4", "--no_nf4", dest="nf4", action="store_false")
    parser.add_argument("--nf4-cache", "--nf4_cache", metavar="DIR",
                        help="a folder that keeps the quantised base: later starts are faster")
    parser.add_argument("--no-capture", "--no_capture", dest="capture", action="store_false",
                        help="on a GPU: without CUDA graphs")
    parser.add_argument("--serve", metavar="[HOST:]PORT",
                        help="answer requests of the chat-completions protocol, and show a page to "
                        "chat with (default host 127.0.0.1); the flags of drawing are its defaults")
    parser.add_argument("--api-key", "--api_key", metavar="KEY",
                        help="with --serve: what requests must hold")
    parser.add_argument("--slots", type=int, metavar="N",
                        help="with --serve: answers written at once (default 8, or as many as fit)")
    options = parser.parse_args(arguments)
    if bool(options.serve) == (options.question is not None):
        raise Refusal("give a question, or --serve PORT; see --help")
    for flag in ("api_key", "slots"):
        if getattr(options, flag) is not None and not options.serve:
            raise Refusal(f"--{flag.replace('_', '-')}: is for --serve")
    return options


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


def sampling_of(options) -> Sampling:
    """The flags of drawing; Refusal for what cannot be."""
    bounds = {"temperature": (0, 100), "top_k": (0, 2**31), "top_p": (0, 1), "min_p": (0, 1),
              "repetition_penalty": (0, 100), "seed": (0, 2**63 - 1)}
    for name, (low, high) in bounds.items():
        value, flag = getattr(options, name), f"--{name.replace('_', '-')}"
        if not low <= value <= high or (name in ("top_p", "repetition_penalty") and value == 0):
            raise Refusal(f"{flag} {value}: must be from {low} to {high}"
                          + (", and not 0" if low == value else ""))
        if name in ("top_k", "top_p", "min_p") and not options.temperature \
                and value != getattr(Sampling, name):
            raise Refusal(f"{flag} {value}: is for drawing at random; give --temperature too")
    return Sampling(options.temperature, options.top_k, options.top_p, options.min_p,
                    options.repetition_penalty)


def bounded(options, prompt: list[int], most: int) -> int:
    """Tokens that the answer may have, so that the model's `most` hold it and its prompt."""
    if options.max_new_tokens < 1:
        raise Refusal(f"--max-new-tokens {options.max_new_tokens}: must be at least 1")
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
    adapters = named_adapters(options.adapter)
    if options.serve:
        return serve(options, adapters, sampling_of(options))
    if len(adapters) > 1:
        raise Refusal("--adapter: several are for --serve; give one")
    options.adapter = next(iter(adapters.values()), None)
    question = from_stdin() if options.question == "-" else options.question
    question = question.removeprefix("\ufeff")
    if not question.strip():
        raise Refusal("the question is empty")
    if any("\ud800" <= letter <= "\udfff" for letter in question):
        raise Refusal("the question is not UTF-8; convert it, or type it anew")
    sampling = sampling_of(options)
    stops = [unicodedata.normalize("NFC", stop) for stop in options.stop]  # as answers are
    card = this_card()
    made = read_origin(options.adapter) if options.adapter else Origin("nano")
    nf4 = options.nf4 if options.nf4 is not None else made.nf4
    check_nf4_cache(options.nf4_cache, nf4=nf4)
    dtype = recorded_dtype(card, options.dtype, made.dtype)
    base, revision, named = chosen_base(options.adapter, made, options.model, options.revision)
    folder = find_folder(base, revision, WITHOUT_WEIGHTS, named)
    shape = read_config(folder)
    if options.adapter:
        check_not_merged(folder, options.adapter)
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
                capture=options.capture) as engine:
        engine.add(0, prompt, most, options.seed, sampling)
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
        text = _("(cut after {n} tokens; --max-new-tokens writes on)", n=most)
        full = _("(cut after {n} tokens: the model was made for no more)", n=most)
        say(full if len(prompt) + most == shape.max_seq_len else text)
    if loops(ids):
        say(_("(the answer repeats itself; --repetition-penalty 1.2 may help, or more training)"))
    if options.stats:
        say(stats(card, len(prompt), len(ids), first - begun, time.perf_counter() - first))


def show(text: str, shown: str) -> str:
    """Print text, without the spaces before the first letter (4B's template begins with one)."""
    text = text if shown else text.lstrip()
    print(text, end="", flush=True)
    return text


def stats(card, prompt: int, written: int, first_s: float, then_s: float) -> str:
    text = _("({prompt:,} tokens read, {written:,} written; the first after {first:.3f} s",
             prompt=prompt, written=written, first=first_s)
    if written > 1:
        text += _(", then {rate:,.1f} tokens/s", rate=(written - 1) / then_s)
    if card.device == "cuda":
        gib = torch.cuda.max_memory_allocated() / 2**30
        text += _("; at most {gib:.2f} GiB allocated", gib=gib)
    return text + ")"


if __name__ == "__main__":
    main()
