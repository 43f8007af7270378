"""A merged model gives the same logits as the base with the adapter."""

import json
import shutil

import checkpoints
import pytest
import torch
from peft import LoraConfig

from phogpt_raw.config import Config
from phogpt_raw.data.examples import load_examples
from phogpt_raw.export.merge import Merger, mapped_tensors, stored_dtype, write_merged
from phogpt_raw.model.adapters import inject, load_adapters, new_adapters
from phogpt_raw.model.weights import NANO, load_base
from phogpt_raw.refusal import Refusal

CPU = dict(nf4=False, dtype=torch.float32, device="cpu")


def save_adapter(base, folder, **lora):
    """Save a random adapter with the settings `lora` for a base; return the logits with it."""
    model, _ = load_base(str(base), **CPU)
    torch.manual_seed(0)  # for the random A matrices of PEFT's new layers
    adapters = inject(model, LoraConfig(**{
        "r": 4, "lora_alpha": 8, "target_modules": ["Wqkv", "up_proj", "down_proj"],
        "task_type": "CAUSAL_LM", **lora}))
    dice = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, view in adapters.views:
            view.add_(torch.randn(view.shape, generator=dice), alpha=0.05)
    adapters.cast()
    adapters.save(folder)
    return logits(model)


@torch.no_grad()
def logits(model):
    ids = torch.randint(4, 4096, (2, 30), generator=torch.Generator().manual_seed(0))
    return model.eval().logits(model(ids))


def merged_logits(base, adapter, folder, dtype=torch.float32):
    write_merged(Merger(base, adapter), folder, dtype, str(base))
    return logits(load_base(str(folder), **CPU)[0])


@pytest.mark.parametrize("lora", [
    {}, {"use_rslora": True}, {"use_dora": True}, {"lora_bias": True}, {"bias": "lora_only"},
    {"bias": "all"}, {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"Wqkv": 32}},
    {"target_modules": r".*\.1\.attn\.Wqkv", "layers_to_transform": None}],
    ids=lambda lora: "-".join(lora) or "plain")
def test_every_variant_of_lora_merges_to_the_same_logits(tiny, tmp_path, lora):
    wanted = save_adapter(tiny, tmp_path / "adapter", **lora)
    found = merged_logits(tiny, tmp_path / "adapter", tmp_path / "merged")
    assert (found - wanted).abs().max() < 1e-5
    assert (logits(load_base(str(tiny), **CPU)[0]) - wanted).abs().max() > 1e-2


