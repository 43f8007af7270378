"""Files and folders that are whole, or not there.

What is written goes under another name first, is flushed to the disk, and is renamed at the end. A
run that is killed leaves only the unfinished name behind; the next write of the same name removes
it.
"""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from phogpt_raw.refusal import Refusal

UNFINISHED = ".unfinished"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG)


@contextmanager
def whole_file(file: Path) -> Iterator[Path]:
    """A path to write `file` under; it takes its name when the block ends without an error."""
    unfinished = file.with_name(file.name + UNFINISHED)
    with removed_on_error(unfinished):
        yield unfinished
        flush(unfinished)
        os.replace(unfinished, file)
        flush(file.parent)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to write the files of `folder` into, which must not exist; it takes its name
    when the block ends without an error."""
    unfinished = folder.with_name(folder.name + UNFINISHED)
    with removed_on_error(unfinished):
        unfinished.mkdir(parents=True)
        yield unfinished
        for file in (*unfinished.iterdir(), unfinished):
            flush(file)
        unfinished.rename(folder)
        flush(folder.parent)


@contextmanager
def removed_on_error(path: Path) -> Iterator[None]:
    """Remove what an earlier write left under this name, and what this one leaves when it fails.

    Raises Refusal where the disk is full or the place cannot be written to.
    """
    try:
        remove(path)
        yield
    except BaseException as error:
        with suppress(OSError):
            remove(path)
        number = error_number(error)
        if number in FULL:
            raise Refusal(f"{path.parent}: the disk is full; nothing was written. Free some space, "
                          f"or name another place") from None
        if number in CLOSED:
            raise Refusal(f"{path.parent}: cannot be written to; name another place") from None
        raise


def error_number(error: BaseException) -> int | None:
    """The system's number of an error; safetensors, written in Rust, has it in its text.

    >>> error_number(ValueError("Error while serializing: I/O error: No space (os error 28)"))
    28
    """
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Have the disk hold a file's content, or a folder's names."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def check_space(folder: Path, size: int) -> None:
    """Raise Refusal where the disk of `folder` (which may not exist yet) has not `size` bytes
    free."""
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(there).free
    if size > free:
        raise Refusal(f"{folder}: {size / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free "
                      f"on that disk; free some, or name another place")
