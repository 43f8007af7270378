"""Which base a run was trained over: a hash of samples of its weight files.

An adapter fits the weights that it was trained over and no others, and the same path or hub id may
hold others later. The time of a file's last change would not do: it differs where the same files
are fetched again, as on a new machine. Samples do, and need no 15 GB to be read: another training
changes weights everywhere.
"""

import sys
from pathlib import Path

import xxhash

from phogpt_raw.messages import _
from phogpt_raw.model.weights import list_files

SAMPLE, SAMPLES = 2**16, 64  # bytes of a sample, and samples of a file


def weights_hash(folder: Path) -> str:
    """Of the names, sizes and samples of a base's weight files: 64 of each file, evenly spaced from
    its first bytes to its last."""
    hasher = xxhash.xxh3_128()
    for file in list_files(folder):
        size = file.stat().st_size
        hasher.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as opened:
            for n in range(SAMPLES):
                opened.seek(max(0, size - SAMPLE) * n // (SAMPLES - 1))
                hasher.update(opened.read(SAMPLE))
    return hasher.hexdigest()


def say_if_another(folder: Path, recorded: str | None, adapter: Path) -> None:
    """Say where the base in `folder` is not the one of the hash that an adapter's run recorded."""
    if recorded and weights_hash(folder) != recorded:
        print(_("{folder}: holds other weights than those {adapter} was trained over, so its "
                "answers may be worse", folder=folder, adapter=adapter), file=sys.stderr)
