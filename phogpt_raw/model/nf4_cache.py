"""The quantised base kept in a folder of caches, so that the next start quantises nothing.

PhoGPT-7B5 in NF4 is 5.4 GB where its checkpoint is 15, and needs no arithmetic to load. A file
(nf4_file.py) whose key, what its bits depend on, is another is stale. Neither a stale file nor a
damaged one is used: it is named with the reason, and a new one is written.
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

FORMAT = 1  # of the file: a change of names or of the checksum makes all older files stale
HEAD = 2**16  # bytes at a weight file's beginning that tell it from another of its size


# -- what the bits depend on


def make_key(files: list[Path], dtype: torch.dtype, device: torch.device) -> dict:
    """What the quantised weights of `files` (config.json among them) depend on.

    A GPU and a CPU quantise a little differently: of 10,000 scales about 16 differ by one step.
    """
    return {
        "format": FORMAT,
        "source": [identity(file) for file in sorted(files)],
        "dtype": dtype_name(dtype),
        "device": torch.device(device).type,
        "bitsandbytes": version("bitsandbytes"),
    }


def identity(file: Path) -> list:
    """A file's name and what changes with its content, without reading all of it.

    In the hub's own cache a file is a link to a blob that is named by its content. Elsewhere: size,
    time of the last change and a hash of the first 64 KiB.
    """
    if file.is_symlink() and (blob := Path(os.readlink(file))).parent.name == "blobs":
        return [file.name, blob.name]
    with file.open("rb") as opened:
        head = xxhash.xxh3_128_hexdigest(opened.read(HEAD))
        stat = os.fstat(opened.fileno())
    return [file.name, stat.st_size, stat.st_mtime_ns, head]


def difference(old: dict, new: dict) -> str:
    """Why a cache with the key `old` does not serve where `new` is asked for."""
    changed = [entry[0] for entry in new["source"] if entry not in old.get("source", [])]
    if changed:
        return _("{files} of the base changed since", files=", ".join(changed))
    parts = [_("{what} {old}, now {new}", what=name, old=old.get(name), new=new[name])
             for name in new if name != "source" and old.get(name) != new[name]]
    return ", ".join(parts) or _("the base had more files")


# -- one base's file in a folder of caches


def family(file: Path, ending: str = "") -> list[Path]:
    """Files beside `file` of the same model, dtype and device, with any key; `ending` is a regular
    expression of what follows after .safetensors."""
    stem = file.stem.rpartition("-")[0]
    name = re.compile(re.escape(stem) + r"-[0-9a-f]{8}\.safetensors" + ending)
    try:
        return [other for other in sorted(file.parent.iterdir()) if name.fullmatch(other.name)]
    except OSError:  # nothing there, or nothing that may be seen
        return []


@dataclass(frozen=True)
class NF4Cache:
    """Where a base's NF4 weights are kept, whether they are there or not."""

    folder: Path  # of any number of caches
    name: str  # of the model
    base: str  # where its checkpoint lies
    key: dict

    @property
    def file(self) -> Path:
        """FOLDER/PhoGPT-4B-fp16-cuda-1a2b3c4d.safetensors, the last part a hash of the key."""
        digest = xxhash.xxh3_64_hexdigest(json.dumps(self.key, sort_keys=True).encode())[:8]
        parts = (self.name, self.key["dtype"], self.key["device"], digest)
        return self.folder / ("-".join(parts) + ".safetensors")

    def load(self, config: ModelConfig, device: torch.device) -> PhoGPT | None:
        """The model, not yet frozen; None where there is no whole cache with this key. Says which,
        on standard error."""
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
        """Write the model's file, then delete stale ones; before, what a killed write has left. A
        cache that cannot be written is said on standard error and ends no run."""
        try:
            for left in family(self.file, re.escape(UNFINISHED)):
                left.unlink(missing_ok=True)
            size = write(phogpt, self.file, self.key, self.base)
        except (OSError, Refusal) as error:
            say(_("NF4 cache {file} cannot be written ({reason}); the run goes on without it",
                  file=self.file, reason=getattr(error, "strerror", None) or error))
            return
        say(_("NF4 cache written to {file} ({size})", file=self.file, size=human(size)))
        for file, _reason in self.stale():
            with suppress(OSError):
                file.unlink()

    def stale(self) -> Iterator[tuple[Path, str]]:
        """Files of the same base, dtype and device that no run like this one can use, and why."""
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
    """On standard error: generate.py's standard output is the answer alone."""
    print(line, file=sys.stderr)


def human(size: int) -> str:
    """Bytes as 5.4 GB or 31 MB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
