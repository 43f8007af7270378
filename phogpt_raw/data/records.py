"""Records as they are read from files, each with file and line, before their format is known; bad
records; and counted notes on records."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from phogpt_raw.refusal import Refusal

LONGEST = 10_000_000  # characters of a record; a longer one means a broken file
ENOUGH, NAMED = 0.9, 10  # share of good rows below which none is left out; bad rows that are named
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
MANY = 100_000  # bad rows, more than good ones: the rest of the file is not read


@dataclass(frozen=True)
class Record:
    """What one row of a file holds (usually a dict of fields), and where: file:line."""

    value: object
    where: str


@dataclass(frozen=True)
class NoText:
    """A value in the place of a text: `why` it cannot be used as one, and what would be
    right."""

    why: str


@dataclass(frozen=True)
class Bad:
    """A row that cannot be used: file:line, what is wrong and what would be right."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


@dataclass(frozen=True)
class Note:
    """A note: how often something was found, where it was found first, and a name or an example."""

    count: int
    where: str
    example: str = ""


@dataclass
class Findings:
    """Bad rows in the files' order, and notes by kind. `good` rows were read."""

    good: int = 0
    bad: list[Bad] = field(default_factory=list)
    notes: dict[str, Note] = field(default_factory=dict)

    def note(self, kind: str, where: str, example: str = "", count: int = 1) -> None:
        kind, where, example = printable(kind), printable(where), printable(example)
        first = self.notes.get(kind, Note(0, where, example))
        self.notes[kind] = Note(first.count + count, first.where, first.example)

    def add(self, other: "Findings") -> None:
        self.good += other.good
        self.bad += other.bad
        for kind, note in other.notes.items():
            self.note(kind, note.where, note.example, note.count)

    def reject(self, bad: Bad) -> None:
        """Count a bad row. Raises Refusal if more than MANY rows are bad and these are more than
        the good ones: then the rest of the file is not read."""
        self.bad.append(Bad(printable(bad.where), printable(bad.what)))
        if len(self.bad) > max(MANY, self.good):
            raise Refusal(f"{named(self.bad)} ({len(self.bad):,} rows cannot be used so far, and "
                          f"{self.good:,} can)")

    def sift(self, found: Iterable) -> Iterator:
        """Yields the good records; the bad ones are stored here."""
        for one in found:
            if isinstance(one, Bad):
                self.reject(one)
            else:
                yield one

    def check(self, strict: bool) -> None:
        """Raise Refusal if more rows are bad than may be left out."""
        total = self.good + len(self.bad)
        if not self.bad or (not strict and self.good >= ENOUGH * total):
            return
        if total == 1:
            raise Refusal(named(self.bad))
        why = "with --strict none is left out" if strict else (
            f"they are left out only where at least {ENOUGH:.0%} are good")
        raise Refusal(f"{named(self.bad)} ({len(self.bad):,} of {total:,} rows cannot be used; "
                      f"{why})")


def check_all(findings: Findings) -> None:
    """Raise Refusal where any row is bad."""
    if findings.bad:
        raise Refusal(f"{named(findings.bad)} ({len(findings.bad):,} of "
                      f"{findings.good + len(findings.bad):,} rows cannot be used)")


def printable(text: str) -> str:
    """Text that is safe to print: incomplete characters and control characters are written as their
    codes.

    >>> printable("a\\ud83db\\x1b[2J")
    'a\\\\ud83db\\\\x1b[2J'
    """
    text = CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def named(bad: list[Bad]) -> str:
    """The first of them with file, line and fault; those with one fault are named together.

    >>> named([Bad("a.csv:2", "is empty"), Bad("a.csv:3", "is empty"), Bad("b.csv:2", "is long")])
    'a.csv:2, :3: is empty; b.csv:2: is long'
    """
    places: dict[str, list[str]] = {}
    for one in bad[:NAMED]:
        before = places.setdefault(one.what, [])
        file = before[0].rpartition(":")[0] if before else None
        before.append(one.where if one.where.rpartition(":")[0] != file
                      else one.where.removeprefix(file))
    return "; ".join(f"{', '.join(where)}: {what}" for what, where in places.items())
