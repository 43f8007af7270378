"""The training and the held-out examples of a run, from its files or from nano's bundled pairs."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from phogpt_raw.config import Config
from phogpt_raw.data.chat_template import choose_template
from phogpt_raw.data.conversations import Conversation, parse_map
from phogpt_raw.data.encoded import Encoded, Rows, encode_sources, read_sources
from phogpt_raw.data.prompt import TEMPLATES, Example, Template, next_tokens
from phogpt_raw.data.report import Report, report
from phogpt_raw.data.row_cache import through_cache
from phogpt_raw.data.sources import Source, find_source, find_unweighted
from phogpt_raw.messages import plural
from phogpt_raw.refusal import Refusal

# Without --hold-out, this share of a file with ENOUGH rows is held out, and at least LEAST rows.
# With only one or two held-out rows, chance would decide which adapter is the best.
DEFAULT_SHARE, LEAST, ENOUGH = 0.05, 4, 40
PAD = 3  # any token: a plan has no values
STEPS = 50  # of a plan without rows, so that its warm-up is that of most runs
PAIRS = Path(__file__).parents[1] / "nano" / "pairs"


@dataclass(frozen=True)
class DataFile:
    """Names (without paths) and SHA-256 hashes of the files that were read."""

    name: str
    sha256: str


@dataclass(frozen=True)
class Examples:
    """Encoded rows, the questions as typed of the held-out ones that have any, the template, why,
    and the files: `file` of the training rows, `held_out_file` where the held-out ones come from
    another. `rows` and `held_out_rows`: how many rows these are; a row gives several examples where
    it is split or weighs more, none where it weighs less. `trained_too`: where those held-out rows
    are that are training rows as well. Reports: what the training and the held-out rows are
    like."""

    train: list[Example]
    held_out: list[Example]
    questions: list[str]
    template: str
    template_reason: str
    source: str
    rows: int = 0
    held_out_rows: int = 0
    file: DataFile | None = None
    held_out_file: DataFile | None = None
    trained_too: tuple[str, ...] = ()
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
    sources, others = sources_of(data), held_out_sources(val)
    name, reason = choose_template(tokenizer, config.template)
    found, found_val = (read(part, tokenizer, TEMPLATES[name], config) if part else Rows()
                        for part in (sources, others))
    check_map(config.map, found, found_val)
    rows, held_out = found.rows, found_val.rows
    if not val:
        rows, held_out = divide(rows, *hold_out_of(config, len(rows)), names(sources))
    train = weighted(rows, [source.weight for source in sources])
    if not train:
        raise Refusal(f"{names(sources)}: no row is left to train on")
    kept_out = [document for row in held_out for document in row.documents]
    return Examples(train, kept_out, questions(tokenizer, TEMPLATES[name], kept_out), name, reason,
                    file_names(sources), len(rows), len(held_out), identify(sources),
                    identify(others), shared(rows, held_out), report(rows, found.together()),
                    report(held_out, found_val.together()) if val else None)


def stand_ins(config: Config) -> Examples:
    """Examples for a plan without a tokenizer: as many as --data has, or as STEPS take, each of
    --max-len tokens that all carry loss."""
    ids = [PAD] * config.max_len
    every = Example(ids, next_tokens(ids, start=1))
    sources, others = sources_of(config.data), held_out_sources(config.val)
    counts = STEPS * config.batch_size, 0
    if sources:
        rows, held_out = (read_sources(part, parse_map(config.map), config.strict)
                          for part in (sources, others))
        counts = [*map(len, (rows, held_out) if others else
                       divide(rows, *hold_out_of(config, len(rows)), names(sources)))]
    train, held_out = ([every] * n for n in counts)
    return Examples(train, held_out, [], "", "", file_names(sources), *counts, identify(sources),
                    identify(others))


def sources_of(specs: tuple[str, ...] | str | None) -> list[Source]:
    """What --data names."""
    return [find_source(spec) for spec in several(specs)]


def several(specs: tuple[str, ...] | str | None) -> tuple[str, ...]:
    return (specs,) if isinstance(specs, str) else specs or ()


def held_out_sources(specs: tuple[str, ...] | str | None) -> list[Source]:
    """What --val names, which has no weight."""
    return [find_unweighted(spec, "--val") for spec in several(specs)]


def names(sources: list[Source]) -> str:
    return " and ".join(source.name for source in sources)


def file_names(sources: list[Source]) -> str:
    """The names of the files, without their paths."""
    return ", ".join(Path(source.name).name for source in sources)


def read(sources: list[Source], tokenizer, template: Template, config: Config) -> Rows:
    """The rows of the sources; Refusal where too many are bad, or any with --strict."""
    settings = dict(max_len=config.max_len, too_long=config.too_long, mapped=parse_map(config.map))
    found = through_cache(config.data_cache, sources, tokenizer, template, settings,
                          lambda: encode_sources(sources, tokenizer, template, **settings))
    found.check(config.strict)
    if not found.rows:
        raise Refusal(f"{names(sources)}: no row is left; all are longer than --max-len "
                      f"{config.max_len}, and --too-long drop leaves them out")
    return found


def check_map(spec: str | None, *found: Rows) -> None:
    """Raise Refusal for a --map that names a column which no row has."""
    for name, field in parse_map(spec).items():
        if not any(f"mapped {field}" in rows.together().notes for rows in found):
            raise Refusal(f"--map {field}={name}: no row has a field {name}")


def weighted(rows: list[Encoded], weights: list[float]) -> list[Example]:
    """The rows' documents, each as often as the weight of its source says. For a weight such as
    2.5, a hash of the row's text decides whether the row is repeated a third time, so that this is
    the same in every run. It uses other bits of the hash than the choice of held-out rows."""
    return [document for row in rows
            for _ in range(int(weights[row.source])
                           + (row.hash % 2**32 < weights[row.source] % 1 * 2**32))
            for document in row.documents]


def questions(tokenizer, template: Template, examples: Iterable[Example]) -> list[str]:
    """The questions of the examples that have one, as typed."""
    before, after = template.question.split("{}")
    return [tokenizer.decode(example.prompt).removeprefix(before).removesuffix(after)
            for example in examples if example.asks]


def hold_out_of(config: Config, rows: int) -> tuple[float, int]:
    """(--hold-out or its default, the least number of rows where that is a share)."""
    if config.hold_out is None:
        return (DEFAULT_SHARE, LEAST) if rows >= ENOUGH else (0, 0)
    return config.hold_out, 1


def divide(rows: list[Encoded] | list[Conversation], hold_out: float, least: int,
           data: str) -> tuple[list, list]:
    """(training rows, held-out rows), both in the file's order.

    The hash of a row's text decides, so equal rows are never on both sides. `hold_out` below 1 is a
    share: rows that are added later move none of the others, unless the share is fewer than `least`
    rows. From 1 on it is a count. It is exceeded only if equal rows must stay together.
    """
    if not hold_out:
        return rows, []
    hashes = [row.hash for row in rows]
    nth = min(max(least, int(hold_out)), len(rows))
    limit = max(hold_out * 2**64 if hold_out < 1 else 0, sorted(hashes)[nth - 1] + 1)
    kept, held_out = ([row for row, place in zip(rows, hashes, strict=True)
                       if (place < limit) == held] for held in (False, True))
    if not kept:
        raise Refusal(f"--hold-out {hold_out:g}: {data} has only {len(set(hashes))} different "
                      f"{plural(len(set(hashes)), 'row', 'rows')}; none would be left to train on")
    return kept, held_out


def shared(train: list[Encoded], held_out: list[Encoded]) -> tuple[str, ...]:
    """The places of held-out rows that are also training rows: a --val file may repeat rows of
    --data."""
    trained = {row.hash for row in train}
    return tuple(row.where for row in held_out if row.hash in trained)


def fingerprint(example: Example) -> str:
    """A hash of an encoded row, 12 hexadecimal digits."""
    return hashlib.sha256(repr((example.ids, example.targets)).encode()).hexdigest()[:12]


def identify(sources: list[Source]) -> DataFile | None:
    """The names and hashes of sources; None of none."""
    return DataFile(file_names(sources), ", ".join(source.identity() for source in sources)) \
        if sources else None
