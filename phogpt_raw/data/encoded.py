"""All rows of the sources as documents of token ids, with what was found on the way.

This is the chain from files to ids: records, conversations, documents. A file of which too many
rows are bad is refused here.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from phogpt_raw.data.conversations import TEXT, Conversation, conversations
from phogpt_raw.data.encodings import MOJIBAKE
from phogpt_raw.data.prompt import Example, Template, encode
from phogpt_raw.data.records import Bad, Findings
from phogpt_raw.data.sources import Source, read_file, read_hub
from phogpt_raw.refusal import Refusal

CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")  # PhoGPT's vocabulary has none of them
TEMPLATE_INSIDE = re.compile("### (Câu hỏi|Trả lời):")
HOLDS_NO_ROWS = 'holds no rows; a row is a line such as {"prompt": "…", "response": "…"}'


@dataclass(frozen=True)
class Encoded:
    """A row: its documents (several where it was split), the hash of its texts, and the number of
    its source."""

    documents: tuple[Example, ...]
    hash: int
    source: int = 0

    @property
    def where(self) -> str:
        return self.documents[0].where


@dataclass
class Rows:
    """The rows of the sources, and what was found in each file."""

    rows: list[Encoded] = field(default_factory=list)
    findings: dict[str, Findings] = field(default_factory=dict)

    def check(self, strict: bool) -> None:
        """Raise Refusal for a file with too many bad rows."""
        for findings in self.findings.values():
            findings.check(strict)

    def together(self) -> Findings:
        """What was found in all files."""
        found = Findings()
        for findings in self.findings.values():
            found.add(findings)
        return found


def encode_sources(sources: list[Source], tokenizer, template: Template, *, max_len: int,
                   too_long: str | None = None, mapped: dict[str, str] | None = None) -> Rows:
    """Read and encode every source. Raises Refusal for one that cannot be read or holds no rows;
    bad rows are kept in the findings (Rows.check)."""
    found = Rows()
    for number, source in enumerate(sources):
        read = 0
        for name, records, findings in units(source):
            found.findings[name] = findings
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
            raise Refusal(f"{source.name}: {HOLDS_NO_ROWS}")
    return found


def units(source: Source) -> Iterator[tuple[str, Iterable, Findings]]:
    """(name, records, findings) of each file of a source, or of its hub dataset."""
    if source.hub:
        findings = Findings()
        yield source.name, read_hub(*source.hub), findings
    for n, path in enumerate(source.files):
        findings = Findings()
        if n == 0:
            for left in source.not_read():
                findings.note("file", str(left), left.name)
        yield str(path), read_file(path, findings), findings


def seen(talks: Iterable[Conversation], findings: Findings) -> Iterator[Conversation]:
    """The conversations; what is odd in their texts is counted."""
    for talk in talks:
        texts = [text for _role, text in talk.turns]
        if all(map(str.isascii, texts)):
            if any(letter.isalpha() for text in texts for letter in text):
                findings.note("no diacritics", talk.where)
        else:
            for text in texts:
                if MOJIBAKE.search(text):
                    findings.note("mojibake", talk.where)
                    break
            if any("\ufffd" in text for text in texts):
                findings.note("lost letters", talk.where)
            if any(TEMPLATE_INSIDE.search(text) for text in texts):
                findings.note("template inside", talk.where)
        if any(map(CONTROL.search, texts)):
            findings.note("control", talk.where)
        if talk.turns[0][0] == TEXT:
            findings.note("text", talk.where)
        elif len(talk.turns) > 2:
            findings.note("turns", talk.where)
        yield talk
