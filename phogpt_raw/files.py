"""Files and folders that are whole, or not there.

What is written goes under another name first, is flushed to the disk, and is renamed at the end. A
run that is killed leaves only the unfinished name behind; the next write of the same name removes
it. A folder is written by one process at a time, which a lock decides that ends with its process.
"""

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from phogpt_raw.refusal import Refusal

UNFINISHED = ".unfinished"
LOCK = ".lock"  # in a folder that is being written: without it the folder is somebody else's
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG)


@contextmanager
def whole_file(file: Path) -> Iterator[Path]:
    """A path to write `file` under; it takes its name when the block ends without an error."""
    unfinished = file.with_name(file.name + UNFINISHED)
    with in_words(unfinished), removed_on_error(unfinished):
        remove(unfinished)
        yield unfinished
        flush(unfinished)
        os.replace(unfinished, file)
        flush(file.parent)


def write_text(file: Path, text: str) -> None:
    """Write a text file that is whole, the old one or the new one, whenever the program ends."""
    with whole_file(file) as unfinished:
        unfinished.write_text(text, "utf-8")


@contextmanager
def whole_folder(folder: Path, *, ours: bool = False) -> Iterator[Path]:
    """A folder to write the files of `folder` into, which must not exist; it takes its name when
    the block ends without an error.

    Raises Refusal where another process is writing the same folder, or its unfinished name is taken
    by a folder that is not of this program; `ours` says that none but this program writes there.
    """
    unfinished = folder.with_name(folder.name + UNFINISHED)
    with in_words(unfinished):
        try:
            unfinished.mkdir(parents=True)
        except FileExistsError:
            if not (ours or (unfinished / LOCK).is_file()):
                raise Refusal(f"{unfinished}: is in the way, because {folder} is written under "
                              f"that name; move it away, or name another folder") from None
        with locked(unfinished / LOCK, f"{folder}: another process is writing it"):
            with removed_on_error(unfinished):
                for left in unfinished.iterdir():
                    if left.name != LOCK:
                        remove(left)
                yield unfinished
                for path in (*unfinished.rglob("*"), unfinished):
                    flush(path)
                unfinished.rename(folder)
            (folder / LOCK).unlink()
        flush(folder.parent)


@contextmanager
def locked(file: Path, busy: str) -> Iterator[None]:
    """Hold a lock on a file, which is made where it is missing; Refusal with the text `busy` where
    another process holds it. The lock ends with the process, however that ends."""
    opened = os.open(file, os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refusal(busy) from None
        yield
    finally:
        os.close(opened)


@contextmanager
def removed_on_error(path: Path) -> Iterator[None]:
    """Remove what a write leaves under this name when it fails."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            remove(path)
        raise


@contextmanager
def in_words(path: Path) -> Iterator[None]:
    """Raise Refusal where the disk is full or the place of `path` cannot be written to."""
    try:
        yield
    except Exception as error:
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
