"""Which base a run was trained over: a hash of its shape and of samples of its weight files.

An adapter fits the weights that it was trained over and no others, and the same path or hub id may
hold others later. The time of a file's last change cannot be used: it differs if the same files are
downloaded again, as on a new computer. Samples are enough, because another training changes weights
everywhere. They also avoid reading 15 GB.
"""

import sys
from pathlib import Path

import xxhash

from phogpt_raw.messages import _
from phogpt_raw.model.weights import list_files, read_config

SAMPLE, SAMPLES = 2**16, 64  # bytes of a sample, and samples of a file


def base_hash(folder: Path) -> str:
    """A hash of the fields of a base's config.json that decide values, and of the names, sizes and
    samples of its weight files: 64 samples of each file, evenly spaced from its first bytes to its
    last."""
    hasher = xxhash.xxh3_128(repr(read_config(folder)).encode())
    for file in list_files(folder):
        size = file.stat().st_size
        hasher.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as opened:
            for n in range(SAMPLES):
                opened.seek(max(0, size - SAMPLE) * n // (SAMPLES - 1))
                hasher.update(opened.read(SAMPLE))
    return hasher.hexdigest()


def say_if_another(folder: Path, recorded: str | None, adapter: Path) -> None:
    """Print a warning if the base in `folder` has another hash than the adapter's run recorded."""
    if recorded and base_hash(folder) != recorded:
        print(_("{folder}: holds other weights, or another config.json, than those {adapter} was "
                "trained over, so its answers may be worse", folder=folder, adapter=adapter),
              file=sys.stderr)
