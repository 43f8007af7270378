"""Print the settings of a run before training. `--dry-run` prints only these settings and one
example."""

import statistics
from contextlib import nullcontext

import torch

from phogpt_raw.cards import capability, dtype_name
from phogpt_raw.config import Config
from phogpt_raw.data.examples import DEFAULT_SHARE, ENOUGH, LEAST
from phogpt_raw.data.prompt import Example
from phogpt_raw.messages import _, plural
from phogpt_raw.model.attention import choose_attention
from phogpt_raw.model.documents import choose_kernel
from phogpt_raw.show import data_report
from phogpt_raw.show.console import clock, heading, listing, say
from phogpt_raw.show.inspection import print_example
from phogpt_raw.simulate.fit import Choice, attention_kernels
from phogpt_raw.simulate.plan import Duration
from phogpt_raw.simulate.trace import Recorder
from phogpt_raw.training.setup import EPOCHS, Job, steps_known


def show(job: Job, choice: Choice, duration: Duration | None = None) -> None:
    """Print the settings of a run. duration: the simulated time of a step, for --dry-run."""
    config, shape, run = job.config, job.model.config, job.run
    slopes_H, kernels = job.model.slopes_H, nullcontext()
    if slopes_H.is_meta and job.card.device == "cuda":  # the GPU may not be in this computer
        kernels = Recorder(attention_kernels(job.card, job.model.head.dtype))
    elif slopes_H.is_meta:
        slopes_H = torch.zeros(slopes_H.shape)  # on the CPU of this computer
    with kernels:
        attention = attention_line(job, slopes_H)
    longest, dtype = max(len(e.ids) for e in job.examples.train), job.model.head.dtype
    listing("PhoGPT raw", {
        **({_("preset"): preset_line(config)} if config.preset else {}),
        _("model"): model_line(job),
        _("adapters"): adapters_line(job),
        _("card"): card_line(job),
        _("dtype"): f"{dtype_name(dtype)}: {job.dtype_reason}",
        _("attention"): attention,
        _("data"): data_line(job),
        _("template"): template_line(job),
        _("steps"): steps_line(job),
        **({_("time"): time_line(job, duration)} if duration else {}),
        _("packing"): packing_line(job),
        _("optimizer"): optimizer_line(job),
        _("recompute"): recompute_line(choice),
        _("CUDA graphs"): _("off: {reason}", reason=job.not_captured) if job.not_captured else
        _("on, for micro-batches of a shape that was seen before"),
        _("folder"): f"{run.folder}" + (
            _(", resumed after step {n}", n=run.state.step) if run.state.step else ""),
    })
    if job.examples.report:
        data_report.show(job.tokenizer, job.examples, config)
    for fault in run.damaged:
        say(_("not used: {fault}", fault=fault))
    if longest > shape.max_seq_len:
        say(_("the longest row is longer than the {n:,} tokens that the model was trained for",
              n=shape.max_seq_len))
    if job.examples.trained_too:
        say(_("held-out rows that are also training rows: {n:,} of {of:,} (the first: {where}); "
              "they make the validation loss too low", n=len(job.examples.trained_too),
              of=job.examples.held_out_rows, where=job.examples.trained_too[0]))
    cut = [e for e in job.examples.train + job.examples.held_out if e.cut]
    if cut:
        say(_("rows longer than --max-len {limit:,}: {n:,} (the first: {where}); their ends are "
              "cut off, so they have no </s>", limit=config.max_len, n=len(cut),
              where=cut[0].where))


def preset_line(config: Config) -> str:
    if config.preset == "none":
        return _("none: each setting has its default")
    return _("{name} (--preset none turns it off)", name=config.preset)


