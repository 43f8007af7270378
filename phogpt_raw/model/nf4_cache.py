"""A folder of quantised base models. With it, later starts need not quantise again.

PhoGPT-7B5 takes 5.4 GB in NF4, and 15 GB as a checkpoint. Loading the NF4 file needs no arithmetic.
Each file (nf4_file.py) contains a key. The key lists everything that the quantised weights depend
on, such as the checkpoint's files and the dtype. A file is stale if its key differs from the key
that is needed now. A stale or damaged file is not used. The program prints the file's name and the
reason, and writes a new file.
"""

import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import xxhash

from phogpt_raw.cards import dtype_name
from phogpt_raw.files import UNFINISHED
from phogpt_raw.messages import _
from phogpt_raw.model.nf4_file import Damaged, read, read_header, write
from phogpt_raw.model.phogpt import ModelConfig, PhoGPT
from phogpt_raw.refusal import Refusal

# The version of the file format. Raise it if the tensors' names or the method of the checksum
# change, so that older files become stale.
FORMAT = 1
HEAD = 2**16  # bytes at the beginning of a weight file that are hashed


# -- the key of a file


def make_key(files: list[Path], dtype: torch.dtype, device: torch.device) -> dict:
    """The key: everything that the quantised weights depend on.

    files: the checkpoint's weight files and config.json. The key contains the type of the device,
    because a GPU and a CPU quantise slightly differently. About 16 of 10,000 scales differ by one
    quantisation level.
    """
    return {
        "format": FORMAT,
        "source": [identity(file) for file in sorted(files)],
        "dtype": dtype_name(dtype),
        "device": torch.device(device).type,
        "bitsandbytes": version("bitsandbytes"),
    }


def identity(file: Path) -> list:
    """A list of the file's name and of values that change if its content changes. It does not read
    the whole file.

    In the hub's cache, a file is a link to a blob, whose name is a hash of its content. For such a
    file the list contains the name of the blob. For other files it contains the size, the time of
    the last change and a hash of the first 64 KiB.
    """
    if file.is_symlink() and (blob := Path(os.readlink(file))).parent.name == "blobs":
        return [file.name, blob.name]
    with file.open("rb") as opened:
        head = xxhash.xxh3_128_hexdigest(opened.read(HEAD))
        stat = os.fstat(opened.fileno())
    return [file.name, stat.st_size, stat.st_mtime_ns, head]


def difference(old: dict, new: dict) -> str:
    """The reason why a cache file with the key `old` cannot be used if the key `new` is needed."""
    changed = [entry[0] for entry in new["source"] if entry not in old.get("source", [])]
    if changed:
        return _("{files} of the base changed", files=", ".join(changed))
    parts = [_("{what} {old}, now {new}", what=name, old=old.get(name), new=new[name])
             for name in new if name != "source" and old.get(name) != new[name]]
    return ", ".join(parts) or _("the base has fewer files now")


# -- the cache file of one base


def family(file: Path, ending: str = "") -> list[Path]:
    """The cache files in the folder of `file` that have the same model, dtype and device as `file`,
    with any key. ending: a regular expression for the text after `.safetensors`."""
    stem = file.stem.rpartition("-")[0]
    name = re.compile(re.escape(stem) + r"-[0-9a-f]{8}\.safetensors" + ending)
    try:
        return [other for other in sorted(file.parent.iterdir()) if name.fullmatch(other.name)]
    except OSError:  # the folder is missing or not readable
        return []


@dataclass(frozen=True)
class NF4Cache:
    """The cache file of one base model. The file may not exist yet."""

    folder: Path  # this folder can contain the files of several bases
    name: str  # the model's name
    base: str  # the folder of the base's checkpoint
    key: dict

    @property
    def file(self) -> Path:
        """The path of the cache file, such as FOLDER/PhoGPT-4B-fp16-cuda-1a2b3c4d.safetensors. The
        last part of its name is a hash of the key."""
        digest = xxhash.xxh3_64_hexdigest(json.dumps(self.key, sort_keys=True).encode())[:8]
        parts = (self.name, self.key["dtype"], self.key["device"], digest)
        return self.folder / ("-".join(parts) + ".safetensors")

    def load(self, config: ModelConfig, device: torch.device) -> PhoGPT | None:
        """The model from the cache file, not yet frozen. None if there is no valid file with this
        key. Prints to standard error that the file was read, or why files are not used."""
        if os.path.isfile(self.file):
            try:
                head = read_header(self.file)
                if head.key != self.key:
                    raise Damaged(_("stale: {why}", why=difference(head.key, self.key)))
                phogpt = read(self.file, head, config, device)
            except (Damaged, OSError) as reason:
                say_not_used(self.file, reason)
            else:
                say(_("base read from NF4 cache {file}", file=self.file))
                return phogpt
        for file, reason in self.stale():
            say_not_used(file, reason)
        return None

    def keep(self, phogpt: PhoGPT) -> None:
        """Write the cache file of the model, then delete stale files. Temporary files of killed
        runs are deleted first. If the write fails, a message on standard error says so, and the run
        continues."""
        try:
            for left in family(self.file, re.escape(UNFINISHED)):
                left.unlink(missing_ok=True)
            size = write(phogpt, self.file, self.key, self.base)
        except (OSError, Refusal) as error:
            say(_("NF4 cache {file} cannot be written ({reason}); the run continues without it",
                  file=self.file, reason=getattr(error, "strerror", None) or error))
            return
        say(_("NF4 cache written to {file} ({size})", file=self.file, size=human(size)))
        for file, _reason in self.stale():
            with suppress(OSError):
                file.unlink()

    def stale(self) -> Iterator[tuple[Path, str]]:
        """Yields (file, reason) for each stale or damaged file of this base, dtype and device."""
        for file in family(self.file):
            if file == self.file:
                continue
            try:
                head = read_header(file)
            except Damaged as reason:
                yield file, str(reason)
            except OSError:
                continue
            else:
                if head.base == self.base:
                    yield file, _("stale: {why}", why=difference(head.key, self.key))


def say_not_used(file: Path, reason) -> None:
    say(_("NF4 cache {file}: {reason}; it is rebuilt from the checkpoint", file=file,
          reason=reason))


def say(line: str) -> None:
    """Print to standard error, because generate.py's standard output contains only the answer."""
    print(line, file=sys.stderr)


def human(size: int) -> str:
    """A number of bytes as text, such as 5.4 GB or 31 MB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
