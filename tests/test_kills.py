"""A killed and resumed run gives the same files as an uninterrupted run.

tests/kills.py kills the runs.

`pytest tests/test_kills.py` kills ten runs, two with each setting; `pytest -m slow` kills fifty
more.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from kills import MOMENTS, SETTINGS, plan

NUMBERS = {"fp32": (0, 2), "nf4": (2, 4), "packed": (4, 6), "accumulation": (6, 8),
           "dropout": (8, 10)}  # ten runs: each kind of first kill occurs twice


def kill(setting: str, start: int, end: int) -> None:
    script = Path(__file__).with_name("kills.py")
    done = subprocess.run([sys.executable, str(script), setting, str(start), str(end)],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count(" ok\n") == end - start


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_killed_run_goes_on_to_the_straight_run(setting):
    kill(setting, *NUMBERS[setting])


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_ten_more_killed_runs_of_each_setting(setting):
    kill(setting, 10, 20)


def test_the_ten_kills_are_first_at_each_kind_of_moment_twice():
    first = [MOMENTS[n % len(MOMENTS)] for span in NUMBERS.values() for n in range(*span)]
    assert sorted(first) == sorted(2 * MOMENTS)
    assert all(len(plan("nf4", n)) <= 3 for n in range(50))
