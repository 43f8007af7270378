"""Classes for the records of a file, for bad records, and for notes on records.

Each record, bad record and note has its place (file and line). This module does not depend on the
format of a record.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from phogpt_raw.refusal import Refusal

LONGEST = 10_000_000  # characters of a record; a longer record means a broken file
# ENOUGH: bad rows are left out only if at least this share of the rows is good. NAMED: a message
# names at most this number of bad rows.
ENOUGH, NAMED = 0.9, 10
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
MANY = 100_000  # if more rows than this are bad, and most rows are bad, reading ends


@dataclass(frozen=True)
class Record:
    """One row of a file. value: its content, usually a dict of fields. where: file:line. table:
    True if the first row of a table names the fields."""

    value: object
    where: str
    table: bool = False


@dataclass(frozen=True)
class NoText:
    """A value in a text field that is not a text. `why`: the reason and the remedy."""

    why: str


@dataclass(frozen=True)
class Bad:
    """A row that cannot be used. where: file:line. what: the fault and the remedy."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


@dataclass(frozen=True)
class Note:
    """A note on records. count: the number of cases. where: the place of the first case. example: a
    name or a text from the first case."""

    count: int
    where: str
    example: str = ""


@dataclass
class Findings:
    """The findings of files. good: the number of good rows. bad: the bad rows in the files' order.
    notes: {kind: note}."""

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
        """Store a bad row.

        Raises Refusal if more than MANY rows are bad, and more rows are bad than good. The rest of
        the file is then not read.
        """
        self.bad.append(Bad(printable(bad.where), printable(bad.what)))
        if len(self.bad) > max(MANY, self.good):
            raise Refusal(f"{named(self.bad)} (so far, {len(self.bad):,} rows cannot be used, and "
                          f"{self.good:,} rows can be used)")

    def sift(self, found: Iterable) -> Iterator:
        """Yield the good records, and store the bad records."""
        for one in found:
            if isinstance(one, Bad):
                self.reject(one)
            else:
                yield one

    def check(self, strict: bool) -> None:
        """Raise Refusal if too many rows are bad. With `strict`, one bad row is too many."""
        total = self.good + len(self.bad)
        if not self.bad or (not strict and self.good >= ENOUGH * total):
            return
        if total == 1:
            raise Refusal(named(self.bad))
        why = "with --strict, bad rows are not left out" if strict else (
            f"bad rows are left out only if at least {ENOUGH:.0%} of the rows are good")
        raise Refusal(f"{named(self.bad)} ({len(self.bad):,} of {total:,} rows cannot be used; "
                      f"{why})")


def check_all(findings: Findings) -> None:
    """Raise Refusal if any row is bad."""
    if findings.bad:
        raise Refusal(f"{named(findings.bad)} ({len(findings.bad):,} of "
                      f"{findings.good + len(findings.bad):,} rows cannot be used)")


def printable(text: str) -> str:
    """Return a text that is safe to print: control characters and incomplete characters are
    replaced with codes.

    >>> printable("a\\ud83db\\x1b[2J")
    'a\\\\ud83db\\\\x1b[2J'
    """
    text = CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def named(bad: list[Bad]) -> str:
    """Describe the first NAMED bad rows: file, line and fault. Equal faults are described once.

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
