"""Kill runs of train.py, resume them, and compare them with an uninterrupted run.

    python tests/kills.py nf4 0 10      the setting nf4, kills number 0 to 9

Every run is a forked copy of one process that has already imported all modules. Some kills send
SIGKILL before a file operation. The other kills send SIGALRM, for which the program has no handler.
This signal arrives at most 50 ms after the start of a step, of an evaluation, or of the loading of
a checkpoint. Each run is killed one to three times and is then resumed to its end.
"""

import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

SETTINGS = {
    "fp32": ["--no-nf4", "--dtype", "fp32"],
    "nf4": ["--no-packing"],
    "packed": ["--batch-size", 8, "--micro-batch", 1],
    "accumulation": ["--batch-size", 6, "--micro-batch", 1, "--optimizer", "adamw"],
    "dropout": ["--dropout", 0.3],
}
RUN = {"--steps": 8, "--save-every": 2, "--eval-every": 3, "--keep": 2}
MOMENTS = ("start", "step", "evaluation", "save", "resume")  # run n begins with MOMENTS[n % 5]
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"}


@dataclass
class Kill:
    """The point at which a process is killed.

    If `moment` is "files", the process is killed before file operation number `call`. Any other
    `moment` names a function. The process is then killed `delay` seconds after the start of call
    number `call` of this function.
    """

    moment: str
    call: int
    delay: float = 0.0


def choose(dice: random.Random, moment: str) -> Kill:
    if moment == "start":  # the start of a new run or of a resumed run
        return Kill("files", dice.randrange(16))
    if moment in ("step", "evaluation"):
        return Kill(moment, dice.randrange(8 if moment == "step" else 4), dice.uniform(0, 0.05))
    if moment == "save":
        return Kill("files", dice.randrange(16, 100))
    return Kill("resume", 0, dice.uniform(0, 0.03))


def plan(setting: str, number: int) -> list[Kill]:
    """The kills of one run, in the order in which they happen."""
    dice = random.Random(f"{setting} {number}")
    first = MOMENTS[number % len(MOMENTS)]
    kills = [choose(dice, "save" if first == "resume" else first)]
    if first == "resume":
        kills.append(choose(dice, "resume"))
    return kills + [choose(dice, dice.choice(MOMENTS)) for _ in range(dice.randrange(2))]


def arm(kill: Kill, folder: Path) -> None:
    """Prepare this process so that it is killed at the point that `kill` describes."""
    import train
    from phogpt_raw.training import checkpoint, setup

    if kill.moment == "files":
        count = 0

        def watch(event, args):
            nonlocal count
            writes = event == "open" and isinstance(args[2], int) and args[2] & WRITES
            if (writes or event in CHANGES) and str(folder) in str(args[0]):
                if count == kill.call:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1

        return sys.addaudithook(watch)
    owner, name = {"step": (train, "train_step"), "evaluation": (setup.Job, "evaluate"),
                   "resume": (checkpoint, "load")}[kill.moment]
    real, calls = getattr(owner, name), iter(range(1000))

    def dying(*args, **kwargs):
        if next(calls) == kill.call:
            signal.setitimer(signal.ITIMER_REAL, max(kill.delay, 1e-6))
        return real(*args, **kwargs)

    setattr(owner, name, dying)


def run(arguments: list[str], folder: Path, kill: Kill | None = None) -> int:
    """Run train.py in a forked process; return its exit status, or -N if signal N killed it."""
    child = os.fork()
    if child == 0:
        import train

        status = 1
        try:
            quiet = os.open(folder.parent / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            if kill:
                arm(kill, folder)
            train.main([*arguments, "--out", str(folder)])
            status = 0
        except SystemExit as left:
            status = left.code
        finally:
            sys.stdout.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_and_straight(setting: str, numbers: range, place: Path) -> None:
    """Raise AssertionError if a killed and resumed run differs from the uninterrupted one."""
    import bitsandbytes  # noqa: F401  imported once, before the process is forked
    import checkpoints
    import matplotlib.pyplot  # noqa: F401
    import peft  # noqa: F401
    from conftest import SMALL, command_line, write_rows
    from test_checkpoint import assert_same_run

    base = place / "tiny"
    checkpoints.write_checkpoint(base)
    arguments = command_line({**SMALL, **RUN, "--model": base,
                              "--data": write_rows(place / "rows.jsonl")}, SETTINGS[setting])
    straight = place / "straight" / "run"
    straight.parent.mkdir()
    assert run(arguments, straight) == 0, (straight.parent / "said.txt").read_text()
    for number in numbers:
        broken = place / f"broken-{number}" / "run"
        broken.parent.mkdir()
        kills = plan(setting, number)
        died = [run(arguments, broken, kill) for kill in kills]
        end = run(arguments, broken)
        said = (broken.parent / "said.txt").read_text()
        try:
            assert -signal.SIGKILL in died or -signal.SIGALRM in died, "nothing was killed"
            assert {*died, end} <= {-signal.SIGKILL, -signal.SIGALRM, 0, 2}, (died, end)
            assert end == 0 or "this run is complete" in said.splitlines()[-1], said[-600:]
            assert_same_run(broken, straight)
        except AssertionError as error:
            raise AssertionError(f"{setting} {number}: {kills} {died} {end}\n{error}") from None
        print(f"{setting} {number}: {kills} {died} ok", flush=True)


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        killed_and_straight(sys.argv[1], range(int(sys.argv[2]), int(sys.argv[3])), Path(place))
    print(f"{time.perf_counter() - begun:.1f} s")
