"""Errors that a person reads as one line instead of a traceback.

A Refusal is raised where a file, a flag, a row or a GPU cannot be used as asked (exit status 2). A
RunFailed ends a training run that produced nothing usable (exit status 1). A bug is neither: it
keeps its traceback.
"""

import errno
import functools
import os
import signal
import sys
import threading
from contextlib import suppress

from phogpt_raw.messages import _

# Errors of a path or of the disk. They are never bugs of the program.
OF_THE_PLACE = (errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ELOOP, errno.EISDIR,
                errno.ENAMETOOLONG, errno.ENOSPC, errno.ENOTDIR, errno.EPERM, errno.EROFS)


def write_utf8(stream) -> None:
    """Have a stream write Vietnamese where the system's encoding cannot, as a redirected output on
    Windows: in UTF-8; a terminal keeps its encoding and shows `?` for what it lacks. What UTF-8
    lacks, such as half a character in the name of a file, is written as its code."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    if not hasattr(stream, "reconfigure"):
        return
    if stream.isatty() and encoding.lower().replace("-", "") != "utf8":
        stream.reconfigure(errors="replace")
    else:
        stream.reconfigure(encoding="utf-8", errors="backslashreplace")


def open_missing_streams() -> None:
    """If a program is started without an input or an output stream, Python's sys has None in its
    place."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def discard_unwritable() -> None:
    """Send what is still to be printed nowhere where its reader is gone or its disk is full: at
    its end Python would print it once more, and fail."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def tell(text: str) -> None:
    """Print a line on stderr, if anybody reads it."""
    with suppress(OSError):
        print(text, file=sys.stderr)


class Refusal(ValueError):
    """One sentence: what is wrong, where (file and line, flag, tensor), and what to do."""


class RunFailed(RuntimeError):
    """One sentence: why the run ends without a result, and what is left of it."""


signalled: list[int] = []  # signals that have asked the command to end


def end(number: int, _frame) -> None:
    """The handler of SIGTERM and SIGHUP. Where it runs inside a `__del__`, Python prints SystemExit
    and goes on; so the signal is remembered."""
    signalled.append(number)
    sys.exit(128 + number)


def exits_cleanly(main):
    """Decorate a command: an error for people becomes one line on stderr and an exit status.

    Refusal, a full GPU, a file or disk that cannot be used: 2; RunFailed: 1; Ctrl-C: 130, with the
    text of the KeyboardInterrupt where it has one; SIGTERM: 143; SIGHUP: 129, after what is
    unfinished has been removed.
    """
    @functools.wraps(main)
    def command(*args, **kwargs):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
                if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
                    signal.signal(number, end)
        signalled.clear()
        open_missing_streams()
        for stream in (sys.stdout, sys.stderr):
            write_utf8(stream)
        try:
            result = main(*args, **kwargs)
            sys.stdout.flush()
            return result
        except (Refusal, RunFailed) as error:
            tell(_("error: {text}", text=" ".join(str(error).split())))
            sys.exit(2 if isinstance(error, Refusal) else 1)
        except BrokenPipeError:  # the reader of the output has gone, as `head` does
            sys.exit(1)
        except OSError as error:
            if error.errno not in OF_THE_PLACE:
                raise
            place = _("the output") if error.filename is None else error.filename
            tell(_("error: {place}: {reason}", place=place, reason=error.strerror))
            sys.exit(2)
        except Exception as error:
            if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported here
                raise
            tell(_("error: the GPU's memory is full; train.py: --micro-batch 1, --recompute all "
                   "or --no-capture, then go on with the same --out; generate.py: fewer "
                   "--max-new-tokens"))
            sys.exit(2)
        except KeyboardInterrupt as stop:
            tell(str(stop) or _("stopped by hand"))
            sys.exit(130)
        finally:
            discard_unwritable()

    return command
