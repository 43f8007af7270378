"""Fine-tune a PhoGPT on your questions and answers, by QLoRA.

    python train.py --steps 60      train the small model nano, on any CPU
    python train.py --model vinai/PhoGPT-4B-Chat --data rows.jsonl --epochs 3

With --dry-run it prints its settings and trains nothing.
"""

from phogpt_raw.command_line import from_command_line
from phogpt_raw.export import model_card
from phogpt_raw.refusal import exits_cleanly
from phogpt_raw.show import console, plots, startcard
from phogpt_raw.simulate.fit import choose
from phogpt_raw.simulate.plan import duration
from phogpt_raw.training.limits import retry_without_graphs
from phogpt_raw.training.metrics import Metrics
from phogpt_raw.training.optim import lr_at
from phogpt_raw.training.setup import set_up
from phogpt_raw.training.step import train_step


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    config = from_command_line(arguments, __doc__)
    job = set_up(config)  # model, adapters, optimizer, data: everything, wired once
    run, state = job.run, job.run.state
    choice = choose(job)  # simulated: how rows are packed, how many blocks backward recomputes
    job.pack(choice.packing)
    job.limits.recompute = choice.recompute
    startcard.show(job, choice, duration(job, choice) if config.dry_run else None)
    if config.dry_run:
        return startcard.example(job.tokenizer, job.examples.train[0])

    run.begin(job)
    metrics = Metrics(run.folder, state.step, job, config.tensorboard)
    with plots.drawn(run), console.Display(run) as show:
        loss, score = train(job, metrics, show)
    run.check_result(loss, score)
    model_card.write(job)
    console.summary(run, job.examples.questions, score, show)


def train(job, metrics, show):
    """The loop, from where the run stands to its last step: take a window, step, show, evaluate
    and save where it is due. Returns the last loss and score."""
    config, run, state = job.config, job.run, job.run.state
    step = retry_without_graphs(train_step, job, console.say)
    evaluate = retry_without_graphs(job.evaluate, job, console.say)

    def evaluation():
        score = evaluate()
        metrics.evaluation(state.step, score)
        show.evaluation(score)
        run.keep_if_best(job.adapters, score)
        return score

    if state.step == 0:
        evaluation()
    job.model.train()
    while not run.ended:
        window = job.stream.window(state.step)
        lr = lr_at(state.applied, run.steps, config.lr, config.warmup_of(run.steps),
                   config.lr_floor)
        job.optimizer.param_groups[0]["lr"] = lr

        metrics.begin()
        stats = step(job, window)
        state.count(skipped=bool(stats.skipped))
        row = metrics.step(state, stats, window, lr)
        show.step(row, metrics.seconds)

        run.stop_if_stuck()
        if run.due(config.eval_every):
            score = evaluation()
        if run.due(config.eval_every) or run.due(config.save_every):
            run.save(job)
    return row.loss, score


if __name__ == "__main__":
    main()
