"""Ask a question of a fine-tuned PhoGPT, or of a base model without an adapter.

    python generate.py --adapter runs/nano-001 "Phở bò là gì?"
    python generate.py --model vinai/PhoGPT-4B-Chat "Phở bò là gì?"
    python generate.py --adapter runs/nano-001 --temperature 0.7 "Trà đá là gì?"
    python generate.py --adapter runs/nano-001 --chat
    python generate.py --adapter RUN --input ask.txt --output answers.jsonl
    python generate.py --adapter RUN --eval rows.jsonl --output scores.json
    python generate.py --adapter runs/nano-001 --serve 8000

The program prints the answer while the model generates it. The answer ends when the model generates
the end token </s>. Without --temperature, the model always chooses the most likely token.
"""

import phogpt_raw  # noqa: F401, before torch: Ctrl-C while torch loads prints one line

# isort: split
import argparse
import sys
import unicodedata
from pathlib import Path

import torch

from phogpt_raw.cards import DTYPES
from phogpt_raw.command_line import Parser
from phogpt_raw.config import number_text
from phogpt_raw.data.conversations import parse_map
from phogpt_raw.data.prompt import TEMPLATES, encode_prompt
from phogpt_raw.decode.engine import Engine
from phogpt_raw.decode.sampling import Sampling
from phogpt_raw.inference import memory_plan
from phogpt_raw.inference.answers import answer_file, lengths_in
from phogpt_raw.inference.conversation import chat
from phogpt_raw.inference.loading import Found, find
from phogpt_raw.inference.question import read_question
from phogpt_raw.inference.score import evaluate, prompt_lengths
from phogpt_raw.inference.streaming import Generation, Written, remarks, say, stream, tokens
from phogpt_raw.messages import _
from phogpt_raw.refusal import Refusal, exits_cleanly
from phogpt_raw.serve.models import named_adapters
from phogpt_raw.serve.start import serve

MOST_SAMPLES = 1000  # maximum number of answers to one question