def data_line(job: Job) -> str:
    if job.tokenizer is None and not job.config.data:
        return _("no rows are read: each is assumed to have {n:,} tokens (--max-len)",
                 n=job.config.max_len)
    n, file = job.examples.rows, job.examples.source
    rows = plural(n, _("1 training row of {file}", file=file),
                  _("{n:,} training rows of {file}", n=n, file=file))
    if job.tokenizer is None:
        return _("{rows}, counted but not tokenised: each is assumed to have {tokens:,} "
                 "tokens (--max-len); {held}", rows=rows, tokens=job.config.max_len,
                 held=held_out_line(job))
    lengths = [len(e.ids) for e in job.examples.train]
    if len(lengths) != job.examples.rows:
        rows += plural(len(lengths), _(" as 1 example"), _(" as {n:,} examples", n=len(lengths)))
    return _("{rows}, median {median:,} tokens, longest {longest:,}; {held}", rows=rows,
             median=int(statistics.median(lengths)), longest=max(lengths), held=held_out_line(job))


def template_line(job: Job) -> str:
    if job.tokenizer is None:
        return _("not chosen: {model} has no tokenizer here", model=job.config.model)
    return f"{job.examples.template}: {job.examples.template_reason}"


def held_out_line(job: Job) -> str:
    n, hold_out = job.examples.held_out_rows, job.config.hold_out
    if job.examples.held_out_file:
        return _("{n:,} held out, of {file}", n=n, file=job.examples.held_out_file.name)
    if hold_out is None and not n:
        return _("none held out: fewer than {enough} different rows; --hold-out N or --val FILE "
                 "holds out some", enough=ENOUGH)
    if hold_out is None:
        return _("{n:,} held out (about {share:.0%}, at least {least}; --hold-out 0 trains on "
                 "all)", n=n, share=DEFAULT_SHARE, least=LEAST)
    if 0 < hold_out < 1:
        return _("{n:,} held out (--hold-out {share:g}: about that share)", n=n, share=hold_out)
    if not n:
        return _("none held out (--hold-out 0)")
    return _("{n:,} held out", n=n)


def model_line(job: Job) -> str:
    """The base's name, shape and number of parameters, without adapters. In NF4, a byte holds two
    parameters."""
    frozen = [p for p in job.model.parameters() if not p.requires_grad]
    quantised = 2 * sum(p.numel() for p in frozen if p.dtype == torch.uint8)
    plain = sum(p.numel() for p in frozen if p.dtype != torch.uint8)
    shape, dtype = job.model.config, dtype_name(job.model.head.dtype)
    weights = (_("{quantised} parameters in NF4, {plain} in {dtype}", dtype=dtype,
                 quantised=millions(quantised), plain=millions(plain)) if quantised
               else _("{plain} parameters in {dtype}", plain=millions(plain), dtype=dtype))
    return _("{name}: {blocks} blocks of width {width}, vocabulary {vocabulary:,}; {weights}",
             name=job.config.model, blocks=shape.n_layers, width=shape.d_model,
             vocabulary=shape.vocab_size, weights=weights)


def adapters_line(job: Job) -> str:
    lora = job.model.peft_config["default"]
    targets = lora.target_modules  # names, or a regular expression
    targets = targets if isinstance(targets, str) else ", ".join(sorted(targets))
    text = _("{n} parameters in fp32: LoRA rank {rank}, alpha {alpha:g}, on {targets}",
             n=millions(job.adapters.count), rank=lora.r, alpha=lora.lora_alpha, targets=targets)
    if job.config.adapter:
        text += _(", starting from {folder}", folder=job.config.adapter)
    return text


def card_line(job: Job) -> str:
    card = job.card
    if not card.memory_gib:
        return card.name
    return _("{name}, {gib:.1f} GiB, compute capability {capability}", name=card.name,
             gib=card.memory_gib, capability=capability(card))


def steps_line(job: Job) -> str:
    config, steps = job.config, job.run.steps
    if job.tokenizer is None and not config.data:  # no rows, so no epochs
        each = (_("at most {n:,} tokens each", n=config.batch_tokens) if config.batch_tokens
                else _("{n} examples each", n=config.batch_size))
        return f"{config.steps}, {each}" if config.steps else _(
            "{each}; --data FILE or --steps N gives the number of steps", each=each)
    passes = (steps / job.stream.steps(1) if config.batch_tokens
              else steps * config.batch_size / len(job.examples.train))
    asked = None if config.steps else config.epochs or EPOCHS
    epochs = (_("{epochs:.1f} epochs", epochs=passes) if asked is None or passes - asked < 0.05
              else _("{asked:g} epochs, rounded up to whole steps: {epochs:.1f}", asked=asked,
                     epochs=passes))
    text = (_("{steps} of at most {n:,} tokens ({epochs})", steps=steps, n=config.batch_tokens,
              epochs=epochs) if config.batch_tokens
            else _("{steps} of {n} examples ({epochs})", steps=steps, n=config.batch_size,
                   epochs=epochs))
    if job.run.planned not in (0, steps):
        before = plural(job.run.planned, _("1 step"), _("{n} steps", n=job.run.planned))
        text += _("; planned before: {before}; the learning rate now falls until step {steps}",
                  before=before, steps=steps)
    return text


