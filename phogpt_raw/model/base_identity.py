"""A hash that identifies the base model of a run, from its shape and samples of its weight files.

An adapter fits only the weights that it was trained over. The same path or hub id may have other
weights later. The time of a file's last change cannot identify the weights: it differs if the same
files are downloaded again, for example on a new computer. Samples of the weights are enough,
because training changes weights everywhere. With samples, the program need not read all 15 GB of
PhoGPT-7B5's weights.
"""

import sys
from pathlib import Path

import xxhash

from phogpt_raw.messages import _
from phogpt_raw.model.weights import list_files, read_config

SAMPLE, SAMPLES = 2**16, 64  # bytes per sample; samples per file


def base_hash(folder: Path) -> str:
    """The hash of a base model. It covers the fields of config.json that affect the model's
    results, and the name, the size and 64 samples of each weight file. The samples are evenly
    spaced from the first bytes of the file to its last bytes."""
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
    """Print a warning if the hash of the base in `folder` differs from the hash that the adapter's
    run recorded."""
    if recorded and base_hash(folder) != recorded:
        print(_("{folder}: its weights or config.json differ from the base that {adapter} was "
                "trained over; answers may be worse", folder=folder, adapter=adapter),
              file=sys.stderr)
