"""generate.py --input: the questions, the order of the answers, and resuming an interrupted file.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import QUESTIONS

import generate
from phogpt_raw.decode.history import Turn
from phogpt_raw.files import awaited_file
from phogpt_raw.inference import answers as module
from phogpt_raw.inference import memory_plan
from phogpt_raw.inference.answers import read_questions
from phogpt_raw.refusal import Refusal

ROOT = Path(__file__).parents[1]


@pytest.fixture
def asked(tmp_path):
    """Nine questions of unequal length in a file."""
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps({"question": q * (1 + n % 3)}, ensure_ascii=False) + "\n"
                            for n, (q, _) in enumerate(QUESTIONS[:9])), "utf-8")
    return file


@pytest.fixture
def run(tiny, capsys):
    """A function that runs generate.py on tiny and returns (exit status, stderr)."""

    def call(*flags):
        status = 0
        try:
            generate.main(["--model", str(tiny), "--max-new-tokens", "8", *map(str, flags)])
        except SystemExit as left:
            status = left.code
        return status, capsys.readouterr().err

    return call


def lines(file):
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def test_an_answer_a_line_in_the_order_of_the_questions(run, asked, tmp_path, tiny, capsys):
    assert run("--input", asked, "--output", tmp_path / "a.jsonl")[0] == 0
    found = lines(tmp_path / "a.jsonl")
    assert [row["question"] for row in found] == [row["question"] for row in lines(asked)]
    assert [row["where"] for row in found] == [f"{asked}:{n}" for n in range(1, 10)]
    for row in found[::4]:  # an answer without --input equals the answer with --input
        generate.main(["--model", str(tiny), "--max-new-tokens", "8", row["question"]])
        assert capsys.readouterr().out.strip() == row["answer"]
    assert {file.name for file in tmp_path.iterdir()} == {"questions.jsonl", "a.jsonl"}


def test_killed_and_gone_on_it_is_the_straight_run(run, asked, tmp_path, tiny):
    flags = ["--num-samples", 3, "--temperature", 0.8, "--seed", 5]
    assert run("--input", asked, "--output", tmp_path / "straight.jsonl", *flags)[0] == 0
    output = tmp_path / "a.jsonl"
    script = ("import sys, time, generate\nfrom phogpt_raw.inference import answers\n"
              "add = answers.Progress.add\n"
              "def slow(self, *line):\n    add(self, *line); time.sleep(0.2)\n"
              "answers.Progress.add = slow\ngenerate.main(sys.argv[1:])\n")
    command = [sys.executable, "-c", script, "--model", str(tiny), "--max-new-tokens", "8",
               "--input", str(asked), "--output", str(output), *map(str, flags)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE) as process:
        half = output.with_name("a.jsonl.progress")
        while not (half.is_file() and half.read_text("utf-8").count("\n") > 5):
            time.sleep(0.05)
            assert process.poll() is None, process.stderr.read()
        os.kill(process.pid, signal.SIGKILL)
    assert not output.exists()
    with half.open("a") as cut:
        cut.write('{"n": 26, "question": "ha')  # a cut line, as after a power failure
    status, said = run("--input", asked, "--output", output, *flags)
    assert status == 0 and "already finished" in said
    assert output.read_bytes() == (tmp_path / "straight.jsonl").read_bytes()


def test_every_letter_that_ends_a_line_somewhere_is_kept_in_the_progress(tmp_path):
    """Unicode has more line separators than the newline. For example, U+2028 occurs in text that is
    copied from web pages."""
    for n, letter in enumerate("\x0b\x0c\x1c\x85\u2028\u2029\r}"):
        line = module.Line(f"a{letter}b", f"c{letter}", True, 0, "q:1")
        progress = module.Progress(tmp_path / str(n), "key")
        progress.add(0, line)
        assert module.Progress(tmp_path / str(n), "key").done == {0: line}


@pytest.mark.parametrize("name, line", [("ask.txt", "Phở?"), ("ask.jsonl", '{"prompt": "Phở?"}')])
def test_a_map_to_a_column_that_no_row_has_is_refused(run, tmp_path, name, line):
    """Only the column of the answers may be missing, because questions need no answers."""
    file = tmp_path / name
    file.write_text(line + "\n", "utf-8")
    for flags in ([], ["--dry-run"]):
        status, said = run("--input", file, "--output", tmp_path / "a", "--map", "system=x", *flags)
        assert status == 2 and said == "error: --map system=x: no row has a field x\n"
    assert run("--input", file, "--output", tmp_path / "b", "--map", "response=x")[0] == 0


@pytest.mark.parametrize("cut", range(1, 25))
def test_a_line_that_is_cut_anywhere_is_answered_again(tmp_path, cut):
    """A full disk can cut a line at any byte, even inside a character."""
    progress = module.Progress(tmp_path / "a", "key")
    for n in range(2):
        progress.add(n, module.Line("ở {}", "}ạ}", True, 0, "ở:1}"))
    progress.file.write_bytes(progress.file.read_bytes()[:-cut])
    found = module.Progress(tmp_path / "a", "key")
    assert set(found.done) == ({0, 1} if cut == 1 else {0})
    found.add(1, progress.done[1])
    assert module.Progress(tmp_path / "a", "key").done == progress.done


@pytest.mark.parametrize("other", [
    "[]", "{}", "null", "7", '"n"', "[" * 100_000, '{"n": 0}', '{"n": "0", "question": "a"}', " ",
    '{"n": 9, "question": "a", "answer": "b", "stopped": true, "sample": 0, "where": "q:1"}'])
def test_a_line_that_was_not_written_there_is_not_used(tmp_path, other):
    (tmp_path / "a.progress").write_text(f"key\n{other}\n")
    assert module.Progress(tmp_path / "a", "key").done == {}


def test_a_damaged_answer_and_one_to_other_questions_are_not_used(tmp_path):
    written = module.Progress(tmp_path / "a", "key")
    for n in range(3):
        written.add(n, module.Line("a", "b", True, 0, "q:1"))
    key, first, second, third = written.file.read_text().splitlines()
    damaged = second.replace('"answer": "b"', '"answer": "c"')
    assert damaged != second
    written.file.write_text("\n".join([key, first, damaged, third]) + "\n")
    assert set(module.Progress(tmp_path / "a", "key").done) == {0, 2}
    (tmp_path / "b.progress").write_text("\n".join(["another", first, second, third]) + "\n")
    assert module.Progress(tmp_path / "b", "another").done == {}


@pytest.mark.parametrize("how", [KeyboardInterrupt, SystemExit(143)])
def test_who_ends_it_hears_how_it_goes_on(run, asked, tmp_path, monkeypatch, how):
    given = iter([(0, "a", True)])

    def broken_off(*_, **_more):
        yield from given
        raise how

    monkeypatch.setattr(module, "answered", broken_off)
    status, said = run("--input", asked, "--output", tmp_path / "a")
    assert status in (130, 143)
    assert f"(1 answer saved in {tmp_path}/a.progress; the same command continues)" in said


def test_a_disk_that_gets_full_keeps_what_is_answered(tmp_path, monkeypatch):
    progress = module.Progress(tmp_path / "a", "key")
    line = module.Line("a", "b", True, 0, "q:1")
    progress.add(0, line)
    progress.file.unlink()
    progress.file.symlink_to("/dev/full")
    with pytest.raises(Refusal, match="No space left on device; it holds 1 answer; free some"):
        progress.add(1, line)


@pytest.mark.parametrize("flag", ["--input", "--eval"])
def test_a_place_that_cannot_be_written_is_said_before_the_weights(run, asked, tmp_path, flag,
                                                                   monkeypatch):
    monkeypatch.setattr("phogpt_raw.inference.loading.load_base", None)
    status, said = run(flag, asked, "--output", asked / "a.json")
    assert status == 2 and f"{asked}/a.json: cannot be written" in said


def test_what_was_begun_otherwise_is_refused(run, asked, tmp_path):
    output = tmp_path / "a.jsonl"
    (tmp_path / "a.jsonl.progress").write_text("another key\n")
    status, said = run("--input", asked, "--output", output)
    assert status == 2 and "belongs to other questions, flags or another model" in said
    output.touch()
    assert "exists already" in run("--input", asked, "--output", output)[1]


def test_two_at_once_do_not_mix_their_answers(run, asked, tmp_path):
    with awaited_file(tmp_path / "a.jsonl"):
        status, said = run("--input", asked, "--output", tmp_path / "a.jsonl")
    assert status == 2 and "another process is about to write it" in said
    assert not (tmp_path / "a.jsonl.progress").exists()
    assert run("--input", asked, "--output", tmp_path / "a.jsonl")[0] == 0


def test_samples_differ_and_repeat(run, asked, tmp_path):
    flags = ["--input", asked, "--num-samples", 4, "--temperature", 2]
    for name in "ab":
        run(*flags, "--output", tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    found = lines(tmp_path / "a")
    assert [row["sample"] for row in found[:5]] == [0, 1, 2, 3, 0]
    assert len({row["answer"] for row in found[:4]}) > 1


def test_a_stop_text_ends_an_answer(run, asked, tmp_path):
    run("--input", asked, "--output", tmp_path / "a")
    whole = lines(tmp_path / "a")[0]["answer"]
    run("--input", asked, "--output", tmp_path / "b", "--stop", whole[3:6])
    row = lines(tmp_path / "b")[0]
    assert (row["answer"], row["stopped"]) == (whole[: whole.find(whole[3:6])].strip(), True)


def test_what_might_begin_a_stop_text_is_not_lost_at_the_end(run, asked, tmp_path):
    run("--input", asked, "--output", tmp_path / "a")
    whole = lines(tmp_path / "a")[0]["answer"]
    run("--input", asked, "--output", tmp_path / "b", "--stop", whole[-1] + "#never#")
    assert lines(tmp_path / "b")[0]["answer"] == whole


def test_another_context_is_another_run(run, asked, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(module.Progress, "add", lambda *_: sys.exit(143))
        assert run("--input", asked, "--output", tmp_path / "a")[0] == 143
    status, said = run("--input", asked, "--output", tmp_path / "a", "--context", 100)
    assert status == 2 and "belongs to other questions, flags" in said


@pytest.mark.parametrize("row, turns, system", [
    ({"Câu hỏi": "a"}, (Turn("a"),), ""), ({"prompt": "a", "response": "b"}, (Turn("a"),), ""),
    ({"instruction": "a", "input": "b"}, (Turn("a\nb"),), ""),
    ({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"},
                   {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]},
     (Turn("a", "b"), Turn("c")), "s"),
    ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
     (Turn("a"),), "")])
def test_questions_of_any_format(tmp_path, row, turns, system):
    file = tmp_path / "q.jsonl"
    file.write_text(json.dumps(row, ensure_ascii=False) + "\n", "utf-8")
    [found] = read_questions(str(file), {})
    assert (found.turns, found.system, found.where) == (turns, system, f"{file}:1")


def test_of_a_text_file_a_line_is_a_question(tmp_path):
    file = tmp_path / "q.txt"
    file.write_text("\ufeffmột\n\n hai \n", "utf-8")
    assert [(q.turns, q.where) for q in read_questions(str(file), {})] == [
        ((Turn("một"),), f"{file}:1"), ((Turn("hai"),), f"{file}:3")]


@pytest.mark.parametrize("content, line", [
    ('{"question": 3}\n', "q.jsonl:1"), ('{"question": "a"}\n{"x": "a"}\n', "q.jsonl:2"),
    ("", "holds no"), ('{"text": "a b c"}\n', "q.jsonl:1")])
def test_what_cannot_be_asked_is_named(tmp_path, content, line):
    file = tmp_path / "q.jsonl"
    file.write_text(content)
    with pytest.raises(Refusal, match=line):
        read_questions(str(file), {})


@pytest.mark.parametrize("field, said", [
    ("cau", "fields cau; a question needs prompt, instruction, question, input, messages or "
            "conversations; missing: prompt; for other names, give --map prompt=NAME (1 of 1"),
    ("promt", "did you mean prompt? Correct the name, or give --map prompt=promt (1 of 1")])
def test_of_a_question_no_answer_is_demanded(tmp_path, field, said):
    file = tmp_path / "q.jsonl"
    file.write_text(json.dumps({field: "Phở?"}) + "\n")
    with pytest.raises(Refusal) as refused:
        read_questions(str(file), {})
    assert said in str(refused.value) and "response" not in str(refused.value)
    [found] = read_questions(str(file), {field: "prompt"})
    assert found.turns == (Turn("Phở?"),)


@pytest.mark.parametrize("row", [
    {"question": "a", "answer": ""}, {"Câu hỏi": "a", "output": None, "Trả lời": ""},
    {"messages": [{"vai trò": "Người dùng", "nội dung": "a"}]}])
def test_an_empty_answer_is_no_answer(tmp_path, row):
    file = tmp_path / "q.jsonl"
    file.write_text(json.dumps(row) + "\n")
    [found] = read_questions(str(file), {})
    assert found.turns == (Turn("a"),)


@pytest.mark.parametrize("name, said", [
    ("q.csv", "the first row names the columns, such as question; the rows are below it"),
    ("q.txt", "write a text into it"), ("q.jsonl", 'a row is a line such as {"question": "…"}')])
def test_a_file_without_questions_says_what_its_kind_needs(tmp_path, name, said):
    (tmp_path / name).touch()
    with pytest.raises(Refusal, match=f"holds no questions; {said}"):
        read_questions(str(tmp_path / name), {})


def test_a_question_too_long_is_named_before_the_weights_are_read(run, tmp_path, monkeypatch):
    monkeypatch.setattr("phogpt_raw.inference.loading.load_base", None)
    (tmp_path / "q.txt").write_text("a\n" + "dài " * 300)
    status, said = run("--input", tmp_path / "q.txt", "--output", tmp_path / "a")
    assert status == 2 and "q.txt:2: the question has" in said


def test_batches_are_as_large_as_the_cache_allows(monkeypatch, run, asked, tmp_path):
    rows = []
    engine = module.Engine
    monkeypatch.setattr(module, "Engine", lambda *a, **k: rows.append(k["rows"]) or engine(*a, **k))
    for mib, n in ((0, 1), (2048, 9)):
        monkeypatch.setattr(memory_plan, "CPU_MIB", mib)
        run("--input", asked, "--output", tmp_path / f"{mib}")
        assert rows.pop() == n
