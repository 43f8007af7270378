"""Take a fine-tuned PhoGPT elsewhere: files for transformers, llama.cpp and Ollama.

    python -m phogpt_raw.export runs/nano-001 out --merged       a checkpoint for transformers
    python -m phogpt_raw.export runs/nano-001 out --gguf q8_0    for llama.cpp and Ollama
    python -m phogpt_raw.export runs/nano-001 out --lora-gguf    for llama.cpp, over a base's GGUF
    python -m phogpt_raw.export runs/nano-001 --push ME/NAME     adapter and card, to the hub

The adapter's base is read as it is stored and never quantised on the way. The folder is written
whole or not at all.
"""

import argparse
import shlex
import time
from pathlib import Path

import torch
from tqdm import tqdm

from phogpt_raw.cards import DTYPES, dtype_name, this_card, training_dtype
from phogpt_raw.command_line import Parser
from phogpt_raw.config import hub_id
from phogpt_raw.data.examples import PAIRS
from phogpt_raw.data.prompt import TEMPLATES, choose_template, encode_row
from phogpt_raw.data.rows import read_rows
from phogpt_raw.export import exported_card, gguf, push
from phogpt_raw.export.chat import jinja, modelfile
from phogpt_raw.export.distance import distance
from phogpt_raw.export.merge import Merger, mapped_tensors, stored_dtype, write_merged
from phogpt_raw.files import check_space, whole_folder
from phogpt_raw.messages import _
from phogpt_raw.model import nf4_file
from phogpt_raw.model.adapters import named_base
from phogpt_raw.model.nf4 import NF4_BYTES
from phogpt_raw.model.weights import (
    find_cache,
    find_folder,
    read_json,
    read_model,
    read_tokenizer,
)
from phogpt_raw.refusal import Refusal, exits_cleanly
from phogpt_raw.show.console import listing, out

COMPARED = 8  # texts over which a merged checkpoint is compared with the adapter on NF4


def parse(arguments):
    parser = Parser(prog="python -m phogpt_raw.export", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="the folder of a run or of a checkpoint; or a "
                        "base (nano, a folder, a hub id), to export it without an adapter")
    parser.add_argument("out", metavar="OUT", type=Path, nargs="?",
                        help="the folder to write; must not exist")
    parser.add_argument("--merged", action="store_true", help="a checkpoint in PhoGPT's format, "
                        "the adapter merged into the base's weights")
    parser.add_argument("--gguf", choices=gguf.KINDS, help="model.gguf for llama.cpp, merged, and "
                        "a Modelfile for Ollama")
    parser.add_argument("--lora-gguf", "--lora_gguf", action="store_true", help="adapter.gguf: the "
                        "adapter alone, for llama.cpp over a GGUF of the same base")
    parser.add_argument("--nf4", action="store_true", help="the base's weights in NF4, as this "
                        "machine quantises them; train.py and generate.py read them with "
                        "--nf4-cache OUT")
    parser.add_argument("--model", help="the base (default: the one that the adapter names)")
    parser.add_argument("--revision", help="the hub repository's branch, tag or commit")
    parser.add_argument("--template", default="auto", choices=["auto", *TEMPLATES],
                        help="default: the run's, else by the tokenizer")
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES],
                        help="of --merged (auto: the base's own) and of --nf4 (auto: the card's)")
    parser.add_argument("--push", metavar="USER/NAME", help="upload OUT to this repository of the "
                        "hub (a new one is private); without OUT, the run's adapter and card. The "
                        "token is HF_TOKEN's, or that of hf auth login")
    options = parser.parse_args(arguments)
    written = options.merged or options.gguf or options.lora_gguf or options.nf4
    if bool(options.out) != bool(written) or not (written or options.push):
        raise Refusal("what to write, and where? name a folder OUT and one or more of --merged, "
                      "--gguf, --lora-gguf and --nf4; or --push USER/NAME alone")
    if options.out and options.out.exists():
        raise Refusal(f"{options.out}: exists already; name a folder that does not")
    if options.push:
        push.check(options.push)
    options.adapter = Path(options.run).expanduser()
    if not (options.adapter / "adapter_config.json").is_file():
        options.adapter = None
        if options.lora_gguf:
            raise Refusal(f"--lora-gguf: {options.run} holds no adapter (adapter_config.json)")
    return options


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.out:
        write(options)
    if options.push:
        folder = options.out or Path(options.run).expanduser()
        out.print(push.in_words(folder, options.push), markup=False)
        out.print(push.push(folder, options.push), markup=False)


