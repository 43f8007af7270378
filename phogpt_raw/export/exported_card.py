"""README.md of an exported folder, in the hub's format. It explains each file and its use."""

from pathlib import Path

from phogpt_raw.data.prompt import TEMPLATES
from phogpt_raw.export.model_card import metadata, plain

HEAD = """\
# {title}

{what}, exported by phogpt-raw. PhoGPT is an MPT model with biases; PhoGPT-7B5 has 193. A program
that builds MPT without biases drops them. Then the model gives other answers.

Put each question into the template {whose}, `{template}`, without a space at the end. The answer
ends with `</s>`:

```text
{question}
```
"""
MERGED = """\
**The checkpoint** (`config.json`, `model*.safetensors`, tokenizer) is in PhoGPT's own format, in
{dtype}. With phogpt-raw: `python generate.py --model FOLDER --no-nf4 "Câu hỏi của bạn"`. Without
`--no-nf4` the weights are rounded to 4 bits again. This takes less memory and gives other answers.
transformers' own MPT class drops the checkpoint's biases; they must be put back.
"""
GGUF = """\
**`model.gguf`** ({kind}) is for llama.cpp: `llama-cli -m model.gguf`. It contains the tokenizer and
the chat template. With Ollama: `ollama create phogpt -f Modelfile`, then `ollama run phogpt`.
"""
LORA = """\
**`adapter.gguf`** is the adapter alone, for llama.cpp over a GGUF of its base, {base}
(`llama-completion` is `llama-cli` in versions before 2026):

```bash
llama-completion -m BASE.gguf --lora adapter.gguf -no-cnv -e -p '{escaped}'
```
"""


def write(file: Path, *, title: str, base: str | None, revision: str | None, name: str,
          template: str, adapted: bool, merged: str | None, kind: str | None, lora: bool) -> None:
    """Write the README.md of an exported folder.

    base: the base's repository on the hub, or None if the base is a folder. name: the base's name.
    merged: dtype of the merged checkpoint, or None if there is none. kind: type of model.gguf, or
    None if there is no such file.
    """
    named = plain(base or name) + (f", revision {plain(revision)}" if revision else "")
    question = TEMPLATES[template].question.format("Câu hỏi của bạn")
    parts = [MERGED.format(dtype=merged) if merged else "", GGUF.format(kind=kind) if kind else "",
             LORA.format(base=named, escaped=question.replace("\n", "\\n")) if lora else ""]
    head = HEAD.format(
        title=plain(title), template=template,
        what=f"A PhoGPT, fine-tuned from {named}" if adapted else f"A PhoGPT, {named}",
        whose="of its training" if adapted else "that it was exported with",
        question=question)
    text = "\n".join([head, *filter(None, parts)])
    relation = "adapter" if lora and not (merged or kind) else "quantized" if kind else None
    if merged:  # without an adapter, the checkpoint is only the base in another format
        relation = "merge" if adapted else None
    tags = ["phogpt", "vietnamese", *(["gguf"] if kind or lora else [])]
    file.write_text(f"---\n{metadata(base, relation, tags)}\n---\n\n{text}", "utf-8")
