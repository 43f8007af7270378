"""What a run is about to do, before anything is trained: all that `--dry-run` prints."""

import statistics
from contextlib import nullcontext

import torch

from phogpt_raw.cards import capability, dtype_name
from phogpt_raw.config import Config
from phogpt_raw.data.examples import DEFAULT_SHARE
from phogpt_raw.data.prompt import Example
from phogpt_raw.messages import _
from phogpt_raw.model.attention import choose_attention
from phogpt_raw.model.documents import choose_kernel
from phogpt_raw.show import data_report
from phogpt_raw.show.console import heading, listing, say
from phogpt_raw.show.inspection import print_example
from phogpt_raw.simulate.fit import Choice, attention_kernels
from phogpt_raw.simulate.trace import Recorder
from phogpt_raw.training.setup import Job


def show(job: Job, choice: Choice) -> None:
    config, shape, run = job.config, job.model.config, job.run
    plan = job.model.head.is_meta  # of a card that need not be here: it decides, not the device
    kernels = Recorder(attention_kernels(job.card, job.model.head.dtype)) if plan else nullcontext()
    with kernels:
        attention = attention_line(job)
    lengths = [len(e.ids) for e in job.examples.train]
    longest, dtype = max(lengths), job.model.head.dtype
    listing("PhoGPT raw", {
        **({_("preset"): preset_line(config)} if config.preset else {}),
        _("model"): model_line(job),
        _("adapters"): adapters_line(job),
        _("card"): card_line(job),
        _("dtype"): f"{dtype_name(dtype)}: {job.dtype_reason}",
        _("attention"): attention,
        _("data"): _(
            "{n:,} rows of {file}, median {median} tokens, longest {longest}; {held}",
            n=len(lengths), file=job.examples.source, median=int(statistics.median(lengths)),
            longest=longest, held=held_out_line(job)),
        _("template"): f"{job.examples.template}: {job.examples.template_reason}",
        _("steps"): steps_line(job),
        _("packing"): packing_line(job),
        _("optimizer"): optimizer_line(job),
        _("recompute"): recompute_line(choice),
        _("capture"): _("off: {reason}", reason=job.not_captured) if job.not_captured else
        _("on: a shape that is seen again runs as CUDA graphs"),
        _("folder"): f"{run.folder}" + (
            _(", resumed after step {n}", n=run.state.step) if run.state.step else ""),
    })
    if job.examples.report:
        data_report.show(job.tokenizer, job.examples, config)
    if longest > shape.max_seq_len:
        say(_("the longest row is longer than the {n} tokens that the model was trained for",
              n=shape.max_seq_len))
    cut = [e for e in job.examples.train + job.examples.held_out if e.cut]
    if cut:
        say(_("{n} rows are longer than --max-len {limit}: their answers are cut and have no </s> "
              "(the first: {where})", n=len(cut), limit=config.max_len, where=cut[0].where))


def preset_line(config: Config) -> str:
    return _("{name} (--preset none turns it off)", name=config.preset)


def held_out_line(job: Job) -> str:
    n, config = len(job.examples.held_out), job.config
    if n and config.hold_out is None and not job.examples.held_out_file:
        return _("{n:,} held out (about {share:.0%}; --hold-out 0 trains on all)", n=n,
                 share=DEFAULT_SHARE)
    return _("{n:,} held out", n=n)


def model_line(job: Job) -> str:
    """An NF4 byte holds two parameters; the adapters are counted apart."""
    frozen = [p for p in job.model.parameters() if not p.requires_grad]
    quantised = 2 * sum(p.numel() for p in frozen if p.dtype == torch.uint8)
    plain = sum(p.numel() for p in frozen if p.dtype != torch.uint8)
    shape = job.model.config
    return _("{name}: {blocks} blocks of width {width}, vocabulary {vocabulary:,}; {quantised} "
             "parameters in NF4, {plain} in {dtype}", name=job.config.model, blocks=shape.n_layers,
             width=shape.d_model, vocabulary=shape.vocab_size, quantised=millions(quantised),
             plain=millions(plain), dtype=dtype_name(job.model.head.dtype))


