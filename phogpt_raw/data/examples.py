"""Load the training and held-out examples of a run, from its files or from nano's bundled pairs."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from phogpt_raw.config import Config
from phogpt_raw.data.chat_template import choose_template
from phogpt_raw.data.conversations import Conversation, check_map, parse_map
from phogpt_raw.data.encoded import Encoded, Rows, encode_sources, read_sources
from phogpt_raw.data.prompt import TEMPLATES, Example, Template, next_tokens
from phogpt_raw.data.report import Report, report
from phogpt_raw.data.row_cache import through_cache
from phogpt_raw.data.sources import Source, find_source, find_unweighted
from phogpt_raw.messages import plural
from phogpt_raw.refusal import Refusal

# Without --hold-out, DEFAULT_SHARE of the rows is held out, but at least LEAST rows, because with
# only one or two held-out rows, chance would decide which adapter is the best. If there are fewer
# than ENOUGH different rows in all, no row is held out.
DEFAULT_SHARE, LEAST, ENOUGH = 0.05, 4, 40
PAD = 3  # any token id; a plan uses only the number of tokens
STEPS = 50  # number of steps of a plan without rows; with 50, the warm-up has its usual 5 steps
PAIRS = Path(__file__).parents[1] / "nano" / "pairs"


@dataclass(frozen=True)
class DataFile:
    """Names (without paths) and SHA-256 hashes of the files that were read."""

    name: str
    sha256: str


@dataclass(frozen=True)
class Examples:
    """The encoded rows of a run.

    train, held_out: the examples to train on, and the held-out examples. A row gives several
    examples if it is split or its weight is above 1. A row may give no example if its weight is
    below 1.
    questions: the questions of the held-out examples, as typed. A plain text has no question.
    template, template_reason: the name of the prompt template, and the reason for it.
    source: the names of the training files.
    rows, held_out_rows: the number of training rows and of held-out rows.
    file: the files of the training rows. held_out_file: the files of the held-out rows, or None if
    the held-out rows come from the training files.
    trained_too: the places (file:line) of the held-out rows that are also training rows.
    report, held_out_report: statistics of the rows. held_out_report is None if the held-out rows
    come from the training files.
    """

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
    """Read and encode the rows, and divide them into training rows and held-out rows.

    Raises Refusal if there is no data, or if no row is left to train on.
    """
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
    findings, findings_val = found.together(), found_val.together()
    check_map(parse_map(config.map), findings, findings_val)
    rows, held_out = found.rows, found_val.rows
    if not val:
        rows, held_out = divide(rows, *hold_out_of(config, rows), names(sources))
    train = weighted(rows, [source.weight for source in sources])
    if not train:
        raise Refusal(f"{names(sources)}: no row is left to train on")
    kept_out = [document for row in held_out for document in row.documents]
    return Examples(train, kept_out, questions(tokenizer, TEMPLATES[name], kept_out), name, reason,
                    file_names(sources), len(rows), len(held_out), identify(sources),
                    identify(others), shared(rows, held_out), report(rows, findings),
                    report(held_out, findings_val) if val else None)


def stand_ins(config: Config) -> Examples:
    """Return placeholder examples for a plan without a tokenizer. A placeholder has no real text.

    With --data, there is one placeholder for each row. Without --data, there are enough
    placeholders for STEPS steps. Each placeholder has --max-len tokens, and all its tokens except
    the first carry loss.
    """
    ids = [PAD] * config.max_len
    every = Example(ids, next_tokens(ids, start=1))
    sources, others = sources_of(config.data), held_out_sources(config.val)
    counts = STEPS * config.batch_size, 0
    if sources:
        rows, held_out = (read_sources(part, parse_map(config.map), config.strict)
                          for part in (sources, others))
        counts = [*map(len, (rows, held_out) if others else
                       divide(rows, *hold_out_of(config, rows), names(sources)))]
    train, held_out = ([every] * n for n in counts)
    return Examples(train, held_out, [], "", "", file_names(sources), *counts, identify(sources),
                    identify(others))


def sources_of(specs: tuple[str, ...] | str | None) -> list[Source]:
    """Return the sources that --data names."""
    return [find_source(spec) for spec in several(specs)]


def several(specs: tuple[str, ...] | str | None) -> tuple[str, ...]:
    return (specs,) if isinstance(specs, str) else specs or ()


def held_out_sources(specs: tuple[str, ...] | str | None) -> list[Source]:
    """Return the sources that --val names. They cannot have a weight."""
    return [find_unweighted(spec, "--val") for spec in several(specs)]


def names(sources: list[Source]) -> str:
    return " and ".join(source.name for source in sources)


def file_names(sources: list[Source]) -> str:
    """The names of the files, without their paths."""
    return ", ".join(Path(source.name).name for source in sources)


def read(sources: list[Source], tokenizer, template: Template, config: Config) -> Rows:
    """Return the rows of the sources.

    Raises Refusal if too many rows are bad (with --strict, if any row is bad), or if no row is
    left.
    """
    settings = dict(max_len=config.max_len, too_long=config.too_long, mapped=parse_map(config.map))
    found = through_cache(config.data_cache, sources, tokenizer, template, settings,
                          lambda: encode_sources(sources, tokenizer, template, **settings))
    found.check(config.strict)
    if not found.rows:
        raise Refusal(f"{names(sources)}: no row is left; all are longer than --max-len "
                      f"{config.max_len}, and --too-long drop leaves them out")
    return found


def weighted(rows: list[Encoded], weights: list[float]) -> list[Example]:
    """Return the documents of the rows. Each row appears as often as its source's weight says.

    If the weight is 2.5, a row appears two or three times. The low bits of the hash of the row's
    text decide between two and three, so the number is the same in every run. `divide` uses the
    high bits of the same hash to choose the held-out rows.
    """
    return [document for row in rows
            for _ in range(int(weights[row.source])
                           + (row.hash % 2**32 < weights[row.source] % 1 * 2**32))
            for document in row.documents]


def questions(tokenizer, template: Template, examples: Iterable[Example]) -> list[str]:
    """Return the questions, as typed, of the examples that have a question."""
    before, after = template.question.split("{}")
    return [tokenizer.decode(example.prompt).removeprefix(before).removesuffix(after)
            for example in examples if example.asks]


def hold_out_of(config: Config, rows: list[Encoded] | list[Conversation]) -> tuple[float, int]:
    """Return (--hold-out or its default, the smallest number of held-out rows).

    The second value matters only if the first value is a share.
    """
    if config.hold_out is None:
        return (DEFAULT_SHARE, LEAST) if len({row.hash for row in rows}) >= ENOUGH else (0, 0)
    return config.hold_out, 1


def divide(rows: list[Encoded] | list[Conversation], hold_out: float, least: int,
           data: str) -> tuple[list, list]:
    """Return (training rows, held-out rows), both in the file's order.

    The hash of a row's text decides whether the row is held out. So of several equal rows, either
    all are held out or none is. If `hold_out` is below 1, it is the share of held-out rows. In this
    case, rows that are added later do not change the decision about the older rows, unless the
    share is smaller than `least` rows. If `hold_out` is 1 or more, it is the number of held-out
    rows. More rows than this number are held out only if some of them are equal.
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
                      f"{plural(len(set(hashes)), 'row', 'rows')}; none would be left to train on; "
                      f"--hold-out 0 trains on all rows")
    return kept, held_out


def shared(train: list[Encoded], held_out: list[Encoded]) -> tuple[str, ...]:
    """Return the places of held-out rows that are also training rows.

    There are such rows if a --val file repeats rows of --data.
    """
    trained = {row.hash for row in train}
    return tuple(row.where for row in held_out if row.hash in trained)


def fingerprint(example: Example) -> str:
    """Return a hash of an encoded row: 12 hexadecimal digits."""
    return hashlib.sha256(repr((example.ids, example.targets)).encode()).hexdigest()[:12]


def identify(sources: list[Source]) -> DataFile | None:
    """Return the names and hashes of the sources, or None if there are no sources."""
    return DataFile(file_names(sources), ", ".join(source.identity() for source in sources)) \
        if sources else None
