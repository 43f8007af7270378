"""Ask a fine-tuned PhoGPT a question, or a base without an adapter.

    python generate.py --adapter runs/nano-001 "Phở bò là gì?"
    python generate.py --model vinai/PhoGPT-4B-Chat "Phở bò là gì?"
    python generate.py --adapter runs/nano-001 --temperature 0.7 "Trà đá là gì?"
    python generate.py --adapter runs/nano-001 --chat

The answer is shown while it is written. It ends where the model writes its end token </s>. Without
--temperature each token is the most likely one.
"""

import argparse
import sys
import unicodedata
from pathlib import Path

import torch

from phogpt_raw.cards import DTYPES
from phogpt_raw.command_line import Parser
from phogpt_raw.data.prompt import TEMPLATES, encode_prompt
from phogpt_raw.decode.engine import Engine
from phogpt_raw.decode.sampling import Sampling
from phogpt_raw.messages import _
from phogpt_raw.refusal import Refusal, exits_cleanly
from phogpt_raw.talk.conversation import chat
from phogpt_raw.talk.loading import Found, find
from phogpt_raw.talk.question import read_question
from phogpt_raw.talk.streaming import Written, remarks, say, stream, tokens


def parse(arguments):
    parser = Parser(usage="%(prog)s [options] [question]", description=__doc__)
    parser.add_argument("question", nargs="?", help="the question; - reads it from standard input")
    parser.add_argument("--chat", action="store_true",
                        help="a conversation; from a pipe, one question per line")
    parser.add_argument("--system", default="", metavar="TEXT",
                        help="with --chat: what stands before the first question")
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
    options = parser.parse_args(arguments)
    if (options.question is not None) == options.chat:
        raise Refusal("what to ask? a question, or - for standard input, or --chat")
    if options.system and not options.chat:
        raise Refusal("--system: is for --chat; write it into the question")
    return options


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


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    stops = [unicodedata.normalize("NFC", stop) for stop in options.stop]  # as answers are
    how = dict(sampling=sampling_of(options), seed=options.seed or 0, stops=stops)
    if options.chat:
        chat(find(options), most=options.max_new_tokens, system=options.system.strip(),
             capture=options.capture, **how)
    else:
        one(options, read_question(options.question), how)


def one(options, question: str, how: dict) -> None:
    """Answer one question."""
    found = find(options)
    tokenizer = found.tokenizer
    prompt = encode_prompt(tokenizer, found.template, question)
    most = bounded(options, prompt, found.shape.max_seq_len)
    model, written = found.load(), Written()
    with Engine(model, eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id, rows=1,
                capture=options.capture) as engine:
        try:
            stream(engine, tokenizer, prompt, most, written, **how)
        except KeyboardInterrupt:
            say(_("(stopped by hand)"))
            sys.exit(130)
    for line in remarks(written, most, full=len(prompt) + most == found.shape.max_seq_len):
        say(line)
    if options.stats:
        say(stats(found, len(prompt), written))


def stats(found: Found, prompt: int, written: Written) -> str:
    n = len(written.ids)
    text = _("({prompt} read, {written:,} written; the first after {first:.3f} s",
             prompt=tokens(prompt), written=n, first=written.first_s)
    if n > 1:
        text += _(", then {rate:,.1f} tokens/s", rate=(n - 1) / written.then_s)
    if found.card.device == "cuda":
        gib = torch.cuda.max_memory_allocated() / 2**30
        text += _("; at most {gib:.2f} GiB allocated", gib=gib)
    return text + ")"


if __name__ == "__main__":
    main()
