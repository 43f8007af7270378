"""Read files, folders and hub datasets as records. Each record has its file and line.

Text files are read with the standard library, because `datasets` and pandas guess the type of each
column and lose the line numbers. The network is used only for a name `owner/name` that is not a
path on this computer.
"""

import gzip
import hashlib
import logging
import re
import unicodedata
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import TextIOWrapper
from itertools import chain
from pathlib import Path

from phogpt_raw.data.encodings import CONVERT, HEAD, detect
from phogpt_raw.data.excel import sheets
from phogpt_raw.data.json_text import json_lines, json_values, lines_of, parse_line
from phogpt_raw.data.records import LONGEST, Bad, Findings, Record
from phogpt_raw.data.tables import one_line, parquet, text_table
from phogpt_raw.files import expanded
from phogpt_raw.refusal import Refusal

KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "table", ".tsv": "table",
         ".txt": "text", ".md": "text", ".markdown": "text", ".xlsx": "xlsx",
         ".parquet": "parquet"}
# The first bytes of files that are not text. The ending of a file's name is not used here.
OTHER = {b"PK\x03\x04": "a .zip, .xlsx or .docx file; unpack it, or correct the ending of its name",
         b"\x1f\x8b": "a .gz file within a .gz file; unpack it once",
         b"\xd0\xcf\x11\xe0": "an old .xls or .doc file; save it as .xlsx or as text",
         b"%PDF-": "a .pdf file; save its text",
         b"PAR1": "a .parquet file; change the ending of its name to .parquet",
         b"\x28\xb5\x2f\xfd": "a .zst file; unpack it", b"BZh": "a .bz2 file; unpack it",
         b"{\\rtf": "a .rtf file; save it as text"}
READ = ", ".join(KINDS) + ", all also as .gz, and folders of these files"
ABOUT = re.compile(r"(readme|licen[sc]e|notice|changelog)\b.*", re.IGNORECASE)
HUB = re.compile(r"(\w[\w.-]*/\w[\w.-]*?)(?::([\w.-]+))?(?:@([\w./-]+))?")


@dataclass(frozen=True)
class Source:
    """One value of --data.

    files: the files on this computer. hub: (repository, split, revision) of a hub dataset. weight:
    how often each row is trained on in an epoch.
    """

    name: str
    files: tuple[Path, ...] = ()
    hub: tuple[str, str, str | None] | None = None
    weight: float = 1.0

    def not_read(self) -> list[Path]:
        """Return the files of a folder that are not read."""
        folder = expanded(self.name)
        return [file for file in sorted(folder.rglob("*"))
                if file.is_file() and file not in self.files] if folder.is_dir() else []

    def identity(self) -> str:
        """Return the SHA-256 of the files' bytes, or of a hub dataset's name."""
        if self.hub:
            return hashlib.sha256(repr(self.hub).encode()).hexdigest()
        digest = hashlib.sha256()
        for file in self.files:
            with refused(file), file.open("rb") as content:
                while piece := content.read(1 << 20):
                    digest.update(piece)
        return digest.hexdigest()


def find_source(spec: str) -> Source:
    """Return the source that a value of --data names.

    The value is FILE, FOLDER, FILE=WEIGHT, or owner/name:split@revision of the hub.
    """
    if not spec.strip():
        raise Refusal("--data: is empty; name a file, a folder or a data set of the hub")
    weight = 1.0
    path = expanded(spec)
    file, _equals, text = spec.rpartition("=")
    if file and not path.exists() and (expanded(file).exists() or HUB.fullmatch(file)
                                       or re.fullmatch(r"[\d.]+", text)):
        spec, weight = file, number(text, spec)
        path = expanded(spec)
    if path.is_dir():
        return Source(spec, in_folder(path), None, weight)
    if path.exists():
        kind_of(path)
        return Source(spec, (path,), None, weight)
    named = HUB.fullmatch(spec)
    if named and Path(named[1]).suffix.lower() not in (*KINDS, ".gz", ".xls", ".pdf", ".docx"):
        return Source(spec, (), (named[1], named[2] or "train", named[3]), weight)
    raise Refusal(f"{spec}: no such data file")


