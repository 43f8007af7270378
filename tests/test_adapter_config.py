"""An adapter's folder: the check of its config, and the settings of the run that trained it."""

import json
import shutil

import pytest

from phogpt_raw import limited
from phogpt_raw.model.adapter_config import (
    MERGED,
    Origin,
    adapter_hash,
    check_not_merged,
    chosen_base,
    named_base,
    read_adapter_config,
    read_origin,
)
from phogpt_raw.refusal import Refusal

LORA = dict(peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path="nano", r=8,
            lora_alpha=16, target_modules=["Wqkv"])
RUN = dict(model="nano", template="7b5-instruct", rank=8, nf4=False, dtype="fp32",
           revision="v1")


def adapter(folder, **changed):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(LORA | changed))
    return folder


@pytest.mark.parametrize("changed", [
    {"use_rslora": True}, {"use_dora": True}, {"rank_pattern": {"up_proj": 4}},
    {"alpha_pattern": {"up_proj": 2.5}}, {"target_modules": r".*\.(Wqkv|up_proj)"},
    {"base_model_name_or_path": None}])
def test_what_peft_can_have_is_read(tmp_path, changed):
    config = read_adapter_config(adapter(tmp_path, **changed))
    for name, value in changed.items():
        assert getattr(config, name) == value


