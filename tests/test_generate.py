"""generate.py, from a question to the answer on standard output."""

import io
import json
import re
import shutil
import sys
import unicodedata
from types import SimpleNamespace

import pytest
import torch
from conftest import write_rows

import generate
from phogpt_raw.data.prompt import TEMPLATES, encode_prompt
from phogpt_raw.decode import text as module
from phogpt_raw.decode.engine import answer
from phogpt_raw.decode.text import HALF
from phogpt_raw.inference import loading, streaming
from phogpt_raw.inference.question import broken, from_stdin, read_question
from phogpt_raw.model.adapters import load_adapters
from phogpt_raw.model.weights import load_base
from phogpt_raw.refusal import write_utf8

QUESTION = "Phở bò là gì?"


@pytest.fixture
def ask(capsys):
    """A function that runs generate.py in this process and returns (status, stdout, stderr)."""

    def run(*arguments):
        status = 0
        try:
            generate.main([str(a) for a in arguments])
        except SystemExit as left:
            status = left.code
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


def expected(folder, tokens, adapter=None, template="4b-chat"):
    """The expected answer, from the functions that generate.py calls, decoded in one piece."""
    model, tokenizer = load_base(str(folder))
    if adapter:
        load_adapters(model, adapter)
    prompt = encode_prompt(tokenizer, TEMPLATES[template], QUESTION)
    [written] = answer(model, [prompt], eos_id=2, pad_id=3, max_new_tokens=tokens)
    return tokenizer.decode(written.ids).rstrip(HALF)


def test_generating_allocates_no_gradients(ask, adapted, tiny, tmp_path, monkeypatch):
    adapted()[1].save(tmp_path)
    loaded = []

    def noted(*args, **kwargs):
        loaded.append(load_adapters(*args, **kwargs))
        return loaded[-1]

    monkeypatch.setattr(loading, "load_adapters", noted)
    status, _, _ = ask("--model", tiny, "--adapter", tmp_path, "--max-new-tokens", 2, QUESTION)
    assert status == 0 and len(loaded) == 1
    assert loaded[0].flat.grad is None and not loaded[0].flat.requires_grad


def test_the_answer_is_written_on_standard_output(ask, tiny):
    status, out, err = ask("--model", tiny, "--max-new-tokens", 6, QUESTION)
    assert status == 0
    assert out == expected(tiny, 6).lstrip() + "\n"
    assert len(out) > 6
    assert "(cut at 6 tokens" in err  # on stderr, so that a pipe gets only the answer


def test_a_hyphen_reads_the_question_from_standard_input(ask, tiny, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(QUESTION + "\n"))
    status, out, _ = ask("--model", tiny, "--max_new_tokens", 6, "-")
    assert status == 0
    assert out == expected(tiny, 6).lstrip() + "\n"


def test_the_template_can_be_named(ask, tiny):
    _, out, _ = ask("--model", tiny, "--max-new-tokens", 6, "--template", "7b5-instruct", QUESTION)
    assert out == expected(tiny, 6, template="7b5-instruct").lstrip() + "\n"


def test_an_adapter_brings_its_base_and_changes_the_answer(ask, train, tiny, tmp_path):
    out = tmp_path / "run"
    train("--out", out, "--lr", 0.1, "--hold-out", 0, "--eval-answers", 0)
    for folder in (out, out / "checkpoint-7"):
        status, said, _ = ask("--adapter", folder, "--max-new-tokens", 6, QUESTION)
        assert status == 0
        assert said == expected(tiny, 6, adapter=out).lstrip() + "\n"
        assert said.strip() != expected(tiny, 6).strip()


def test_an_answer_that_ends_by_itself_is_not_called_cut(ask, train, tmp_path):
    """In a few steps nano learns one row by heart, including its </s>."""
    data = write_rows(tmp_path / "one.jsonl", [(QUESTION, "Dạ, món nước ạ.")])
    train("--model", "nano", "--data", data, "--out", tmp_path / "run", "--steps", 25, "--hold-out",
          0, "--batch-size", 1, "--rank", 16, "--recompute", "none")
    status, out, err = ask("--adapter", tmp_path / "run", QUESTION)
    assert (status, err) == (0, "")
    assert out == "Dạ, món nước ạ.\n"  # without the leading space of 4B's template


