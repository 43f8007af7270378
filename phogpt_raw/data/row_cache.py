"""`--data-cache DIR` stores the encoded rows of the sources in a file, so that later starts are
faster.

The file's name is a hash of everything that determines the rows: the bytes and names of the
sources, the tokenizer, and the settings of reading and encoding. If one of these changes, the name
changes.
"""

import hashlib
import json
from array import array
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from phogpt_raw.data.encoded import Encoded, Rows
from phogpt_raw.data.prompt import IGNORED, Example, Template
from phogpt_raw.data.records import Bad, Findings, Note
from phogpt_raw.data.sources import Source
from phogpt_raw.files import expanded, whole_file
from phogpt_raw.refusal import Refusal

FORMAT = 2  # raise this number when the format of the file or the encoding of rows changes


def key_of(sources: list[Source], tokenizer, template: Template, settings: dict) -> str:
    """Return the name of the file for these rows, without its ending: 24 hexadecimal digits."""
    digest = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode())
    parts = [FORMAT, tokenizer.eos_token_id, asdict(template), settings,
             [(source.name, [str(file) for file in source.files], source.identity())
              for source in sources]]
    digest.update(json.dumps(parts, sort_keys=True).encode())
    return digest.hexdigest()[:24]


def through_cache(folder: str | None, sources: list[Source], tokenizer, template: Template,
                  settings: dict, encode: Callable[[], Rows]) -> Rows:
    """Return the rows from their file in the folder, or the result of `encode`.

    If the file is missing or damaged, the result of `encode` is written to it. A hub dataset may
    change while its name stays the same, so it is never cached.
    """
    if folder is None or any(source.hub for source in sources):
        return encode()
    name = f"{key_of(sources, tokenizer, template, settings)}.npz"
    file = expanded(folder) / name
    if file.is_file():
        try:
            return read(file)
        except (BadZipFile, OSError, ValueError, KeyError, EOFError):
            pass  # the file is damaged and is written again below
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refusal(f"--data-cache {folder}: this folder cannot be created "
                      f"({error.strerror})") from None
    rows = encode()
    with whole_file(file) as unfinished, unfinished.open("wb") as content:
        write(rows, content)
    return rows


def write(rows: Rows, content) -> None:
    documents = [document for row in rows.rows for document in row.documents]
    ids, targets = array("i"), array("i")
    for document in documents:
        ids.extend(document.ids)
        targets.extend(document.targets)
    carries = np.frombuffer(targets, np.intc) != IGNORED
    about = {"where": [row.where for row in rows.rows], "findings": [
        {"good": found.good, "bad": [(bad.where, bad.what) for bad in found.bad],
         "notes": {kind: asdict(note) for kind, note in found.notes.items()}}
        for found in rows.findings]}
    np.savez(content, ids=np.frombuffer(ids, np.intc), carries=np.packbits(carries),
             lengths=np.array([len(e.ids) for e in documents], np.int32),
             cut=np.array([e.cut for e in documents], np.bool_),
             documents=np.array([len(row.documents) for row in rows.rows], np.int32),
             hashes=np.array([row.hash for row in rows.rows], np.uint64),
             sources=np.array([row.source for row in rows.rows], np.int32),
             about=np.frombuffer(json.dumps(about).encode(), np.uint8))


def read(file: Path) -> Rows:
    with np.load(file, allow_pickle=False) as found:
        stored = {name: found[name] for name in found.files}
    about = json.loads(stored["about"].tobytes())
    examples = iter(examples_of(stored))
    rows = []
    for where, count, hashed, source in zip(
            about["where"], *(stored[name].tolist() for name in ("documents", "hashes", "sources")),
            strict=True):
        documents = tuple(Example(*next(examples), where) for _ in range(count))
        rows.append(Encoded(documents, hashed, source))
    findings = [Findings(one["good"], [Bad(*bad) for bad in one["bad"]],
                         {kind: Note(**note) for kind, note in one["notes"].items()})
                for one in about["findings"]]
    return Rows(rows, findings)


def examples_of(stored: dict):
    """Yield (ids, targets, cut) of each document."""
    ids = stored["ids"]
    carries = np.unpackbits(stored["carries"], count=len(ids)).astype(bool)
    targets = np.where(carries, np.roll(ids, -1), -1)  # a target is always the next token
    # All rows share one Python object for each token id. Sharing needs a quarter of the memory that
    # separate objects would need, and is faster.
    numbers = np.array([*range(ids.max(initial=0) + 1), IGNORED], dtype=object)
    ids, targets, start = numbers[ids], numbers[targets], 0
    for length, cut in zip(stored["lengths"].tolist(), stored["cut"].tolist(), strict=True):
        stop = start + length
        yield ids[start:stop].tolist(), targets[start:stop].tolist(), cut
        start = stop
