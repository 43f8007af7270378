"""metrics.jsonl: the time, memory and loss of each step. The display: the remaining time."""

import json
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ragged_examples

from phogpt_raw.config import Config
from phogpt_raw.data.batches import Window
from phogpt_raw.show import console
from phogpt_raw.show.console import Display
from phogpt_raw.training import metrics as module
from phogpt_raw.training.evaluate import Score
from phogpt_raw.training.limits import Limits
from phogpt_raw.training.metrics import Metrics, StepRow
from phogpt_raw.training.run import Run, RunState
from phogpt_raw.training.shutdown import GracefulShutdown
from phogpt_raw.training.step import StepStats

TRAINING = SimpleNamespace(forward=None, limits=Limits(micro_batch=4, chunk_rows=1))


def stats(loss=2.0, skipped=False):
    return StepStats(torch.tensor(loss), torch.tensor(0.5), torch.tensor(4096.0),
                     torch.tensor(float(skipped)))


def test_a_row_is_of_its_own_step(tmp_path, monkeypatch):
    """A step's peak memory does not count for later steps. A step's time starts at `begin`."""
    window, peaks = Window(ragged_examples(3), 3), iter([3 * 2**30, 2**30])
    resets = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: resets.append(1))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: next(peaks))
    metrics = Metrics(tmp_path, RunState(), TRAINING)
    time.sleep(0.05)
    rows = []
    for step in (1, 2):
        metrics.begin()
        rows.append(metrics.step(RunState(step=step, skipped=1), stats(), window, lr=0.1))
    assert [row.peak_gib for row in rows] == [3.0, 1.0] and len(resets) == 2
    assert all(window.tokens / row.tokens_per_s < 0.05 for row in rows)
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert written == [vars(row) for row in rows]
    assert written[0] == dict(
        step=1, loss=2.0, lr=0.1, grad_norm=0.5, tokens=window.supervised,
        tokens_per_s=rows[0].tokens_per_s, peak_gib=3.0, scale=4096.0, skipped=1,
        rows=3, fill=round(window.tokens / (3 * 32), 4))


def test_the_peak_of_graphs_is_theirs(monkeypatch):
    class Graphs:
        def peak_bytes(self):
            return 5

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 4)
    monkeypatch.setattr(module, "GraphedModel", Graphs)
    assert module.peak_bytes(Graphs()) == 5
    assert module.peak_bytes(object()) == 4


def test_rows_after_the_checkpoint_are_dropped_when_a_run_resumes(tmp_path):
    file = tmp_path / "metrics.jsonl"
    rows = [f'{{"step": {n}, "loss": 1.0}}\n' for n in (1, 2, 3)]
    file.write_text("".join(rows) + '{"step": 4, "lo')
    Metrics(tmp_path, RunState(2, evaluated=2), TRAINING)
    assert file.read_text() == rows[0] + rows[1]
    Metrics(tmp_path, RunState(), TRAINING)
    assert file.read_text() == ""


# -- the remaining time


def run_of(tmp_path, steps, eval_every, step=0):
    run = Run(Config(out=str(tmp_path / "run"), eval_every=eval_every), steps, None)
    run.state.step = step
    return run


@pytest.mark.parametrize("every", [0, 1, 3, 4, 7, 30])
@pytest.mark.parametrize("step", [1, 3, 4, 8, 11, 12])
def test_evaluations_that_are_still_due_are_counted(tmp_path, every, step):
    run = run_of(tmp_path, 12, every, step)
    expected = 0
    for n in range(step, 13):
        run.state.step = n
        expected += n == 12 or (every > 0 and n % every == 0)
    run.state.step = step
    assert run.still_due(every) == expected


def test_the_time_left_counts_steps_and_evaluations(tmp_path):
    run = run_of(tmp_path, 10, eval_every=5)
    display = Display(run, GracefulShutdown())
    display.evaluation(Score(1.0, None, [], seconds=30.0))  # before the first step
    for step in (1, 2):
        run.state.step = step
        display.step(StepRow(step, 1.0, 0.1, 1.0, 10, 50.0, None, 1.0, 0, 1, 1.0), seconds=2.0)
    assert display.seconds_left() == pytest.approx(8 * 2.0 + 2 * 30.0)
    run.state.step = 5  # before the evaluation of step 5
    assert display.seconds_left() == pytest.approx(5 * 2.0 + 2 * 30.0)
    run.state.step = 10
    assert display.seconds_left() == pytest.approx(30.0)


def test_the_progress_line_names_what_runs_and_ends_without_a_time_left(tmp_path):
    run = run_of(tmp_path, 1, eval_every=1)
    with Display(run, GracefulShutdown()) as display:
        assert display.bar.desc == "evaluating"
        display.evaluation(None)
        assert display.bar.desc == "first step"
        run.state.step = 1
        display.step(StepRow(1, 2.0, 0.1, 1.0, 10, 50.0, None, 1.0, 0, 1, 1.0), seconds=2.0)
        assert display.bar.desc == "loss 2.000, 50 tokens/s, CPU, 0 s left"
    assert display.bar.desc == "loss 2.000, 50 tokens/s, CPU"


def test_a_line_above_the_progress_is_broken_between_words_on_a_terminal_alone(monkeypatch, capsys):
    text = "step 0: validation loss 5.675 (perplexity 291.4); answers that stop: 0 of 2"
    console.say(text)
    assert capsys.readouterr().out == text + "\n"
    monkeypatch.setattr(console, "out", console.Rich(force_terminal=True, width=40))
    console.say(text)
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 40 and said.split() == text.split()


# -- TensorBoard


def test_tensorboard_gets_the_values_of_the_file(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    window = Window(ragged_examples(3), 3)
    metrics = Metrics(tmp_path, RunState(), TRAINING, tensorboard=True)
    for step in (1, 2):
        metrics.begin()
        metrics.step(RunState(step=step), stats(loss=3.0 / step), window, lr=0.1)
    metrics.step(RunState(step=3), stats(loss=float("nan")), window, lr=0.1)  # NaN is left out
    metrics.evaluation(2, Score(1.25, None, []))
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(e.step, e.value) for e in board.Scalars("loss")] == [(1, 3.0), (2, 1.5)]
    assert [(e.step, e.value) for e in board.Scalars("val_loss")] == [(2, 1.25)]


def test_without_its_package_tensorboard_is_refused(monkeypatch):
    import sys

    from phogpt_raw.refusal import Refusal
    from phogpt_raw.training.metrics import summary_writer

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(Refusal, match=r"pip install .*'\.\[tensorboard\]'"):
        summary_writer()
