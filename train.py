"""QLoRA fine-tuning of PhoGPT; the loop: window, step, show, evaluate?, save?

    python train.py --steps 60                          nano on any CPU, in under a minute
    python train.py --preset t4 --model vinai/PhoGPT-4B-Chat --data rows.jsonl --epochs 3
"""

from contextlib import nullcontext
from dataclasses import replace

import torch

from phogpt_raw.cards import dtype_name, this_card, training_dtype
from phogpt_raw.command_line import from_command_line
from phogpt_raw.data.batches import Stream
from phogpt_raw.data.examples import load_examples
from phogpt_raw.model.adapters import load_adapters, new_adapters
from phogpt_raw.model.weights import load_base
from phogpt_raw.refusal import exits_cleanly
from phogpt_raw.show import console, startcard
from phogpt_raw.simulate.fit import choose
from phogpt_raw.training.evaluate import Evaluation
from phogpt_raw.training.graphs import Captured, or_eagerly, why_not
from phogpt_raw.training.loss import chunk_rows
from phogpt_raw.training.optim import lr_at, make_optimizer
from phogpt_raw.training.run import Run
from phogpt_raw.training.step import make_micro_step, make_scaler, train_step


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    config = from_command_line(arguments, __doc__)
    card = this_card()
    dtype, reason = training_dtype(card, config.dtype)
    model, tokenizer = load_base(config.model, nf4=config.nf4, dtype=dtype, device=card.device,
                                 revision=config.revision)
    if config.adapter:
        adapters = load_adapters(model, config.adapter, base=config.model)
    else:
        adapters = new_adapters(model, rank=config.rank, alpha=config.alpha, dropout=config.dropout,
                                targets=config.target_names(), base=config.model, seed=config.seed)
    examples = load_examples(tokenizer, config)
    fit = choose(config, card, model, examples.train, dtype)
    model.recompute = fit.recompute
    stream = Stream(examples.train, batch_size=config.batch_size, micro_batch=config.micro_batch,
                    pad_id=tokenizer.pad_token_id, seed=config.seed)
    steps = config.steps or stream.steps(config.epochs or 3)
    run = Run(replace(config, dtype=dtype_name(dtype)), steps)
    uncaptured = why_not(model, card.device, config.capture)
    startcard.show(config, card, dtype, reason, model, adapters, examples, run, fit, uncaptured)
    if config.dry_run:
        return console.example(tokenizer, examples.train[0])

    optimizer = make_optimizer(adapters.flat, config.optimizer, config.lr, config.weight_decay)
    scaler = make_scaler(dtype, card.device)
    captured = None if uncaptured else Captured(model, adapters.flat)
    micro_step = make_micro_step(captured or model, scaler,
                                 chunk_rows(model.config.vocab_size, config.loss_mib))
    torch.manual_seed(config.seed)  # dropout's, also of a loaded adapter; a resumed run has its own
    evaluate = or_eagerly(Evaluation(model, tokenizer, examples.held_out, config,
                                     memory=captured.memory if captured else nullcontext),
                          captured, console.say)
    step = or_eagerly(train_step, captured, console.say)  # eagerly where graphs leave no room
    progress = run.begin(adapters, optimizer, scaler)
    show = console.Progress(run.folder, progress.step, steps)
    if progress.step == 0:
        score = look(run, evaluate, adapters, show)

    model.train()
    while progress.step < steps:
        window = stream.window(progress.step)
        lr = lr_at(progress.applied, steps, config.lr, config.warmup, config.lr_floor)
        if window.supervised:
            show.begin()
            optimizer.param_groups[0]["lr"] = lr
            scale = scaler.get_scale()
            stats = step(window, micro_step, adapters.flat, optimizer, scaler, config.clip)
            progress.count(skipped=scaler.get_scale() < scale)  # lowered: the update was left out
            show.step(progress, stats, window, lr=lr, scale=scale)
        else:
            progress.count(skipped=True)
            show.without_tokens(progress)
        if run.due(config.eval_every):
            score = look(run, evaluate, adapters, show)
        if run.due(config.eval_every) or run.due(config.save_every):
            run.save(adapters, optimizer, scaler)
    console.summary(run, examples.questions, score, show)


def look(run, evaluate, adapters, show):
    """Evaluate, show the score, keep the adapter if it is the best so far."""
    score = evaluate()
    show.evaluated(run.progress.step, score)
    run.judge(adapters, score)
    return score


if __name__ == "__main__":
    main()