@pytest.mark.parametrize("arguments, said", [
    (["--adapter", "/nowhere", QUESTION], "/nowhere/adapter_config.json: missing"),
    (["--model", "/nowhere", QUESTION], "--model /nowhere: no such folder"),
    ([""], "the question is empty"),
    ([" \n"], "the question is empty"),
    ([], "question"),
    (["--max-new-tokens", "0", QUESTION], "--max-new-tokens 0: must be at least 1"),
    (["--max-new", "3", QUESTION], "--max-new"),
    (["--input", "a.jsonl", "--output", "b", "--num-samples", "1000000000", "--temperature", "1"],
     "--num-samples 1000000000: must be from 1 to 1,000"),
    (["--template", "llama", QUESTION], "llama"),
])
def test_what_is_not_possible_is_refused_in_one_line(ask, arguments, said):
    status, out, err = ask(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert said in err


@pytest.mark.parametrize("flags, needed", [
    (["--system", "a"], "--chat"), (["--output", "a"], "--input or --eval"),
    (["--map", "prompt=a"], "--input or --eval"), (["--num-samples", "2"], "--input"),
    (["--stats"], "a question"), (["--api-key", "a"], "--serve"), (["--slots", "1"], "--serve"),
    (["--card", "t4"], "--dry-run")])
def test_a_flag_without_effect_is_refused(ask, flags, needed, monkeypatch):
    monkeypatch.setattr(generate, "serve", None)
    monkeypatch.setattr(generate, "chat", None)
    other = ["--serve", "0"] if needed in ("--chat", "a question") else ["--chat"]
    status, out, err = ask(*other, *flags)
    assert (status, out) == (2, "")
    assert err == f"error: {flags[0]}: has an effect only with {needed}\n"


def test_a_missing_adapter_is_refused_with_a_model_named_too(ask, tiny, tmp_path):
    status, _, err = ask("--model", tiny, "--adapter", tmp_path, QUESTION)
    assert status == 2
    assert f"{tmp_path / 'adapter_config.json'}: missing" in err


def test_an_empty_question_from_standard_input_is_refused(ask, tiny, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    assert ask("--model", tiny, "-")[0] == 2


def test_bf16_can_be_asked_for_on_the_cpu(ask, tiny):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    status, out, _ = ask("--model", tiny, "--dtype", "bf16", "--no_nf4", "--max-new-tokens", 3,
                         QUESTION)
    assert status == 0
    assert out.strip()


def test_prompt_and_answer_fit_what_the_model_was_made_for_and_it_is_said(ask, tiny):
    status, out, err = ask("--model", tiny, "--max-new-tokens", 500, QUESTION)
    assert status == 0 and len(out) > 10
    first, second, *_ = err.splitlines()
    assert re.fullmatch(r"\(the answer has at most \d+ tokens: the model was made for 128, the "
                        r"question has \d+\)", first)
    assert re.fullmatch(r"\(cut at \d+ tokens: the model's context is full\)", second)


def test_a_question_that_is_too_long_is_refused_before_the_weights_are_read(ask, tiny, monkeypatch):
    monkeypatch.setattr(loading, "load_base", None)
    status, _, err = ask("--model", tiny, "một hai ba " * 100)
    assert status == 2 and re.search(r"the question is too long: \d+ tokens of the 128", err)
    assert err.count("\n") == 1


@pytest.mark.parametrize("flags, said", [
    (["--temperature", "-1"], "--temperature -1: must be from 0 to 100"),
    (["--temperature", "nan"], "--temperature nan: must be from 0"),
    (["--top-p", "0", "--temperature", "1"], "--top-p 0: must be from 0 to 1, and not 0"),
    (["--top-k", "5"], "--top-k 5: needs random sampling; give --temperature too"),
    (["--min-p", "1.5", "--temperature", "1"], "--min-p 1.5: must be from 0 to 1"),
    (["--repetition-penalty", "0"], "--repetition-penalty 0: must be from 0 to 100, and not 0"),
    (["--seed", "-1"], "--seed -1: must be from 0"),
    (["--seed", "0"], "--seed 0: needs random sampling; give --temperature too"),
])
def test_sampling_that_cannot_be_is_one_line(ask, flags, said):
    status, out, err = ask(*flags, QUESTION)
    assert (status, out, err.count("\n")) == (2, "", 1) and said in err


def test_a_seed_repeats_its_answer_and_another_gives_another(ask, tiny):
    how = ["--model", tiny, "--max-new-tokens", 12, "--temperature", 1, "--top-k", 50]
    answers = [ask(*how, "--seed", seed, QUESTION)[1] for seed in (3, 3, 4)]
    assert answers[0] == answers[1] != answers[2]
    assert answers[0] != ask("--model", tiny, "--max-new-tokens", 12, QUESTION)[1]


def test_a_stop_string_ends_the_answer_before_it(ask, tiny):
    whole = ask("--model", tiny, "--max-new-tokens", 12, QUESTION)[1].strip()
    stop = whole[4:7]
    status, out, err = ask("--model", tiny, "--max-new-tokens", 12, "--stop", stop, QUESTION)
    assert (status, out, err) == (0, whole[: whole.index(stop)] + "\n", "")


def test_each_flag_of_drawing_changes_the_draw(ask, tiny):
    how = ["--model", tiny, "--max-new-tokens", 20, "--temperature", 3, "--seed", 5]
    plain = ask(*how, QUESTION)[1]
    for flag in (["--top-k", 2], ["--top-p", 0.05], ["--min-p", 0.9]):
        assert ask(*how, *flag, QUESTION)[1] != plain, flag
    greedy = ["--model", tiny, "--max-new-tokens", 20]
    assert ask(*greedy, "--repetition-penalty", 50, QUESTION)[1] != ask(*greedy, QUESTION)[1]


def test_an_answer_that_loops_is_said(ask, tiny):
    """tiny has random weights, and its answer repeats one token."""
    _, _, err = ask("--model", tiny, "--max-new-tokens", 60, QUESTION)
    assert "(the answer repeats itself; --repetition-penalty 1.2 may help" in err
    _, _, err = ask("--model", tiny, "--max-new-tokens", 60, "--temperature", 5, QUESTION)
    assert "repeats itself" not in err


def test_a_stop_string_in_other_letters_of_the_same_look_is_the_same(ask, tiny, monkeypatch):
    """A Mac may give the stop string in NFD. The program compares it in NFC."""
    monkeypatch.setattr(streaming, "TextStream", lambda tokenizer, stops: seen.append(stops)
                        or module.TextStream(tokenizer, stops))
    seen = []
    ask("--model", tiny, "--max-new-tokens", 2, "--stop", unicodedata.normalize("NFD", "một"),
        QUESTION)
    assert seen == [("một",)]


def test_nothing_is_written_after_a_stop_string(ask, tiny):
    whole = ask("--model", tiny, "--max-new-tokens", 30, QUESTION)[1].strip()
    _, _, err = ask("--model", tiny, "--max-new-tokens", 30, "--stats", "--stop", whole[:2],
                    QUESTION)
    assert int(re.search(r"(\d+) written", err)[1]) <= 3


def test_a_question_that_is_no_text_is_refused(ask):
    status, _, err = ask("\udcff")
    assert status == 2 and "the question is not UTF-8" in err


@pytest.mark.parametrize("question", ["P\0h\0o\0", "Ph\ufffd là gì?"])
def test_a_question_that_lost_letters_in_a_conversion_is_refused(ask, question):
    status, _, err = ask(question)
    assert status == 2 and "which is not part of a text" in err and err.count("\n") == 1


def test_a_question_is_read_as_utf8_where_the_system_has_another_encoding(monkeypatch):
    seen_by_python = QUESTION.encode("utf-8").decode("ascii", "surrogateescape")
    assert broken(seen_by_python)
    assert read_question(seen_by_python) == QUESTION


def test_ctrl_c_ends_the_answer_and_says_so(ask, tiny, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(streaming.Written, "show", interrupted)
    status, out, err = ask("--model", tiny, "--max-new-tokens", 5, QUESTION)
    assert (status, out, err) == (130, "\n", "(stopped by hand)\n")


def test_stats_are_said_beside_the_answer(ask, tiny):
    _, out, err = ask("--model", tiny, "--max-new-tokens", 6, "--stats", QUESTION)
    assert out == expected(tiny, 6).lstrip() + "\n"
    assert re.search(r"\(\d+ tokens read, 6 written; the first after 0\.\d+ s, then [\d.,]+ "
                     r"tokens/s\)", err)


def test_the_runs_template_and_precision_are_the_answers(ask, first_command, tmp_path, monkeypatch):
    """Answers use the template and the precision of the run, unless a flag overrides them."""
    run = shutil.copytree(first_command, tmp_path / "run")
    made = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(made | {"template": "7b5-instruct", "nf4": False}))
    loaded, encoded = [], []
    load, encode = loading.load_base, generate.encode_prompt
    monkeypatch.setattr(loading, "load_base",
                        lambda *a, **k: loaded.append(k["nf4"]) or load(*a, **k))
    monkeypatch.setattr(generate, "encode_prompt", lambda tokenizer, template, question:
                        encoded.append(template.question) or encode(tokenizer, template, question))
    for flags in ([], ["--nf4", "--template", "4b-chat"]):
        assert ask("--adapter", run, "--max-new-tokens", 2, *flags, QUESTION)[0] == 0
    assert loaded == [False, True]
    assert encoded == ["### Câu hỏi:\n{}\n\n### Trả lời:", "### Câu hỏi: {}\n### Trả lời:"]


@pytest.mark.parametrize("encode", [
    lambda text: text.encode("utf-8"), lambda text: text.encode("utf-8-sig"),
    lambda text: text.encode("utf-16")], ids=["utf-8", "with a mark", "utf-16"])
def test_a_question_from_a_file_of_any_editor(encode, monkeypatch):
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(encode(QUESTION))))
    assert from_stdin() == QUESTION


def test_a_question_in_another_encoding_is_refused(ask, monkeypatch):
    content = io.BytesIO("Phở là gì?".encode("cp1258", "replace"))
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=content))
    status, _, error = ask("-")
    assert status == 2 and "not UTF-8" in error and error.count("\n") == 1


@pytest.mark.parametrize("encoding", ["cp1252", "cp1258", "ascii", "utf-8"])
def test_an_output_of_another_encoding_gets_utf8(encoding):
    stream = io.TextIOWrapper(io.BytesIO(), encoding)
    write_utf8(stream)
    stream.write("Dạ, phở ạ")
    stream.flush()
    assert stream.buffer.getvalue().decode("utf-8") == "Dạ, phở ạ"


def test_a_terminal_of_another_encoding_keeps_it():
    stream = io.TextIOWrapper(io.BytesIO(), "cp1252")
    stream.isatty = lambda: True
    write_utf8(stream)
    stream.write("Dạ, phở ạ")
    stream.flush()
    assert stream.buffer.getvalue() == b"D?, ph? ?"
