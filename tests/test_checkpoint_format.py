"""Checkpoints in VinAI's format are written shard by shard. Wrong tensors leave no checkpoint."""

import gc
import json

import pytest
import torch
from safetensors import safe_open

from phogpt_raw.model.checkpoint_format import parameter_shapes, vinai_config, write_checkpoint
from phogpt_raw.model.phogpt import ModelConfig
from phogpt_raw.model.weights import NANO, read_config, read_model
from phogpt_raw.refusal import Refusal

SHAPE = ModelConfig(d_model=32, n_heads=4, n_layers=6, vocab_size=400, max_seq_len=64)
CONFIG = vinai_config(SHAPE)
EMBEDDING = "transformer.wte.weight"


def tensors(dtype=torch.bfloat16):
    """Yield (name, tensor) of every parameter. A tensor is created when it is requested."""
    for number, (name, shape) in enumerate(parameter_shapes(SHAPE).items()):
        yield name, torch.full(shape, float(number), dtype=dtype)


def read(folder):
    model = read_model(folder, nf4=False, dtype=torch.bfloat16, device=torch.device("cpu"))
    return dict(model.named_parameters())


def test_nano_written_again_is_the_committed_folder(tmp_path):
    weights = torch.load(NANO / "pytorch_model.bin", weights_only=True)
    write_checkpoint(tmp_path, vinai_config(read_config(NANO)), weights, tokenizer=NANO)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (NANO / name).read_bytes(), name
    written = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    assert written.keys() == weights.keys()
    assert all(torch.equal(written[name], weights[name]) for name in weights)


@pytest.mark.parametrize("shape", [
    SHAPE,
    ModelConfig(64, 2, 1, 99, 77, expansion_ratio=3, no_bias=True, layer_norm_epsilon=1e-6,
                alibi_bias_max=16, clip_qkv=6.0, softmax_scale=0.5),
])
def test_the_config_holds_every_value_of_the_shape(shape):
    assert ModelConfig.from_json(vinai_config(shape)) == shape


def test_an_override_of_attn_config_keeps_its_other_fields():
    changed = vinai_config(SHAPE, attn_config={"attn_pdrop": 0}, torch_dtype="float16", new=1)
    assert type(changed["attn_config"].pop("attn_pdrop")) is int
    assert changed == {
        **CONFIG, "torch_dtype": "float16", "new": 1,
        "attn_config": {k: v for k, v in CONFIG["attn_config"].items() if k != "attn_pdrop"},
    }


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
@pytest.mark.parametrize("shards", [1, 2, 5])
def test_shards_are_of_about_equal_size_and_hold_every_tensor(tmp_path, kind, shards):
    write_checkpoint(tmp_path, CONFIG, tensors(), shards=shards, kind=kind)
    expected = dict(tensors())
    assert {n: t.tolist() for n, t in read(tmp_path).items()} == {
        n: t.tolist() for n, t in expected.items()}
    files = sorted(tmp_path.glob(f"*.{kind}"))
    total = sum(t.nbytes for t in expected.values())
    assert len(files) == shards
    largest = max(t.nbytes for t in expected.values())
    headers = 200 * len(expected)  # the format itself needs up to 200 bytes per tensor
    for file in files:
        size = file.stat().st_size
        assert abs(size - total / shards) <= largest + (headers if kind == "safetensors" else 30e3)
    if shards > 1:
        [index] = tmp_path.glob("*.index.json")
        index = json.loads(index.read_text())
        assert index["metadata"]["total_size"] == total
        assert set(index["weight_map"]) == set(expected)


def test_safetensors_name_their_format_as_transformers_asks(tmp_path):
    write_checkpoint(tmp_path, CONFIG, tensors(), kind="safetensors")
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_at_most_one_shard_is_in_memory(tmp_path):
    """The test counts the memory of all fp64 tensors each time a tensor is requested.

    Outside this test no tensor in this process is fp64.
    """
    peak = 0

    def watched():
        nonlocal peak
        for name, tensor in tensors(torch.float64):
            alive = {t.untyped_storage().data_ptr(): t.nbytes for t in gc.get_objects()
                     if issubclass(type(t), torch.Tensor) and t.dtype == torch.float64}
            peak = max(peak, sum(alive.values()))
            yield name, tensor

    write_checkpoint(tmp_path, CONFIG, watched(), shards=4, kind="safetensors")
    sizes = {name: shape.numel() * 8 for name, shape in parameter_shapes(SHAPE).items()}
    # a shard has at most a quarter of all bytes plus the largest tensor
    assert sizes[EMBEDDING] < peak <= sum(sizes.values()) / 4 + max(sizes.values())


def test_a_view_is_stored_without_the_rest_of_its_storage(tmp_path):
    whole = torch.zeros(1000, *parameter_shapes(SHAPE)[EMBEDDING], dtype=torch.bfloat16)
    write_checkpoint(tmp_path, CONFIG, {**dict(tensors()), EMBEDDING: whole[7]})
    assert (tmp_path / "pytorch_model.bin").stat().st_size < 0.1 * whole.nbytes


@pytest.mark.parametrize("change, message", [
    (lambda pairs: pairs[:-1], "1 tensors are missing, the first is transformer.norm_f.bias"),
    (lambda pairs: [*pairs, pairs[0]], "wte.weight is given twice"),
    (lambda pairs: [*pairs, ("lm_head.weight", pairs[0][1])], "lm_head.weight is given twice or"),
    (lambda pairs: [(n, t.flatten()) for n, t in pairs], r"wte.weight: shape \[12800\], not \[400"),
])
def test_tensors_of_another_model_are_an_error_and_leave_no_checkpoint(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        write_checkpoint(tmp_path, CONFIG, change(list(tensors())), shards=2)
    with pytest.raises(Refusal):
        read(tmp_path)


def test_more_shards_than_the_tensors_fill_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="500 shards: the tensors fill only 75; use fewer shards"):
        write_checkpoint(tmp_path, CONFIG, tensors(), shards=500)


def test_a_tokenizers_other_files_are_copied_and_a_missing_one_is_refused_first(tmp_path):
    source = tmp_path / "base"
    source.mkdir()
    for name in ("tokenizer.json", "special_tokens_map.json", "README.md"):
        (source / name).write_text("{}")
    with pytest.raises(Refusal, match=r"tokenizer_config\.json: missing"):
        write_checkpoint(tmp_path / "out", CONFIG, tensors(), tokenizer=source)
    assert not (tmp_path / "out").exists()
    (source / "tokenizer_config.json").write_text("{}")
    write_checkpoint(tmp_path / "out", CONFIG, tensors(), tokenizer=source)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "config.json", "pytorch_model.bin", "tokenizer.json", "tokenizer_config.json",
        "special_tokens_map.json"}
