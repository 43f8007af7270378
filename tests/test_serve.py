"""bench/serve.py: clients over HTTP, compared with the engine alone."""

import json
import sys

import pytest

from bench import results, serve
from bench.sides import write_random_checkpoint
from phogpt_raw.model.phogpt import ModelConfig
from phogpt_raw.model.weights import load_base
from phogpt_raw.refusal import Refusal

pytest.importorskip("uvicorn")


def test_both_sides_are_measured_and_saved_when_asked(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["serve.py", "--save"])
    serve.main(["--model", "nano", "--clients", "2", "--prompt", "9", "--new", "6", "--save"])
    [file] = tmp_path.iterdir()
    ours, served = json.loads(file.read_text())["rows"]
    assert (ours["who"], served["who"]) == ("engine", "server")
    assert served["share_of_engine"] == pytest.approx(
        served["tokens_per_s"] / ours["tokens_per_s"])
    assert 0 < served["first_s"] < 5 and 0 < served["first_beside_others_s"] < 5
    said = capsys.readouterr().out
    assert "of prefill" in said and "…" not in said


def test_every_token_of_a_wider_vocabulary_is_text(tmp_path):
    """A model with random weights may choose any id of its vocabulary.

    If no tokens were added to the tokenizer, most of these ids would have no text.
    """
    shape = ModelConfig(64, 2, 1, vocab_size=9000, max_seq_len=64)
    write_random_checkpoint(tmp_path, shape)
    serve.widen(tmp_path / "tokenizer.json", shape.vocab_size)
    _model, tokenizer = load_base(str(tmp_path), device="cpu")
    assert len(tokenizer) == 9000
    assert tokenizer.decode([4096, 8999]) == " t4096 t8999"


def test_one_client_or_token_is_too_few_to_measure():
    for flags in (["--clients", "1"], ["--new", "1"]):
        with pytest.raises(Refusal, match=f"{flags[0]}: '1': must be a whole number from 2 to"):
            serve.parse(flags)
