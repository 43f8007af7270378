"""How a command ends: one line and an exit status for errors that the user can correct."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from phogpt_raw.refusal import Refusal, RunFailed, exits_cleanly

ROOT = Path(__file__).parents[1]
HEAD = "import os, sys\nfrom phogpt_raw.refusal import exits_cleanly\n@exits_cleanly\n"


def ended(error, capsys):
    """(exit status, stderr) of a command that raises `error`."""
    @exits_cleanly
    def main():
        raise error

    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code, capsys.readouterr().err


@pytest.mark.parametrize("error, status, line", [
    (Refusal("rows.jsonl:3: not\nJSON"), 2, "error: rows.jsonl:3: not JSON\n"),
    (RunFailed("20 steps skipped"), 1, "error: 20 steps skipped\n"),
    (PermissionError(13, "Permission denied", "/x"), 2, "error: /x: Permission denied\n"),
    (OSError(36, "File name too long", "xxx"), 2, "error: xxx: File name too long\n")])
def test_what_a_person_can_mend_is_one_line(error, status, line, capsys):
    assert ended(error, capsys) == (status, line)


def test_a_bug_keeps_its_traceback():
    @exits_cleanly
    def main():
        raise FileNotFoundError(2, "No such file", "internal")

    with pytest.raises(FileNotFoundError):
        main()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_an_output_whose_disk_is_full_is_one_line():
    code = HEAD + "def main():\n    print('x')\nmain()"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE,
                              text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (
        2, "error: the output: No space left on device\n")


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_lets_what_is_unfinished_be_removed(number, status):
    code = HEAD + ("def main():\n    try:\n        os.kill(os.getpid(), int(sys.argv[1]))\n"
                   "        import time; time.sleep(9)\n    finally:\n        print('removed')\n"
                   "main()")
    done = subprocess.run([sys.executable, "-c", code, str(int(number))], capture_output=True,
                          text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (status, "removed\n")


def test_a_hangup_that_nohup_ignores_stays_ignored():
    code = HEAD + ("def main():\n    os.kill(os.getpid(), 1)\n    print('still here')\nmain()")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
                          preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    assert (done.returncode, done.stdout) == (0, "still here\n")


@pytest.mark.parametrize("command", ["train", "generate", "phogpt_raw.export"])
def test_ctrl_c_while_modules_are_imported_is_one_line(command):
    code = ("import runpy, sys\nclass Stop:\n    def find_spec(self, name, *_):\n"
            "        if name == 'torch':\n            raise KeyboardInterrupt\n"
            f"sys.meta_path.insert(0, Stop())\nrunpy.run_module({command!r}, None, '__main__')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "stopped by hand\n")


def test_other_errors_of_an_import_keep_their_traceback():
    code = "import sys; sys.modules['torch'] = None; import phogpt_raw"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "Traceback" in done.stderr