def time_line(job: Job, duration: Duration) -> str:
    """The simulated time of a step, and of all steps if their number is known."""
    low, high = (f"{s:.3g}" if s < 1000 else f"{s:,.0f}" for s in (duration.low, duration.high))
    text = _("simulated: {low} to {high} s a step", low=low, high=high)
    if steps_known(job.config, job.tokenizer):
        ends = dict.fromkeys(clock(max(1, job.run.steps * s))
                             for s in (duration.low, duration.high))
        text += _(", {span} for all steps, without evaluations", span=_(" to ").join(ends))
    return text


def packing_line(job: Job) -> str:
    packing, micro_batch = job.stream.packing, job.config.micro_batch
    if packing is None:
        return _("off (--no-packing)") + "; " + plural(
            micro_batch, _("1 row at a time"), _("{n} rows at a time", n=micro_batch))
    windows = [job.stream.window(step) for step in job.planned()]
    shapes = [shape for window in windows for shape in window.shapes(micro_batch)]
    rows = sum(rows for rows, _length in shapes)
    return _("{each:.1f} examples a row, {fill:.0%} full; rows of {lengths} tokens, {n} at a time",
             each=sum(len(window.examples) for window in windows) / rows,
             fill=sum(window.tokens for window in windows) / sum(b * n for b, n in shapes),
             lengths=", ".join(f"{length:,}" for length in packing.lengths), n=micro_batch)


def attention_line(job: Job, slopes_H: torch.Tensor) -> str:
    """The attention kernel on the device of slopes_H, and the form in which it gets ALiBi."""
    model, packing, dtype = job.model, job.stream.packing, job.model.head.dtype
    length = (packing.lengths[-1] if packing
              else max(len(e.ids) for e in job.examples.train))
    if packing:
        kernel = choose_kernel(slopes_H, model.config.d_model // model.config.n_heads, length,
                               dtype, packing.bounds(length))
        if kernel is not None:
            return _("{kernel}, each example separately, ALiBi as columns of the keys",
                     kernel=in_words(kernel.name))
    found = choose_attention(slopes_H, model.config, length, dtype)
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
    warmup = config.warmup_of(job.run.steps)
    steps = plural(warmup, _(" after 1 step of warm-up"),
                   _(" after {n} steps of warm-up", n=warmup)) if warmup else ""
    return kind + _("; learning rate {peak:g}{warmup}, then a cosine to {end:g}; gradient "
                    "clipped to {clip:g}", peak=config.lr, warmup=steps,
                    end=config.lr * config.lr_floor, clip=config.clip)


def recompute_line(choice: Choice) -> str:
    text = _("{n} of {blocks} blocks in backward", n=choice.recompute, blocks=choice.blocks)
    if choice.gib is None:
        return text
    if choice.auto:
        text += _(" (auto)")
    text += _(": {gib:.1f} of {of:.1f} GiB with margins", gib=choice.gib, of=choice.of)
    if choice.recompute:
        text += _(", for {share:.0%} more arithmetic in the blocks",
                  share=choice.recompute / choice.blocks / 2)
    if choice.gib > choice.of:
        text += _("; it may not fit: try a shorter --max-len or a smaller --micro-batch")
    return text


def example(tokenizer, encoded: Example) -> None:
    """Print one training example, if there is a tokenizer."""
    if tokenizer is None:
        return
    heading(_("one training example"))
    print_example(tokenizer, encoded)


def millions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"
