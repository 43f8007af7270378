"""Print the results of an export: how a merged checkpoint differs from the adapter on its base, and
a command for each written file."""

import shlex
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm

from phogpt_raw.cards import dtype_name
from phogpt_raw.data.conversations import conversations
from phogpt_raw.data.examples import PAIRS
from phogpt_raw.data.prompt import TEMPLATES, encode_row
from phogpt_raw.data.records import Findings
from phogpt_raw.data.sources import read_file
from phogpt_raw.export.distance import distance
from phogpt_raw.export.merge import mapped_tensors
from phogpt_raw.export.source import Source
from phogpt_raw.files import script
from phogpt_raw.messages import _
from phogpt_raw.model.nf4_cache import human
from phogpt_raw.show.console import listing, out, paragraph

COMPARED = 8  # texts over which a merged checkpoint is compared with the adapter on its base
# A warning is printed if both models have the same most likely token in less than this fraction of
# the predictions.
ENOUGH = 0.8
NF4 = "nf4"  # folder in OUT for the NF4 cache; only this computer uses it; it is never uploaded


def progress(what: str, unit: str = "tensors"):
    """A function that iterates over its argument and shows a progress bar on a terminal."""
    return lambda parts: tqdm(parts, desc=what, unit=f" {unit}", leave=False, disable=None)


def say_distance(source: Source, made: Path, dtype: torch.dtype) -> None:
    merger = source.merger
    if merger.adapters is None:
        return
    records = read_file(PAIRS / "heldout.jsonl", Findings())
    rows = list(islice(conversations(records, Findings()), COMPARED))
    template = TEMPLATES[source.template]
    texts = [encode_row(source.tokenizer, template, row, 1024).ids for row in rows]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = distance(merger, mapped_tensors(made), texts, device, source.nf4,
                     progress("compared", "blocks"))
    values = dict(dtype=dtype_name(dtype), n=found.tokens, texts=len(texts), same=found.same,
                  nats=found.divergence, largest=found.largest)
    if source.nf4:
        said = _("The merged checkpoint ({dtype}) compared with the adapter on its NF4 base, over "
                 "{n} predictions in {texts} Vietnamese texts: the most likely token is the same "
                 "in {same:.1%}; the mean divergence is {nats:.2g} nats; logits differ by at most "
                 "{largest:.2g}. The NF4 base's weights are rounded to 4 bits; the merged "
                 "checkpoint has the unrounded weights.", **values)
    else:
        said = _("The merged checkpoint ({dtype}) compared with the adapter on its base, over {n} "
                 "predictions in {texts} Vietnamese texts: the most likely token is the same in "
                 "{same:.1%}; the mean divergence is {nats:.2g} nats; logits differ by at most "
                 "{largest:.2g}.", **values)
    paragraph(said)
    if found.same < ENOUGH:
        paragraph(_("That is a large difference. Ask both the same questions before you use the "
                    "merged checkpoint."))


def shown(folder: Path) -> str:
    """A folder as an argument of a command.

    `./` is put before the folder if the command would read its name as a flag or as the built-in
    base nano.
    """
    text = str(folder)
    return f"./{text}" if text.startswith("-") or text == "nano" else text


def say_uses(options, source: Source, nf4_dtype: torch.dtype | None, seconds: float) -> None:
    """Print the written files, and a command for each use of the files."""
    folder = shlex.quote(shown(options.out))
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
        commands.append((_("Ask the merged checkpoint (without --no-nf4 it is rounded to 4 bits "
                           "again: less memory, other answers):"),
                         f"python {script('generate.py')} --model {folder} --no-nf4 "
                         f'"Phở bò là gì?"'))
    if options.gguf:
        commands.append((_("llama.cpp:"), f"llama-cli -m {folder}/model.gguf"))
        commands.append((_("Ollama:"), f"cd {folder} && ollama create phogpt -f Modelfile && "
                                       f"ollama run phogpt"))
    if options.gguf in ("f32", "f16"):
        commands.append((_("A smaller file, with llama.cpp's own tool (gguf has no K types):"),
                         f"llama-quantize {folder}/model.gguf {folder}/model-q4_k_m.gguf Q4_K_M"))
    if options.lora_gguf:
        commands.append((_("llama.cpp over a GGUF of the base (in versions before 2026 "
                           "llama-completion is llama-cli):"),
                         f"llama-completion -m BASE/model.gguf --lora {folder}/adapter.gguf "
                         f"-no-cnv -p {question}"))
        commands.append((_("If you have no GGUF of the base, this writes it:"),
                         f"python -m phogpt_raw.export {base} BASE --gguf q8_0"))
    if options.nf4:
        dtype = f" --dtype {dtype_name(nf4_dtype)}"
        commands.append((_("Start from the base in NF4 (the base alone, without an adapter):"),
                         f"python {script('train.py')} --model {base}{dtype} --nf4-cache "
                         f"{folder}/{NF4} --data rows.jsonl"))
    for what, command in commands:
        out.print(f"\n{what}\n  {command}", markup=False)
