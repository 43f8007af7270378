"""Files of every format become the same rows; a bad row is named with its file and line."""

import csv
import json
import re
import unicodedata

import pytest

from phogpt_raw.data.rows import read_rows
from phogpt_raw.refusal import Refusal

GOOD = '{"prompt": "Phở là gì?", "response": "Một món nước."}'


def written(tmp_path, content: str | bytes, name: str = "rows.jsonl"):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def test_both_formats_become_questions_and_answers_that_know_their_line(tmp_path):
    file = written(tmp_path, GOOD + '\n{"instruction": "Dịch", "input": "cat", "output": "mèo"}\n'
                   '{"instruction": "Chào", "input": "", "output": "Dạ"}\n'
                   '{"instruction": "Chào", "input": null, "output": "Dạ"}\n'
                   '{"instruction": "Chào", "output": "Dạ", "topic": 3}\n')
    rows = read_rows(file)
    assert [(row.prompt, row.response) for row in rows] == [
        ("Phở là gì?", "Một món nước."), ("Dịch\ncat", "mèo"), *[("Chào", "Dạ")] * 3]
    assert [row.where for row in rows] == [f"{file}:{n}" for n in (1, 2, 3, 4, 5)]


def test_decomposed_vietnamese_becomes_composed(tmp_path):
    decomposed = unicodedata.normalize("NFD", GOOD)
    assert decomposed != GOOD
    [row] = read_rows(written(tmp_path, decomposed))
    assert (row.prompt, row.response) == ("Phở là gì?", "Một món nước.")


def test_byte_order_mark_windows_line_ends_and_blank_lines_are_no_obstacle(tmp_path):
    file = written(tmp_path, b"\xef\xbb\xbf" + f"{GOOD}\r\n\r\n   \r\n{GOOD}".encode())
    rows = read_rows(file)
    assert [row.where for row in rows] == [f"{file}:1", f"{file}:4"]
    assert rows[0].prompt == rows[1].prompt == "Phở là gì?"


def test_white_space_around_a_text_is_dropped_and_inside_it_stays(tmp_path):
    [row] = read_rows(written(tmp_path, r'{"prompt": " a\n\n b ", "response": "\tc  d\n"}'))
    assert (row.prompt, row.response) == ("a\n\n b", "c  d")


@pytest.mark.parametrize("line, said", [
    ('{"prompt": "a", "response": "b"', "not JSON"),
    ("{'prompt': 'a'}", "not JSON"),
    ('{"prompt": "a"}', "fields prompt; a row needs prompt and response"),
    ('{"instruction": "a", "input": "b"}', "or instruction and output"),
    ("{}", "fields none"),
    ('{"prompt": "a", "response": ""}', "response is empty"),
    ('{"prompt": "a", "response": " \\n"}', "response is empty"),
    ('{"prompt": "", "response": "b"}', "prompt is empty"),
    ('{"prompt": null, "response": "b"}', "fields response; a row needs prompt"),
    ('{"prompt": "a", "response": 5}', "response is not text"),
    ('{"prompt": ["a"], "response": "b"}', "prompt is not text"),
    ('{"instruction": "a", "input": {"b": 1}, "output": "c"}', "input is not text"),
    ('["a", "b"]', "an object with fields, not list"),
    ('"a"', "not str"),
    ('{"prompt": "\\ud83d", "response": "b"}', "prompt holds half a character"),
])
def test_a_line_that_cannot_be_used_is_named_with_its_file_and_number(tmp_path, line, said):
    file = written(tmp_path, f"{GOOD}\n\n{line}\n{GOOD}\n")
    with pytest.raises(Refusal, match=rf"^{re.escape(str(file))}:3: .*{re.escape(said)}"):
        read_rows(file)


def test_a_line_that_is_not_utf8_is_named(tmp_path):
    file = written(tmp_path, GOOD.encode() + b"\n" + GOOD.encode("cp1258", "replace") + b"\n")
    with pytest.raises(Refusal, match=rf"{re.escape(str(file))}:2: not UTF-8"):
        read_rows(file)
    with pytest.raises(Refusal, match=r":1: not UTF-8"):
        read_rows(written(tmp_path, GOOD.encode("utf-16")))


def test_csv_json_and_parquet_hold_the_same_rows(tmp_path):
    pairs = [("Phở là gì?", "Một món nước."), ("Hai dòng,\nmột câu", 'Có "ngoặc"')]
    records = [{"prompt": q, "response": a} for q, a in pairs]
    with (tmp_path / "rows.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, ["prompt", "response"])
        table.writeheader()
        table.writerows(records)
    written(tmp_path, json.dumps(records, ensure_ascii=False), "rows.json")
    pyarrow = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    pyarrow.write_table(pa.Table.from_pylist(records), tmp_path / "rows.parquet")
    for name in ("rows.csv", "rows.json", "rows.parquet"):
        rows = read_rows(tmp_path / name)
        assert [(row.prompt, row.response) for row in rows] == pairs
        assert rows[1].where == f"{tmp_path / name}: record 2"


def test_a_csv_cell_is_text_even_where_it_looks_like_a_number_or_nothing(tmp_path):
    file = written(tmp_path, "instruction,input,output\nHai cộng ba?,,5\nGiá trị rỗng?,x,null\n"
                   "Số điệp viên?,,007\n", "rows.csv")
    rows = read_rows(file)
    assert [row.response for row in rows] == ["5", "null", "007"]
    assert [row.prompt for row in rows] == ["Hai cộng ba?", "Giá trị rỗng?\nx", "Số điệp viên?"]


@pytest.mark.parametrize("name, content, said", [
    ("rows.csv", "prompt,response\na,b\nc,\n", "rows.csv: record 2: response is empty"),
    ("rows.csv", "question,answer\na,b\n", "rows.csv: record 1: fields question, answer"),
    ("rows.json", '[{"prompt": "a"', "rows.json: cannot be read"),
    ("rows.parquet", "not parquet", "rows.parquet: cannot be read"),
    ("rows.txt", "a", "unknown kind of file; .jsonl, .json, .csv, .parquet are read"),
    ("rows", "a", "unknown kind of file"),
    ("rows.jsonl", "", "holds no rows"),
    ("rows.jsonl", "\n \r\n", "holds no rows"),
    ("rows.json", "", "holds no rows"),
    ("rows.csv", "", "holds no rows"),
    ("rows.csv", "prompt,response\n", "holds no rows"),
])
def test_a_file_that_cannot_be_used_is_refused(tmp_path, name, content, said):
    with pytest.raises(Refusal, match=re.escape(said)):
        read_rows(written(tmp_path, content, name))


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "rows.jsonl", tmp_path):
        with pytest.raises(Refusal, match=f"{path}: no such data file"):
            read_rows(path)


def test_a_json_table_may_mix_both_forms_and_hold_blank_inputs(tmp_path):
    records = [{"prompt": "Chào", "response": "Dạ"},
               {"instruction": "Dịch", "input": "  ", "output": "Vâng"}]
    file = written(tmp_path, json.dumps(records, ensure_ascii=False), "rows.json")
    assert [(row.prompt, row.response) for row in read_rows(file)] == [
        ("Chào", "Dạ"), ("Dịch", "Vâng")]
