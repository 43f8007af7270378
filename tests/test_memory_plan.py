"""generate.py --dry-run: the memory that answering needs, without reading weights."""

import re

import pytest
import torch

import generate
from phogpt_raw.cards import Card
from phogpt_raw.inference import loading
from phogpt_raw.inference.answers import lengths_in
from phogpt_raw.model.phogpt import PUBLISHED


@pytest.fixture
def plan(capsys, monkeypatch):
    """A function that runs generate.py --dry-run and returns (status, lines by name, stderr)."""
    monkeypatch.setattr(loading, "load_base", None)  # weights are not read

    def run(*arguments):
        status = 0
        try:
            generate.main(["--dry-run", *map(str, arguments)])
        except SystemExit as left:
            status = left.code
        said = capsys.readouterr()
        lines = (re.split(r" {2,}", line, maxsplit=1) for line in said.out.splitlines())
        return status, {line[0]: line[1] for line in lines if len(line) == 2}, said.err

    return run


@pytest.mark.parametrize("asked, answers, gib", [
    (("Phở?",), "1 at once, of at most 262 tokens, prompt included", 6.6),
    (("--chat",), "1 at once, of at most 2,048 tokens, prompt included", 7.7),
    (("--chat", "--context", 512), "1 at once, of at most 512 tokens, prompt included", 6.7),
    (("--serve", 8000), "7 at once, of at most 2,048 tokens, prompt included", 14.0)])
def test_a_plan_for_a_card_and_a_model_that_are_not_here(plan, asked, answers, gib):
    status, lines, error = plan("--model", "7b5", "--card", "t4", *asked)
    assert status == 0, error
    assert lines["answers"] == answers and lines["base"] == "5.01 GiB"
    assert lines["card"] == "Tesla T4, 14.6 GiB, compute capability 7.5"
    said = re.fullmatch(r"about (\S+) GiB, simulated; the card has 14.6", lines["in all"])
    assert float(said[1]) == pytest.approx(gib, abs=0.1)


def test_a_file_of_questions_is_planned_with_and_without_a_tokenizer(plan, tmp_path):
    file = tmp_path / "ask.txt"
    file.write_text("Phở?\nBún?\nTrà?\n", "utf-8")
    asked = ("--input", file, "--output", tmp_path / "out.jsonl")
    assert plan("--card", "t4", *asked)[1]["answers"].startswith("3 at once, of at most 2")
    lines = plan("--model", "4b", "--card", "l4", *asked)[1]
    assert lines["answers"] == "3 at once, of at most 8,192 tokens, prompt included"
    assert plan("--card", "t4", *asked, "--num-samples", 4, "--temperature", 1)[1][
        "answers"].startswith("12 at once")
    assert not (tmp_path / "out.jsonl").exists() and len(list(tmp_path.iterdir())) == 1


def test_an_evaluation_is_planned_with_and_without_a_tokenizer(plan, tmp_path):
    file = tmp_path / "rows.jsonl"
    row = '{"prompt": "a?", "response": "b"}\n'
    file.write_text(f'{row}{{"text": "một hai"}}\n{row}', "utf-8")
    assert plan("--card", "t4", "--eval", file)[1]["answers"].startswith("2 at once, of at most 2")
    shape = ("--model", "4b", "--card", "l4", "--eval", file)
    assert plan(*shape)[1]["answers"] == "2 at once, of at most 8,192 tokens, prompt included"
    file.write_text('{"text": "một hai"}\n', "utf-8")
    for asked in (("--eval", file), shape):
        status, _, error = plan(*asked)
        assert status == 2 and error == f"error: {file}: holds no questions with answers\n"


def test_a_plan_for_this_computers_cpu(plan):
    status, lines, _ = plan("--chat")
    assert status == 0 and lines["card"] == "CPU" and "the card has" not in lines["in all"]
    assert lines["dequantised"] == "0.02 GiB"  # nano's 6.3 million weights in fp32


@pytest.mark.parametrize("asked, error", [
    (("--model", "7b5", "--card", "t4", "--no-nf4", "--chat"), "without --no-nf4"),
    (("--model", "7b5", "--card", "t4", "--serve", 1, "--slots", 9), "room for --slots 7"),
    (("--model", "7b5", "--chat"), "name one, such as --card t4"),
    (("--card", "rtx", "--chat"), "--card rtx: choose from"),
    (("--context", 63, "--chat"), "--context 63: must be from 64 to 1,024")])
def test_what_does_not_fit_or_cannot_be_is_refused(plan, asked, error):
    status, _, said = plan(*asked)
    assert status == 2 and error in said


def test_without_dry_run_a_card_or_a_shape_is_refused(capsys):
    for flags, error in ((("--card", "t4"), "--card"), (("--model", "4b"), "for --dry-run")):
        with pytest.raises(SystemExit):
            generate.main([*flags, "--chat"])
        assert error in capsys.readouterr().err


@pytest.mark.parametrize("asked", [("Phở?",), ("--chat",), ("--serve", "0"),
                                   ("--input", "ask.txt", "--output", "out.jsonl"),
                                   ("--eval", "rows.jsonl")])
def test_a_gpu_that_is_too_small_is_refused_before_weights_are_read(
        asked, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ask.txt").write_text("Phở?\n", "utf-8")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a?", "response": "b"}\n', "utf-8")
    monkeypatch.setattr(loading, "this_card", lambda: Card("small", "cuda", (8, 0), 0.5))
    monkeypatch.setattr(loading, "load_base", None)
    with pytest.raises(SystemExit):
        generate.main(list(asked))
    assert "small has 0.5 GiB, and this takes about" in capsys.readouterr().err


def test_a_shape_alone_is_as_long_as_the_model_can_read(tmp_path):
    file = tmp_path / "ask.txt"
    file.write_text("Phở?\n", "utf-8")
    found = loading.Found("7b5", None, None, PUBLISHED["7b5"], None, None, True, None,
                          torch.float16, Card("CPU", "cpu"))
    assert lengths_in(found, str(file), {}) == [2047]