@pytest.mark.parametrize("changed, line", [
    ({"base_model_name_or_path": 3}, "base_model_name_or_path 3 is not text"),
    ({"r": 0}, "cannot be read|r 0 is not a whole number from 1"),
    ({"r": -1}, "r -1 is not"), ({"r": "8"}, "r '8' is not"), ({"r": True}, "r True is not"),
    ({"r": 10**9}, "r 1000000000 is not"), ({"rank_pattern": {"Wqkv": 0}}, "rank_pattern Wqkv 0"),
    ({"rank_pattern": []}, "rank_pattern is not an object"),
    ({"rank_pattern": [1]}, "rank_pattern is not an object|cannot be read"),
    ({"rank_pattern": {"(": 2}}, "'\\(' is not a regular expression"),
    ({"lora_alpha": 0}, "lora_alpha 0 is not a positive number"),
    ({"lora_alpha": -2}, "lora_alpha -2"), ({"lora_alpha": float("nan")}, "lora_alpha nan"),
    ({"lora_alpha": float("inf")}, "lora_alpha inf"), ({"lora_alpha": "16"}, "lora_alpha '16'"),
    ({"alpha_pattern": {"Wqkv": None}}, "alpha_pattern Wqkv None"),
    ({"lora_dropout": 1}, "lora_dropout 1"), ({"lora_dropout": "x"}, "lora_dropout 'x'"),
    ({"target_modules": "("}, "'\\(' is not a regular expression"),
    ({"target_modules": [3]}, "target_modules \\[3\\] is not a list of names"),
    ({"target_modules": None}, "target_modules names no layers"),
    ({"target_modules": 5}, "target_modules 5 is not a list of names"),
    ({"exclude_modules": 5}, "exclude_modules 5 is not a list of names"),
    ({"exclude_modules": "("}, "exclude_modules '\\(' is not a regular expression"),
    ({"layers_to_transform": "all"}, "layers_to_transform 'all' is not the number of a block"),
    ({"layers_to_transform": [0, True]}, "layers_to_transform True is not the number of a block"),
    ({"layers_pattern": 3}, "layers_pattern 3 is not a list of names"),
    ({"bias": 5}, "bias 5 must be one of none, all, lora_only"), ({"bias": "zz"}, "bias 'zz'"),
    ({"use_rslora": "false"}, "use_rslora 'false' is neither true nor false"),
    ({"use_dora": "no"}, "use_dora 'no' is neither"), ({"lora_bias": 1}, "lora_bias 1 is neither"),
    ({"lora_alpha": 1e300}, "lora_alpha 1e\\+300 is not a positive number up to"),
    ({"lora_alpha": 10**400}, "lora_alpha 10+ … is not a positive number up to"),
    ({"kasa_config": {"x": 1}}, "kasa_config is not supported"),
    ({"a_variant_of_next_year": True}, "a_variant_of_next_year is not supported"),
    ({"revision": 3}, "revision 3 is not text"), ({"init_lora_weights": 1}, "init_lora_weights 1"),
    ({"layer_replication": [[0, 1]]}, "layer_replication is not supported"),
    ({"trainable_token_indices": [3]}, "trainable_token_indices is not supported"),
    ({"modules_to_save": ["wte"]}, "modules_to_save is not supported"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' changes the base's weights"),
    ({"init_lora_weights": "olora"}, "init_lora_weights 'olora' changes the base's weights"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out is not supported"),
    ({"use_qalora": True}, "use_qalora is not supported|cannot be read"),
    ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
     "init_lora_weights 'loftq' changes the base's weights"),
    ({"peft_type": "IA3", "feedforward_modules": []}, "peft_type is IA3; only LoRA is supported"),
    ({"peft_type": 7}, "peft_type is 7; only LoRA is supported")])
def test_what_cannot_be_used_is_one_line_with_the_file(tmp_path, changed, line):
    with pytest.raises(Refusal, match=line) as refused:
        read_adapter_config(adapter(tmp_path, **changed))
    assert str(tmp_path / "adapter_config.json") in str(refused.value)
    assert "\n" not in str(refused.value)


SLOW = r"((\w+\.?)+)+x"


@pytest.mark.parametrize("changed", [
    {"target_modules": SLOW}, {"exclude_modules": SLOW}, {"rank_pattern": {SLOW: 2}},
    {"alpha_pattern": {"Wqkv": 4, SLOW: 2}},
    {"layers_pattern": ["blocks", SLOW], "layers_to_transform": 0}], ids=lambda c: min(c))
def test_a_regular_expression_that_takes_for_ever_is_one_line(tmp_path, monkeypatch, changed):
    monkeypatch.setattr(limited, "SECONDS", 0.3)
    with pytest.raises(Refusal, match=r"matching a layer's name takes more than 0\.3 s"):
        read_adapter_config(adapter(tmp_path, **changed))


@pytest.mark.parametrize("text, line", [("{", "not JSON"), ("[]", "not a JSON object")])
def test_a_file_that_is_not_a_json_object_is_one_line(tmp_path, text, line):
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(Refusal, match=f"adapter_config.json: {line}"):
        read_adapter_config(tmp_path)


def test_how_a_run_was_made_is_found_from_its_adapter_and_its_checkpoints(tmp_path):
    run = adapter(tmp_path / "run")
    (run / "config.json").write_text(json.dumps(RUN))
    made = Origin("nano", "v1", "7b5-instruct", nf4=False, dtype="fp32")
    assert read_origin(run) == made
    assert read_origin(adapter(run / "checkpoint-30")) == made
    (tmp_path / "link").symlink_to(run / "checkpoint-30")
    assert read_origin(tmp_path / "link") == made


def test_an_adapter_in_a_runs_folder_is_not_of_that_run(tmp_path):
    run = adapter(tmp_path / "run")
    (run / "config.json").write_text(json.dumps(RUN))
    assert read_origin(adapter(run / "foreign")) == Origin("nano")


@pytest.mark.parametrize("text", ["", "[]", '{"model": "nano", "tem', '{"model": "nano"}'])
def test_a_damaged_record_is_refused_and_never_taken_for_none(tmp_path, text):
    (adapter(tmp_path) / "config.json").write_text(text)
    with pytest.raises(Refusal, match=f"{tmp_path}/config.json: is not a complete config.json of "
                                      f"a run"):
        read_origin(tmp_path)


def test_a_revision_goes_with_its_base(tmp_path):
    folder = adapter(tmp_path, base_model_name_or_path="vinai/PhoGPT-4B", revision="v7")
    made = Origin("vinai/PhoGPT-4B", "v7")

    def chosen(model=None, revision=None):
        return chosen_base(folder, made, model, revision)[:2]

    assert chosen() == chosen(model="vinai/PhoGPT-4B") == ("vinai/PhoGPT-4B", "v7")
    assert chosen(revision="v8") == chosen("vinai/PhoGPT-4B", "v8") == ("vinai/PhoGPT-4B", "v8")
    assert chosen(model="vinai/PhoGPT-4B-Chat") == ("vinai/PhoGPT-4B-Chat", None)


def test_a_folder_that_hides_the_hubs_base_is_said(tmp_path, monkeypatch):
    folder = adapter(tmp_path / "a", base_model_name_or_path="vinai/PhoGPT-4B", revision="v7")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vinai" / "PhoGPT-4B").mkdir(parents=True)
    with pytest.raises(Refusal, match="vinai/PhoGPT-4B on the hub, revision v7, but there is"):
        chosen_base(folder, read_origin(folder), None, None)


def test_an_adapter_is_not_put_over_a_base_that_has_it_already(tmp_path):
    one, other = adapter(tmp_path / "one"), adapter(tmp_path / "other")
    (one / "adapter_model.safetensors").write_bytes(b"1")
    (other / "adapter_model.safetensors").write_bytes(b"2")
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({MERGED: ["other", adapter_hash(one)]}))
    check_not_merged(base, other)
    with pytest.raises(Refusal, match="one is already merged into it"):
        check_not_merged(base, one)


