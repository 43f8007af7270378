"""README.md of a run's folder, in the hub's format. It describes the adapter and its use.

The user may publish this model card, so it contains no path of the computer that trained the
adapter. For a data file it gives only the name and the hash, and for a base in a folder only the
folder's name. It contains no date, so the same run gives the same model card. A README.md without
the line MARK was not written by this program, and is not replaced.
"""

import importlib.metadata
import re
from pathlib import Path

from phogpt_raw.cards import dtype_name
from phogpt_raw.config import hub_id
from phogpt_raw.data.prompt import IGNORED, TEMPLATES, Example
from phogpt_raw.files import whole_file
from phogpt_raw.messages import _, plural
from phogpt_raw.refusal import Refusal
from phogpt_raw.show.console import say
from phogpt_raw.training.evaluate import perplexity
from phogpt_raw.training.metrics import read_metrics
from phogpt_raw.training.run import CARD, MARK, has_our_card
from phogpt_raw.training.setup import Job

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")

BODY = """\
# {title}

A LoRA adapter for {base}, trained on {kind} in Vietnamese. It is not a complete
model: it needs its base.{unpublished}

{results}

{picture}## How to use it

`FOLDER` is the folder of this file. Put each question into the template of the training,
{template}, without a space at the end. The answer ends with `</s>`:

```text
{question}
```

**With {project}**, over the same base{precision}. The program adds the template:

```bash
python generate.py --adapter FOLDER {flags}"Câu hỏi của bạn"
```

**With PEFT on transformers**: PhoGPT has a bias on every linear layer and norm (193 in PhoGPT-7B5).
transformers' MPT has no biases. It drops the checkpoint's biases and says so only in its load
report. Then the adapter does not fit the model. It also refuses VinAI's `attn_pdrop: 0.0`. So put
the biases back (`BASE` is the base's folder):

```python
import json
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import MptConfig, MptForCausalLM

config = json.loads(Path("BASE/config.json").read_text())
config["attn_config"]["attn_pdrop"] = 0
model = MptForCausalLM(MptConfig.from_dict(config))
for name, module in model.named_modules():
    if name != "lm_head" and getattr(module, "bias", 0) is None:
        module.bias = torch.nn.Parameter(torch.zeros(module.weight.shape[0]))
missing = {{name for name, _ in model.named_parameters()}}
for shard in [*Path("BASE").glob("*.bin"), *Path("BASE").glob("*.safetensors")]:
    tensors = load_file(shard) if shard.suffix == ".safetensors" else torch.load(shard)
    assert not model.load_state_dict(tensors, strict=False).unexpected_keys
    missing -= tensors.keys()
assert not missing
model = PeftModel.from_pretrained(model, "FOLDER")
```

Or merge adapter and base into one 16-bit checkpoint, for programs that support PhoGPT's biases:

```bash
python -m phogpt_raw.export FOLDER OUT --merged{export_flags}{merge_flags}
```

**With llama.cpp**, which supports the biases. This file is the merged model with the template:

```bash
python -m phogpt_raw.export FOLDER OUT --gguf q8_0{export_flags}
llama-cli -m OUT/model.gguf
```

Or write the adapter alone, a small file for a published GGUF of the same base (`llama-completion`
is `llama-cli` in versions before 2026):

```bash
python -m phogpt_raw.export FOLDER OUT --lora-gguf{export_flags}
llama-completion -m PhoGPT.gguf --lora OUT/adapter.gguf -no-cnv -e -p '{escaped}'
```

## How it was trained

{training}

## Data

{data}

## Versions

{versions}
"""


def write(job: Job) -> None:
    """Write README.md into the folder of a run that has ended with an adapter.

    If the file cannot be written, one line of text is printed and the run still succeeds.
    """
    file = job.run.folder / CARD
    try:
        if file.is_file() and not has_our_card(job.run.folder):
            return say(_("{file} was not written by this program and is not replaced", file=file))
        with whole_file(file) as unfinished:
            unfinished.write_text(card(job), "utf-8")
    except (OSError, Refusal) as error:
        say(_("{file} was not written ({reason})", file=file,
              reason=getattr(error, "strerror", None) or error))


