"""Files and folders that are written completely or not at all.

A file is written under a temporary name, flushed to the disk, and renamed at the end. A killed run
leaves only the file with the temporary name. The next write of the same file removes it. A lock
lets only one process at a time write a folder. The lock ends with the process.
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
LOCK = ".lock"  # in a folder that is being written; its content tells whose it is
SIGN = b"a folder that phogpt-raw is writing\n"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NOT_THERE = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
CUT_SHORT = re.compile(r"\d+ requested and \d+ written")  # numpy's error, which has no errno
CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


def expanded(path: str | Path) -> Path:
    """A path in which ~ is the home folder."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise Refusal(f"{path}: no user of that name has a home folder here; write the whole path "
                      f"if it is a file's name") from None


def script(name: str) -> str:
    """train.py or generate.py as a command names it: by its whole path in another folder than
    theirs."""
    file = Path(__file__).parents[1] / name
    here = not file.is_file() or os.path.samefile(file.parent, ".")
    return name if here else shlex.quote(str(file))


@contextmanager
def whole_file(file: Path) -> Iterator[Path]:
    """A path to write `file` under; it takes its name when the block ends without an error."""
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
    """The JSON object in a file. Raises Refusal, which ends with `remedy`, if the file contains
    something else."""
    try:
        content = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested too deep
        raise Refusal(f"{file}: not JSON ({error}); {remedy}") from None
    if not isinstance(content, dict):
        raise Refusal(f"{file}: not a JSON object; {remedy}")
    return content


def write_text(file: Path, text: str) -> None:
    """Write a text file so that it is always complete: the old one or the new one, even if the
    program is killed."""
    with whole_file(file) as unfinished:
        unfinished.write_text(text, "utf-8")


def save_tensors(file: Path, tensors: dict) -> None:
    """Write a safetensors file completely or not at all, with the permissions of other new files.
    safetensors itself lets only the owner read it."""
    from safetensors.torch import save_file

    with whole_file(file) as unfinished:
        save_file(tensors, unfinished, metadata={"format": "pt"})  # which transformers requires
        mask = os.umask(0)
        os.umask(mask)
        unfinished.chmod(0o666 & ~mask)


@contextmanager
def whole_folder(folder: Path, *, ours: bool = False) -> Iterator[Path]:
    """A folder to write the files of `folder` into, which must not exist; it takes its name when
    the block ends without an error.

    Raises Refusal where `folder` exists at the start or at the end, another process is writing it,
    or its temporary name belongs to something that this program has not created. `ours`: only this
    program writes there, and the block itself removes an older `folder`.
    """
    unfinished = folder.with_name(folder.name + UNFINISHED)
    with in_words(unfinished):
        try:
            unfinished.mkdir(parents=True)
        except FileExistsError:
            if not os.path.lexists(unfinished):  # a broken link
                raise Refusal(f"{unfinished.parent}: is not a folder; name another place") from None
            if not (ours or is_ours(unfinished)):
                raise Refusal(f"{unfinished}: is in the way, because {folder} is written under "
                              f"that name; move it away, or name another folder") from None
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
    """Whether a killed process of this program left this folder: it has our lock, or it is
    empty, as it is before the lock is created."""
    if not unfinished.is_dir() or unfinished.is_symlink():
        return False
    lock = unfinished / LOCK
    if lock.is_file() and lock.read_bytes() == SIGN:
        return True
    return not any(path != lock or path.stat().st_size for path in unfinished.iterdir())


def check_free(folder: Path) -> None:
    """Raise Refusal if a file or folder of this name exists."""
    if os.path.lexists(folder):
        raise Refusal(f"{folder}: exists already; name a folder that does not")


@contextmanager
def awaited_file(file: Path) -> Iterator[None]:
    """Hold the place of a new file that is written at the end of the block, whose folder is made.

    Raises Refusal where `file` exists or cannot be written, or another process holds its place.
    """
    check_place(file)
    lock = file.with_name(file.name + LOCK)
    with locked(lock, f"{file}: another process is about to write it; wait for its end, or name "
                      f"another place"):
        try:
            check_free(file)
            yield
        finally:
            lock.unlink(missing_ok=True)


def check_place(file: Path) -> None:
    """Raise Refusal if a new file of this name cannot be written. Its folder is created."""
    check_free(file)
    unfinished = file.with_name(f"{file.name}.{os.getpid()}{UNFINISHED}")  # no other process's
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
    """Hold a lock on a file, which is made where it is missing; Refusal with the text `busy` where
    another process holds it, or has just moved it away. The lock ends with the process, however
    that ends."""
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
        place = next(folder for folder in path.parents if not folder.name.endswith(UNFINISHED))
        if number in FULL or CUT_SHORT.match(str(error)):
            raise Refusal(f"{place}: the disk is full; older files stay whole. Free some space, or "
                          f"name another place") from None
        if number == errno.ENAMETOOLONG:
            raise Refusal(f"{path.name}: the name is too long; name another") from None
        if number == errno.ENOENT and not place.is_dir():
            raise Refusal(f"{place}: is not there, or no longer: it cannot be made, or was moved "
                          f"or deleted meanwhile; move it back, or name another place") from None
        if number in CLOSED:
            raise Refusal(f"{place}: cannot be written to; name another place") from None
        raise


def error_number(error: BaseException) -> int | None:
    """The errno of an error; safetensors, which is written in Rust, has it only in the text.

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
    """Flush a file's content, or a folder's list of names, to the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in NOT_THERE:
            raise
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