def test_an_adapter_from_elsewhere_names_its_base_alone(tmp_path):
    assert read_origin(adapter(tmp_path / "a", revision="v2")) == Origin("nano", "v2")
    # a model's config.json in this folder, or in the folder above it, does not describe a run
    for folder in (tmp_path, tmp_path / "a"):
        (folder / "config.json").write_text(json.dumps({"model_type": "mpt", "d_model": 64}))
    assert read_origin(tmp_path / "a") == Origin("nano", "v2")


@pytest.mark.parametrize("field, value", [("template", ["x"]), ("template", "alpaca"),
                                          ("nf4", "yes"), ("dtype", 16), ("revision", 3)])
def test_a_recorded_value_that_cannot_be_is_one_line(tmp_path, field, value):
    (adapter(tmp_path) / "config.json").write_text(json.dumps(RUN | {field: value}))
    with pytest.raises(Refusal, match=f"config.json: {field} "):
        read_origin(tmp_path)


def test_a_base_that_is_no_longer_there_is_said_to_be_the_adapters(tmp_path):
    base = tmp_path / "base"
    folder = adapter(tmp_path / "a", base_model_name_or_path=str(base))
    with pytest.raises(Refusal, match=f"a: its base is {base}, but no such folder exists; name "
                                      f"its new folder with --model"):
        named_base(folder)
    base.mkdir()
    assert named_base(folder) == str(base)
    shutil.rmtree(base)
    assert chosen_base(folder, Origin(str(base), "v1"), "elsewhere", None)[:2] == (
        "elsewhere", None)
    assert named_base(adapter(tmp_path / "b", base_model_name_or_path="vinai/PhoGPT-4B")) == (
        "vinai/PhoGPT-4B")


def test_a_folder_without_an_adapter_is_answered_with_what_it_has(tmp_path):
    def said(folder):
        with pytest.raises(Refusal) as refused:
            read_adapter_config(folder)
        return str(refused.value)

    assert said(tmp_path).endswith("name a folder that a run has written, such as runs/nano-001")
    record = {"model": "nano", "template": "4b-chat", "rank": 8}
    (tmp_path / "config.json").write_text(json.dumps(record))
    assert "has saved no checkpoint; give its command again" in said(tmp_path)
    (tmp_path / "checkpoint-5").mkdir()
    assert "has not ended; name one of its checkpoint-N folders" in said(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mpt", "d_model": 8}))
    assert "is a whole model; name it with --model" in said(tmp_path)