def parse(arguments):
    parser = Parser(usage="%(prog)s [options] [question]", description=__doc__)
    parser.add_argument("question", nargs="?", help="the question; - reads it from standard input")
    parser.add_argument("--chat", action="store_true",
                        help="hold a conversation; a pipe gives one question per line")
    parser.add_argument("--system", default="", metavar="TEXT",
                        help="with --chat: a system text, put before the first question")
    parser.add_argument("--input", metavar="FILE", help="answer the questions in a file that "
                        "train.py can read, or in a text file with one question per line")
    parser.add_argument("--eval", metavar="FILE", help="score the answers to the rows of a file, "
                        "with and without the adapter")
    parser.add_argument("--output", type=Path, metavar="FILE", help="with --input: file for the "
                        "answers, one JSON line each; with --eval: .json file for the scores, and "
                        "an .html page of answers beside it")
    parser.add_argument("--num-samples", type=int, default=1, metavar="N",
                        help="with --input: N answers to each question (default 1)")
    parser.add_argument("--map", metavar="FIELD=NAME,…", help="with --input or --eval: the "
                        "column of each field, written as for train.py")
    parser.add_argument("--adapter", action="append", default=[], metavar="[NAME=]DIR",
                        help="folder of a run or of one of its checkpoints; with --serve it may be "
                        "given several times")
    parser.add_argument("--model", metavar="BASE", help="nano, a folder or a hub id (default: the "
                        "adapter's base, or nano without --adapter)")
    parser.add_argument("--revision", metavar="TEXT",
                        help="branch, tag or commit of the hub repository")
    parser.add_argument("--template", default="auto", choices=["auto", *TEMPLATES],
                        help="prompt template (default: that of the run or of the tokenizer)")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N",
                        help="maximum number of tokens in the answer (default 256)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T",
                        help="sample each token at random. 1 uses the model's probabilities; lower "
                        "values favour likely tokens (default 0: always the most likely token)")
    parser.add_argument("--top-k", type=int, default=0, metavar="K",
                        help="sample only from the K most likely tokens (default 0: from all)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P",
                        help="sample only from the most likely tokens that together have the "
                        "probability P (default 1: from all)")
    parser.add_argument("--min-p", type=float, default=0.0, metavar="P",
                        help="sample only from tokens with at least P times the probability of the "
                        "most likely token (default 0: from all)")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R",
                        help="above 1: tokens that are already in the text become less likely "
                        "(default 1)")
    parser.add_argument("--seed", type=int, metavar="N",
                        help="with --temperature: the same seed gives the same answer (default 0)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT",
                        help="end the answer before this text; may be given several times")
    parser.add_argument("--stats", action="store_true",
                        help="print the speed, and on a GPU the memory")
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES],
                        help="data type of activations (default: that of the run, if this "
                        "computer supports it)")
    parser.add_argument("--nf4", action=argparse.BooleanOptionalAction,
                        help="store the base in 4 bits (default: as in the run; yes without a run)")
    parser.add_argument("--nf4-cache", metavar="DIR",
                        help="folder that stores the 4-bit base; makes later starts faster")
    parser.add_argument("--no-capture", dest="capture", action="store_false",
                        help="on a GPU: do not use CUDA graphs")
    parser.add_argument("--serve", metavar="[HOST:]PORT",
                        help="serve the chat-completions protocol and a chat page (default host "
                        "127.0.0.1); the sampling flags set the defaults of requests")
    parser.add_argument("--api-key", metavar="KEY",
                        help="with --serve: the key that requests must send")
    parser.add_argument("--slots", type=int, metavar="N", help="with --serve: maximum number of "
                        "answers at once for each model (default 8, or fewer if memory is short)")
    parser.add_argument("--context", type=int, metavar="N", help="maximum number of tokens in a "
                        "prompt, or a conversation, plus its answer (default: the model's limit)")
    parser.add_argument("--dry-run", action="store_true", help="print the memory that answering "
                        "would need; read no weights and answer nothing")
    parser.add_argument("--card", metavar="NAME", help="with --dry-run: plan for this GPU: t4, "
                        "v100, l4, a100 or h200")
    options = parser.parse_args(arguments)
    check(options, parser)
    return options


def check(options, parser: Parser) -> None:
    """Raise Refusal for flags that cannot be combined."""
    asked = [options.question is not None, options.chat, bool(options.input), bool(options.eval),
             bool(options.serve)]
    if sum(asked) != 1:
        raise Refusal("what to ask? give exactly one of: a question, - for standard input, --chat, "
                      "--input FILE, --eval FILE, --serve PORT")
    only = {"system": "--chat", "output": "--input or --eval", "map": "--input or --eval",
            "num_samples": "--input", "stats": "a question", "api_key": "--serve",
            "slots": "--serve", "card": "--dry-run"}
    given = {"--chat": options.chat, "--input": options.input, "--eval": options.eval,
             "a question": options.question is not None, "--serve": options.serve,
             "--dry-run": options.dry_run}
    for name, needed in only.items():
        if getattr(options, name) != parser.get_default(name) \
                and not any(given[other] for other in needed.split(" or ")):
            raise Refusal(f"--{name.replace('_', '-')}: has an effect only with {needed}")
    if options.input and not options.output:
        raise Refusal("--input: name a file for the answers with --output")
    if not 1 <= options.num_samples <= MOST_SAMPLES:
        raise Refusal(f"--num-samples {options.num_samples}: must be from 1 to {MOST_SAMPLES:,}")
    if options.num_samples > 1 and not options.temperature:
        raise Refusal(f"--num-samples {options.num_samples}: without --temperature all answers "
                      f"are the same; give --temperature too")


