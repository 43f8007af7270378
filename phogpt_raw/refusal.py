"""Errors that a person reads as one line instead of a traceback.

A Refusal is raised where a file, a flag, a row or a GPU cannot be used as asked (exit status 2). A
RunFailed ends a training run that produced nothing usable (exit status 1). A bug is neither: it
keeps its traceback.
"""

import functools
import os
import sys

from phogpt_raw.messages import _


class Refusal(ValueError):
    """One sentence: what is wrong, where (file and line, flag, tensor), and what to do."""


class RunFailed(RuntimeError):
    """One sentence: why the run ends without a result, and what is left of it."""


def exits_cleanly(main):
    """Decorate a command: an error for people becomes one line on stderr and an exit status.

    Refusal and a full GPU: 2; RunFailed: 1; Ctrl-C: 130.
    """

    @functools.wraps(main)
    def command(*args, **kwargs):
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
        except KeyboardInterrupt:
            print(_("stopped by hand; with the same --out train.py goes on from its last "
                    "checkpoint"), file=sys.stderr)
            sys.exit(130)

    return command
