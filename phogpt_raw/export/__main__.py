"""Export a fine-tuned PhoGPT: files for transformers, llama.cpp and Ollama.

    python -m phogpt_raw.export RUN out --merged     for transformers
    python -m phogpt_raw.export RUN out --gguf q8_0  for llama.cpp and Ollama
    python -m phogpt_raw.export RUN out --lora-gguf  for llama.cpp, with a base
    python -m phogpt_raw.export RUN --push ME/NAME   upload the adapter

An adapter is merged into the base's stored weights, without quantising them first. The folder is
written completely or not at all.
"""

import os
import shlex
import time
from pathlib import Path

import torch

from phogpt_raw.cards import DTYPES, dtype_name, recorded_dtype, this_card
from phogpt_raw.command_line import Parser
from phogpt_raw.config import hub_id
from phogpt_raw.data.prompt import TEMPLATES
from phogpt_raw.export import exported_card, gguf, push
from phogpt_raw.export.chat import jinja, modelfile
from phogpt_raw.export.merge import Merger, stored_dtype, write_merged
from phogpt_raw.export.report import NF4, progress, say_distance, say_uses, shown
from phogpt_raw.export.source import find_source
from phogpt_raw.files import check_free, check_space, expanded, whole_folder
from phogpt_raw.model import nf4_file
from phogpt_raw.model.adapter_config import instead, run_record
from phogpt_raw.model.base_identity import say_if_another
from phogpt_raw.model.nf4 import NF4_BYTES
from phogpt_raw.model.weights import find_cache, find_folder, read_model
from phogpt_raw.refusal import Refusal, exits_cleanly
from phogpt_raw.show.console import out


def parse(arguments):
    parser = Parser(prog="python -m phogpt_raw.export", description=__doc__,
                    usage="%(prog)s [options] RUN [OUT]")
    parser.add_argument("run", metavar="RUN", help="the folder of a run or of a checkpoint; or a "
                        "base (nano, a folder, a hub id), to export it without an adapter")
    parser.add_argument("out", metavar="OUT", type=Path, nargs="?",
                        help="the folder to write; must not exist")
    parser.add_argument("--merged", action="store_true", help="a checkpoint in PhoGPT's format, "
                        "the adapter merged into the base's weights")
    parser.add_argument("--gguf", choices=gguf.KINDS, help="the merged model as model.gguf for "
                        "llama.cpp, and a Modelfile for Ollama")
    parser.add_argument("--lora-gguf", "--lora_gguf", action="store_true", help="the adapter alone "
                        "as adapter.gguf, for llama.cpp with a GGUF of the same base")
    parser.add_argument("--nf4", action="store_true", help="the base's weights in NF4, without an "
                        "adapter, for this computer; train.py and generate.py read them with "
                        "--nf4-cache OUT/nf4")
    parser.add_argument("--no-nf4", dest="base_nf4", action="store_false", default=None,
                        help="compare the --merged checkpoint with the adapter over a base that is "
                        "not in NF4 (default: as in the run; NF4 if the run is not known)")
    parser.add_argument("--model", help="the base (default: the base that the adapter names)")
    parser.add_argument("--revision", help="branch, tag or commit of the hub repository")
    parser.add_argument("--template", default="auto", choices=["auto", *TEMPLATES],
                        help="prompt template (default: the run's; without a run the tokenizer's)")
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES],
                        help="data type of the files of --merged (auto: the base's 16-bit type) "
                        "and of --nf4 (auto: the run's, or by GPU)")
    parser.add_argument("--push", metavar="USER/NAME", help="upload OUT to this repository of the "
                        "hub (a new one is private); without OUT, upload the run's adapter and "
                        "model card. The access token comes from HF_TOKEN or hf auth login")
    options = parser.parse_args(arguments)
    check(options)
    return options


