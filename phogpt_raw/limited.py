"""Run a function in a forked process with limits on its time and its memory.

The function runs code from downloaded files: chat templates and regular expressions. Such code can
run for ever or fill the memory, although each operation of the code is allowed.
"""

import multiprocessing
import resource
from collections.abc import Callable
from pathlib import Path

SECONDS, MIB = 10, 512


class OverLimit(Exception):
    """The function exceeded a limit. The text is a predicate, such as "takes more than 10 s"."""


def limited(function: Callable, *args):
    """Return the result of `function(*args)`. The result must be small and picklable.

    Raises OverLimit if the function takes more time than SECONDS or more memory than MIB. An
    exception of the function is raised as a ValueError with the same text.
    """
    forking = multiprocessing.get_context("fork")
    receiver, sender = forking.Pipe(duplex=False)
    child = forking.Process(target=send_result, args=(sender, function, args), daemon=True)
    child.start()
    sender.close()
    try:
        if not receiver.poll(SECONDS):
            raise OverLimit(f"takes more than {SECONDS} s")
        value, error = receiver.recv()
    except EOFError:  # the process was killed from outside
        error = MemoryError()
    finally:
        child.kill()
        child.join()
    if isinstance(error, MemoryError):
        raise OverLimit(f"needs more than {MIB} MiB")
    if error:
        raise error
    return value


def send_result(sender, function: Callable, args: tuple) -> None:
    """Send (value, None) or (None, exception). This function runs in the forked process."""
    limit_memory()
    try:
        found = function(*args), None
    except MemoryError:
        found = None, MemoryError()
    except Exception as error:  # the class of `error` may not be picklable
        found = None, ValueError(str(error) or type(error).__name__)
    sender.send(found)


def limit_memory() -> None:
    """Limit the memory of this process to its present size plus MIB.

    Only Linux has a file with the present size of a process. On other systems the memory is not
    limited.
    """
    pages = Path("/proc/self/statm")
    if pages.is_file():
        size = int(pages.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + (MIB << 20),) * 2)
