"""generate.py from a question to the answer on standard output."""

import io
import sys

import pytest
import torch
from conftest import write_rows

import generate
from phogpt_raw.data.prompt import TEMPLATES, encode_prompt
from phogpt_raw.decode import answer
from phogpt_raw.model.adapters import load_adapters
from phogpt_raw.model.weights import load_base

QUESTION = "Phở bò là gì?"


@pytest.fixture
def ask(capsys):
    """A function that runs generate.py in this process: (exit status, stdout, stderr)."""

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
    """The same answer by the parts that generate.py is made of, decoded at once."""
    model, tokenizer = load_base(str(folder))
    if adapter:
        load_adapters(model, adapter)
    prompt = encode_prompt(tokenizer, TEMPLATES[template], QUESTION)
    [written] = answer(model, [prompt], eos_id=2, pad_id=3, max_new_tokens=tokens)
    return tokenizer.decode(written.ids)


def test_generating_allocates_no_gradients(ask, adapted, tiny, tmp_path, monkeypatch):
    adapted()[1].save(tmp_path)
    loaded = []

    def noted(*args, **kwargs):
        loaded.append(load_adapters(*args, **kwargs))
        return loaded[-1]

    monkeypatch.setattr(generate, "load_adapters", noted)
    status, _, _ = ask("--model", tiny, "--adapter", tmp_path, "--max-new-tokens", 2, QUESTION)
    assert status == 0 and len(loaded) == 1
    assert loaded[0].flat.grad is None and not loaded[0].flat.requires_grad


def test_the_answer_is_written_on_standard_output(ask, tiny):
    status, out, err = ask("--model", tiny, "--max-new-tokens", 6, QUESTION)
    assert status == 0
    assert out == expected(tiny, 6).lstrip() + "\n"
    assert len(out) > 6
    assert "(cut after 6 tokens" in err  # apart from the answer, so that a pipe gets it alone


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
    """Nano, which a few steps teach one row by heart, its </s> included."""
    data = write_rows(tmp_path / "one.jsonl", [(QUESTION, "Dạ, món nước ạ.")])
    train("--model", "nano", "--data", data, "--out", tmp_path / "run", "--steps", 25, "--hold-out",
          0, "--batch-size", 1, "--rank", 16, "--recompute", "none")
    status, out, err = ask("--adapter", tmp_path / "run", QUESTION)
    assert (status, err) == (0, "")
    assert out == "Dạ, món nước ạ.\n"  # without the space that 4B's template begins with


@pytest.mark.parametrize("arguments, said", [
    (["--adapter", "/nowhere", QUESTION], "/nowhere/adapter_config.json: missing"),
    (["--model", "/nowhere", QUESTION], "--model /nowhere: no such folder"),
    ([""], "the question is empty"),
    ([" \n"], "the question is empty"),
    ([], "question"),
    (["--max-new-tokens", "0", QUESTION], "--max-new-tokens 0: must be at least 1"),
    (["--max-new", "3", QUESTION], "--max-new"),
    (["--template", "llama", QUESTION], "llama"),
])
def test_what_cannot_be_is_one_line(ask, arguments, said):
    status, out, err = ask(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert said in err


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


def test_more_tokens_than_the_model_was_made_for_are_refused(tiny, capsys):
    import generate

    with pytest.raises(SystemExit) as stopped:
        generate.main(["--model", str(tiny), "--max-new-tokens", "100000000", "Chào?"])
    assert stopped.value.code == 2 and "made for 128 tokens" in capsys.readouterr().err
