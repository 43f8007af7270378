"""--inspect shows the rows of a training step. Every format and kind of file gives equal rows."""

import csv
import gzip
import io
import json

import pytest
from conftest import QUESTIONS
from odd_files import parquet, sheet

import train as script
from phogpt_raw.config import Config
from phogpt_raw.data.examples import load_examples
from phogpt_raw.model.weights import NANO, read_config, read_tokenizer
from phogpt_raw.show.inspection import parts

FORMATS = {
    "prompt": lambda q, a: {"prompt": q, "response": a},
    "completion": lambda q, a: {"prompt": q, "completion": a},
    "alpaca": lambda q, a: {"instruction": q, "input": "", "output": a},
    "instruction": lambda q, a: {"instruction": q, "response": a},
    "question": lambda q, a: {"question": q, "answer": a},
    "input": lambda q, a: {"input": q, "output": a},
    "vietnamese": lambda q, a: {"Câu hỏi": q, "Trả lời": a},
    "upper": lambda q, a: {"PROMPT": q, "Response": a},
    "worn": lambda q, a: {"prompt": f"### Câu hỏi:\n{q}\n\n### Trả lời:", "response": a},
    "text": lambda q, a: {"text": f"### Câu hỏi: {q}\n### Trả lời: {a}</s>"},
    "messages": lambda q, a: {"messages": [{"role": "user", "content": q},
                                           {"role": "assistant", "content": a}]},
    "sharegpt": lambda q, a: {"conversations": [{"from": "human", "value": q},
                                                {"from": "gpt", "value": a}]},
}


def lines(records) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def table(records, delimiter=",") -> str:
    text = io.StringIO()
    written = csv.DictWriter(text, list(records[0]), delimiter=delimiter)
    written.writeheader()
    written.writerows(records)
    return text.getvalue()


KINDS = {
    "rows.jsonl": lambda records: lines(records).encode(),
    "rows.jsonl.gz": lambda records: gzip.compress(lines(records).encode("utf-16")),
    "rows.json": lambda records: json.dumps(records, indent=1).encode(),
    "nested.json": lambda records: json.dumps({"data": records}).encode(),
    "rows.parquet": parquet,
    "rows.csv": lambda records: table(records).encode("utf-8-sig"),
    "excel.csv": lambda records: table(records, ";").encode(),
    "rows.tsv": lambda records: table(records, "\t").encode("utf-16"),
    "rows.xlsx": lambda records: sheet([list(records[0]), *(list(r.values()) for r in records)]),
}


def written(tmp_path, kind, form):
    if kind.endswith("xlsx"):
        pytest.importorskip("openpyxl")
    file = tmp_path / kind
    file.write_bytes(KINDS[kind]([FORMATS[form](q, a) for q, a in QUESTIONS]))
    return file


def inspected(capsys, *flags):
    script.main([str(flag) for flag in ("--inspect", 99, "--json", "--hold-out", 0, *flags)])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMATS)
def test_every_format_in_every_kind_of_file_is_the_same_examples(tmp_path, kind, form):
    if form in ("messages", "sharegpt") and kind.endswith(("csv", "tsv", "xlsx")):
        pytest.skip("a table has no lists")
    tokenizer = read_tokenizer(NANO, read_config(NANO))
    plain = load_examples(tokenizer, Config(data=str(written(tmp_path, "rows.jsonl", "prompt"))))
    found = load_examples(tokenizer, Config(data=str(written(tmp_path, kind, form))))
    assert [(e.ids, e.targets) for e in found.train] == [(e.ids, e.targets) for e in plain.train]
    assert len(found.train) == len(QUESTIONS) and not found.report.findings.bad


@pytest.mark.parametrize("kind, form", [
    ("rows.xlsx", "alpaca"), ("rows.parquet", "messages"), ("rows.jsonl.gz", "text")])
def test_inspect_prints_the_same_rows_for_the_same_content(tmp_path, capsys, kind, form):
    plain = inspected(capsys, "--data", written(tmp_path, "rows.jsonl", "prompt"))
    found = inspected(capsys, "--data", written(tmp_path, kind, form))
    for row in (*plain, *found):
        assert len(row.pop("where")) == max(row["documents"]) + 1
    assert found == plain


