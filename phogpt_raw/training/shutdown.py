"""Stop a run early: after Ctrl-C, another signal, --max-minutes, or a failed write to the output.

The current step is finished, the run is saved, and the program ends. An evaluation is interrupted
at once, because it changes nothing; the resumed run repeats it. A second Ctrl-C, or Ctrl-C after
another signal, ends the program without saving. SIGTERM and SIGHUP may arrive several times, for
example from a shell and from the system. Only the first of these signals counts.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from phogpt_raw.messages import _
from phogpt_raw.refusal import signalled

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP")
                if hasattr(signal, name))


class ShutdownRequested(Exception):
    """Raised at a point where the run can be saved. why: the reason, as a text for the user.
    status: the exit status of the program."""

    def __init__(self, why: str, status: int):
        self.why, self.status = why, status


class GracefulShutdown:
    """A context manager that turns signals and a time limit into ShutdownRequested.

    minutes: the time limit; None means no limit.
    """

    def __init__(self, minutes: float | None = None):
        self.ends = None if minutes is None else time.monotonic() + 60 * minutes
        self.minutes, self.asked, self.may_raise = minutes, None, False
        self.unseen = None  # the reason why the output cannot be written, or None

    def __enter__(self) -> "GracefulShutdown":
        self.asked = next(iter(signalled), None)
        self.before = {number: signal.getsignal(number) for number in SIGNALS}
        for number, handler in self.before.items():
            if handler is not signal.SIG_IGN:  # keeps a signal ignored, such as SIGHUP under nohup
                signal.signal(number, self.ask)
        return self

    def __exit__(self, *_exception) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, number: int, _frame) -> None:
        """Handle a signal: remember it, and tell the user that the run will be saved."""
        if number == signal.SIGINT and self.asked:
            raise KeyboardInterrupt
        self.asked = self.asked or number
        if self.may_raise:
            self.check()
        again = _("a second Ctrl-C") if number == signal.SIGINT else _("Ctrl-C")
        text = _("\n{signal}: finishing the step, then saving; {again} stops without saving\n",
                 signal=name_of(number), again=again)
        with suppress(OSError):  # after SIGHUP the terminal no longer exists
            os.write(sys.stderr.fileno(), text.encode())  # print is not safe in a signal handler

    def check(self) -> None:
        """Raise ShutdownRequested after a signal, after the time limit, or after a failed write."""
        if self.asked:
            raise ShutdownRequested(name_of(self.asked), 128 + self.asked)
        if self.ends and time.monotonic() >= self.ends:
            raise ShutdownRequested(_("--max-minutes {minutes:g}", minutes=self.minutes), 0)
        if self.unseen:
            raise ShutdownRequested(self.unseen, 1)

    @contextmanager
    def printing(self) -> Iterator[None]:
        """A context for printing. If a write fails, the run stops at the next `check`.

        A write fails if the terminal or pipe is closed, or if the disk of a log file is full.
        """
        try:
            yield
        except OSError as error:
            self.unseen = _("the output cannot be written ({reason})", reason=error.strerror)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """A context for work that can be repeated. A signal interrupts this work at once."""
        self.check()
        self.may_raise = True
        try:
            yield
        finally:
            self.may_raise = False


def name_of(number: int) -> str:
    """The name of a signal in messages: Ctrl-C, SIGTERM or SIGHUP."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