def test_a_base_without_biases_is_merged_too(tmp_path):
    config = checkpoints.vinai_config(d_model=64, n_heads=8, n_layers=1, vocab_size=4096,
                                      max_seq_len=64, no_bias=True)
    checkpoints.write_checkpoint(tmp_path / "base", config)
    wanted = save_adapter(tmp_path / "base", tmp_path / "adapter")
    found = merged_logits(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert (found - wanted).abs().max() < 1e-5


def test_nano_with_its_trained_adapter_merges_to_the_same_logits(first_command, tmp_path):
    """The largest logits of the held-out pairs are about 27.

    In fp32 the logits of the two models differ by up to 3e-5, because the sums differ in order.
    In fp64 they differ by up to 2e-6. The tolerances are 5e-5 and 1e-5.
    """
    model, tokenizer = load_base("nano", **CPU)
    load_adapters(model, first_command, trainable=False)
    write_merged(Merger(NANO, first_command), tmp_path / "merged", torch.float32, "nano")
    merged, _ = load_base(str(tmp_path / "merged"), **CPU)
    texts = [torch.tensor([row.ids]) for row in load_examples(tokenizer, Config()).held_out]
    for dtype, limit in ((torch.float32, 5e-5), (torch.float64, 1e-5)):
        with torch.no_grad():
            for ids in texts:
                one, other = (m.eval().to(dtype).logits(m(ids)) for m in (model, merged))
                assert (one - other).abs().max() < limit, dtype
                assert (one.softmax(-1) - other.softmax(-1)).abs().max() < 1e-5


def test_a_merged_checkpoint_is_in_phogpts_format(tiny, tmp_path):
    save_adapter(tiny, tmp_path / "adapter")
    merger = Merger(tiny, tmp_path / "adapter")
    assert stored_dtype(merger) == torch.bfloat16
    write_merged(merger, tmp_path / "merged", torch.bfloat16, str(tiny))
    found = mapped_tensors(tmp_path / "merged")
    assert len(found) == 12 * 2 + 3 and {t.dtype for t in found.values()} == {torch.bfloat16}
    before = mapped_tensors(tiny)
    changed = {name for name in found if not torch.equal(found[name], before[name])}
    assert changed == {f"transformer.blocks.{n}.{layer}.weight" for n in range(2)
                       for layer in ("attn.Wqkv", "ffn.up_proj", "ffn.down_proj")}
    names = {file.name for file in (tmp_path / "merged").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors",
                     "tokenizer.json", "tokenizer_config.json"}


def test_large_checkpoints_come_in_shards_and_two_are_equal(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("phogpt_raw.export.merge.SHARD", 2**18)
    save_adapter(tiny, tmp_path / "adapter")
    for name in ("one", "two"):
        write_merged(Merger(tiny, tmp_path / "adapter"), tmp_path / name, torch.bfloat16, "tiny")
    files = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert "model-00003-of-00003.safetensors" in files and "model.safetensors.index.json" in files
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize("base, place", [
    ("vinai/PhoGPT-4B-Chat", "vinai/PhoGPT-4B-Chat--configuration_mpt.MPTConfig"),
    ("a/folder", "a/folder--configuration_mpt.MPTConfig"), (None, None)])
def test_the_config_names_code_only_where_there_is_some(tiny, tmp_path, base, place):
    write_merged(Merger(tiny), tmp_path / "merged", torch.bfloat16, base or str(tiny))
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config.get("auto_map", {}).get("AutoConfig") == place
    pdrop = config["attn_config"]["attn_pdrop"]
    assert pdrop == 0 and type(pdrop) is int and config["use_cache"] is True
    assert config["d_model"] == 64 and config["torch_dtype"] == "bfloat16"


def test_transformers_with_biases_reads_it_and_gives_our_logits(tiny, tmp_path):
    """transformers' MPT drops the biases. MptWithBiases (oracle.py) has the biases."""
    from oracle import MptWithBiases
    from transformers import AutoConfig, AutoTokenizer

    wanted = save_adapter(tiny, tmp_path / "adapter")
    write_merged(Merger(tiny, tmp_path / "adapter"), tmp_path / "m", torch.float32, str(tiny))
    assert AutoConfig.from_pretrained(tmp_path / "m").model_type == "mpt"
    model, info = MptWithBiases.from_pretrained(tmp_path / "m", dtype=torch.float32,
                                                output_loading_info=True)
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    ids = torch.randint(4, 4096, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (model.eval()(ids).logits - wanted).abs().max() < 1e-4
    assert model.generation_config.eos_token_id == 2 and model.generation_config.use_cache
    assert AutoTokenizer.from_pretrained(tmp_path / "m")("Phở")["input_ids"]


def test_stock_peft_applies_the_adapter_to_transformers_mpt_over_an_exported_base(tiny, tmp_path):
    """The exported base has a config that transformers can read. MptWithBiases adds the biases."""
    from oracle import MptWithBiases
    from peft import PeftModel

    wanted = save_adapter(tiny, tmp_path / "adapter")
    write_merged(Merger(tiny), tmp_path / "base", torch.float32, str(tiny))
    model = MptWithBiases.from_pretrained(tmp_path / "base", dtype=torch.float32)
    model = PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    ids = torch.randint(4, 4096, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (model(ids).logits - wanted).abs().max() < 1e-4


def test_an_adapter_of_another_base_is_refused_by_name(tiny, tmp_path):
    other = checkpoints.vinai_config(d_model=32, n_heads=4, n_layers=2, vocab_size=4096,
                                     max_seq_len=64)
    checkpoints.write_checkpoint(tmp_path / "other", other)
    save_adapter(tmp_path / "other", tmp_path / "adapter")
    with pytest.raises(Refusal, match=r"adapter_model\.safetensors: base_model.* has shape"):
        Merger(tiny, tmp_path / "adapter")
    deeper = checkpoints.vinai_config(d_model=64, n_heads=8, n_layers=3, vocab_size=4096,
                                      max_seq_len=64)
    checkpoints.write_checkpoint(tmp_path / "deeper", deeper)
    save_adapter(tmp_path / "deeper", tmp_path / "more")
    with pytest.raises(Refusal, match="holds unknown tensor base_model"):
        Merger(tiny, tmp_path / "more")


@pytest.mark.parametrize("field, value, line", [
    ("init_lora_weights", "pissa", "init_lora_weights 'pissa' changes the base's weights"),
    ("modules_to_save", ["wte"], r"modules_to_save is not supported")])
def test_what_is_more_than_lora_is_refused(tiny, tmp_path, field, value, line):
    save_adapter(tiny, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    with pytest.raises(Refusal, match=line):
        Merger(tiny, tmp_path / "adapter")


def test_a_value_that_the_dtype_cannot_hold_is_refused(tiny, tmp_path):
    model, _ = load_base(str(tiny), **CPU)
    adapters = new_adapters(model, rank=4, alpha=8)
    with torch.no_grad():
        adapters.flat.fill_(300.0)
    adapters.cast()
    adapters.save(tmp_path / "adapter")
    merger = Merger(tiny, tmp_path / "adapter")
    with pytest.raises(Refusal, match=r"tensor transformer.* but the largest value of fp16 is"):
        write_merged(merger, tmp_path / "merged", torch.float16, "tiny")
    with torch.no_grad():
        merger.adapters.flat[0] = float("nan")
    with pytest.raises(Refusal, match=r"transformer\.blocks\.0.*NaN"):
        merger.merged("transformer.blocks.0.attn.Wqkv.weight")


@pytest.mark.parametrize("lora", [{}, {"use_dora": True}, {"lora_bias": True}])
def test_merging_one_layer_leaves_the_next_as_it_was(tiny, tmp_path, lora):
    save_adapter(tiny, tmp_path / "adapter", **lora)
    merger = Merger(tiny, tmp_path / "adapter")
    path = "transformer.blocks.1.ffn.up_proj"
    weight, bias = (merger.merged(f"{path}.{kind}").clone() for kind in ("weight", "bias"))
    merger.merged("transformer.blocks.0.ffn.up_proj.weight")
    assert torch.equal(merger.merged(f"{path}.weight"), weight)
    assert torch.equal(merger.merged(f"{path}.bias"), bias)
    zeros = torch.zeros_like(merger.tensors[f"{path}.weight"])
    assert not torch.equal(merger.merged(f"{path}.weight", zeros), weight)
    base = merger.layers[path].base_layer
    for parameter in (base.weight, base.bias):  # no merged weight is kept
        assert parameter.untyped_storage().nbytes() == 4 and not parameter.any()


@pytest.mark.parametrize("stored, merged", [
    (torch.float16, torch.float16), (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.bfloat16), (torch.float64, torch.bfloat16)])
def test_a_base_in_another_precision_is_merged_to_16_bits(tmp_path, stored, merged):
    checkpoints.write_checkpoint(tmp_path / "base", dtype=stored)
    save_adapter(tmp_path / "base", tmp_path / "adapter")
    merger = Merger(tmp_path / "base", tmp_path / "adapter")
    assert stored_dtype(merger) == merged
    write_merged(merger, tmp_path / "merged", merged, "x")
    assert {t.dtype for t in mapped_tensors(tmp_path / "merged").values()} == {merged}


def test_the_end_and_padding_of_generation_are_phogpts(tiny, tmp_path):
    config = json.loads((tiny / "config.json").read_text())
    odd = shutil.copytree(tiny, tmp_path / "odd")
    (odd / "config.json").write_text(json.dumps(config | {"attn_config": None}))
    write_merged(Merger(odd), tmp_path / "merged", torch.bfloat16, "x", chat_template="{{ 1 }}")
    said = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert said == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3, "use_cache": True}
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["attn_config"] == {
        "attn_pdrop": 0}
    tokenizer = json.loads((tmp_path / "merged" / "tokenizer_config.json").read_text())
    assert tokenizer["chat_template"] == "{{ 1 }}" and tokenizer["eos_token"] == "</s>"
