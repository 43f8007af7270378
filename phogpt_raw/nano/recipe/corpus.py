"""Clean the text of encyclopedia articles, and choose the held-out articles by their titles.

A "word" here is the text between two spaces. In Vietnamese, this is one syllable.
"""

import gzip
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from phogpt_raw.refusal import Refusal


def read_json_lines(path: str | Path, *keys: str) -> Iterator[tuple[str, ...]]:
    """Yield the texts under `keys`, in NFC, of each line of a .jsonl or .jsonl.gz file."""
    path = Path(path)
    if not path.is_file():
        raise Refusal(f"{path}: no such file; give JSON lines (.jsonl or .jsonl.gz)")
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as lines:
        for n, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                yield tuple(unicodedata.normalize("NFC", row[key]) for key in keys)
            except (ValueError, KeyError, TypeError):
                raise Refusal(
                    f"{path}:{n}: not a JSON object with the texts {' and '.join(keys)}"
                ) from None


def is_held_out(title: str, share: float = 0.015) -> bool:
    """Return whether an article is held out.

    The hash of its title decides this. The order and the number of articles do not matter.
    """
    digest = hashlib.sha256(unicodedata.normalize("NFC", title).casefold().encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


CLEANINGS = [  # (pattern, replacement), applied to each line in this order
    (r"[\u00ad\u200b-\u200f\u2060\ufeff\ue000-\uf8ff\ufffd]", ""),
    (r"[^\S\n]+", " "),
    (r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]", r"\1"),  # [[target|words]]
    (r"\{\{[^{}]*\}\}|</?\w+[^<>]{0,80}>|\[\d+\]|'''?", ""),
    (r"\(\s*(?:[-–?.…,;:/\s]|\b(?:tiếng|chữ) [\w ]{1,12}:)*\)", ""),  # remains of a template
    (r"\(\s*[,;:]\s*", "("),
    (r"\s*[,;:]\s*\)", ")"),
    (r"\s+([.,;:!?)”])", r"\1"),
    (r"\(\s+", "("),
    (r"([a-zà-ỹ]{2}[.!?])([A-ZÀ-ỸĐ][a-zà-ỹ])", r"\1 \2"),  # a reference mark was removed here
    (r" {2,}", " "),
]
CLEANINGS = [(re.compile(pattern), by) for pattern, by in CLEANINGS]
HEADING = re.compile(r"^\s*(={2,})\s*(.*?)\s*=+\s*$")
APPENDIX = re.compile(
    r"(xem thêm|xem khác|tham khảo|chú thích|chú dẫn|ghi chú|liên kết|thư mục|nguồn|đọc thêm"
    r"|tài liệu|dẫn chứng|(thư viện )?(hình )?ảnh|(một (vài|số) )?hình ảnh|chú giải)\b",
    re.I,
)
VIETNAMESE = re.compile(r"[ăâđêôơưà-ãè-êìíò-õùúýĩũạ-ỹ]", re.I)


def clean(text: str) -> str:
    """Return the running text of an article in NFC: one paragraph on each line, with headings.

    Reference sections, remains of templates and formulas, lists of names, and empty sections are
    removed. `is_prose` decides which lines are kept.
    """
    lines, heading, appendix = [], None, 0
    for line in unicodedata.normalize("NFC", text).replace("\r", "\n").split("\n"):
        if marked := HEADING.match(line):
            depth, heading = len(marked[1]), clean_line(marked[2])
            if not appendix or depth <= appendix:
                appendix = depth if APPENDIX.match(heading) else 0
        elif not appendix and is_prose(line := clean_line(line)):
            lines += [heading, line] if heading else [line]
            heading = None
    return "\n".join(lines)


def clean_line(line: str) -> str:
    for pattern, by in CLEANINGS:
        line = pattern.sub(by, line)
    return line.strip(" *#:;•·–|-")


def is_prose(line: str) -> bool:
    """Return whether a line has six words or more, is mostly letters, and is in Vietnamese."""
    letters = sum(map(str.isalpha, line))
    return (
        len(line.split()) >= 6
        and letters >= 0.65 * len(line)
        and len(VIETNAMESE.findall(line)) >= 0.06 * letters
        and not re.search(r"[{}\\|<>=]|https?:", line)
    )
