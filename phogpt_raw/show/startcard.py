"""The plan of a run in words, before anything is trained: what `--dry-run` prints."""

import statistics

import torch

from phogpt_raw.cards import Card, capability, dtype_name
from phogpt_raw.config import Config
from phogpt_raw.data.examples import Examples
from phogpt_raw.model.adapters import Adapters
from phogpt_raw.model.attention import form
from phogpt_raw.model.phogpt import PhoGPT
from phogpt_raw.show import console
from phogpt_raw.simulate.fit import Fit
from phogpt_raw.training.optim import describe
from phogpt_raw.training.run import Run


def show(config: Config, card: Card, dtype: torch.dtype, reason: str, model: PhoGPT,
         adapters: Adapters, examples: Examples, run: Run, fit: Fit,
         uncaptured: str | None) -> None:
    lengths = [len(e.ids) for e in examples.train]
    longest = max(lengths)
    shape, lora = model.config, model.peft_config["default"]
    targets = lora.target_modules  # names, or a regular expression
    targets = targets if isinstance(targets, str) else ", ".join(sorted(targets))
    quantised, plain = parameters(model, adapters)
    rows = f"{len(lengths):,} rows of {examples.source}, {int(statistics.median(lengths))} tokens" \
           f" in the middle, {longest} the longest; {len(examples.held_out)} held out"
    steps, at = run.steps, run.progress.step
    passes = steps * config.batch_size / len(lengths)
    console.card("PhoGPT raw", {
        "model": f"{config.model}: {shape.n_layers} blocks of width {shape.d_model}, vocabulary "
                 f"{shape.vocab_size:,}; {millions(quantised)} parameters in NF4, "
                 f"{millions(plain)} in {dtype_name(dtype)}",
        "adapters": f"{millions(adapters.count)} parameters in fp32: LoRA rank {lora.r}, alpha "
                    f"{lora.lora_alpha:g}, on {targets}"
                    + (f", going on from {config.adapter}" if config.adapter else ""),
        "card": card.name + (f", {card.memory_gib:.1f} GiB, compute capability "
                             f"{capability(card)}" if card.memory_gib else ""),
        "dtype": f"{dtype_name(dtype)}: {reason}",
        "attention": form(model.slopes_H, shape, longest, dtype),
        "data": rows,
        "template": f"{examples.template}: {examples.template_reason}",
        "steps": f"{steps} of {config.batch_size} rows, {config.micro_batch} at a time "
                 f"({passes:.1f} passes)",
        "optimizer": f"{describe(config.optimizer, card.device)}; learning rate to "
                     f"{config.lr:g} in {config.warmup} steps, then a cosine to "
                     f"{config.lr * config.lr_floor:g}; clip {config.clip:g}",
        "recompute": f"{fit}",
        "capture": f"off: {uncaptured}" if uncaptured else
                   "on: a shape that comes again runs as CUDA graphs",
        "folder": f"{run.folder}" + (f", going on after step {at}" if at else ""),
    })
    if longest > shape.max_seq_len:
        console.say(f"the longest row is longer than the {shape.max_seq_len} tokens that the model "
                    f"was made for")
    cut = [e for e in examples.train + examples.held_out if e.cut]
    if cut:
        console.say(f"{len(cut)} rows are longer than --max-len {config.max_len}: their answers "
                    f"are cut and have no </s> (the first: {cut[0].where})")


def parameters(model: PhoGPT, adapters: Adapters) -> tuple[int, int]:
    """(in NF4, plain) frozen parameters; an NF4 byte holds two."""
    packed = sum(p.numel() for p in model.parameters() if p.dtype == torch.uint8) * 2
    plain = sum(p.numel() for p in model.parameters()
                if p.dtype != torch.uint8 and not p.requires_grad)
    return packed, plain


def millions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"
