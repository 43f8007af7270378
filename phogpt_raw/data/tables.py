"""Read tables as records: text with any delimiter, and parquet.

The first row names the columns. An extra quote or comma would move texts into other columns, or
join rows. Two rules reveal such mistakes: every row must have one cell for each column, and a
delimiter or a line end must follow each closing quote. A row that breaks a rule is bad. If the
mistake is a quote, reading continues with the line after the first line of the bad row.
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
from phogpt_raw.messages import plural
from phogpt_raw.refusal import Refusal

DELIMITERS = ",;\t|"
MOST_LINES = 1000  # if a row has more than MOST_LINES lines, a closing quote is missing
LIKE_ROWS = 10  # if LIKE_ROWS lines of a cell look like rows, a closing quote is missing


class Text:
    """The lines of a table. Lines that have been read can be put back and read again."""

    def __init__(self, lines: Iterable[str | None]):
        self.lines, self.back = iter(lines), deque()
        self.taken: list[str] = []  # lines of the current record
        self.number = 0  # number of lines before the current record

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
        """End the current record, which has this number of lines. The other lines in `taken` are
        read again."""
        self.back.extendleft(reversed(self.taken[lines:]))
        self.number += lines
        self.taken = []


def cells_of(text: Text, delimiter: str) -> Iterator[tuple[int, list[str] | str]]:
    """Yield (line number, cells) of each record. A bad record has its fault in place of cells."""
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
        return ('text follows the closing quote of a cell; close each quote that opens a cell, '
                'write "" for each quote inside a cell, and put the cell in quotes')
    if "unexpected end" in error:
        return 'a quote opens a cell and never closes; write "" for a quote inside a cell'
    return error


def delimiter_of(head: str) -> str:
    """Choose the delimiter of a table from the start of its text.

    Each delimiter that occurs in the first row is tried: it divides the first 20 rows into cells.
    The program then counts the rows that have the same number of cells as the first row. The
    delimiter with the largest share of such rows is chosen. If two delimiters have the same share,
    the one that gives more cells is chosen.

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
    """Yield the rows of .csv or .tsv text."""
    lines = lines_of(stream)
    head, skipped = list(islice(lines, 50)), 0
    delimiter = None
    if head and head[0] and head[0].lower().startswith("sep=") and len(head[0].strip()) == 5:
        delimiter, head, skipped = head[0].strip()[4], head[1:], 1  # "sep=;" for Excel
    delimiter = delimiter or delimiter_of("".join(line for line in head if line))
    text = Text(chain(head, lines))
    text.number = skipped
    rows = ((number, cells) for number, cells in cells_of(text, delimiter)
            if isinstance(cells, str) or any(cell.strip() for cell in cells))
    for number, cells in rows:
        if isinstance(cells, str):
            raise Refusal(f"{name}:{number}: {cells}; this row must name the columns")
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
            yield Record(dict(zip(names, cells, strict=False)), where, table=True)


def columns(cells: list, where: str) -> list[str]:
    """Return the names of the columns. Raises Refusal if a name appears twice."""
    names = [cell.strip() or f"column {n}" for n, cell in enumerate(cells, 1)]
    folded = [name.casefold() for name in names]
    for name in names:
        if folded.count(name.casefold()) > 1:
            raise Refusal(f"{where}: the column {name} appears twice; rename one of them, "
                          f"or remove one")
        if (column := undecoded(name)) is not None:
            raise Refusal(f"{where}: {NOT_UTF8.format(column)}")
    return names


def misfit(cells: list[str], names: list[str], delimiter: str) -> str | None:
    """Return the fault of a row that does not fit the columns, or None if the row fits."""
    for cell in cells:
        if (column := undecoded(cell)) is not None:
            return NOT_UTF8.format(column)
    if len(cells) < len(names) or any(cell.strip() for cell in cells[len(names) :]):
        what = {",": "comma", ";": "semicolon", "\t": "tab", "|": "|"}.get(delimiter, delimiter)
        remedy = (f"put a text that has a {what} in double quotes" if len(cells) > len(names)
                  else "a quote or a cell is missing")
        count = plural(len(cells), "1 cell", f"{len(cells)} cells")
        return f"has {count}, but the first row has {len(names)}; {remedy}"
    for cell in cells:
        if "\n" in cell and rows_within(cell, names, delimiter) >= LIKE_ROWS:
            return (f"a quote opens a cell and closes {cell.count(chr(10))} lines later, after "
                    f'lines that look like rows; write "" for a quote inside a cell')
    return None


def rows_within(cell: str, names: list[str], delimiter: str) -> int:
    """Return the number of lines inside a cell that look like rows.

    Returns 0 if fewer than two lines, or less than 90 % of the lines, look like rows.
    """
    inside = [line for line in cell.split("\n")[1:-1] if line.strip()]
    like = sum(line.count(delimiter) == len(names) - 1 for line in inside)
    return like if len(names) > 1 and like >= 2 and like >= 0.9 * len(inside) else 0


def parquet(path: Path, name: str) -> Iterator[Record]:
    """Yield the rows of a .parquet file. Their places have a row number instead of a line number.
    """
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with path.open("rb") as content:
            ends = content.read(4), content.seek(max(0, path.stat().st_size - 4)), content.read(4)
            if ends[0] != b"PAR1" or ends[2] != b"PAR1":
                raise Refusal(f"{name}: cannot be read as .parquet (it does not begin and end "
                              f"with PAR1); the file may be incomplete")
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
    """Raise Refusal if the rows of a row group have more than LONGEST characters on average.

    Four bytes count as one character. Only the metadata of the file is read.
    """
    for n in range(metadata.num_row_groups):
        group = metadata.row_group(n)
        if group.total_byte_size > 4 * LONGEST * max(1, group.num_rows):
            raise Refusal(f"{name}: {TOO_LONG}")


def one_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
