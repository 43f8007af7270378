"""Take a fine-tuned PhoGPT elsewhere: files for transformers, llama.cpp and Ollama.

    python -m phogpt_raw.export runs/nano-001 out --merged       a checkpoint for transformers
    python -m phogpt_raw.export runs/nano-001 out --gguf q8_0    for llama.cpp and Ollama
    python -m phogpt_raw.export runs/nano-001 out --lora-gguf    for llama.cpp, over a base's GGUF
    python -m phogpt_raw.export runs/nano-001 --push ME/NAME     adapter and card, to the hub

The adapter's base is read as it is stored and never quantised on the way. The folder is written
whole or not at all.
"""

import argparse
import os
import re
import shlex
import time
from dataclasses import dataclass
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
from phogpt_raw.model.adapter_config import Origin, named_base, read_origin
from phogpt_raw.model.nf4 import NF4_BYTES
from phogpt_raw.model.nf4_cache import human
from phogpt_raw.model.weights import (
    WITHOUT_WEIGHTS,
    find_cache,
    find_folder,
    read_model,
    read_tokenizer,
)
from phogpt_raw.refusal import Refusal, exits_cleanly
from phogpt_raw.show.console import listing, out, paragraph

COMPARED = 8  # texts over which a merged checkpoint is compared with the adapter on its base
ENOUGH = 0.8  # share of equal likeliest tokens below which a person is warned
NF4 = "nf4"  # OUT's folder for the cache, which is for this computer alone and is never uploaded


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
                        "computer quantises them, without an adapter; train.py and generate.py "
                        "read them with --nf4-cache OUT/nf4")
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
    check(options)
    return options


def check(options) -> None:
    """Raise Refusal for flags that do not go together; find the run's adapter."""
    model = options.merged or options.gguf or options.lora_gguf
    if bool(options.out) != bool(model or options.nf4) or not (options.out or options.push):
        raise Refusal("what to write, and where? name a folder OUT and one or more of --merged, "
                      "--gguf, --lora-gguf and --nf4; or --push USER/NAME alone")
    if options.out:
        options.out = options.out.expanduser()
        if os.path.lexists(options.out):
            raise Refusal(f"{options.out}: exists already; name a folder that does not")
    if options.push:
        if options.out and not model:
            raise Refusal("--push: --nf4 writes a file for this computer, which is not uploaded; "
                          "add --merged, --gguf or --lora-gguf, or leave out --push")
        push.check(options.push)
    options.run = str(Path(options.run).expanduser()) if options.run.startswith("~") else (
        options.run)
    options.adapter = Path(options.run)
    if not (options.adapter / "adapter_config.json").is_file():
        options.adapter = None
        if options.lora_gguf:
            raise Refusal(f"--lora-gguf: {options.run} holds no adapter (adapter_config.json)")


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.out:
        write(options)
    if options.push:
        folder = options.out or Path(options.run)
        out.print(push.in_words(folder, options.push), markup=False)
        out.print(push.push(folder, options.push), markup=False)


@dataclass(frozen=True)
class Source:
    """What is exported: a base, maybe with an adapter over it, and how the adapter was made."""

    base: str
    revision: str | None
    nf4: bool  # whether the adapter was trained over NF4 weights
    name: str
    template: str
    tokenizer: object
    merger: Merger


def find_source(options) -> Source:
    """Everything but the weights; Refusal for what they are not needed to know."""
    made = read_origin(options.adapter) if options.adapter else Origin(options.run)
    base, revision = options.model or made.base, options.revision
    if options.adapter:
        base = named_base(options.adapter, options.model)
    if not options.model:
        revision = revision or made.revision
    folder = find_folder(base, revision, files=WITHOUT_WEIGHTS)
    merger = Merger(folder, options.adapter)
    if options.gguf:
        gguf.check_model(merger)
    if options.lora_gguf:
        gguf.check_plain(merger)
    tokenizer = read_tokenizer(folder, merger.config)
    asked = made.template if options.template == "auto" else options.template
    name = Path(base).expanduser().resolve().name
    if options.adapter:
        name += f" + {run_name(options.adapter)}"
    return Source(base, revision, made.nf4, name, choose_template(tokenizer, asked)[0], tokenizer,
                  merger)


def run_name(adapter: Path) -> str:
    """nano-001, or nano-001 checkpoint-30."""
    folder = adapter.resolve()
    is_checkpoint = re.fullmatch(r"checkpoint-\d+", folder.name)
    return f"{folder.parent.name} {folder.name}" if is_checkpoint else folder.name


