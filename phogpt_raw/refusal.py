"""Errors that a person reads as one line instead of a traceback.

A Refusal is raised where a file, a flag, a row or a GPU cannot be used as asked (exit status 2). A
RunFailed ends a training run that produced nothing usable (exit status 1). A bug is neither: it
keeps its traceback.
"""

import functools
import os
import signal
import sys
import threading

from phogpt_raw.messages import _


def write_utf8(stream) -> None:
    """Have a stream write Vietnamese where the system's encoding cannot, as a redirected output on
    Windows: in UTF-8; a terminal keeps its encoding and shows `?` for what it lacks."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    if hasattr(stream, "reconfigure") and encoding.lower().replace("-", "") != "utf8":
        stream.reconfigure(**({"errors": "replace"} if stream.isatty() else {"encoding": "utf-8"}))


class Refusal(ValueError):
    """One sentence: what is wrong, where (file and line, flag, tensor), and what to do."""


class RunFailed(RuntimeError):
    """One sentence: why the run ends without a result, and what is left of it."""


def exits_cleanly(main):
    """Decorate a command: an error for people becomes one line on stderr and an exit status.

    Refusal and a full GPU: 2; RunFailed: 1; Ctrl-C: 130, with the text of the KeyboardInterrupt
    where it has one; SIGTERM: 143, after what is unfinished has been removed.
    """
    @functools.wraps(main)
    def command(*args, **kwargs):
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        for stream in (sys.stdout, sys.stderr):
            write_utf8(stream)
        try:
            return main(*args, **kwargs)
        except (Refusal, RunFailed) as error:
            print(_("error: {text}", text=" ".join(str(error).split())), file=sys.stderr)
            sys.exit(2 if isinstance(error, Refusal) else 1)
        except BrokenPipeError:  # the reader of the output has gone, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except Exception as error:
            if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported here
                raise
            print(_("error: the GPU's memory is full; train.py: --micro-batch 1, --recompute all "
                    "or --no-capture, then go on with the same --out; generate.py: fewer "
                    "--max-new-tokens"), file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt as stop:
            print(str(stop) or _("stopped by hand"), file=sys.stderr)
            sys.exit(130)

    return command
