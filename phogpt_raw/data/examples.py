"""The training and the held-out examples of a run, from its files or from nano's bundled pairs."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from phogpt_raw.config import Config
from phogpt_raw.data.prompt import TEMPLATES, Example, choose_template, encode_row, next_tokens
from phogpt_raw.data.rows import Row, read_rows
from phogpt_raw.files import expanded
from phogpt_raw.messages import plural
from phogpt_raw.refusal import Refusal

# Without --hold-out: this share is held out, and so many rows at least, of files with ENOUGH rows.
# One or two held-out rows would decide by chance which adapter is the best.
DEFAULT_SHARE, LEAST, ENOUGH = 0.05, 4, 40
PAD = 3  # any token: a plan has no values
STEPS = 50  # of a plan without rows, so that its warm-up is that of most runs
PAIRS = Path(__file__).parents[1] / "nano" / "pairs"


@dataclass(frozen=True)
class DataFile:
    """A file that was read: its name without the path, and the SHA-256 of its bytes."""

    name: str
    sha256: str


@dataclass(frozen=True)
class Examples:
    """Encoded rows, the held-out ones' questions as typed, the template, why, and the files: `file`
    of the training rows, `held_out_file` where the held-out ones come from another. `trained_too`:
    where those held-out rows are that are training rows as well."""

    train: list[Example]
    held_out: list[Example]
    questions: list[str]
    template: str
    template_reason: str
    source: str
    file: DataFile | None = None
    held_out_file: DataFile | None = None
    trained_too: tuple[str, ...] = ()


def load_examples(tokenizer, config: Config) -> Examples:
    """Read, encode and divide; Refusal where there is no data or nothing is left to train on."""
    data, val = config.data, config.val
    if data is None and config.model == "nano":
        data = str(PAIRS / "train.jsonl")
        val = val or (str(PAIRS / "heldout.jsonl") if config.hold_out is None else None)
    if data is None:
        raise Refusal("--data: name a file of rows, such as --data rows.jsonl with lines "
                      '{"prompt": "…", "response": "…"}')
    name, reason = choose_template(tokenizer, config.template)
    rows, held_out = read_parts(config, data, val)
    train, kept_out = (
        [encode_row(tokenizer, TEMPLATES[name], row, config.max_len) for row in part]
        for part in (rows, held_out)
    )
    return Examples(train, kept_out, [row.prompt for row in held_out], name, reason,
                    Path(data).name, identify(data), identify(val) if val else None,
                    shared(rows, held_out))


def stand_ins(config: Config) -> Examples:
    """Examples for a plan without a tokenizer: as many as --data has, or as STEPS take, each of
    --max-len tokens that all carry loss."""
    ids = [PAD] * config.max_len
    every = Example(ids, next_tokens(ids, start=1))
    data, counts = config.data, (STEPS * config.batch_size, 0)
    if data:
        counts = map(len, read_parts(config, data, config.val))
    train, held_out = ([every] * n for n in counts)
    return Examples(train, held_out, [], "", "", Path(data).name if data else "",
                    identify(data) if data else None,
                    identify(config.val) if config.val else None)


def read_parts(config: Config, data: str, val: str | None) -> tuple[list[Row], list[Row]]:
    """(training rows, held-out rows) of the files."""
    rows, held_out = read_rows(data), read_rows(val) if val else []
    return (rows, held_out) if val else divide(rows, *hold_out_of(config, len(rows)), data)


def hold_out_of(config: Config, rows: int) -> tuple[float, int]:
    """(--hold-out or its default, the least number of rows where that is a share)."""
    if config.hold_out is None:
        return (DEFAULT_SHARE, LEAST) if rows >= ENOUGH else (0, 0)
    return config.hold_out, 1


def divide(rows: list[Row], hold_out: float, least: int,
           data: str) -> tuple[list[Row], list[Row]]:
    """(training rows, held-out rows), both in the file's order.

    The hash of a row's text decides, so equal rows are never on both sides. `hold_out` below 1 is a
    share: rows that are added later move none of the others, unless the share is fewer than `least`
    rows. From 1 on it is a count, reached or passed by as few as equal rows force.
    """
    if not hold_out:
        return rows, []
    hashes = [hash_of(row) for row in rows]
    nth = min(max(least, int(hold_out)), len(rows))
    limit = max(hold_out * 2**64 if hold_out < 1 else 0, sorted(hashes)[nth - 1] + 1)
    kept, held_out = ([row for row, place in zip(rows, hashes, strict=True)
                       if (place < limit) == held] for held in (False, True))
    if not kept:
        raise Refusal(f"--hold-out {hold_out:g}: {data} has only {len(set(hashes))} different "
                      f"{plural(len(set(hashes)), 'row', 'rows')}; none would be left to train on")
    return kept, held_out


def shared(train: list[Row], held_out: list[Row]) -> tuple[str, ...]:
    """Where the held-out rows are that are training rows too: a file that --val names may repeat
    rows of --data."""
    trained = {hash_of(row) for row in train}
    return tuple(row.where for row in held_out if hash_of(row) in trained)


def hash_of(row: Row) -> int:
    """A number below 2^64 from a row's text, in which capitals and spaces do not count."""
    text = "\0".join(" ".join(part.casefold().split()) for part in (row.prompt, row.response))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def fingerprint(example: Example) -> str:
    """12 hexadecimal digits that tell an encoded row from others."""
    return hashlib.sha256(repr((example.ids, example.targets)).encode()).hexdigest()[:12]


def identify(path: str) -> DataFile:
    file = expanded(path)
    with file.open("rb") as content:
        return DataFile(file.name, hashlib.file_digest(content, "sha256").hexdigest())
