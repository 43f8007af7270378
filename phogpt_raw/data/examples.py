"""The training and the held-out examples of a run, from its files or from nano's bundled pairs."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from phogpt_raw.config import Config
from phogpt_raw.data.conversations import parse_map
from phogpt_raw.data.encoded import Encoded, Rows, encode_sources
from phogpt_raw.data.prompt import TEMPLATES, Example, Template, choose_template
from phogpt_raw.data.report import Report, report
from phogpt_raw.data.row_cache import through_cache
from phogpt_raw.data.sources import Source, find_source
from phogpt_raw.refusal import Refusal

DEFAULT_SHARE, ENOUGH = 0.05, 40  # held out unless --hold-out says otherwise, of so many rows
PAIRS = Path(__file__).parents[1] / "nano" / "pairs"


@dataclass(frozen=True)
class DataFile:
    """What was read: its name without the path, and the SHA-256 of its bytes; of several, both of
    each."""

    name: str
    sha256: str


@dataclass(frozen=True)
class Examples:
    """Encoded rows, the questions as typed of the held-out ones that have any, the template, why,
    and the files: `file` of the training rows, `held_out_file` where the held-out ones come from
    another. reports: what the training and the held-out rows are like."""

    train: list[Example]
    held_out: list[Example]
    questions: list[str]
    template: str
    template_reason: str
    source: str
    file: DataFile | None = None
    held_out_file: DataFile | None = None
    report: Report | None = None
    held_out_report: Report | None = None


def load_examples(tokenizer, config: Config) -> Examples:
    """Read, encode and divide; Refusal where there is no data or nothing is left to train on."""
    data, val = config.data, config.val
    if data is None and config.model == "nano":
        data = str(PAIRS / "train.jsonl")
        val = val or (str(PAIRS / "heldout.jsonl") if config.hold_out is None else None)
    if data is None:
        raise Refusal("--data: name a file of rows, such as --data rows.jsonl with lines "
                      '{"prompt": "…", "response": "…"}')
    data, val = ((names,) if isinstance(names, str) else names for names in (data, val))
    sources, others = ([find_source(name) for name in names or ()] for names in (data, val))
    name, reason = choose_template(tokenizer, config.template)
    found, found_val = (read(part, tokenizer, TEMPLATES[name], config) if part else Rows()
                        for part in (sources, others))
    check_map(config.map, found, found_val)
    rows, held_out = found.rows, found_val.rows
    if not val:
        rows, held_out = divide(rows, hold_out_of(config, len(rows)), " and ".join(data))
    train = weighted(rows, [source.weight for source in sources])
    if not train:
        raise Refusal(f"{' and '.join(data)}: no row is left to train on")
    kept_out = [document for row in held_out for document in row.documents]
    return Examples(train, kept_out, questions(tokenizer, TEMPLATES[name], kept_out), name, reason,
                    ", ".join(Path(source.name).name for source in sources),
                    identify(sources), identify(others) if val else None,
                    report(rows, found.together()),
                    report(held_out, found_val.together()) if val else None)


def read(sources: list[Source], tokenizer, template: Template, config: Config) -> Rows:
    """The rows of the sources; Refusal where too many are bad, or any with --strict."""
    settings = dict(max_len=config.max_len, too_long=config.too_long, mapped=parse_map(config.map))
    found = through_cache(config.data_cache, sources, tokenizer, template, settings,
                          lambda: encode_sources(sources, tokenizer, template, **settings))
    found.check(config.strict)
    if not found.rows:
        raise Refusal(f"{sources[0].name}: no row is left; all are longer than --max-len "
                      f"{config.max_len}, and --too-long drop leaves them out")
    return found


def check_map(spec: str | None, *found: Rows) -> None:
    """Raise Refusal for a --map that names a column which no row has."""
    for name, field in parse_map(spec).items():
        if not any(f"mapped {field}" in rows.together().notes for rows in found):
            raise Refusal(f"--map {field}={name}: no row has a field {name}")


def weighted(rows: list[Encoded], weights: list[float]) -> list[Example]:
    """The rows' documents, each as often as the weight of its source says. Of a part of a time it
    is decided by a hash of the row's text (by other bits of it than what is held out), so that it
    is the same in every run."""
    return [document for row in rows
            for _ in range(int(weights[row.source])
                           + (row.hash % 2**32 < weights[row.source] % 1 * 2**32))
            for document in row.documents]


def questions(tokenizer, template: Template, examples: Iterable[Example]) -> list[str]:
    """What is asked by each example that asks, as typed."""
    before, after = template.question.split("{}")
    return [tokenizer.decode(example.prompt).removeprefix(before).removesuffix(after)
            for example in examples if example.asks]


def hold_out_of(config: Config, rows: int) -> float:
    """--hold-out, or its default."""
    if config.hold_out is None:
        return DEFAULT_SHARE if rows >= ENOUGH else 0
    return config.hold_out


def divide(rows: list[Encoded], hold_out: float, data: str
           ) -> tuple[list[Encoded], list[Encoded]]:
    """(training rows, held-out rows), both in the file's order.

    The hash of a row's text decides, so equal rows are never on both sides. `hold_out` below 1 is a
    share: rows that are added later move none of the others. From 1 on it is a count, reached or
    passed by as few as equal rows force.
    """
    if not hold_out:
        return rows, []
    hashes = [row.hash for row in rows]
    limit = hold_out * 2**64 if hold_out < 1 else 0
    if min(hashes) >= limit:  # a count; or a share of so few rows that none is below it
        nth = min(max(1, int(hold_out)), len(rows))
        limit = sorted(hashes)[nth - 1] + 1
    kept, held_out = ([row for row, place in zip(rows, hashes, strict=True)
                       if (place < limit) == held] for held in (False, True))
    if not kept:
        raise Refusal(f"--hold-out {hold_out:g}: {data} has only {len(rows)} rows, "
                      f"{len(set(hashes))} of them different; none would be left to train on")
    return kept, held_out


def fingerprint(example: Example) -> str:
    """12 hexadecimal digits that tell an encoded row from others."""
    return hashlib.sha256(repr((example.ids, example.targets)).encode()).hexdigest()[:12]


def identify(sources: list[Source]) -> DataFile:
    return DataFile(", ".join(Path(source.name).name for source in sources),
                    ", ".join(source.identity() for source in sources))