def test_the_rows_are_those_of_the_first_epochs_windows(tmp_path, capsys):
    file = written(tmp_path, "rows.jsonl", "prompt")
    rows = inspected(capsys, "--data", file, "--batch-size", 5)
    assert sorted(where for row in rows for where in row["where"])[0] == f"{file}:1"
    assert sum(len(row["where"]) for row in rows) == 15  # three windows of five examples
    for row in rows:
        for place, target in enumerate(row["targets"]):
            if target != -100:  # a target is the next token of the same document
                assert target == row["ids"][place + 1]
                assert row["documents"][place] == row["documents"][place + 1]
        assert row["ids"][-1] == 2 and row["targets"][-2] == 2
    assert len(inspected(capsys, "--data", file, "--inspect", 1)) == 1
    assert len(inspected(capsys, "--data", file, "--no-packing", "--batch-size", 12)) == 12


def test_for_people_it_shows_borders_prompts_and_what_is_learned(tmp_path, capsys):
    file = written(tmp_path, "rows.jsonl", "prompt")
    script.main(["--inspect", "1", "--hold-out", "0", "--data", str(file), "--batch-size", "2"])
    said = capsys.readouterr().out
    assert "tokens; examples: 2" in said and said.count("document ") == 2
    assert said.count("⟦ Dạ") == 2 and said.count("</s>⟧") == 2
    assert f"{file}:" in said and "PhoGPT raw" not in said


def test_a_letter_that_is_divided_between_two_tokens_is_shown_whole(tmp_path, capsys):
    file = tmp_path / "rows.txt"
    file.write_text("Thủ đô của Việt Nam là Hà Nội.", "utf-8")
    script.main(["--inspect", "1", "--hold-out", "0", "--data", str(file), "--batch-size", "1"])
    assert "\nTh⟦ủ đô của Việt Nam là Hà Nội.</s>⟧\n" in capsys.readouterr().out


@pytest.mark.parametrize("max_len", range(8, 13))
def test_the_parts_of_an_example_are_its_text(tmp_path, max_len):
    """A long text is split between tokens, also inside a letter."""
    text = "Ạ, phở, bún bò ở Huế 🍜 rất ngon ạ. " * 5
    (tmp_path / "rows.txt").write_text(text, "utf-8")
    tokenizer = read_tokenizer(NANO, read_config(NANO))
    found = load_examples(tokenizer, Config(data=str(tmp_path / "rows.txt"), max_len=max_len))
    for example in found.train:
        said = "".join(part for _, part in parts(tokenizer, example))
        assert "\ufffd" not in said and said == tokenizer.decode(example.ids).strip("\ufffd")
        assert said.removesuffix("</s>") in text


def test_inspect_reads_no_weights_and_leaves_no_folder(tmp_path, capsys, monkeypatch):
    from phogpt_raw.training import setup

    monkeypatch.setattr(setup, "read_model", lambda *_, **__: pytest.fail("read the weights"))
    file = written(tmp_path, "rows.jsonl", "prompt")
    inspected(capsys, "--data", file, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_rows_that_one_epoch_does_not_have_are_not_awaited(tmp_path, capsys):
    file = tmp_path / "few.jsonl"
    file.write_text('{"prompt": "Phở?", "response": "Dạ."}\n', "utf-8")
    script.main(["--data", str(file), "--hold-out", "0", "--steps", "1", "--inspect", "9"])
    said = capsys.readouterr().out
    assert said.endswith("(one epoch has only this row)\n") and said.count("document 0") == 1


def test_a_shape_without_a_tokenizer_is_shown_only_as_ids(capsys):
    flags = ["--model", "7b5", "--card", "t4", "--dry-run", "--inspect", "1"]
    with pytest.raises(SystemExit) as stopped:
        script.main(flags)
    assert stopped.value.code == 2
    assert "the shape 7b5 does not have; name a base with --model" in capsys.readouterr().err
    script.main([*flags, "--json"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["ids"]
