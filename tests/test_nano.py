"""nano has VinAI's format. The README's first command gives the results that nano's card states."""

import json
import unicodedata

import torch

from phogpt_raw.data.examples import PAIRS
from phogpt_raw.model.adapters import load_adapters
from phogpt_raw.model.checkpoint_format import vinai_config
from phogpt_raw.model.weights import NANO, load_base, read_config
from phogpt_raw.nano.recipe.score import (
    greedy_answers,
    held_out_pairs,
    is_polite,
    score_answers,
)


def pairs(name: str) -> list[dict]:
    return [json.loads(line) for line in (PAIRS / f"{name}.jsonl").read_text("utf-8").splitlines()]


def test_the_folder_is_as_vinai_ships_it():
    config = json.loads((NANO / "config.json").read_text())
    assert config == vinai_config(read_config(NANO))
    assert config["attn_config"]["attn_pdrop"] == 0.0 and config["no_bias"] is False
    tensors = torch.load(NANO / "pytorch_model.bin", weights_only=True)
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert len(tensors) == 12 * config["n_layers"] + 3
    assert sum(name.endswith(".bias") for name in tensors) == 6 * config["n_layers"] + 1
    assert 3e6 <= sum(t.numel() for t in tensors.values()) <= 8e6
    assert sum(f.stat().st_size for f in NANO.iterdir()) <= 16e6


def test_the_pairs_are_many_polite_and_disjoint():
    training, held_out = pairs("train"), pairs("heldout")
    assert len(training) >= 400 and len(held_out) >= 60
    everything = training + held_out
    assert len({p["prompt"] for p in everything}) == len(everything)
    assert len({p["response"] for p in everything}) == len(everything)
    for p in everything:
        assert is_polite(p["response"]) and p["topic"].casefold() in p["response"].casefold()
        assert p["topic"].casefold() in p["prompt"].casefold()
        assert unicodedata.is_normalized("NFC", p["prompt"] + p["response"])
    learnt = {p["topic"].casefold() for p in training}
    assert not learnt & {p["topic"].casefold() for p in held_out}


def test_the_first_command_teaches_nano_to_answer_politely_and_stop(first_command):
    rows = [json.loads(line) for line in (first_command / "metrics.jsonl").read_text().splitlines()]
    evaluations = [row for row in rows if "val_loss" in row]
    assert evaluations[-1]["val_loss"] <= 2 / 3 * evaluations[0]["val_loss"]
    assert evaluations[0]["stops"] < 0.10 and evaluations[-1]["stops"] >= 0.95

    model, tokenizer = load_base("nano")
    load_adapters(model, first_command)
    asked = held_out_pairs()
    answers, stopped = greedy_answers(model, tokenizer, [pair["prompt"] for pair in asked])
    scores = score_answers(answers, stopped, [pair["topic"] for pair in asked])
    print(scores)
    assert scores.stops >= 0.95 and scores.polite >= 0.95
    assert scores.distinct >= 0.80 and scores.names_topic >= 0.70


def test_the_base_alone_neither_stops_nor_is_polite():
    model, tokenizer = load_base("nano")
    asked = held_out_pairs()[:20]
    answers, stopped = greedy_answers(model, tokenizer, [pair["prompt"] for pair in asked])
    scores = score_answers(answers, stopped, [pair["topic"] for pair in asked])
    assert scores.stops < 0.10 and scores.polite == 0.0
    assert scores.names_topic >= 0.70  # but most answers name the topic


def test_scores_are_shares_of_all_answers():
    import doctest

    from phogpt_raw.nano.recipe import score as module

    assert doctest.testmod(module).failed == 0
