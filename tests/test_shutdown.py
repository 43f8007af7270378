"""A signal or a time limit ends a run. The run saves its state first.

The resumed run gives the same result as an uninterrupted run, bit for bit.
"""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import SMALL
from test_checkpoint import assert_same_run

from phogpt_raw.refusal import exits_cleanly, signalled
from phogpt_raw.training import checkpoint
from phogpt_raw.training.shutdown import GracefulShutdown, ShutdownRequested

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143),
                                            (signal.SIGHUP, 129)])
def test_a_signal_is_remembered_until_the_step_is_done(number, status, capfd):
    before = signal.getsignal(number)
    with GracefulShutdown() as shutdown:
        shutdown.check()
        os.kill(os.getpid(), number)
        with pytest.raises(ShutdownRequested) as request:
            shutdown.check()
    assert request.value.status == status and signal.getsignal(number) is before
    again = "a second Ctrl-C" if number == signal.SIGINT else "Ctrl-C"
    assert f"finishing the step, then saving; {again} stops without" in capfd.readouterr().err


def test_a_second_ctrl_c_leaves_at_once():
    with GracefulShutdown():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_after_another_signal_leaves_at_once_as_it_said():
    with GracefulShutdown():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_first_signal_is_the_reason():
    with GracefulShutdown() as shutdown:
        for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGHUP):
            os.kill(os.getpid(), number)
        with pytest.raises(ShutdownRequested) as request:
            shutdown.check()
    assert request.value.status == 129


class Closing:
    """An object that sends SIGTERM when it is deleted.

    If its __del__ raises an exception, Python only prints it and continues.
    """

    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_python_swallowed_ends_the_run_at_its_first_step():
    before = signal.getsignal(signal.SIGTERM)

    @exits_cleanly
    def main():
        Closing()
        with GracefulShutdown() as shutdown, pytest.raises(ShutdownRequested) as request:
            shutdown.check()
        return request.value.status

    try:
        assert main() == 143
    finally:
        signal.signal(signal.SIGTERM, before)
        signalled.clear()
    with GracefulShutdown() as shutdown:
        shutdown.check()


def test_a_terminal_that_is_gone_does_not_disturb_the_step(monkeypatch):
    def gone(_number, _text):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "write", gone)
    with GracefulShutdown() as shutdown, pytest.raises(ShutdownRequested):
        os.kill(os.getpid(), signal.SIGHUP)
        shutdown.check()


def test_what_can_be_repeated_is_broken_off():
    with GracefulShutdown() as shutdown:
        with pytest.raises(ShutdownRequested), shutdown.at_once():
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("the block goes on")
        with pytest.raises(ShutdownRequested), shutdown.at_once():
            raise AssertionError("asked before, and begun all the same")


def test_a_signal_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with GracefulShutdown() as shutdown:
            os.kill(os.getpid(), signal.SIGHUP)
            shutdown.check()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_time_is_over_without_an_error():
    with GracefulShutdown(minutes=0) as shutdown, pytest.raises(ShutdownRequested) as request:
        shutdown.check()
    assert request.value.status == 0 and request.value.why == "--max-minutes 0"


# -- a whole run


@pytest.fixture
def command(tiny, rows):
    """The command that runs train.py on tiny in a separate process."""
    return [sys.executable, "train.py", "--model", str(tiny), "--data", str(rows),
            *(str(part) for pair in SMALL.items() for part in pair)]



def until_step(process, step):
    for line in process.stdout:
        if line.startswith(f"step {step}/") or f"step {step}:" in line:
            return
    raise AssertionError(f"no step {step}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_run_that_is_left_goes_on_to_the_bit(command, train_and_draw, tmp_path, number):
    straight, broken = tmp_path / "straight" / "run", tmp_path / "broken" / "run"
    how = ["--dropout", "0.2", "--warmup", "2"]
    assert train_and_draw("--out", straight, *how)[0] == 0
    run = [*command, *how, "--out", str(broken)]
    with subprocess.Popen(run, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True) as process:
        until_step(process, 1)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.skip("the run ended before the signal came")
    assert process.returncode == 128 + number
    assert "ended after step" in said and f"--out {broken}" in said
    assert not (broken / ".lock").exists()
    again = said.splitlines()[-1].split()  # the printed command
    done = subprocess.run([sys.executable, *again[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same_run(broken, straight)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_the_same_signal_while_the_run_is_saved_changes_nothing(train, tmp_path, monkeypatch,
                                                                number):
    """A signal may come twice. For example, a shell and the system both send SIGHUP, or a cluster
    repeats SIGTERM."""
    before = signal.getsignal(number)
    write = checkpoint.write

    def asked(*args):
        os.kill(os.getpid(), number)
        return 0.01

    def asked_again(*args):
        os.kill(os.getpid(), number)
        return write(*args)

    try:
        with monkeypatch.context() as patch:
            patch.setattr("train.lr_at", asked)
            patch.setattr(checkpoint, "write", asked_again)
            patch.setattr("phogpt_raw.show.plots.draw",
                          lambda *_: os.kill(os.getpid(), number))
            status, _, said = train("--out", tmp_path / "run")
    finally:
        signal.signal(number, before)
    assert status == 128 + number and "saved; resume with" in said
    assert checkpoint.newest(tmp_path / "run") == tmp_path / "run" / "checkpoint-1"


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EIO, errno.ENOSPC])
def test_a_run_whose_output_is_gone_is_saved(train, tmp_path, monkeypatch, number):
    def gone(text):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr("phogpt_raw.show.console.say", gone)  # `say` prints an evaluation
        status, _, said = train("--out", tmp_path / "run", "--eval-every", 5)
    assert status == 1 and "the output cannot be written" in said  # at the evaluation before step 1
    assert train("--out", tmp_path / "run", "--eval-every", 5)[0] == 0


def test_a_run_of_no_minutes_takes_no_step_and_loses_nothing(train, tmp_path):
    status, _, said = train("--out", tmp_path / "run", "--max-minutes", 0)
    assert status == 0 and "nothing was trained yet" in said
    assert train("--out", tmp_path / "run")[0] == 0


def test_two_runs_in_one_folder_do_not_mix(command, tmp_path):
    run = [*command, "--steps", "9999", "--out", str(tmp_path / "run")]
    with subprocess.Popen(run, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True) as first:
        until_step(first, 1)
        second = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
        first.kill()
        first.communicate()
    assert second.returncode == 2 and "another process trains there" in second.stderr
    assert second.stderr.count("\n") == 1


def test_a_lock_ends_with_its_process(command, tmp_path):
    run = [*command, "--out", str(tmp_path / "run")]
    with subprocess.Popen(run, cwd=ROOT, stdout=subprocess.PIPE, text=True) as first:
        until_step(first, 2)
        first.kill()
    time.sleep(0.1)
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and not (tmp_path / "run" / ".lock").exists()
