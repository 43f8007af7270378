"""Tables become records: text with any delimiter, and parquet.

The first row names the columns. An extra quote or comma moves texts into other columns, or joins
rows. So every row must have as many cells as there are names, and a closing quote must be followed
by a delimiter or a line end. Other rows are bad. After a bad row, reading continues with the line
after its first line.
"""

import csv
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from io import StringIO, TextIOBase
from itertools import chain, islice
from pathlib import Path

from phogpt_raw.data.json_text import NOT_UTF8, TOO_LONG, lines_of, undecoded
from phogpt_raw.data.records import LONGEST, Bad, Findings, Record
from phogpt_raw.refusal import Refusal

DELIMITERS = ",;\t|"
MOST_LINES = 1000  # lines of a quoted cell; in a longer one the closing quote is missing
LIKE_ROWS = 10  # lines within a cell that look like rows: so many are not a text


class Text:
    """The lines of a table; lines can be put back and read again."""

    def __init__(self, lines: Iterable[str | None]):
        self.lines, self.back = iter(lines), deque()
        self.taken: list[str] = []  # of the current record
        self.number = 0  # lines before it

    def __iter__(self) -> Iterator[str]:
        while True:
            try:
                line = self.back.popleft() if self.back else next(self.lines)
            except StopIteration:
                return
            self.taken.append(line)
            if line is None:
                raise csv.Error(TOO_LONG)
            if len(self.taken) > MOST_LINES:
                raise csv.Error(f"a quote opens a cell and does not close within {MOST_LINES:,} "
                                f"lines")
            yield line

    def done(self, lines: int) -> None:
        """The record had this number of lines; the lines after it are read again."""
        self.back.extendleft(reversed(self.taken[lines:]))
        self.number += lines
        self.taken = []


def cells_of(text: Text, delimiter: str) -> Iterator[tuple[int, list[str] | str]]:
    """(line, cells) of each record; in place of cells what is wrong with it."""
    csv.field_size_limit(sys.maxsize)
    while True:
        reader = csv.reader(iter(text), delimiter=delimiter, strict=True)
        try:
            for cells in reader:
                number = text.number + 1
                text.done(len(text.taken))
                yield number, cells
            return
        except csv.Error as error:
            number = text.number + 1
            text.done(1)
            yield number, in_words(str(error))


def in_words(error: str) -> str:
    if "expected after" in error:
        return ('a cell begins with a quote, and text follows where it closes; write "" for each '
                'quote inside a cell and put the cell in quotes')
    if "unexpected end" in error:
        return 'a quote opens a cell and never closes; write "" for a quote inside a cell'
    return error


def delimiter_of(head: str) -> str:
    """The delimiter of a table with this beginning: it occurs between the names, and with it the
    most rows have as many cells as there are names.

    >>> delimiter_of("Câu hỏi;Trả lời\\nSao, vậy?;Dạ, vâng\\n"), delimiter_of("a\\tb\\n1\\t2")
    (';', '\\t')
    """
    best, fit = ",", (0, 0)
    for delimiter in DELIMITERS:
        rows = [cells for _, cells in islice(cells_of(Text(StringIO(head, None)),
                                                      delimiter), 20)]
        if not rows or isinstance(rows[0], str) or len(rows[0]) < 2:
            continue
        width = len(rows[0])
        same = sum(len(cells) == width for cells in rows if not isinstance(cells, str))
        if (same / len(rows), width) > fit:
            best, fit = delimiter, (same / len(rows), width)
    return best


