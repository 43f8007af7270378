"""The models of a server: adapters by name, one base, and the number of slots."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

from phogpt_raw.cards import Card, known_card
from phogpt_raw.data.prompt import TEMPLATES
from phogpt_raw.decode.history import Turn, encode_history
from phogpt_raw.inference.loading import Found
from phogpt_raw.model.phogpt import PUBLISHED
from phogpt_raw.refusal import Refusal
from phogpt_raw.serve.models import load, memory_line, named_adapters, plan, show_plan, slots_for
from phogpt_raw.serve.protocol import Conversation, ProtocolError


def options(**more):
    return SimpleNamespace(**{"model": None, "revision": None, "template": "auto", "nf4": None,
                              "dtype": "auto", "nf4_cache": None, "slots": None, "card": None,
                              "context": None, "dry_run": False, **more})


def found(shape="7b5", card="t4"):
    """A model with a published shape of PhoGPT on the GPU `card`."""
    return Found("b", None, None, PUBLISHED[shape], None, TEMPLATES["4b-chat"], True, None,
                 torch.float16, known_card(card))


@pytest.fixture
def folders(adapted, tmp_path):
    """The folders of two adapters of tiny, `one` and `two`."""
    for name in ("one", "two"):
        adapted()[1].save(tmp_path / name)
    return {name: tmp_path / name for name in ("one", "two")}


def test_an_adapter_has_the_name_that_is_given_or_its_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert named_adapters(["a=runs/x", "runs/y/", f"c.d-e={tmp_path}/a=b"]) == {
        "a": tmp_path.__class__("runs/x"), "y": tmp_path.__class__("runs/y"),
        "c.d-e": tmp_path / "a=b"}
    assert list(named_adapters(["/runs/a=b"])) == ["a=b"]  # the text before = is a path, not a name
    for given in (["a=x", "a=y"], ["runs/x", "x=other"]):
        with pytest.raises(Refusal, match="two adapters have the name"):
            named_adapters(given)


def test_adapters_are_loaded_over_one_base(tiny, folders):
    made, slots = plan(options(model=str(tiny)), folders)
    one, two = load(made)
    assert (one.name, two.name, slots) == ("one", "two", 8)
    assert one.model.head.data_ptr() == two.model.head.data_ptr()
    assert one.model is not two.model and one.template == TEMPLATES["4b-chat"]
    flat = [next(p for n, p in served.model.named_parameters() if "lora_B" in n)
            for served in (one, two)]
    assert flat[0].data_ptr() != flat[1].data_ptr()


def test_the_base_alone_has_its_own_name(tiny):
    assert list(plan(options(model=str(tiny)), {})[0]) == [tiny.name]
    for model in (None, "nano"):
        assert list(plan(options(model=model), {})[0]) == ["nano"]


def test_each_adapter_keeps_the_template_of_its_run(tiny, folders):
    record = {"model": str(tiny), "template": "7b5-instruct", "rank": 4, "nf4": True}
    (folders["two"] / "config.json").write_text(json.dumps(record))
    one, two = load(plan(options(model=str(tiny)), folders)[0])
    assert (one.template, two.template) == (TEMPLATES["4b-chat"], TEMPLATES["7b5-instruct"])


def test_adapters_over_other_weights_are_refused(tiny, folders):
    record = {"model": str(tiny), "template": "auto", "rank": 4, "nf4": False}
    (folders["two"] / "config.json").write_text(json.dumps(record))
    with pytest.raises(Refusal, match=r"one and two have different bases \(nf4"):
        plan(options(model=str(tiny)), folders)
    made, _slots = plan(options(model=str(tiny), nf4=False), folders)  # nf4=False for both adapters
    assert not any(one.nf4 for one in made.values())


def test_a_conversation_is_encoded_in_the_models_template(tiny):
    [served] = load(plan(options(model=str(tiny), template="7b5-instruct"), {})[0])
    said = Conversation((Turn("a", "b"), Turn("c")), "s")
    assert served.encode(said) == encode_history(
        served.tokenizer, TEMPLATES["7b5-instruct"], [Turn("a", "b"), Turn("c")], "s")
    assert served.encode([5, 6]) == [5, 6]
    most = served.model.config.max_seq_len
    assert len(served.encode([5] * (most - 1))) == most - 1  # leaves room for one token
    for prompt in ([5] * most, [], "", [-1], [served.model.config.vocab_size]):
        with pytest.raises(ProtocolError) as caught:
            served.encode(prompt)
        assert caught.value.param == "prompt" and caught.value.status == 400


@pytest.mark.parametrize("card, shape, models, slots", [
    ("h200", "7b5", 1, 8), ("t4", "7b5", 1, 7), ("t4", "7b5", 2, 3), ("t4", "4b", 1, 3)])
def test_so_many_slots_are_taken_as_the_card_has_room_for(card, shape, models, slots):
    """A row of the key-value cache takes 1 GiB for 7B5 and 3 GiB for 4B. A T4 has 14.56 GiB.

    The row has 2,048 tokens for 7B5 and 8,192 tokens for 4B.
    """
    assert slots_for(None, {str(n): found(shape, card) for n in range(models)}) == slots


def test_more_slots_than_fit_are_refused_before_weights_are_read():
    made = {"a": found()}
    with pytest.raises(Refusal, match=r"this takes about 7\d.*cache 64.00, .*--slots 7; a smaller"):
        slots_for(64, made)
    assert slots_for(64, made, planned=True) == 64
    here = {"a": dataclasses.replace(found(), card=Card("CPU", "cpu"))}
    assert slots_for(64, here) == 64
    for slots in (0, -1, 1025):
        with pytest.raises(Refusal, match="from 1 to 1024"):
            slots_for(slots, here)


def test_a_base_alone_that_does_not_fit_is_refused():
    small = dataclasses.replace(found(), card=Card("small", "cuda", (7, 5), 6.0))
    with pytest.raises(Refusal, match=r"small has 6\.0 GiB, and this takes about"):
        slots_for(None, {"a": small})


def test_what_slots_take_is_said():
    said = memory_line({"a": found(), "b": found()}, 17)
    assert "(17 slots for answers of 2,048 tokens, prompt included, in each of 2 models" in said
    assert "cache at most 34.00 GiB; base 5.01 GiB, NF4, fp16; in all about 4" in said
    assert "more than 16 slots are slower" in said
    assert "slower" not in memory_line({"a": found()}, 16)
    assert memory_line({"a": found()}, 1).startswith("(1 slot for an answer of 2,048 tokens")


def test_a_plan_says_what_slots_take_and_how_many_fit(capsys):
    made = {"a": found()}
    show_plan(made, 7)
    assert "7 at once, of at most 2,048 tokens" in capsys.readouterr().out
    with pytest.raises(Refusal, match="there is room for --slots 7"):
        show_plan(made, 9)
    assert "the card has 14.6" in capsys.readouterr().out


def test_a_smaller_context_bounds_prompts_and_answers(tiny):
    made, _slots = plan(options(model=str(tiny), context=64), {})
    [served] = load(made)
    assert served.model.config.max_seq_len == 64
    with pytest.raises(ProtocolError, match="64"):
        served.encode([5] * 64)
    for context in (0, 63, 10**6):
        with pytest.raises(Refusal, match=r"--context \d+: must be from 64 to"):
            plan(options(model=str(tiny), context=context), {})
