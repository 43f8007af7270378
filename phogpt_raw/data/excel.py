"""Sheets of Excel become records. A cell is text or it is said: a formula, a number that Excel
shows in its own way, a date, an error."""

from collections.abc import Iterator
from pathlib import Path

from phogpt_raw.data.records import Bad, Findings, Record
from phogpt_raw.data.tables import columns, one_line
from phogpt_raw.refusal import Refusal

WHOLE = 2**53  # integers above are not exact in Excel


def sheets(path: Path, name: str, findings: Findings) -> Iterator[Record | Bad]:
    """The rows of an .xlsx file: of its first sheet that holds any, and of those like it."""
    try:
        from openpyxl import load_workbook
    except ImportError:
        raise Refusal(f"{name}: Excel files are read by openpyxl, which is not installed: "
                      f"pip install openpyxl; or save the file as .csv") from None
    first = None
    try:
        with path.open("rb") as content, path.open("rb") as again:
            formulas = load_workbook(content, read_only=True)
            values = load_workbook(again, read_only=True, data_only=True)
            for sheet, shown in zip(formulas.worksheets, values.worksheets, strict=True):
                rows = ((number, pair) for number, pair in enumerate(
                    zip(sheet.iter_rows(), shown.iter_rows(), strict=True), 1)
                    if any(cell.value not in (None, "") for cell in pair[0]))
                names = None
                for number, (as_typed, as_shown) in rows:
                    where = f"{name}:{number}"
                    if names is None:
                        names = header(as_typed, where)
                        if first is not None and names != first:
                            findings.note("sheet", where, sheet.title)
                            break
                        first = names
                    else:
                        yield sheet_row(names, as_typed, as_shown, where, findings)
    except Refusal:
        raise
    except Exception as error:  # whatever a broken archive or broken XML raises
        raise Refusal(f"{name}: cannot be read as .xlsx ({one_line(error)}); save it again, or as "
                      f".csv") from None


def header(cells, where: str) -> list[str]:
    names = [cell.value for cell in cells]
    while names and names[-1] is None:
        names.pop()
    wrong = next((value for value in names if not isinstance(value, str | None)), None)
    if wrong is not None:
        raise Refusal(f"{where}: this row should name the columns, and holds {wrong}")
    return columns([value or "" for value in names], where)


def sheet_row(names: list[str], as_typed, as_shown, where: str, findings: Findings
              ) -> Record | Bad:
    found = {}
    for n, (typed, shown) in enumerate(zip(as_typed, as_shown, strict=True)):
        column = names[n] if n < len(names) else f"column {n + 1}"
        value = shown.value
        if typed.value is None or column in found:
            continue
        if typed.data_type == "f":
            if value is None:
                return Bad(where, f"{column} is a formula without a saved value; open and save "
                                  f"the file in Excel")
            findings.note("formula", where, str(typed.value))
        if typed.data_type == "e" or shown.data_type == "e":
            return Bad(where, f"{column} is an error of Excel, {value}; write the text")
        if isinstance(value, int | float) and not isinstance(value, bool):
            if value != int(value) or abs(value) >= WHOLE or typed.number_format not in (
                    "General", "0", "@"):
                return Bad(where, f"{column} is a number that Excel shows in its own way; format "
                                  f"the column as text and type it again")
            findings.note("number", where, str(int(value)))
            value = str(int(value))
        elif not isinstance(value, str):
            kind = "true or false" if isinstance(value, bool) else "a date or a time"
            return Bad(where, f"{column} is not text but {kind}; format the column as text and "
                              f"type it again")
        found[column] = value
    return Record(found, where)
