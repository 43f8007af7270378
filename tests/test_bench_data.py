"""The benchmark that reads rows of data.

Rows from the cache equal the rows of the file. A very long row is refused and takes little memory.
"""

import json

from anonymous_memory import growth

from bench.data import LONG, main, measured, write_rows


def test_rows_from_the_cache_are_those_that_were_made_anew(tmp_path):
    write_rows(tmp_path / "rows.jsonl", 200)
    anew, again = (measured(str(tmp_path / "rows.jsonl"), str(tmp_path / "cache"), "nano")
                   for _ in range(2))
    assert anew["rows"] == again["rows"] == 200 and anew["tokens"] == again["tokens"] > 10_000
    assert anew["steps"] == again["steps"] > 20
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_row_of_40_million_letters_is_refused_before_it_takes_memory(tmp_path):
    file = tmp_path / "long.jsonl"
    row = {"prompt": "a", "response": "ạ" * LONG}
    file.write_text(json.dumps(row, ensure_ascii=False), "utf-8")
    found, grown = growth(lambda: measured(str(file), str(tmp_path / "cache"), "nano"))
    assert "long.jsonl:1: a row has more than 10,000,000 characters" in found["refused"]
    # the file has 120 million bytes, and its decoded text takes 80 million bytes of memory
    assert grown < 250e6


def test_the_command_measures_each_way_in_a_process_of_its_own(capsys, monkeypatch):
    asked = []
    monkeypatch.setattr("bench.data.in_a_process",
                        lambda file, *_: asked.append(file.name) or {"s": 1.0, "rows": 3})
    main(["--rows", "3"])
    assert asked == ["rows.jsonl", "rows.jsonl", "long.jsonl"]
    assert "from the cache: 1.00 s, rows 3" in capsys.readouterr().out