def text_table(stream: TextIOBase, name: str, findings: Findings) -> Iterator[Record | Bad]:
    """The rows of .csv or .tsv text."""
    lines = lines_of(stream)
    head, skipped = list(islice(lines, 50)), 0
    delimiter = None
    if head and head[0] and head[0].lower().startswith("sep=") and len(head[0].strip()) == 5:
        delimiter, head, skipped = head[0].strip()[4], head[1:], 1  # Excel's own first line
    delimiter = delimiter or delimiter_of("".join(line for line in head if line))
    text = Text(chain(head, lines))
    text.number = skipped
    rows = ((number, cells) for number, cells in cells_of(text, delimiter)
            if isinstance(cells, str) or any(cell.strip() for cell in cells))
    for number, cells in rows:
        if isinstance(cells, str):
            raise Refusal(f"{name}:{number}: {cells}; this row names the columns")
        break
    else:
        return
    names = columns(cells, f"{name}:{number}")
    for number, cells in rows:
        where = f"{name}:{number}"
        if isinstance(cells, str):
            yield Bad(where, cells)
        elif fault := misfit(cells, names, delimiter):
            yield Bad(where, fault)
        else:
            if any("\n" in cell and rows_within(cell, names, delimiter) for cell in cells):
                findings.note("like rows", where)
            yield Record(dict(zip(names, cells, strict=False)), where)


def columns(cells: list, where: str) -> list[str]:
    """The names of columns; raises Refusal where one appears twice."""
    names = [cell.strip() or f"column {n}" for n, cell in enumerate(cells, 1)]
    folded = [name.casefold() for name in names]
    for name in names:
        if folded.count(name.casefold()) > 1:
            raise Refusal(f"{where}: the column {name} appears twice; which one is meant? Rename "
                          f"or remove one")
        if (column := undecoded(name)) is not None:
            raise Refusal(f"{where}: {NOT_UTF8.format(column)}")
    return names


def misfit(cells: list[str], names: list[str], delimiter: str) -> str | None:
    """What is wrong with a row, if it does not fit the names of the columns."""
    for cell in cells:
        if (column := undecoded(cell)) is not None:
            return NOT_UTF8.format(column)
    if len(cells) < len(names) or any(cell.strip() for cell in cells[len(names) :]):
        what = {",": "comma", ";": "semicolon", "\t": "tab", "|": "|"}.get(delimiter, delimiter)
        remedy = (f"put a text that has a {what} in double quotes" if len(cells) > len(names)
                  else "a quote or a cell is missing")
        return f"has {len(cells)} cells where the first row has {len(names)}; {remedy}"
    for cell in cells:
        if "\n" in cell and rows_within(cell, names, delimiter) >= LIKE_ROWS:
            return (f"a quote opens a cell and closes {cell.count(chr(10))} lines later, over "
                    f'lines that look like rows; write "" for a quote inside a cell')
    return None


def rows_within(cell: str, names: list[str], delimiter: str) -> int:
    """How many lines inside a cell look like rows, if at least two and nearly all do; else 0."""
    inside = [line for line in cell.split("\n")[1:-1] if line.strip()]
    like = sum(line.count(delimiter) == len(names) - 1 for line in inside)
    return like if len(names) > 1 and like >= 2 and like >= 0.9 * len(inside) else 0


def parquet(path: Path, name: str) -> Iterator[Record]:
    """The rows of a .parquet file; row numbers are used in place of line numbers."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with path.open("rb") as content:
            ends = content.read(4), content.seek(max(0, path.stat().st_size - 4)), content.read(4)
            if ends[0] != b"PAR1" or ends[2] != b"PAR1":
                raise Refusal(f"{name}: cannot be read as .parquet (it does not begin and end "
                              f"with PAR1); is it whole?")
            content.seek(0)
            file, number = ParquetFile(content), 0
            names = file.schema_arrow.names
            columns(names, name)
            check_sizes(file.metadata, name)
            for batch in file.iter_batches(256):
                for row in batch.to_pylist():
                    number += 1
                    yield Record(row, f"{name}:{number}")
    except (pyarrow.ArrowException, OSError, OverflowError, ValueError) as error:
        if isinstance(error, Refusal):
            raise
        raise Refusal(f"{name}: cannot be read as .parquet ({one_line(error)})") from None


def check_sizes(metadata, name: str) -> None:
    """Raise Refusal if the rows of a group are too long on average: more than LONGEST characters of
    four bytes. This reads only the file's metadata."""
    for n in range(metadata.num_row_groups):
        group = metadata.row_group(n)
        if group.total_byte_size > 4 * LONGEST * max(1, group.num_rows):
            raise Refusal(f"{name}: {TOO_LONG}")


def one_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