def sampling_of(options) -> Sampling:
    """The values of the sampling flags. Raises Refusal for a value that is not valid, also for an
    invalid --max-new-tokens."""
    bounds = {"temperature": (0, 100), "top_k": (0, 2**31), "top_p": (0, 1), "min_p": (0, 1),
              "repetition_penalty": (0, 100), "seed": (0, 2**63 - 1)}
    for name, (low, high) in bounds.items():
        value, flag = getattr(options, name), f"--{name.replace('_', '-')}"
        if value is None:
            continue
        if not low <= value <= high or (name in ("top_p", "repetition_penalty") and value == 0):
            raise Refusal(f"{flag} {number_text(value)}: must be from {low:,} to {high:,}"
                          + (", and not 0" if low == value else ""))
        if name in ("top_k", "top_p", "min_p", "seed") and not options.temperature \
                and value != getattr(Sampling, name, None):
            raise Refusal(f"{flag} {number_text(value)}: needs random sampling; give --temperature "
                          f"too")
    if options.max_new_tokens < 1:
        raise Refusal(f"--max-new-tokens {options.max_new_tokens}: must be at least 1")
    return Sampling(options.temperature, options.top_k, options.top_p, options.min_p,
                    options.repetition_penalty)


def bounded(options, prompt: list[int], most: int) -> int:
    """The maximum number of tokens in the answer: --max-new-tokens, or fewer if the prompt and the
    answer would have more than `most` tokens together."""
    left = most - len(prompt)
    if left < 1:
        raise Refusal(f"the question is too long: {len(prompt):,} tokens of the {most:,} that the "
                      f"model was made for; shorten it")
    if options.max_new_tokens > left:
        say(_("(the answer has at most {n:,} tokens: the model was made for {most:,}, the "
              "question has {prompt:,})", n=left, most=most, prompt=len(prompt)))
    return min(left, options.max_new_tokens)


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    adapters = named_adapters(options.adapter)
    if options.serve:
        return serve(options, adapters, sampling_of(options))
    if len(adapters) > 1:
        raise Refusal("--adapter: several adapters need --serve; give one adapter")
    options.adapter = next(iter(adapters.values()), None)
    stops = tuple(unicodedata.normalize("NFC", stop) for stop in options.stop)  # answers are NFC
    how = Generation(options.max_new_tokens, sampling_of(options), options.seed or 0, stops,
                     options.capture)
    if options.dry_run:
        dry_run(options, how)
    elif options.chat:
        chat(find(options), how, options.system.strip())
    elif options.input:
        answer_file(find(options), options.input, options.output, how,
                    samples=options.num_samples, mapped=parse_map(options.map))
    elif options.eval:
        evaluate(find(options), options.eval, options.output, how, mapped=parse_map(options.map))
    else:
        one(options, read_question(options.question), how)


def dry_run(options, how: Generation) -> None:
    """Print the memory that the requested answers would need."""
    found = find(options)
    holds = found.shape.max_seq_len
    if options.question is not None:
        question = read_question(options.question)
        prompt = (encode_prompt(found.tokenizer, found.template, question) if found.tokenizer
                  else [0] * min(len(question.encode()), holds - 1))  # at most one token per byte
        most = bounded(options, prompt, holds)
        return memory_plan.show(found, memory_plan.one_answer(how, len(prompt), most))
    if options.chat:
        return memory_plan.show(found, memory_plan.conversation(found, how))
    mapped = parse_map(options.map)
    lengths = (lengths_in(found, options.input, mapped) if options.input
               else prompt_lengths(found, options.eval, mapped))
    memory_plan.show(found, memory_plan.file(found, how, lengths * options.num_samples))


def one(options, question: str, how: Generation) -> None:
    """Answer one question."""
    found = find(options)
    tokenizer = found.tokenizer
    prompt = encode_prompt(tokenizer, found.template, question)
    most = bounded(options, prompt, found.shape.max_seq_len)
    memory_plan.check_fits(found, memory_plan.one_answer(how, len(prompt), most))
    model, written = found.load(), Written()
    with Engine(model, eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id, rows=1,
                capture=how.capture) as engine:
        try:
            stream(engine, tokenizer, prompt, most, written, how)
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