def card(job: Job) -> str:
    """The whole text of the model card: the front matter in YAML, MARK and the body."""
    config, folder = job.config, job.run.folder
    template = TEMPLATES[job.examples.template].question.format("Câu hỏi của bạn")
    hub, name = hub_id(config.model), plain(config.base_name())
    if hub:
        base, unpublished = f"[{hub}](https://huggingface.co/{hub})", ""
    elif config.model == "nano":
        base = "`nano`, the very small PhoGPT that comes with phogpt-raw"
        unpublished = " That base is not on the hub."
    else:
        base = f"the model in a folder named {name}"
        unpublished = (" That folder was on the computer that trained. Only its owner knows which "
                       "model it contains.")
    losses = "training and held-out loss" if job.examples.held_out else "training loss"
    picture = (f"![{losses}, learning rate](loss.png)\n\n"
               if (folder / "loss.png").is_file() else "")
    model = "" if hub or config.model == "nano" else " --model BASE"
    export_flags = f"{model} --template {job.examples.template}"
    flags = export_flags.lstrip() + ("" if config.nf4 else " --no-nf4") + " "
    body = BODY.format(
        title=f"{name} + {plain(folder.resolve().name)}", base=base, unpublished=unpublished,
        kind=kind_of(job.examples.train),
        picture=picture, results=results(job), template=f"`{job.examples.template}`",
        question=template, escaped=template.replace("\n", "\\n"),
        project=f"phogpt-raw {version('phogpt-raw')}",
        precision=" in 4 bits" if config.nf4 else ", not quantised", flags=flags,
        export_flags=export_flags, merge_flags="" if config.nf4 else " --no-nf4",
        training=table(hyper_parameters(job)), data=table(data(job)),
        versions=table({package: version(package) for package in PACKAGES}),
    )
    return f"---\n{front_matter(job)}\n---\n{MARK}\n\n{body}"


def front_matter(job: Job) -> str:
    """The hub's metadata as YAML."""
    tags = ["lora", *(["qlora"] if job.config.nf4 else []), "phogpt", "vietnamese"]
    return metadata(hub_id(job.config.model), "adapter", tags, library_name="peft")


def metadata(base: str | None, relation: str | None, tags: list[str], **more) -> str:
    """The hub's metadata as YAML.

    `base_model` must be a repository of the hub. So the base is left out if it is a local folder.
    The licence is included only for VinAI's PhoGPT.
    """
    from huggingface_hub import ModelCardData

    if base:
        more |= dict(base_model=base) | (dict(base_model_relation=relation) if relation else {})
        if base.startswith("vinai/PhoGPT"):
            more["license"] = "bsd-3-clause"  # the licence of the base, since November 2024
    return ModelCardData(language=["vi"], pipeline_tag="text-generation", tags=tags,
                         **more).to_yaml()


def results(job: Job) -> str:
    """The results at the saved adapter's step: losses, perplexity, and the fraction of the answers
    that end by themselves.

    The results are a table, or a sentence if no rows were held out.
    """
    state, kept = job.run.state, job.run.state.best_step
    steps, evaluations = read_metrics(job.run.folder)
    if not job.examples.held_out:
        losses = {row["step"]: row["loss"] for row in steps}
        return (f"This is the adapter of step {kept:,}, the last. No rows were held out, so there "
                f"is only the training loss, in nats per token: {number(losses.get(1))} at the "
                f"first step, {number(losses.get(kept))} at step {kept:,}.")
    before, after = state.first["val_loss"], state.best_loss
    lines = ["| on the held-out rows | before training | this adapter |", "|---|---|---|",
             line("loss, nats per token", number(before), number(after)),
             line("perplexity", number(perplexity(before)), number(perplexity(after)))]
    stops = {row["step"]: row["stops"] for row in evaluations}
    if state.first["stops"] is not None and stops.get(kept) is not None:
        lines.append(line("answers that end by themselves", f"{state.first['stops']:.0%}",
                          f"{stops[kept]:.0%}"))
    which = (f"This is the adapter of step {kept:,} of {state.step:,}. It had the lowest "
             "validation loss of all evaluated training steps.")
    if not after < before:
        which += (" That loss is no lower than before training. So this training did not improve "
                  "the model on the held-out rows.")
    return f"{which}\n\n" + "\n".join(lines)