def write(options) -> None:
    """Make OUT, and say what is in it."""
    if options.gguf or options.lora_gguf:
        gguf.import_gguf()
    base = options.model or (named_base(options.adapter) if options.adapter else options.run)
    weights = options.merged or options.gguf or options.nf4
    folder = find_folder(base, options.revision, **({} if weights else {"files": ["*.json"]}))
    merger = Merger(folder, options.adapter)
    tokenizer = read_tokenizer(folder, merger.config)
    template = template_of(options, tokenizer)
    dtype = DTYPES[options.dtype] if options.dtype != "auto" else (
        stored_dtype(merger) if options.merged else torch.float32)
    check_space(options.out, bytes_needed(options, merger, dtype))
    name = options.adapter.resolve().name if options.adapter else Path(base).name
    begun = time.monotonic()
    with whole_folder(options.out) as made:
        if options.merged:
            write_merged(merger, made, dtype, base, progress("merged"))
            say_distance(merger, made, dtype, tokenizer, template)
        if options.gguf:
            gguf.write_model(merger, made / "model.gguf", options.gguf, name=name,
                             chat_template=jinja(TEMPLATES[template]), progress=progress("gguf"))
            text = modelfile(TEMPLATES[template], merger.config.max_seq_len)
            (made / "Modelfile").write_text(text, "utf-8")
        if options.lora_gguf:
            gguf.write_adapter(merger, made / "adapter.gguf")
        if options.nf4:
            write_nf4(folder, made, options.dtype)
        exported_card.write(
            made / "README.md", title=name, base=hub_id(base), template=template,
            adapted=merger.adapters is not None, kind=options.gguf, lora=options.lora_gguf,
            merged=dtype_name(dtype) if options.merged else None)
    seconds = time.monotonic() - begun
    say_uses(options, base, template, seconds)


def template_of(options, tokenizer) -> str:
    """The name of the template: as asked for, as the run was trained, else by the tokenizer."""
    file = options.adapter and options.adapter / "config.json"
    asked = options.template
    if asked == "auto" and file and file.is_file():
        asked = read_json(file).get("template", "auto")
    return choose_template(tokenizer, asked)[0]


def bytes_needed(options, merger: Merger, dtype: torch.dtype) -> int:
    size = 2**24  # tokenizer, metadata, adapter
    if options.merged:
        size += dtype.itemsize * sum(tensor.numel() for tensor in merger.tensors.values())
    if options.nf4:  # the embedding in fp32 at most
        size += int(NF4_BYTES * merger.config.linear_weights)
        size += 4 * merger.config.vocab_size * merger.config.d_model
    if options.gguf:
        size += sum(rows.nbytes for rows in gguf.model_tensors(merger, options.gguf))
    return size


def write_nf4(folder: Path, made: Path, asked: str) -> None:
    """The base of a model folder in NF4, in the dtype that a run on this machine would take."""
    card = this_card()
    dtype, _reason = training_dtype(card, asked)
    where = dict(dtype=dtype, device=torch.device(card.device))
    cache = find_cache(folder, made, **where)
    nf4_file.write(read_model(folder, nf4=True, **where), cache.file, cache.key, cache.base)


def progress(what: str, unit: str = "tensors"):
    """What is gone through, with a progress line on a terminal."""
    return lambda parts: tqdm(parts, desc=what, unit=f" {unit}", leave=False, disable=None)


def say_distance(merger: Merger, made: Path, dtype, tokenizer, template: str) -> None:
    if merger.adapters is None:
        return
    rows = read_rows(PAIRS / "heldout.jsonl")[:COMPARED]
    texts = [encode_row(tokenizer, TEMPLATES[template], row, 1024).ids for row in rows]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = distance(merger, mapped_tensors(made), texts, device,
                     progress("compared", "blocks"))
    out.print(_("merged, {dtype}: of {n} predictions in {texts} Vietnamese texts {same:.1%} have "
                "the same likeliest token as the adapter on NF4; mean divergence {nats:.2g} nats, "
                "largest difference of a logit {largest:.2g}. The adapter was trained over weights "
                "rounded to 4 bits, and is merged into them before that rounding.",
                dtype=dtype_name(dtype), n=found.tokens, texts=len(texts), same=found.same,
                nats=found.divergence, largest=found.largest), markup=False)


def say_uses(options, base: str, template: str, seconds: float) -> None:
    """What was written, and the command that uses each."""
    folder = shlex.quote(str(options.out))
    files = sorted(options.out.iterdir())
    size = sum(file.stat().st_size for file in files) / 1e9
    listing(_("written to {folder}", folder=options.out), {
        _("files"): ", ".join(file.name for file in files),
        _("size"): _("{size:.2f} GB in {seconds:.0f} s", size=size, seconds=seconds)})
    question = shlex.quote(TEMPLATES[template].question.format("Phở bò là gì?"))
    commands = []
    if options.merged:
        commands.append((_("Ask the merged checkpoint:"),
                         f'python generate.py --model {folder} "Phở bò là gì?"'))
    if options.gguf:
        commands.append((_("llama.cpp:"), f"llama-cli -m {folder}/model.gguf"))
        commands.append((_("Ollama:"), f"cd {folder} && ollama create phogpt -f Modelfile && "
                                       f"ollama run phogpt"))
    if options.gguf in ("f32", "f16"):
        commands.append((_("Smaller, by llama.cpp's own tool (the gguf package has no K types):"),
                         f"llama-quantize {folder}/model.gguf {folder}/model-q4_k_m.gguf Q4_K_M"))
    if options.nf4:
        commands.append((_("Start from the base in NF4:"),
                         f"python train.py --model {shlex.quote(base)} --nf4-cache {folder} …"))
    if options.lora_gguf:
        commands.append((_("llama.cpp over a GGUF of {base}:", base=base),
                         f"llama-cli -m BASE.gguf --lora {folder}/adapter.gguf -no-cnv "
                         f"-p {question}"))
    for what, command in commands:
        out.print(f"\n{what}\n  {command}", markup=False)


if __name__ == "__main__":
    main()
