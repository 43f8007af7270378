"""Read JSON records with their line numbers: JSON lines, lists, and objects that contain a list.

A file is read in pieces, one record at a time. Python's json module does not give the line of a
value. So this reader steps through lists and objects itself, and uses the json module only for
their members.
"""

import json
import re
from collections.abc import Iterator
from io import TextIOBase
from itertools import count

from phogpt_raw.data.encodings import UNDECODED
from phogpt_raw.data.fields import field_of
from phogpt_raw.data.records import LONGEST, Bad, Findings, Record
from phogpt_raw.refusal import Refusal

PIECE = 1 << 20  # characters read at once
FIRST = re.compile(r"\s*(\S)")
TOO_LONG = f"a row has more than {LONGEST:,} characters; cut it into several rows"
NOT_UTF8 = "is not UTF-8 at column {}; save the file as UTF-8"


class Number:
    """A number in a JSON file. It is not a str, so it is never used as a text."""

    def __init__(self, text: str):
        self.text = text

    def __str__(self) -> str:
        return self.text


class Twice(dict):
    """An object in which `key` appears twice."""

    key: str


def members(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        found = Twice(found)
        names = [name for name, _ in pairs]
        found.key = next(name for name in names if names.count(name) > 1)
    return found


def constant(text: str) -> Number | None:
    """NaN becomes null, because pandas writes NaN for a missing text; Infinity stays a number."""
    return None if text == "NaN" else Number(text)


DECODER = json.JSONDecoder(parse_int=Number, parse_float=Number, parse_constant=constant,
                           object_pairs_hook=members)


def lines_of(stream: TextIOBase) -> Iterator[str | None]:
    """Yield the lines of a stream, and None for each line of more than LONGEST characters."""
    while line := stream.readline(LONGEST + 1):
        if len(line) <= LONGEST:
            yield line
            continue
        while line and not line.endswith("\n"):
            line = stream.readline(LONGEST + 1)
        yield None


def undecoded(text: str) -> int | None:
    """Return the column of the first byte that could not be decoded, or None. Columns begin at 1.
    """
    found = None if text.isascii() else UNDECODED.search(text)
    return found and found.start() + 1


def parse_line(line: str | None, where: str) -> Record | Bad:
    """Parse one line of a JSON lines file. `where` is the place of the line."""
    if line is None:
        return Bad(where, TOO_LONG)
    if (column := undecoded(line)) is not None:
        return Bad(where, NOT_UTF8.format(column))
    try:
        return Record(DECODER.decode(line.lstrip("\ufeff").rstrip()), where)
    except json.JSONDecodeError as error:
        what = error.msg.removesuffix(" starting at")
        return Bad(where, f"is not JSON ({what} at column {error.colno}); write one object a line")
    except RecursionError:
        return Bad(where, "is nested too deeply; write one object a line, with texts as its fields")


def json_lines(stream: TextIOBase, name: str) -> Iterator[Record | Bad]:
    for number, line in enumerate(lines_of(stream), 1):
        if line is None or not line.isspace():
            yield parse_line(line, f"{name}:{number}")


class Walk:
    """A position in JSON text. More text is read from the stream when it is needed."""

    def __init__(self, stream: TextIOBase, name: str):
        self.stream, self.name = stream, name
        self.text, self.at, self.line, self.counted = "", 0, 1, 0

    def more(self) -> bool:
        """Drop the text before the position, and read more text. Returns False if no text is left.

        One call reads PIECE characters, or the number of characters that are left in `text`,
        whichever is larger.
        """
        self.line += self.text.count("\n", self.counted, self.at)
        self.text = self.text[self.at :]
        self.at = self.counted = 0
        piece = self.stream.read(max(PIECE, len(self.text)))
        self.text += piece
        return bool(piece)

    def where(self) -> str:
        self.line += self.text.count("\n", self.counted, self.at)
        self.counted = self.at
        return f"{self.name}:{self.line}"

    def peek(self) -> str:
        """The next character that is not white space; "" at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in " \t\n\r":
                self.at += 1
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""

    def opens_objects(self) -> bool:
        """Return whether the first member of the list at the position is an object."""
        while True:
            inside = FIRST.match(self.text, self.at + 1)
            if inside or not self.more():
                return inside is not None and inside[1] == "{"

    def take(self, letters: str, what: str) -> str:
        """Return the next character, which must be one of `letters`, and step over it."""
        found = self.peek()
        if not found or found not in letters:
            ends = "the end of the file" if not found else f"{found!r}"
            raise Refusal(f"{self.where()}: is not JSON ({what} is missing before {ends})")
        self.at += 1
        return found

    def value(self):
        """Parse the next value and step over it."""
        self.peek()
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.at)
                if end < len(self.text) or not self.more_of(end):  # a number may continue
                    self.at = end
                    return value
            except RecursionError:
                raise Refusal(f"{self.where()}: is nested too deeply; a row is an object with "
                              f"texts as its fields") from None
            except json.JSONDecodeError as error:
                wrong = error.pos - self.at
                cut_off = error.msg.startswith("Unterminated") or error.pos + 16 > len(self.text)
                if not cut_off or not self.more():
                    self.at += wrong
                    what = error.msg.removesuffix(" starting at")
                    there = self.text[self.at : self.at + 20].splitlines()
                    there = f" before {there[0]}" if there and there[0].strip() else ""
                    raise Refusal(f"{self.where()}: is not JSON ({what}{there})") from None
            if len(self.text) > 2 * LONGEST:
                raise Refusal(f"{self.where()}: {TOO_LONG}")

    def more_of(self, end: int) -> bool:
        """Return whether a value may continue in the text that has not been read yet.

        end: the end of the value, which is also the end of the text read so far. Only a number or a
        word (true, false, null) may continue, and only if more text can be read.
        """
        return self.text[end - 1] not in '"}]' and self.more()


def json_values(stream: TextIOBase, name: str, findings: Findings) -> Iterator[Record | Bad]:
    """Yield the rows of JSON text.

    Each member of a list is a row, and so is each object outside a list. But an object may contain
    one list of objects under a name that is no field of a row. Then the members of this list are
    the rows. Raises Refusal, which names the line, if the text is not JSON.
    """
    walk = Walk(stream, name)
    while found := walk.peek():
        if found == "[":
            walk.at += 1
            yield from list_members(walk)
        elif found == "{":
            yield from object_members(walk, findings)
        else:
            where = walk.where()
            yield Record(walk.value(), where)
        if walk.peek() == ",":
            walk.at += 1


def list_members(walk: Walk) -> Iterator[Record]:
    """Yield the members of a list. The position must be behind the list's opening bracket."""
    if walk.peek() == "]":
        walk.at += 1
        return
    for number in count(1):
        walk.peek()
        where = f"{walk.where()} (record {number})"
        yield Record(walk.value(), where)
        if walk.take(",]", "a comma or ]") == "]":
            return


def is_row(own: list[tuple[str, object]]) -> bool:
    """Return whether an object that begins with these members is a row.

    If it is a row, a list that follows in the same object is a field of the row.
    """
    known = {field_of(key) for key, _ in own} - {None, "system", "text"}
    return len(known) > 1 or bool(known & {"messages", "conversations"})


def object_members(walk: Walk, findings: Findings) -> Iterator[Record | Bad]:
    where, own, lists = walk.where(), [], []
    walk.take("{", "an object")
    if walk.peek() == "}":
        walk.at += 1
        yield Record({}, where)
        return
    while True:
        if walk.peek() != '"':
            walk.take('"', "a name in double quotes")
        key = walk.value()
        walk.take(":", "a colon")
        if walk.peek() == "[" and not field_of(key) and not is_row(own) and walk.opens_objects():
            lists.append(key)
            if len(lists) > 1:
                raise Refusal(f"{walk.where()}: the file holds several lists ("
                              f"{' and '.join(lists)}); put each into a file of its own")
            walk.at += 1
            yield from list_members(walk)
        else:
            own.append((key, walk.value()))
        if walk.take(",}", "a comma or }") == "}":
            break
    known = [key for key, _ in own if field_of(key)]
    if not lists and not known and all(isinstance(value, list) for _, value in own):
        yield Bad(where, f"no objects in {' and '.join(key for key, _ in own)}; a .json file is a "
                         f"list of objects, or an object that contains one such list")
    elif not lists:
        yield Record(members(own), where)
    elif known:
        raise Refusal(f"{where}: this object has a row's field, {known[0]}, and also a list of "
                      f"objects, {lists[0]}; put the rows into a file of their own")
    elif own:
        findings.note("beside the list", where, ", ".join(key for key, _ in own))
