"""Files become rows, each of which knows its file and line.

A row is a question and its answer: `{prompt, response}` as in VinAI's own samples, or
`{instruction, input, output}` as in Alpaca. Text is normalised to NFC on the way in: Vietnamese
typed on a Mac often arrives as NFD, looks the same, and becomes other tokens.
"""

import json
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from phogpt_raw.refusal import Refusal

FIELDS = ("prompt", "response", "instruction", "input", "output")


@dataclass(frozen=True)
class Row:
    """`prompt` is what is asked, `response` what should be answered, `where` is file:line."""

    prompt: str
    response: str
    where: str


def read_rows(path: str | Path) -> list[Row]:
    """All rows of a .jsonl file, or of a .json, .csv or .parquet file through `datasets`.

    Raises Refusal naming the file and line of the first row that cannot be used.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise Refusal(f"{path}: no such data file")
    records = jsonl(path) if path.suffix == ".jsonl" else through_datasets(path)
    rows = [to_row(record, where) for record, where in records]
    if not rows:
        raise Refusal(f"{path}: holds no rows; a row is a line such as "
                      f'{{"prompt": "…", "response": "…"}}')
    return rows


def jsonl(path: Path):
    """(record, file:line) of each line; read by hand, since `datasets` loses the line number."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{path}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if text:
                    yield json.loads(text), where
            except UnicodeDecodeError:
                raise Refusal(f"{where}: not UTF-8; save the file as UTF-8") from None
            except json.JSONDecodeError as error:
                raise Refusal(f"{where}: not JSON ({error.msg} at column {error.colno}); one "
                              f"object a line") from None


def through_datasets(path: Path):
    kinds = {".json": "json", ".csv": "csv", ".parquet": "parquet"}
    if path.suffix not in kinds:
        raise Refusal(f"{path}: unknown kind of file; .jsonl, {', '.join(kinds)} are read")
    if not path.stat().st_size:
        return
    from datasets import load_dataset

    # A cell of a .csv is text, though it says 42 or null.
    as_text = dict(keep_default_na=False, converters=dict.fromkeys(FIELDS, str))
    try:
        table = load_dataset(kinds[path.suffix], data_files=str(path), split="train",
                             streaming=True, **(as_text if path.suffix == ".csv" else {}))
        for number, record in enumerate(table, 1):
            yield record, f"{path}: record {number}"
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Refusal(f"{path}: cannot be read ({reason})") from None


def to_row(record, where: str) -> Row:
    if not isinstance(record, dict):
        raise Refusal(f"{where}: a row is an object with fields, not {type(record).__name__}")
    # A table gives null for a field that only other rows have; Alpaca gives "" for no input.
    record = {name: value for name, value in record.items() if value is not None}
    if "prompt" in record and "response" in record:
        prompt, response = text(record, "prompt", where), text(record, "response", where)
    elif "instruction" in record and "output" in record:
        prompt, more = text(record, "instruction", where), record.get("input", "")
        if more != "" and not str(more).isspace():
            prompt += "\n" + text(record, "input", where)
        response = text(record, "output", where)
    else:
        raise Refusal(f"{where}: fields {', '.join(record) or 'none'}; a row needs prompt and "
                      f"response, or instruction and output")
    return Row(prompt, response, where)


def text(record: dict, field: str, where: str) -> str:
    value = record[field]
    if not isinstance(value, str):
        raise Refusal(f"{where}: {field} is not text")
    if not value.strip():
        raise Refusal(f"{where}: {field} is empty")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise Refusal(f"{where}: {field} holds half a character (a lone surrogate, \\ud83d say)")
    return unicodedata.normalize("NFC", value).strip()
