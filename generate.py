"""Ask a fine-tuned PhoGPT, or the base alone:

    python generate.py --adapter runs/nano-001 "Phở bò là gì?"
    python generate.py --model vinai/PhoGPT-4B-Chat "Phở bò là gì?"

Greedy, streamed as it is written, ended by the model's own </s>.
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import TextStreamer

from phogpt_raw.cards import DTYPES, this_card, training_dtype
from phogpt_raw.command_line import Parser
from phogpt_raw.data.prompt import TEMPLATES, choose_template, encode_prompt
from phogpt_raw.decode import answer
from phogpt_raw.messages import _
from phogpt_raw.model.adapters import load_adapters, named_base, read_adapter_config
from phogpt_raw.model.weights import find_folder, load_base, read_config, read_tokenizer
from phogpt_raw.refusal import Refusal, exits_cleanly


class Streamer(TextStreamer):
    """Prints words as they are finished, without the space before the first (4B's template)."""

    begun = False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        text = text if self.begun else text.lstrip()
        self.begun = self.begun or bool(text)
        super().on_finalized_text(text, stream_end)


def parse(arguments):
    parser = Parser(description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", help="what to ask; - reads it from standard input")
    parser.add_argument("--adapter", type=Path, help="the folder of a run, or of a checkpoint")
    parser.add_argument("--model", help="the base (default: the one the adapter names, or nano)")
    parser.add_argument("--revision", help="the hub repository's branch, tag or commit")
    parser.add_argument("--template", default="auto", choices=["auto", *TEMPLATES])
    parser.add_argument("--max-new-tokens", "--max_new_tokens", type=int, default=256)
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES])
    parser.add_argument("--no-nf4", "--no_nf4", dest="nf4", action="store_false")
    return parser.parse_args(arguments)


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    question = sys.stdin.read() if options.question == "-" else options.question
    if not question.strip():
        raise Refusal("the question is empty")
    if options.max_new_tokens < 1:
        raise Refusal(f"--max-new-tokens {options.max_new_tokens}: must be at least 1")
    card = this_card()
    dtype, _reason = training_dtype(card, options.dtype)
    if options.adapter:
        read_adapter_config(options.adapter)
    base = options.model or (named_base(options.adapter) if options.adapter else "nano")
    folder = find_folder(base, options.revision, files=["*.json"])
    shape = read_config(folder)
    if options.max_new_tokens > shape.max_seq_len:
        raise Refusal(f"--max-new-tokens {options.max_new_tokens}: the model was made for "
                      f"{shape.max_seq_len} tokens at most")
    template, _reason = choose_template(read_tokenizer(folder, shape), options.template)
    model, tokenizer = load_base(base, nf4=options.nf4, dtype=dtype, device=card.device,
                                 revision=options.revision)
    if options.adapter:
        load_adapters(model, options.adapter, trainable=False)
    prompt = encode_prompt(tokenizer, TEMPLATES[template], question)
    streamer = Streamer(tokenizer)
    [written] = answer(
        model, [prompt], eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id,
        max_new_tokens=options.max_new_tokens,
        on_token=lambda token: streamer.put(torch.tensor([token])),
    )
    streamer.end()
    if not written.stopped:
        print(_("(cut after {n} tokens; --max-new-tokens writes on)", n=options.max_new_tokens),
              file=sys.stderr)


if __name__ == "__main__":
    main()
