"""Write files and folders completely or not at all.

A file is written under a temporary name, flushed to the disk, and renamed at the end. A killed run
leaves only the file with the temporary name. The next write of the same file removes this temporary
file. A lock lets only one process at a time write a folder. The lock ends with the process.
"""

import errno
import fcntl
import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from phogpt_raw.refusal import Refusal

UNFINISHED = ".unfinished"
LOCK = ".lock"  # a file in an unfinished folder; its content, SIGN, marks the folder as ours
SIGN = b"a folder that phogpt-raw is writing\n"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NOT_THERE = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
# numpy's error on a full disk has this text, and no errno.
CUT_SHORT = re.compile(r"\d+ requested and \d+ written")
CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


def expanded(path: str | Path) -> Path:
    """Replace a ~ at the start of a path with the home folder."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise Refusal(f"{path}: this computer has no user of that name; if ~ is part of a file's "
                      f"name, write the full path") from None


def script(name: str) -> str:
    """Return the name of train.py or generate.py for a printed command.

    If the current folder is the folder of the scripts, the bare name is enough. In every other
    folder, the full path is returned.
    """
    file = Path(__file__).parents[1] / name
    here = not file.is_file() or os.path.samefile(file.parent, ".")
    return name if here else shlex.quote(str(file))


@contextmanager
def whole_file(file: Path) -> Iterator[Path]:
    """Yield a temporary path, which is renamed to `file` if the block ends without an error."""
    unfinished = file.with_name(file.name + UNFINISHED)
    with in_words(unfinished), removed_on_error(unfinished):
        if file.is_dir():
            raise Refusal(f"{file}: is a folder; move it away")
        remove(unfinished)
        yield unfinished
        flush(unfinished)
        os.replace(unfinished, file)
        flush(file.parent)


def read_object(file: Path, remedy: str) -> dict:
    """Return the JSON object in a file.

    Raises Refusal if the file contains anything else. The message ends with `remedy`.
    """
    try:
        content = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested too deep
        raise Refusal(f"{file}: not JSON ({error}); {remedy}") from None
    if not isinstance(content, dict):
        raise Refusal(f"{file}: not a JSON object; {remedy}")
    return content


def write_text(file: Path, text: str) -> None:
    """Write a text file completely or not at all. If the program is killed, an older file remains.
    """
    with whole_file(file) as unfinished:
        unfinished.write_text(text, "utf-8")


def save_tensors(file: Path, tensors: dict) -> None:
    """Write a safetensors file completely or not at all.

    The file gets the same permissions as other new files. safetensors itself would let only the
    owner read it.
    """
    from safetensors.torch import save_file

    with whole_file(file) as unfinished:
        save_file(tensors, unfinished, metadata={"format": "pt"})  # transformers requires "format"
        mask = os.umask(0)
        os.umask(mask)
        unfinished.chmod(0o666 & ~mask)


@contextmanager
def whole_folder(folder: Path, *, ours: bool = False) -> Iterator[Path]:
    """Yield a temporary folder, which is renamed to `folder` if the block ends without an error.

    Raises Refusal if `folder` exists at the start or at the end, or if another process is writing
    the folder. Also raises Refusal if another program has created a file or folder with the
    temporary name.

    ours: True if only this program writes at this place. In this case `folder` may exist at the
    start, and the block must remove it.
    """
    unfinished = folder.with_name(folder.name + UNFINISHED)
    with in_words(unfinished):
        try:
            unfinished.mkdir(parents=True)
        except FileExistsError:
            if not os.path.lexists(unfinished):  # the parent folder is a broken link
                raise Refusal(f"{unfinished.parent}: is not a folder; name another place") from None
            if not (ours or is_ours(unfinished)):
                raise Refusal(f"{unfinished}: exists, but this name is needed to write {folder}; "
                              f"move it away, or name another folder") from None
        with locked(unfinished / LOCK, f"{folder}: another process is writing it"):
            with removed_on_error(unfinished):
                for left in unfinished.iterdir():
                    if left.name != LOCK:
                        remove(left)
                if not ours:
                    check_free(folder)
                yield unfinished
                for path in (*unfinished.rglob("*"), unfinished):
                    flush(path)
                check_free(folder)
                unfinished.rename(folder)
            (folder / LOCK).unlink()
        flush(folder.parent)


def is_ours(unfinished: Path) -> bool:
    """Return whether a killed process of this program left this folder.

    Such a folder has our lock file. If the process was killed very early, the folder is empty, or
    its lock file is empty.
    """
    if not unfinished.is_dir() or unfinished.is_symlink():
        return False
    lock = unfinished / LOCK
    if lock.is_file() and lock.read_bytes() == SIGN:
        return True
    return not any(path != lock or path.stat().st_size for path in unfinished.iterdir())


def check_free(folder: Path) -> None:
    """Raise Refusal if a file or folder of this name exists."""
    if os.path.lexists(folder):
        raise Refusal(f"{folder}: exists already; give another name")


@contextmanager
def awaited_file(file: Path) -> Iterator[None]:
    """Reserve the name of a new file during the block. The file's folder is created.

    The caller writes the file at the end of the block. Raises Refusal if `file` exists, if it
    cannot be written, or if another process has reserved its name.
    """
    check_place(file)
    lock = file.with_name(file.name + LOCK)
    with locked(lock, f"{file}: another process is about to write it; wait until that process "
                      f"ends, or name another place"):
        try:
            check_free(file)
            yield
        finally:
            lock.unlink(missing_ok=True)


def check_place(file: Path) -> None:
    """Raise Refusal if a new file of this name cannot be written. Its folder is created."""
    check_free(file)
    unfinished = file.with_name(f"{file.name}.{os.getpid()}{UNFINISHED}")  # for this process only
    try:
        with in_words(unfinished):
            file.parent.mkdir(parents=True, exist_ok=True)
            with removed_on_error(unfinished):
                unfinished.write_bytes(SIGN)
                unfinished.unlink()
    except OSError as error:
        raise Refusal(f"{file}: cannot be written ({error.strerror}); name another place"
                      ) from None


@contextmanager
def locked(file: Path, busy: str) -> Iterator[None]:
    """Hold a lock on a file during the block. A missing file is created.

    Raises Refusal with the text `busy` if another process holds the lock, or has just moved or
    removed the file. The lock ends with the process, even if the process is killed.
    """
    with in_words(file):
        opened = os.open(file, os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(opened), os.stat(file)):
                raise BlockingIOError
        except (BlockingIOError, FileNotFoundError):
            raise Refusal(busy) from None
        except OSError as error:  # a cloud drive that is mounted as a folder may not support locks
            if error.errno not in NOT_THERE:
                raise
        with in_words(file):
            os.pwrite(opened, SIGN, 0)
        yield
    finally:
        os.close(opened)


@contextmanager
def removed_on_error(path: Path) -> Iterator[None]:
    """Remove the file or folder `path` if the block fails."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            remove(path)
        raise


