"""Errors that are printed as one line instead of a traceback.

A Refusal means that a file, a flag, a row or a GPU cannot be used as the user requested (exit
status 2). A RunFailed ends a training run without a usable result (exit status 1). The exceptions
of bugs keep their traceback.
"""

import errno
import functools
import os
import signal
import sys
import threading
from contextlib import suppress

from phogpt_raw.messages import _

# Errors of a path or of the disk. Such an error is never a bug of the program.
OF_THE_PLACE = (errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ELOOP, errno.EISDIR,
                errno.ENAMETOOLONG, errno.ENOSPC, errno.ENOTDIR, errno.EPERM, errno.EROFS)


def write_utf8(stream) -> None:
    """Switch an output stream to UTF-8, so that it can write Vietnamese.

    A redirected output on Windows, for example, has another encoding by default. An incomplete
    character, for example from the name of a file, is written as its code. A terminal with another
    encoding keeps it, and shows `?` for each character that this encoding lacks.
    """
    encoding = getattr(stream, "encoding", None) or "utf-8"
    if not hasattr(stream, "reconfigure"):
        return
    if stream.isatty() and encoding.lower().replace("-", "") != "utf8":
        stream.reconfigure(errors="replace")
    else:
        stream.reconfigure(encoding="utf-8", errors="backslashreplace")


def open_missing_streams() -> None:
    """Open os.devnull in place of each missing standard stream.

    If a program is started without a standard stream, Python sets sys.stdin, sys.stdout or
    sys.stderr to None.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def discard_unwritable() -> None:
    """Discard buffered output that cannot be written, because its reader or its disk space is gone.

    Otherwise Python would try to write the output again at exit, and would fail.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def tell(text: str) -> None:
    """Print a line on stderr. An error of the stream, such as a closed pipe, is ignored."""
    with suppress(OSError):
        print(text, file=sys.stderr)


class Refusal(ValueError):
    """An error that the user can correct.

    The text is one sentence: the fault, its place (file and line, flag, tensor), and the remedy.
    """


class RunFailed(RuntimeError):
    """A training run ended without a usable result. The text is one sentence with the reason."""


signalled: list[int] = []  # numbers of the signals SIGTERM and SIGHUP that have been received


def end(number: int, _frame) -> None:
    """Handle SIGTERM and SIGHUP: store the signal, then exit with status 128 + its number.

    If the handler runs inside a `__del__`, Python prints the SystemExit and continues. The rest of
    the program can then still find the signal in `signalled`.
    """
    signalled.append(number)
    sys.exit(128 + number)


def exits_cleanly(main):
    """Decorate a command so that a known error becomes one line on stderr and an exit status.

    The status is 2 for a Refusal, for a full GPU, and for a file or disk that cannot be used. It is
    1 for a RunFailed, 130 for Ctrl-C, 143 for SIGTERM and 129 for SIGHUP. If the KeyboardInterrupt
    of a Ctrl-C has a text, this text is printed as the line. Unfinished files are removed before
    the exit.
    """
    @functools.wraps(main)
    def command(*args, **kwargs):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
                if signal.getsignal(number) is not signal.SIG_IGN:  # nohup sets SIGHUP to SIG_IGN
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
        except BrokenPipeError:  # the reader of the output, such as `head`, has ended
            sys.exit(1)
        except OSError as error:
            if error.errno not in OF_THE_PLACE:
                raise
            place = _("the output") if error.filename is None else error.filename
            tell(_("error: {place}: {reason}", place=place, reason=error.strerror))
            sys.exit(2)
        except Exception as error:
            if type(error).__name__ != "OutOfMemoryError":  # torch's error; torch is not imported
                raise
            tell(_("error: the GPU's memory is full; with train.py, give --micro-batch 1, "
                   "--recompute all or --no-capture, and resume with the same --out; with "
                   "generate.py, give a smaller --max-new-tokens"))
            sys.exit(2)
        except KeyboardInterrupt as stop:
            tell(str(stop) or _("stopped by hand"))
            sys.exit(130)
        finally:
            discard_unwritable()

    return command