def hyper_parameters(job: Job) -> dict[str, str]:
    config, run = job.config, job.run
    lora = job.model.peft_config["default"]
    targets = lora.target_modules
    kinds = [name for name, on in (("rsLoRA", lora.use_rslora), ("DoRA", lora.use_dora)) if on]
    batch = (f"at most {config.batch_tokens:,} tokens" if config.batch_tokens
             else f"{config.batch_size} examples")
    warmup = config.warmup_of(run.steps)
    after = plural(warmup, " after 1 step of warm-up", f" after {warmup} steps of warm-up")
    rate = f"{config.lr:g}{after * bool(warmup)}, then a cosine to {config.lr * config.lr_floor:g}"
    done = run.state.step  # fewer than planned if --patience ended the run
    epochs = done / job.stream.steps(1)
    if not config.batch_tokens:
        epochs = done * config.batch_size / len(job.examples.train)
    planned = f" of {run.steps:,} planned" if done < run.steps else ""
    return {
        "adapter": ", ".join(["LoRA", *kinds]),
        "rank, alpha, dropout": f"{lora.r}, {lora.lora_alpha:g}, {lora.lora_dropout:g}",
        "targets": targets if isinstance(targets, str) else ", ".join(sorted(targets)),
        **({"started from": f"the adapter in a folder named {Path(config.adapter).resolve().name}"}
           if config.adapter else {}),
        "base": config.base_name() + (f", revision {config.revision}" if config.revision else ""),
        "base's precision": "NF4 with double quantisation" if config.nf4 else "not quantised",
        "computed in": dtype_name(job.model.head.dtype),
        "steps": f"{done:,}{planned} ({epochs:.1f} epochs), {run.state.skipped:,} skipped",
        "one step": batch,
        "longest example allowed": f"{config.max_len:,} tokens",
        "learning rate": rate,
        "optimizer": f"{config.optimizer}, weight decay {config.weight_decay:g}, "
                     f"gradient clipped to {config.clip:g}",
        "loss": loss_on(job.examples.train),
        "template": job.examples.template,
        "seed": str(config.seed),
    }


def texts_in(train: list[Example]) -> int:
    """The number of examples that are a text without a question."""
    return sum(example.targets[0] != IGNORED for example in train)


def kind_of(train: list[Example]) -> str:
    """The kind of the examples, in the words of the model card."""
    texts = texts_in(train)
    if not texts:
        return "questions and answers"
    return "texts" if texts == len(train) else "questions and answers, and on texts,"


def loss_on(train: list[Example]) -> str:
    """The tokens that carry loss, in the words of the model card. In a row of text without a
    question, all tokens carry loss."""
    texts = texts_in(train)
    if not texts:
        return "on the answer and its end token only"
    of_text = plural(texts, "the row of text", f"the {texts:,} rows of text")
    return f"on all tokens of {of_text}" + (
        "" if texts == len(train) else ", on the answer and its end token in the others")


def data(job: Job) -> dict[str, str]:
    """The lines of the table of data: numbers of rows, and files by name and hash."""
    examples = job.examples
    training, held_out = (plural(n, "1 row", f"{n:,} rows")
                          for n in (examples.rows, examples.held_out_rows))
    if len(examples.train) != examples.rows:
        training += f" as {len(examples.train):,} examples"
    if examples.held_out and not examples.held_out_file:
        held_out += " of the same file"
    if examples.trained_too:
        held_out += f", {len(examples.trained_too):,} of them training rows as well"
    return {
        "training": training,
        **file_lines("file", examples.file),
        "held out": held_out,
        **file_lines("held-out file", examples.held_out_file),
    }


def file_lines(what: str, file) -> dict[str, str]:
    return {what: file.name, f"SHA-256 of the {what}": file.sha256} if file else {}


def table(lines: dict[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(line(*pair) for pair in lines.items())])


def line(*cells: str) -> str:
    return f"| {' | '.join(map(plain, cells))} |"


def plain(text: str) -> str:
    """Text with escapes, so that Markdown shows it unchanged, also in a table.

    >>> print(plain("a_b|c <d> _e_\\n[f]"))
    a_b\\|c \\<d\\> \\_e\\_ \\[f\\]
    """
    return re.sub(r"([\\`*\[\]<>|#$~&]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(text.split()))


def number(value: float | None) -> str:
    """A value with four digits. None means that the value was not finite."""
    return "not finite" if value is None else f"{value:.4g}"


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # phogpt-raw is used without being installed
        return "not installed"
