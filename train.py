"""Fine-tune a PhoGPT model on your questions and answers with QLoRA.

    python train.py --steps 60      train the small model nano, on any CPU
    python train.py --model vinai/PhoGPT-4B-Chat --data rows.jsonl --epochs 3

With --dry-run the program prints the settings and trains nothing.
"""

import sys
from contextlib import suppress

from phogpt_raw.command_line import from_command_line
from phogpt_raw.export import model_card
from phogpt_raw.refusal import exits_cleanly
from phogpt_raw.show import console, inspection, plots, startcard
from phogpt_raw.simulate.fit import choose
from phogpt_raw.simulate.plan import duration
from phogpt_raw.training.limits import retry_without_graphs
from phogpt_raw.training.metrics import Metrics
from phogpt_raw.training.optim import lr_at
from phogpt_raw.training.setup import set_up
from phogpt_raw.training.shutdown import GracefulShutdown, ShutdownRequested
from phogpt_raw.training.step import train_step


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    config = from_command_line(arguments, __doc__)
    job = set_up(config)  # creates model, adapters, optimizer and data
    run, state = job.run, job.run.state
    choice = choose(job)  # simulates steps to choose packing and the number of recomputed blocks
    job.pack(choice.packing)
    job.limits.recompute = choice.recompute
    if config.inspect:
        return inspection.show(job)
    startcard.show(job, choice, duration(job, choice) if config.dry_run else None)
    if config.dry_run:
        return startcard.example(job.tokenizer, job.examples.train[0])

    with run.begun(job):
        metrics = Metrics(run.folder, state, job, config.tensorboard)
        with GracefulShutdown(config.max_minutes) as shutdown, plots.drawn(run):
            try:
                with console.Display(run, shutdown) as show:
                    train(job, metrics, show, shutdown)
            except ShutdownRequested as request:
                run.save(job)
                run.settle()
                with suppress(OSError):  # the reader of the output may have exited
                    console.ended_early(run, request.why,
                                        sys.argv[1:] if arguments is None else arguments)
                sys.exit(request.status)
        run.settle()
        run.check_result(metrics.last_loss)
        model_card.write(job)
        console.summary(run, job.examples.questions, show)


def train(job, metrics, show, shutdown):
    """Train from the current step to the last one.

    Each iteration begins with an evaluation and a checkpoint, if these are due. Then the iteration
    takes the examples of one optimizer step (a window), runs the step and shows the result. Raises
    ShutdownRequested after a signal or at the time limit.
    """
    config, run, state = job.config, job.run, job.run.state
    step = retry_without_graphs(train_step, job, console.say)
    evaluate = retry_without_graphs(job.evaluate, job, console.say)

    job.model.train()
    while True:
        if run.evaluation_due():
            with shutdown.at_once():
                score = evaluate()
            metrics.evaluation(state.step, score)
            show.evaluation(score)
            run.rate(score)
        if run.save_due():
            run.save(job)
        if run.ended:
            return
        shutdown.check()

        window = job.stream.window(state.step)
        lr = lr_at(state.applied, run.steps, config.lr, config.warmup_of(run.steps),
                   config.lr_floor)
        job.optimizer.param_groups[0]["lr"] = lr

        metrics.begin()
        stats = step(job, window)
        state.count(skipped=bool(stats.skipped))
        row = metrics.step(state, stats, window, lr)
        show.step(row, metrics.seconds)
        run.check()


if __name__ == "__main__":
    main()
