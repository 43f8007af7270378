"""Stop a run before its last step: at Ctrl-C, a signal, --max-minutes, or an output that is gone.

The current step is finished, the run is saved, and the program ends. An evaluation is interrupted
at once: it changes nothing, and the resumed run evaluates again. Ctrl-C after any of these ends the
program without saving. Other signals may come several times, for example from a shell and from the
system. Only the first one counts.
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
    """Raised where the run can be saved. why: the signal or limit, for the user; status: the
    program's exit status."""

    def __init__(self, why: str, status: int):
        self.why, self.status = why, status


class GracefulShutdown:
    """A context in which signals and a time limit end the run after it was saved.

    minutes: None for no limit.
    """

    def __init__(self, minutes: float | None = None):
        self.ends = None if minutes is None else time.monotonic() + 60 * minutes
        self.minutes, self.asked, self.may_raise = minutes, None, False
        self.unseen = None  # why nobody sees what the run prints, or None

    def __enter__(self) -> "GracefulShutdown":
        self.asked = next(iter(signalled), None)
        self.before = {number: signal.getsignal(number) for number in SIGNALS}
        for number, handler in self.before.items():
            if handler is not signal.SIG_IGN:  # as nohup has it
                signal.signal(number, self.ask)
        return self

    def __exit__(self, *_exception) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, number: int, _frame) -> None:
        """The handler of all signals."""
        if number == signal.SIGINT and self.asked:
            raise KeyboardInterrupt
        self.asked = self.asked or number
        if self.may_raise:
            self.check()
        text = _("\n{signal}: finishing the step, then saving; Ctrl-C leaves at once\n",
                 signal=name_of(number))
        with suppress(OSError):  # the terminal whose end SIGHUP reports is gone
            os.write(sys.stderr.fileno(), text.encode())  # print is not made for a handler

    def check(self) -> None:
        """Raise ShutdownRequested after a signal or the time limit, or without an output."""
        if self.asked:
            raise ShutdownRequested(name_of(self.asked), 128 + self.asked)
        if self.ends and time.monotonic() >= self.ends:
            raise ShutdownRequested(_("--max-minutes {minutes:g}", minutes=self.minutes), 0)
        if self.unseen:
            raise ShutdownRequested(self.unseen, 1)

    @contextmanager
    def printing(self) -> Iterator[None]:
        """A block that prints; the run stops where the terminal, pipe or log is gone or full."""
        try:
            yield
        except OSError as error:
            self.unseen = _("the output cannot be written ({reason})", reason=error.strerror)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """A block that a signal interrupts at once, because it can be repeated."""
        self.check()
        self.may_raise = True
        try:
            yield
        finally:
            self.may_raise = False


def name_of(number: int) -> str:
    """Ctrl-C, SIGTERM or SIGHUP."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
