"""Read the sheets of an Excel file as records.

Some cells are not text: a formula without a saved value, a number that Excel may show
differently, a date, an Excel error. Such a cell makes its row bad, but only if its column is used.

An Excel file states the range of its cells. Some programs write a wrong range, so this module
ignores the range.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from phogpt_raw.data.records import Findings, NoText, Record
from phogpt_raw.data.tables import columns, one_line
from phogpt_raw.refusal import Refusal

ESCAPED = re.compile("_x([0-9A-Fa-f]{4})_")  # Excel's code for a character that XML cannot hold
WHOLE = 2**53  # Excel cannot store every integer above this value exactly


def sheets(path: Path, name: str, findings: Findings) -> Iterator[Record]:
    """Yield the rows of an .xlsx file.

    The first visible sheet with rows is read, and also every later visible sheet with the same
    columns. The place of a row in a later sheet includes the sheet's name.
    """
    try:
        from openpyxl import load_workbook
    except ImportError:
        raise Refusal(f"{name}: reading Excel files needs openpyxl, which is not installed; run "
                      f"pip install openpyxl, or save the file as .csv") from None
    if is_ole(path):
        raise Refusal(f"{name}: is an Excel file with a password or an old .xls; open it in Excel "
                      f"and save it without a password as .xlsx")
    first = None
    try:
        with path.open("rb") as content, path.open("rb") as again:
            formulas = load_workbook(content, read_only=True)
            values = load_workbook(again, read_only=True, data_only=True)
            for sheet, shown in zip(formulas.worksheets, values.worksheets, strict=True):
                if sheet.sheet_state != "visible":
                    findings.note("hidden sheet", name, sheet.title)
                    continue
                for one in (sheet, shown):
                    one.reset_dimensions()
                rows = ((number, pair) for number, pair in enumerate(
                    zip(sheet.iter_rows(), shown.iter_rows(), strict=True), 1)
                    if any(cell.value not in (None, "") for cell in pair[0]))
                names = None
                for number, (as_typed, as_shown) in rows:
                    where = f"{name}:{number}" if first is None or names is first else (
                        f"{name}:{sheet.title}:{number}")
                    if names is None:
                        names = header(as_typed, where)
                        if first is not None and set(names) != set(first):
                            findings.note("sheet", where, sheet.title)
                            break
                        first = first or names
                    else:
                        yield sheet_row(names, as_typed, as_shown, where, findings)
    except Refusal:
        raise
    except Exception as error:  # any error that a broken archive or broken XML raises
        raise Refusal(f"{name}: cannot be read as .xlsx ({one_line(error)}); save it again, or as "
                      f".csv") from None


def is_ole(path: Path) -> bool:
    """Return whether a file has the format of old .xls files. Encrypted .xlsx files have this
    format too."""
    with path.open("rb") as content:
        return content.read(8) == b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"


def header(cells, where: str) -> list[str]:
    names = [cell.value for cell in cells]
    while names and names[-1] is None:
        names.pop()
    wrong = next((value for value in names if not isinstance(value, str | None)), None)
    if wrong is not None:
        raise Refusal(f"{where}: this row must name the columns, but has {wrong}; write a text")
    return columns([value or "" for value in names], where)


def sheet_row(names: list[str], as_typed, as_shown, where: str, findings: Findings) -> Record:
    found = dict.fromkeys(names)  # an empty cell is None, as a missing text in JSON
    for n, (typed, shown) in enumerate(zip(as_typed, as_shown, strict=True)):
        column = names[n] if n < len(names) else f"column {n + 1}"
        if typed.value is None or found.get(column) is not None:
            continue
        found[column] = text_of(typed, shown)
        if typed.data_type == "f" and isinstance(found[column], str):
            findings.note("formula", where, str(typed.value))
        elif isinstance(found[column], str) and not isinstance(shown.value, str):
            findings.note("number", where, found[column])
    return Record(found, where, table=True)


def text_of(typed, shown) -> str | NoText:
    """Return a cell's text, or NoText if the cell has no usable text.

    typed: the cell as typed, for example with a formula. shown: the same cell with the formula's
    saved value.
    """
    value = shown.value
    if value is None:
        return NoText("is a formula without a saved value; open and save the file in Excel")
    if typed.data_type == "e" or shown.data_type == "e":
        return NoText(f"is an error of Excel, {value}; write the text")
    if isinstance(value, int | float) and not isinstance(value, bool):
        if value != int(value) or abs(value) >= WHOLE or typed.number_format not in (
                "General", "0", "@"):
            return NoText("is a number that Excel may show differently; format the column as "
                          "text and type it again")
        return str(int(value))
    if isinstance(value, str):
        return ESCAPED.sub(lambda found: chr(int(found[1], 16)), value)
    kind = "true or false" if isinstance(value, bool) else "a date or a time"
    return NoText(f"is not text but {kind}; format the column as text and type it again")