def number(text: str, spec: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = 0
    if not 0 < weight <= 1000:
        raise Refusal(f"{spec}: the weight after = must be a number above 0 and at most 1000")
    return weight


def find_unweighted(spec: str, flag: str) -> Source:
    """Return the source that a flag without weights, such as --val, names."""
    source = find_source(spec)
    if source.weight != 1:
        raise Refusal(f"{flag} {spec}: only --data can have a weight; remove the weight")
    return source


def in_folder(folder: Path) -> tuple[Path, ...]:
    """Return the data files of a folder and of its subfolders, sorted by path."""
    if stored := next(folder.rglob("*.arrow"), None):
        raise Refusal(f"{stored}: belongs to a data set that save_to_disk wrote; write it with "
                      f"to_parquet or to_json instead")
    found = [file for file in sorted(folder.rglob("*"))
             if file.is_file() and suffix(file) in KINDS and not ABOUT.fullmatch(file.name)
             and not file.name.startswith("~$")  # Excel's lock file of an open workbook
             and not any(part.startswith(".") for part in file.relative_to(folder).parts)]
    if not found:
        raise Refusal(f"{folder}: holds no data file; {READ} are read")
    return tuple(found)


def suffix(path: Path) -> str:
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def kind_of(path: Path) -> str:
    if suffix(path) not in KINDS:
        instead = "; save it as .xlsx" if suffix(path) == ".xls" else ""
        raise Refusal(f"{path}: unknown kind of file; {READ} are read{instead}")
    if not path.is_file():
        raise Refusal(f"{path}: is not a file")
    return KINDS[suffix(path)]


def read_file(path: Path, findings: Findings) -> Iterator[Record | Bad]:
    """Yield every record of a file. Raises Refusal if the file cannot be read."""
    kind, name = kind_of(path), str(path)
    with refused(path):
        if kind in ("xlsx", "parquet"):
            if path.suffix.lower() == ".gz":
                raise Refusal(f"{name}: .xlsx and .parquet are compressed already; unpack the .gz")
            if path.stat().st_size:
                yield from (sheets(path, name, findings) if kind == "xlsx" else
                            parquet(path, name))
            return
        with opened(path, findings) as stream:
            if kind == "jsonl":
                yield from either_json(stream, name, findings)
            elif kind == "json":
                yield from json_values(stream, name, findings)
            elif kind == "table":
                yield from text_table(stream, name, findings)
            else:
                yield from documents(stream, name)


@contextmanager
def refused(path: Path) -> Iterator[None]:
    """Turn an error while reading a file into a Refusal."""
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise Refusal(f"{path}: is not a whole .gz file; compress it again") from None
    except OSError as error:
        raise Refusal(f"{path}: cannot be read ({error.strerror or error})") from None


@contextmanager
def opened(path: Path, findings: Findings) -> Iterator[TextIOWrapper]:
    """Open a file as text. A gzip file is unpacked, and every line end becomes \\n.

    An invalid byte becomes a lone surrogate. In UTF-16 and UTF-32, invalid bytes become U+FFFD.
    """
    with path.open("rb") as content:
        if content.read(2) == b"\x1f\x8b":
            content.seek(0)
            content = gzip.GzipFile(fileobj=content)
        content.seek(0)
        head = content.read(HEAD)
        content.seek(0)
        other = next((kind for magic, kind in OTHER.items() if head.startswith(magic)), None)
        if other:
            raise Refusal(f"{path}: is not text, but {other}")
        encoding = detect(head)
        if encoding in ("TCVN3", "VNI"):
            raise Refusal(f"{path}: is in {encoding}; {CONVERT}")
        if encoding == "cp1258":
            findings.note("cp1258", str(path))
        yield TextIOWrapper(content, encoding=encoding or "utf-8", newline=None,
                            errors="replace" if "16" in (encoding or "") or "32" in (encoding or "")
                            else "surrogateescape")


def either_json(stream: TextIOWrapper, name: str, findings: Findings) -> Iterator[Record | Bad]:
    """Yield the records of a .jsonl file.

    Such a file usually has JSON lines. A list, or objects over several lines, can be read too.
    """
    while (start := stream.readline(LONGEST)).isspace():
        pass
    if start.lstrip().startswith("[") or start.strip() == "{":
        stream.seek(0)
        yield from json_values(stream, name, findings)
    else:
        stream.seek(0)
        yield from json_lines(stream, name)


def documents(stream: TextIOWrapper, name: str) -> Iterator[Record | Bad]:
    """Yield the rows of a text file. Usually the whole file is one row.

    If the file has questions in PhoGPT's template, each question begins a row. Such a question is
    a line that begins with "### Câu hỏi:" and is the first line or follows an empty line.
    """
    first, lines, size, empty = 1, [], 0, True
    for number, line in enumerate(chain(lines_of(stream), [""]), 1):
        begins = line is not None and empty and \
            unicodedata.normalize("NFC", line[:40]).startswith("### Câu hỏi:")
        if number == 1 and line and isinstance(parse_line(line, name), Record) and "{" in line:
            raise Refusal(f"{name}: holds lines of JSON; give the file a name that ends with "
                          f".jsonl")
        if (begins or line == "") and any(not part.isspace() for part in lines):
            yield Record({"text": "".join(lines)}, f"{name}:{first}")
        if begins or line == "":
            first, lines, size = number, [], 0
        before, size = size, size + (LONGEST + 1 if line is None else len(line))
        if before <= LONGEST < size:
            yield Bad(f"{name}:{first}", f"a text of more than {LONGEST:,} characters; cut it into "
                                         f"several files")
            lines = []
        elif size <= LONGEST:
            lines.append(line)
        empty = line is not None and line.isspace()


def form_of_rows(source: Source, *fields: str) -> str:
    """Describe a row with these fields in the kind of file that the source has, for a message about
    a source without rows."""
    kind = kind_of(source.files[0]) if source.files else "hub"
    if kind in ("jsonl", "json"):
        texts = ", ".join(f'"{field}": "…"' for field in fields)
        return f"a row is {'a line' if kind == 'jsonl' else 'an object'} such as {{{texts}}}"
    if kind == "text":
        return "write a text into it"
    names = " and ".join(fields)
    if kind in ("table", "xlsx"):
        return f"the first row names the columns, such as {names}; the rows are below it"
    return f"a row has fields such as {names}"


def read_hub(source: Source) -> Iterator[Record]:
    """Yield the rows of a hub dataset while the dataset is downloaded."""
    import datasets

    repository, split, revision = source.hub
    with quiet("datasets", "huggingface_hub"):
        try:
            rows = datasets.load_dataset(repository, split=split, revision=revision,
                                         streaming=True)
            for number, row in enumerate(rows, 1):
                yield Record(row, f"{repository}:{split}:{number}")
        except Exception as error:  # an error of the network, the hub, or the files
            raise Refusal(f"{source.name}: is not a file on this computer, and cannot be read from "
                          f"the hub ({one_line(error)})") from None


@contextmanager
def quiet(*libraries: str) -> Iterator[None]:
    """Print no log messages of these libraries, such as one line for each failed attempt."""
    loggers = [logging.getLogger(name) for name in libraries]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
