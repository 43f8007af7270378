"""A function with limits of time and memory returns, raises, or is stopped."""

import os
import time

import pytest

from phogpt_raw import limited as module
from phogpt_raw.limited import OverLimit, limited


def test_a_function_within_its_limits_returns_its_value():
    assert limited(lambda a, b: {"sum": a + b}, 2, 3) == {"sum": 5}


def test_it_runs_in_another_process_and_leaves_none_behind():
    child = limited(os.getpid)
    assert child != os.getpid()
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


class Odd(Exception):
    """An exception that cannot be unpickled, because its constructor needs two arguments."""

    def __init__(self, one, two):
        super().__init__(one)


def fails():
    raise Odd("no such word", 2)


def test_its_exception_is_raised_here():
    with pytest.raises(ValueError, match="no such word"):
        limited(fails)


def test_a_function_that_does_not_end_is_ended(monkeypatch):
    monkeypatch.setattr(module, "SECONDS", 0.2)
    begun = time.monotonic()
    with pytest.raises(OverLimit, match=r"takes more than 0\.2 s"):
        limited(time.sleep, 60)
    assert time.monotonic() - begun < 20


def test_a_function_that_fills_the_memory_is_ended():
    with pytest.raises(OverLimit, match="needs more than 512 MiB"):
        limited(lambda: len(bytearray(2**30)))
    with pytest.raises(OverLimit, match="needs more than 512 MiB"):  # SIGKILL, as by an OOM killer
        limited(lambda: os.kill(os.getpid(), 9))
