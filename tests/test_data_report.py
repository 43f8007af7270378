"""The report on the rows. train.py prints it before the first step."""

import json
import os
import re

import pytest
from conftest import write_rows
from odd_files import GOOD, TCVN3

from phogpt_raw.data.records import Note
from phogpt_raw.data.report import Lengths
from phogpt_raw.show import data_report
from phogpt_raw.show.data_report import histogram, note_text


def shown(train, *flags) -> str:
    status, said, error = train("--dry-run", "--hold-out", 0, *flags)
    assert status == 0, error
    return said


def test_format_first_row_lengths_and_fit_are_said(train, tmp_path):
    rows = [(f"Câu {n}?", "Dạ " * (n + 1)) for n in range(40)]
    said = shown(train, "--data", write_rows(tmp_path / "rows.jsonl", rows), "--max-len", 60)
    lines = dict(line.split(None, 1) for line in said.split("\nrows\n")[1].split("\n\n")[0]
                 .splitlines())
    assert lines["format"] == "prompt, response: 40"
    assert lines["first"] == "rows.jsonl:1: Câu 0? → Dạ</s>"
    assert "carry loss; median" in lines["tokens"] and "95% have at most" in lines["tokens"]
    assert "█" in lines["lengths"]
    assert lines["fit"].startswith("--max-len 60 is enough for ") and "100" not in lines["fit"]


@pytest.mark.parametrize("text", ["Dạ, thủ đô là Hà Nội.", "Thủ đô là Hà Nội.", "Ạ"])
def test_of_a_text_the_first_token_is_shown_too(train, tmp_path, text):
    (tmp_path / "rows.txt").write_text(text, "utf-8")
    assert f"rows.txt:1: {text}</s>\n" in shown(train, "--data", tmp_path / "rows.txt")


def test_what_was_found_and_left_out_is_said_with_its_place(train, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(GOOD * 2 + json.dumps({"prompt": "Pho?", "response": "Mon", "id": 3}) + "\n"
                    + '{"prompt": "a", "response": 4}\n' + '{"prompt": "b"}\n', "utf-8")
    said = shown(train, "--data", file)
    assert "not used: id" in said
    assert f"left out  2 of 41 rows; {file}:40: response is not text" in said
    assert f"{file}:41: fields prompt" in said
    assert "rows that repeat an earlier row: 19" in said
    assert f"rows without any Vietnamese letters: 1 (the first: {file}:39)" in said


def test_long_rows_are_counted_by_what_is_done_to_them(train, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"text": "Một câu dài. " * 40}) + "\n"
                    + json.dumps({"prompt": "Hai?", "response": "Dạ " * 90}) + "\n" + GOOD, "utf-8")
    said = shown(train, "--data", file, "--max-len", 50)
    assert "; split into several: 1" in said and "longer than --max-len 50" in said
    said = shown(train, "--data", file, "--max-len", 50, "--too-long", "drop")
    assert "; dropped: 2" in said and "split" not in said


def test_strict_refuses_what_would_be_left_out(train, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(GOOD + '{"prompt": "b"}\n', "utf-8")
    assert train("--dry-run", "--data", file)[0] == 0
    status, _, error = train("--dry-run", "--data", file, "--strict")
    assert status == 2 and f"{file}:20: fields prompt" in error and error.count("\n") == 1
    assert "1 of 20 rows cannot be used; with --strict, bad rows are not left out" in error


def test_a_file_of_another_encoding_is_one_line_and_nothing_else(train, tmp_path):
    (tmp_path / "rows.csv").write_bytes(TCVN3)
    status, said, error = train("--data", tmp_path / "rows.csv")
    assert (status, said) == (2, "") and "is in TCVN3; convert it" in error


def test_held_out_files_have_lines_of_their_own(rows, tmp_path, capsys):
    import train as script

    (tmp_path / "val.jsonl").write_text(GOOD + '{"prompt": "b"}\n', "utf-8")
    script.main(["--dry-run", "--data", str(rows), "--val", str(tmp_path / "val.jsonl")])
    said = capsys.readouterr().out.split("\nheld-out rows\n")[1]
    assert said.startswith(f"left out  1 of 20 rows; {tmp_path}/val.jsonl:20: fields prompt")


@pytest.mark.parametrize("kind", [
    "turns", "text", "template", "system", "open question", "template inside", "no diacritics",
    "mojibake", "lost characters", "control", "cp1258", "like rows", "formula", "number", "sheet",
    "hidden sheet", "file", "beside the list"])
def test_every_kind_of_note_has_a_sentence(kind):
    text = note_text(kind, Note(3, "f:7", "tên"))
    assert "3" in text or "f:7" in text or "tên" in text
    assert note_text("format a, b", Note(1, "f:1")) is None


def test_the_histogram_begins_with_the_shortest_row():
    lengths = Lengths(100, 50, 35, 44, 23, 48, (10, 20, 30, 40, 50), (0, 0, 4, 8, 1))
    assert histogram(lengths) == "▅█▂ from 23 to 48 tokens; a bar for each 10 tokens"
    assert data_report.BARS[0] == "▁"


def test_of_few_rows_no_histogram_is_drawn(train, tmp_path):
    rows = [(f"Câu {n}?", "Dạ " * (n + 1)) for n in range(10)]
    assert "█" in shown(train, "--data", write_rows(tmp_path / "ten.jsonl", rows))
    said = shown(train, "--data", write_rows(tmp_path / "nine.jsonl", rows[:9]))
    assert "lengths" not in said and "longest" in said


def test_rows_and_the_examples_that_they_give_are_counted_apart(train, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"text": "Một câu dài. " * 40}) + "\n" + GOOD, "utf-8")
    said = shown(train, "--data", file, "--max-len", 50)
    assert re.search(r"data +20 training rows of rows.jsonl as 2\d examples, median", said), said
    said = shown(train, "--data", f"{write_rows(tmp_path / 'one.jsonl', [('Một?', 'Dạ.')])}=3")
    assert "1 training row of one.jsonl as 3 examples, median" in said


def test_a_path_that_is_no_text_and_a_name_that_a_terminal_would_obey_are_printed(
        train, tmp_path):
    row = json.dumps({"prompt": "Phở?", "response": "Món nước.", "\x1b[2Jcũ": 1})
    file = tmp_path / os.fsdecode(b"rows\xff.jsonl")
    try:
        file.write_text(row + "\n")
    except OSError:
        pytest.skip("the file system takes no such name")
    printed = shown(train, "--data", file)
    assert "rows\\udcff.jsonl:1: Phở?" in printed and "not used: \\x1b[2Jcũ" in printed
    _status, line, _error = train("--data", file, "--hold-out", 0, "--inspect", 1, "--json")
    assert json.loads(line)["where"][0] == f"{tmp_path}/rows\\udcff.jsonl:1"


def test_ten_columns_that_are_not_used_are_named(train, tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("prompt,response," + ",".join(f"c{n}" for n in range(30)) + "\n"
                    + "a,b" + ",x" * 30 + "\n")
    printed = " ".join(shown(train, "--data", file).split())
    assert "not used: c0, c1, c2, c3, c4, c5, c6, c7, c8, c9 and 20 others" in printed