def adapters_line(job: Job) -> str:
    lora = job.model.peft_config["default"]
    targets = lora.target_modules  # names, or a regular expression
    targets = targets if isinstance(targets, str) else ", ".join(sorted(targets))
    text = _("{n} parameters in fp32: LoRA rank {rank}, alpha {alpha:g}, on {targets}",
             n=millions(job.adapters.count), rank=lora.r, alpha=lora.lora_alpha, targets=targets)
    if job.config.adapter:
        text += _(", going on from {folder}", folder=job.config.adapter)
    return text


def card_line(job: Job) -> str:
    card = job.card
    if not card.memory_gib:
        return card.name
    return _("{name}, {gib:.1f} GiB, compute capability {capability}", name=card.name,
             gib=card.memory_gib, capability=capability(card))


def steps_line(job: Job) -> str:
    config, steps = job.config, job.run.steps
    epochs = _("{epochs:.1f} epochs", epochs=steps / job.stream.steps(1))
    if config.batch_tokens:
        return _("{steps} of at most {n:,} tokens ({epochs})", steps=steps, n=config.batch_tokens,
                 epochs=epochs)
    epochs = _("{epochs:.1f} epochs", epochs=steps * config.batch_size / len(job.examples.train))
    return _("{steps} of {n} examples ({epochs})", steps=steps, n=config.batch_size, epochs=epochs)


def packing_line(job: Job) -> str:
    packing, micro_batch = job.stream.packing, job.config.micro_batch
    if packing is None:
        return _("off (--no-packing); {n} rows at a time", n=micro_batch)
    windows = [job.stream.window(step) for step in job.planned()]
    shapes = [shape for window in windows for shape in window.shapes(micro_batch)]
    rows = sum(rows for rows, _length in shapes)
    return _("{each:.1f} examples a row, {fill:.0%} full; rows of {lengths} tokens, {n} at a time",
             each=sum(len(window.examples) for window in windows) / rows,
             fill=sum(window.tokens for window in windows) / sum(b * n for b, n in shapes),
             lengths=", ".join(f"{length:,}" for length in packing.lengths), n=micro_batch)


def attention_line(job: Job) -> str:
    model, packing, dtype = job.model, job.stream.packing, job.model.head.dtype
    length = (packing.lengths[-1] if packing
              else max(len(e.ids) for e in job.examples.train))
    if packing:
        kernel = choose_kernel(model.slopes_H, model.config.d_model // model.config.n_heads, length,
                               dtype, packing.bounds(length))
        if kernel is not None:
            return _("{kernel}, each example for itself, ALiBi as columns of the keys",
                     kernel=in_words(kernel.name))
    found = choose_attention(model.slopes_H, model.config, length, dtype)
    text = _("{kernel}, ALiBi as a bias of {block} x {length}", kernel=in_words(found.kernel),
             block=found.block, length=length)
    if packing:
        text += _(", which hides other examples of the row")
    return text + (_(", {n} blocks of queries", n=found.blocks) if found.blocks > 1 else "")


def in_words(kernel: str) -> str:
    return kernel.lower().replace("_", " ")


def optimizer_line(job: Job) -> str:
    config = job.config
    if config.optimizer == "adamw":
        kind = _("AdamW, 32-bit state")
    elif job.card.device == "cuda":
        kind = _("AdamW, 8-bit state, paged")
    else:
        kind = _("AdamW, 8-bit state (paging needs a GPU)")
    return kind + _("; learning rate {peak:g} after {warmup} steps of warm-up, then a cosine to "
                    "{end:g}; gradient clipped to {clip:g}", peak=config.lr,
                    warmup=config.warmup_of(job.run.steps), end=config.lr * config.lr_floor,
                    clip=config.clip)


def recompute_line(choice: Choice) -> str:
    text = _("{n} of {blocks} blocks in backward", n=choice.recompute, blocks=choice.blocks)
    if choice.gib is None:
        return text
    text += _(" (auto): {gib:.1f} of {of:.1f} GiB with margins", gib=choice.gib, of=choice.of)
    if choice.recompute:
        text += _(", for {share:.0%} more arithmetic in the blocks",
                  share=choice.recompute / choice.blocks / 2)
    if choice.gib > choice.of:
        text += _("; it may not fit: try a shorter --max-len or a smaller --micro-batch")
    return text


def example(tokenizer, encoded: Example) -> None:
    """One training example."""
    heading(_("one training example"))
    print_example(tokenizer, encoded)


def millions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"
