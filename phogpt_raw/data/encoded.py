"""Read all rows of the sources as documents of token ids, and collect the findings of each file:
its bad rows, and notes on its other rows.

Files become records, records become conversations, and conversations become documents of ids. A
file with too many bad rows is refused here.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from phogpt_raw.data.conversations import SYSTEM, TEXT, Conversation, conversations
from phogpt_raw.data.encodings import MOJIBAKE
from phogpt_raw.data.prompt import Example, Template, encode
from phogpt_raw.data.records import CONTROL, Bad, Findings
from phogpt_raw.data.sources import Source, form_of_rows, read_file, read_hub
from phogpt_raw.refusal import Refusal

VIETNAMESE = re.compile("[À-ÖØ-öø-ýĂăĐđĨĩŨũƠơƯưẠ-ỹ]")
TEMPLATE_INSIDE = re.compile("### (Câu hỏi|Trả lời):")


@dataclass(frozen=True)
class Encoded:
    """An encoded row.

    documents: one document, or several if the row was split. hash: the hash of the row's texts.
    source: the index of the row's source.
    """

    documents: tuple[Example, ...]
    hash: int
    source: int = 0

    @property
    def where(self) -> str:
        return self.documents[0].where


@dataclass
class Rows:
    """The rows of the sources, and the findings of each file, both in the order of the sources."""

    rows: list[Encoded] = field(default_factory=list)
    findings: list[Findings] = field(default_factory=list)

    def check(self, strict: bool) -> None:
        """Raise Refusal for a file with too many bad rows."""
        for findings in self.findings:
            findings.check(strict)

    def together(self) -> Findings:
        """Return the findings of all files, added together."""
        found = Findings()
        for findings in self.findings:
            found.add(findings)
        return found


def encode_sources(sources: list[Source], tokenizer, template: Template, *, max_len: int,
                   too_long: str | None = None, mapped: dict[str, str] | None = None) -> Rows:
    """Read and encode every source.

    Raises Refusal if a source cannot be read or has no rows. Bad rows are stored in the findings;
    Rows.check raises Refusal if there are too many bad rows.
    """
    found = Rows()
    for number, source in enumerate(sources):
        read = 0
        for records, findings in units(source):
            found.findings.append(findings)
            talks = seen(conversations(records, findings, mapped), findings)
            for talk, documents in encode(tokenizer, template, talks, max_len, too_long, findings):
                if isinstance(documents, Bad):
                    findings.reject(documents)
                    continue
                findings.good += 1
                if documents:
                    found.rows.append(Encoded(tuple(documents), talk.hash, number))
            read += findings.good + len(findings.bad)
        if not read:
            raise no_rows(source)
    return found


def read_sources(sources: list[Source], mapped: dict[str, str], strict: bool
                 ) -> list[Conversation]:
    """Return every conversation of the sources. This function needs no tokenizer.

    The rows are checked as in `encode_sources` and Rows.check, but without the length in tokens,
    which needs a tokenizer.
    """
    found = []
    for source in sources:
        before = len(found)
        for records, findings in units(source):
            talks = list(conversations(records, findings, mapped))
            findings.good = len(talks)
            findings.check(strict)
            found += talks
        if len(found) == before:
            raise no_rows(source)
    return found


def no_rows(source: Source) -> Refusal:
    return Refusal(f"{source.name}: holds no rows; {form_of_rows(source, 'prompt', 'response')}")


def units(source: Source) -> Iterator[tuple[Iterable, Findings]]:
    """Yield (records, findings) for each file of a source, or once for its hub dataset."""
    if source.hub:
        yield read_hub(source), Findings()
    for n, path in enumerate(source.files):
        findings = Findings()
        if n == 0:
            for left in source.not_read():
                findings.note("file", str(left), left.name)
        yield read_file(path, findings), findings


def seen(talks: Iterable[Conversation], findings: Findings) -> Iterator[Conversation]:
    """Yield the conversations, and count unusual properties of their texts in `findings`."""
    for talk in talks:
        texts = [text for _role, text in talk.turns]
        if not any(map(VIETNAMESE.search, texts)) and \
                any(letter.isalpha() for text in texts for letter in text):
            findings.note("no diacritics", talk.where)
        if not all(map(str.isascii, texts)):
            for text in texts:
                if MOJIBAKE.search(text):
                    findings.note("mojibake", talk.where)
                    break
            if any("\ufffd" in text for text in texts):
                findings.note("lost characters", talk.where)
            if any(TEMPLATE_INSIDE.search(text) for text in texts):
                findings.note("template inside", talk.where)
        if any(map(CONTROL.search, texts)):
            findings.note("control", talk.where)
        if talk.turns[0][0] == TEXT:
            findings.note("text", talk.where)
        elif sum(role != SYSTEM for role, _text in talk.turns) > 2:
            findings.note("turns", talk.where)
        yield talk
