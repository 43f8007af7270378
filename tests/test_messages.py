"""All texts of a run pass through one function. So a dictionary can translate them."""

import ast
import doctest
import re
from pathlib import Path

import pytest

from phogpt_raw import messages
from phogpt_raw.messages import _

ROOT = Path(__file__).parents[1]


def test_doctest():
    assert doctest.testmod(messages).failed == 0


def test_a_catalogue_gives_the_text_and_keeps_the_values(monkeypatch):
    monkeypatch.setitem(messages.CATALOGUE, "{n:,} training rows of {file}", "{file}: {n:,} dòng")
    assert _("{n:,} training rows of {file}", n=1200, file="a.jsonl") == "a.jsonl: 1,200 dòng"
    assert _("no entry for {it}", it="this") == "no entry for this"


def texts() -> set[str]:
    """Every English text that the source files pass to the function `_`."""
    found = set()
    for file in [ROOT / "train.py", *(ROOT / "phogpt_raw").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) \
                    and node.func.id == "_":
                assert isinstance(node.args[0], ast.Constant), f"{file}:{node.lineno}"
                found.add(node.args[0].value)
    return found


class Marked(dict):
    """A dictionary that translates each text to itself between ‹ and ›."""

    def get(self, text, default):
        return f"‹{text}›"


@pytest.mark.parametrize("flags", [[], ["--dry-run"]], ids=["run", "dry-run"])
def test_nothing_that_a_run_shows_bypasses_it(train, tmp_path, monkeypatch, flags):
    """Only names, values, rows of the data and answers remain outside the marks."""
    assert len(texts()) > 40
    monkeypatch.setattr(messages, "CATALOGUE", Marked())
    status, said, _error = train("--out", tmp_path / "run", "--max-len", 24, "--eval-answers", 0,
                                 *flags)
    said = said.split("### Câu hỏi")[0]  # leaves out a row of the data
    assert status == 0 and said.count("‹") == said.count("›") > 10
    while re.search(r"‹[^‹›]*›", said):  # innermost first: texts contain other texts
        said = re.sub(r"‹[^‹›]*›", "", said)
    said = said.replace(str(tmp_path), "")
    left = set(re.findall(r"(?<![\w/.-])[a-z]{3,}(?![\w/.-])", said))
    assert left <= {"raw", "python"}, left  # PhoGPT raw, and the command that asks the adapter