def check(options) -> None:
    """Raise Refusal for flags that exclude each other or have no effect. Find the run's adapter."""
    model = options.merged or options.gguf or options.lora_gguf
    kinds = "one or more of --merged, --gguf, --lora-gguf and --nf4"
    if (model or options.nf4) and not options.out:
        raise Refusal("OUT: is missing; name the folder to write after RUN")
    if options.out and not (model or options.nf4):
        raise Refusal(f"{options.out}: nothing to write there; give {kinds}")
    if not options.out and not options.push:
        raise Refusal(f"nothing to write: name a folder OUT and {kinds}; or give --push USER/NAME "
                      f"alone")
    effects = {"dtype": options.merged or options.nf4, "template": model, "model": options.out,
               "revision": options.out}
    for name, has_one in effects.items():
        if getattr(options, name) not in (None, "auto") and not has_one:
            raise Refusal(f"--{name} {getattr(options, name)}: has no effect on what is written; "
                          f"leave it out")
    if options.base_nf4 is False and not options.merged:
        raise Refusal("--no-nf4: has no effect without --merged; leave it out")
    if options.out:
        options.out = Path(os.path.normpath(expanded(options.out)))
        check_free(options.out)
    if options.push:
        if options.out and not model:
            raise Refusal("--push: --nf4 writes a file for this computer, which is not uploaded; "
                          "add --merged, --gguf or --lora-gguf, or leave out --push")
        push.check(options.push)
    find_adapter(options)


def find_adapter(options) -> None:
    """Set options.adapter: RUN's folder, or None if RUN is a base. Raises Refusal if an adapter is
    needed and RUN has none."""
    options.adapter = expanded(options.run)
    if (options.adapter / "adapter_config.json").is_file():
        return
    none = f"{options.run}: holds no adapter (adapter_config.json)"
    if run_record(options.adapter / "config.json"):
        raise Refusal(f"{none}: {instead(options.adapter)}")
    if options.lora_gguf:
        raise Refusal(f"{none}, and --lora-gguf needs one")
    if options.model:
        raise Refusal(f"{none}, and --model needs one; to export a base alone, name it as RUN, "
                      f"without --model")
    options.adapter = None


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.out:
        write(options)
    if options.push:
        folder = options.out or expanded(options.run)
        out.print(push.in_words(folder, options.push), markup=False)
        try:
            out.print(push.push(folder, options.push), markup=False)
        except Refusal as refusal:
            again = shlex.join(["python", "-m", "phogpt_raw.export", shown(folder), "--push",
                                options.push])
            written = f"; {folder} is written, upload it with {again}" if options.out else ""
            raise Refusal(f"{refusal}{written}") from None


def write(options) -> None:
    """Write the folder OUT. Print its files and how to use them."""
    if options.gguf or options.lora_gguf:
        gguf.import_gguf()
    source = find_source(options)
    merger, template = source.merger, TEMPLATES[source.template]
    if options.merged or options.gguf or options.nf4:
        folder = find_folder(source.base, source.revision)  # now with the weights
        say_if_another(folder, source.base_weights, options.adapter)
    dtype = DTYPES[options.dtype] if options.dtype != "auto" else (
        stored_dtype(merger) if options.merged else torch.float32)
    card = this_card()
    nf4_dtype = recorded_dtype(card, options.dtype, source.dtype) if options.nf4 else None
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
            write_nf4(merger.folder, made / NF4, nf4_dtype, card.device)
        if options.merged or options.gguf or options.lora_gguf:
            exported_card.write(
                made / "README.md", title=source.name, base=hub_id(source.base),
                revision=source.revision, name=expanded(source.base).resolve().name,
                template=source.template, adapted=merger.adapters is not None, kind=options.gguf,
                lora=options.lora_gguf, merged=dtype_name(dtype) if options.merged else None)
    say_uses(options, source, nf4_dtype, time.monotonic() - begun)


def bytes_needed(options, merger: Merger, dtype: torch.dtype) -> int:
    size = 2**24  # bytes for tokenizer, metadata and adapter
    if options.merged:
        size += dtype.itemsize * sum(tensor.numel() for tensor in merger.tensors.values())
    if options.nf4:  # the embedding takes at most 4 bytes a value
        size += int(NF4_BYTES * merger.config.linear_weights)
        size += 4 * merger.config.vocab_size * merger.config.d_model
    if options.gguf:
        size += sum(rows.nbytes for rows in gguf.model_tensors(merger, options.gguf))
    return size


def write_nf4(folder: Path, made: Path, dtype: torch.dtype, device: str) -> None:
    """Write the base of a model folder in NF4, to the folder `made`. A run on this machine would
    quantise the base to the same values."""
    where = dict(dtype=dtype, device=torch.device(device))
    cache = find_cache(folder, made, **where)
    nf4_file.write(read_model(folder, nf4=True, **where), cache.file, cache.key, cache.base)


if __name__ == "__main__":
    main()
