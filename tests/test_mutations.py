"""With damaged files a program ends in one line of error, or its result does not change.

tests/mutate.py damages the files of a base, of an adapter and of a run. Its 400 random mutations
come from fixed seeds, so they are the same in every test run.
"""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("what, count", [("base", 150), ("adapter", 130), ("run", 120)])
def test_damaged_files_end_in_one_line_or_change_nothing(what, count):
    script = Path(__file__).with_name("mutate.py")
    done = subprocess.run([sys.executable, str(script), what, "0", str(count)],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