def write(options) -> None:
    """Make OUT, and say what is in it."""
    if options.gguf or options.lora_gguf:
        gguf.import_gguf()
    source = find_source(options)
    merger, template = source.merger, TEMPLATES[source.template]
    if options.merged or options.gguf or options.nf4:
        find_folder(source.base, source.revision)  # the weights too
    dtype = DTYPES[options.dtype] if options.dtype != "auto" else (
        stored_dtype(merger) if options.merged else torch.float32)
    check_space(options.out, bytes_needed(options, merger, dtype))
    begun = time.monotonic()
    with whole_folder(options.out) as made:
        if options.merged:
            write_merged(merger, made, dtype, source.base, progress("merged"),
                         chat_template=jinja(template))
            say_distance(source, made, dtype)
        if options.gguf:
            gguf.write_model(merger, made / "model.gguf", options.gguf, name=source.name,
                             chat_template=jinja(template), progress=progress("gguf"))
            text = modelfile(template, merger.config.max_seq_len)
            (made / "Modelfile").write_text(text, "utf-8")
        if options.lora_gguf:
            gguf.write_adapter(merger, made / "adapter.gguf")
        if options.nf4:
            write_nf4(merger.folder, made / NF4, options.dtype)
        if options.merged or options.gguf or options.lora_gguf:
            exported_card.write(
                made / "README.md", title=source.name, base=hub_id(source.base),
                template=source.template, adapted=merger.adapters is not None, kind=options.gguf,
                lora=options.lora_gguf, merged=dtype_name(dtype) if options.merged else None)
    say_uses(options, source, time.monotonic() - begun)


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


def say_distance(source: Source, made: Path, dtype: torch.dtype) -> None:
    merger = source.merger
    if merger.adapters is None:
        return
    rows = read_rows(PAIRS / "heldout.jsonl")[:COMPARED]
    template = TEMPLATES[source.template]
    texts = [encode_row(source.tokenizer, template, row, 1024).ids for row in rows]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = distance(merger, mapped_tensors(made), texts, device, source.nf4,
                     progress("compared", "blocks"))
    values = dict(dtype=dtype_name(dtype), n=found.tokens, texts=len(texts), same=found.same,
                  nats=found.divergence, largest=found.largest)
    if source.nf4:
        said = _("The merged checkpoint ({dtype}) beside the adapter on its NF4 base, {n} "
                 "predictions in {texts} Vietnamese texts: the likeliest token is the same in "
                 "{same:.1%}; the mean divergence is {nats:.2g} nats; logits differ by at most "
                 "{largest:.2g}. The adapter was trained on weights rounded to 4 bits; the merged "
                 "checkpoint has the unrounded weights.", **values)
    else:
        said = _("The merged checkpoint ({dtype}) beside the adapter on its base, {n} predictions "
                 "in {texts} Vietnamese texts: the likeliest token is the same in {same:.1%}; the "
                 "mean divergence is {nats:.2g} nats; logits differ by at most {largest:.2g}.",
                 **values)
    paragraph(said)
    if found.same < ENOUGH:
        paragraph(_("That is a large difference. Ask both the same questions before you use the "
                    "merged checkpoint."))


def say_uses(options, source: Source, seconds: float) -> None:
    """What was written, and the command that uses each."""
    folder = shlex.quote(str(options.out))
    files = sorted(file for file in options.out.rglob("*") if file.is_file())
    listing(_("written to {folder}", folder=options.out), {
        _("files"): ", ".join(str(file.relative_to(options.out)) for file in files),
        _("size"): _("{size} in {seconds:.0f} s", seconds=seconds,
                     size=human(sum(file.stat().st_size for file in files)))})
    question = shlex.quote(TEMPLATES[source.template].question.format("Phở bò là gì?"))
    base = shlex.quote(source.base) + (
        f" --revision {shlex.quote(source.revision)}" if source.revision else "")
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
    if options.lora_gguf:
        commands.append((_("llama.cpp over a GGUF of the base (in versions before 2026 "
                           "llama-completion is llama-cli):"),
                         f"llama-completion -m BASE/model.gguf --lora {folder}/adapter.gguf "
                         f"-no-cnv -p {question}"))
        commands.append((_("That GGUF of the base, if you have none:"),
                         f"python -m phogpt_raw.export {base} BASE --gguf q8_0"))
    if options.nf4:
        dtype = "" if options.dtype == "auto" else f" --dtype {options.dtype}"
        commands.append((_("Start from the base in NF4 (the base alone, without an adapter):"),
                         f"python train.py --model {base}{dtype} --nf4-cache {folder}/{NF4} …"))
    for what, command in commands:
        out.print(f"\n{what}\n  {command}", markup=False)


if __name__ == "__main__":
    main()