@contextmanager
def in_words(path: Path) -> Iterator[None]:
    """Turn an error of the block into a Refusal if the disk is full or `path` cannot be written."""
    try:
        yield
    except Exception as error:
        number = error_number(error)
        place = next(folder for folder in path.parents if not folder.name.endswith(UNFINISHED))
        if number in FULL or CUT_SHORT.match(str(error)):
            raise Refusal(f"{place}: the disk is full, older files are unchanged; free some space, "
                          f"or name another place") from None
        if number == errno.ENAMETOOLONG:
            raise Refusal(f"{path.name}: the name is too long; give a shorter name") from None
        if number == errno.ENOENT and not place.is_dir():
            raise Refusal(f"{place}: this folder is missing or cannot be created; move it back if "
                          f"it was moved, or name another place") from None
        if number in CLOSED:
            raise Refusal(f"{place}: cannot be written to; name another place") from None
        raise


def error_number(error: BaseException) -> int | None:
    """Return the errno of an error, or None. In safetensors' errors, only the text has the errno.

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
    """Write a file's buffered content, or a folder's list of names, to the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in NOT_THERE:
            raise
    finally:
        os.close(opened)


def check_space(folder: Path, size: int) -> None:
    """Raise Refusal if the disk of `folder` has less than `size` bytes free.

    The folder need not exist yet.
    """
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(there).free
    if size > free:
        raise Refusal(f"{folder}: {size / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free "
                      f"on that disk; free some space, or name another place")
