"""The content of the GGUF files; test_llama.py runs them in llama.cpp."""

import json

import checkpoints
import pytest
import torch

from phogpt_raw.export.gguf import KINDS, Rows, write_adapter, write_model
from phogpt_raw.export.merge import Merger
from phogpt_raw.model.weights import NANO
from phogpt_raw.refusal import Refusal

gguf = pytest.importorskip("gguf")
from test_merge import save_adapter  # noqa: E402


def read(file):
    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: tensor for tensor in reader.tensors}


def values(tensor):
    """The values of a GGUF file's tensor, in fp32."""
    return torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())


@pytest.fixture
def merger(tiny, tmp_path):
    save_adapter(tiny, tmp_path / "adapter")
    return Merger(tiny, tmp_path / "adapter")


@pytest.mark.parametrize("kind, error", [("f32", 0), ("f16", 5e-4), ("q8_0", 5e-3), ("q4_0", 0.1)])
def test_every_tensor_is_there_with_its_values(merger, tmp_path, kind, error):
    write_model(merger, tmp_path / "m.gguf", kind, name="tiny", chat_template="x")
    fields, tensors = read(tmp_path / "m.gguf")
    assert len(tensors) == 12 * 2 + 3 and "output.weight" not in tensors  # the head is left out
    names = {"token_embd.weight": "transformer.wte.weight",
             "output_norm.bias": "transformer.norm_f.bias",
             "blk.1.attn_qkv.weight": "transformer.blocks.1.attn.Wqkv.weight",
             "blk.1.attn_qkv.bias": "transformer.blocks.1.attn.Wqkv.bias",
             "blk.0.ffn_down.weight": "transformer.blocks.0.ffn.down_proj.weight",
             "blk.0.ffn_norm.weight": "transformer.blocks.0.norm_2.weight"}
    assert names.keys() < tensors.keys()
    for name, own in names.items():
        wanted = merger.merged(own).float()
        found = values(tensors[name]).view(wanted.shape)
        bound = 0 if wanted.dim() == 1 else error * float(wanted.abs().max())
        assert (found - wanted).abs().max() <= bound, name
    embedding = tensors["token_embd.weight"].tensor_type.name
    assert embedding == {"q4_0": "Q8_0"}.get(kind, kind.upper())
    assert fields["general.file_type"] == {"f32": 0, "f16": 1, "q8_0": 7, "q4_0": 2}[kind]


def test_a_tensor_is_converted_some_rows_at_a_time(monkeypatch, tmp_path):
    tensor = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    for kind in KINDS:
        whole, parts = (tmp_path / name for name in "ab")
        for file, chunk in ((whole, 2**23), (parts, 200)):
            monkeypatch.setattr("phogpt_raw.export.gguf.CHUNK", chunk)
            rows = Rows("x", tensor.shape, lambda: tensor, kind)
            with file.open("wb") as opened:
                rows.tofile(opened)
            assert file.stat().st_size == rows.nbytes
        assert whole.read_bytes() == parts.read_bytes()


def test_two_exports_are_equal(merger, tmp_path):
    for name in ("one", "two"):
        write_model(merger, tmp_path / name, "q8_0", name="tiny", chat_template="x")
        write_adapter(merger, tmp_path / f"{name}-adapter")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert (tmp_path / "one-adapter").read_bytes() == (tmp_path / "two-adapter").read_bytes()


def test_the_shape_and_the_tokenizer_are_in_the_file(merger, tmp_path):
    write_model(merger, tmp_path / "m.gguf", "f32", name="tiny", chat_template="x")
    fields, _ = read(tmp_path / "m.gguf")
    assert fields["general.architecture"] == "mpt" and fields["general.name"] == "tiny"
    for key, value in {"context_length": 128, "embedding_length": 64, "block_count": 2,
                       "feed_forward_length": 256, "attention.head_count": 8,
                       "attention.layer_norm_epsilon": pytest.approx(1e-5),
                       "attention.max_alibi_bias": 8}.items():
        assert fields[f"mpt.{key}"] == value, key
    assert "mpt.attention.clamp_kqv" not in fields
    tokenizer = {key.removeprefix("tokenizer.ggml."): value for key, value in fields.items()}
    assert (tokenizer["model"], tokenizer["pre"]) == ("gpt2", "bloom")
    assert [tokenizer[f"{name}_token_id"] for name in ("unknown", "bos", "eos", "padding")] == [
        0, 1, 2, 3]
    assert tokenizer["add_bos_token"] is False and tokenizer["add_eos_token"] is False
    assert tokenizer["tokens"][:4] == ["<unk>", "<s>", "</s>", "<pad>"]
    assert tokenizer["token_type"][:5] == [3, 3, 3, 3, 1]
    assert len(tokenizer["tokens"]) == len(tokenizer["token_type"]) == 4096
    content = json.loads((NANO / "tokenizer.json").read_text("utf-8"))["model"]
    assert tokenizer["merges"] == [" ".join(merge) for merge in content["merges"]]
    assert fields["tokenizer.chat_template"] == "x"


def test_rows_of_the_embedding_beyond_the_tokenizer_are_unused_tokens(tmp_path):
    """For example, the embedding of 7B5 has 200 rows more than its tokenizer has tokens."""
    config = checkpoints.vinai_config(d_model=64, n_heads=4, n_layers=1, vocab_size=4100,
                                      max_seq_len=64, attn_config={"clip_qkv": 6})
    checkpoints.write_checkpoint(tmp_path / "base", config)
    write_model(Merger(tmp_path / "base"), tmp_path / "m.gguf", "f16", name="x", chat_template="")
    fields, _ = read(tmp_path / "m.gguf")
    assert fields["tokenizer.ggml.tokens"][4096:] == [f"[PAD{n}]" for n in range(4096, 4100)]
    assert fields["tokenizer.ggml.token_type"][4096:] == [5] * 4
    assert fields["mpt.attention.clamp_kqv"] == 6


def test_an_adapter_alone_has_llamas_names_and_scale(tiny, tmp_path):
    save_adapter(tiny, tmp_path / "adapter", use_rslora=True, rank_pattern={"up_proj": 2})
    merger = Merger(tiny, tmp_path / "adapter")
    write_adapter(merger, tmp_path / "a.gguf", "f32")
    fields, tensors = read(tmp_path / "a.gguf")
    assert fields["general.type"] == "adapter" and fields["adapter.type"] == "lora"
    alpha = fields["adapter.lora.alpha"]
    assert len(tensors) == 2 * 3 * 2
    for own, name in (("attn.Wqkv", "attn_qkv"), ("ffn.up_proj", "ffn_up")):
        A, B = (values(tensors[f"blk.1.{name}.weight.lora_{part}"]) for part in "ab")
        layer = merger.layers[f"transformer.blocks.1.{own}"]
        delta = alpha / len(A) * (B @ A)
        torch.testing.assert_close(delta, layer.get_delta_weight("default"))


def test_half_precision_halves_an_adapter(merger, tmp_path):
    write_adapter(merger, tmp_path / "a.gguf")
    _, tensors = read(tmp_path / "a.gguf")
    assert {tensor.tensor_type.name for tensor in tensors.values()} == {"F16"}


@pytest.mark.parametrize("lora, line", [
    ({"use_dora": True}, "plain LoRA only, not Dora"),
    ({"bias": "all"}, "trained biases"), ({"lora_bias": True}, "trained biases")])
def test_an_adapter_that_is_more_than_lora_must_be_merged(tiny, tmp_path, lora, line):
    save_adapter(tiny, tmp_path / "adapter", **lora)
    with pytest.raises(Refusal, match=line):
        write_adapter(Merger(tiny, tmp_path / "adapter"), tmp_path / "a.gguf")


def test_what_llama_would_compute_otherwise_is_refused(tmp_path):
    config = checkpoints.vinai_config(d_model=64, n_heads=4, n_layers=1, vocab_size=4096,
                                      max_seq_len=64, attn_config={"softmax_scale": 0.5})
    checkpoints.write_checkpoint(tmp_path / "base", config)
    with pytest.raises(Refusal, match=r"softmax_scale 0\.5: llama\.cpp always uses 1 / sqrt"):
        write_model(Merger(tmp_path / "base"), tmp_path / "m", "f16", name="x", chat_template="")


def test_another_kind_of_tokenizer_is_refused(tiny, tmp_path):
    import shutil

    shutil.copytree(tiny, tmp_path / "base")
    file = tmp_path / "base" / "tokenizer.json"
    content = json.loads(file.read_text("utf-8"))
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\s+"
    file.write_text(json.dumps(content), "utf-8")
    with pytest.raises(Refusal, match=r"tokenizer\.json: is not byte-level BPE with BLOOM's"):
        write_model(Merger(tmp_path / "base"), tmp_path / "m", "f16", name="x", chat_template="")


def test_rows_that_do_not_divide_into_blocks_are_refused(tmp_path):
    config = checkpoints.vinai_config(d_model=48, n_heads=4, n_layers=1, vocab_size=4096,
                                      max_seq_len=64)
    checkpoints.write_checkpoint(tmp_path / "base", config)
    with pytest.raises(Refusal, match="rows of 48, not a multiple of 32; use f16"):
        write_model(Merger(tmp_path / "base"), tmp_path / "m", "q8_0", name="x", chat_template="")


def test_fp16_that_would_overflow_is_refused(merger, tmp_path):
    merger.tensors["transformer.blocks.0.attn.Wqkv.weight"] = torch.full((192, 64), 1e5)
    with pytest.raises(Refusal, match=r"attn_qkv.* but the largest value of F16 is"):
        write_model(merger, tmp_path / "m", "f16", name="x", chat_template="")


@pytest.mark.parametrize("kind, largest", [("q8_0", 127 * 65504), ("q4_0", 8 * 65504)])
def test_a_scale_that_would_overflow_is_refused(merger, tmp_path, kind, largest):
    """In a quantised type the scale of each block of weights is an fp16 value, which can overflow.
    """
    name = "transformer.blocks.0.attn.Wqkv.weight"
    merger.tensors[name] = torch.full((192, 64), 0.99 * largest)
    write_model(merger, tmp_path / "m", kind, name="x", chat_template="")
    _, tensors = read(tmp_path / "m")
    found = values(tensors["blk.0.attn_qkv.weight"])
    assert abs(found.max() / (0.99 * largest) - 1) < 0.15
    merger.tensors[name] = torch.full((192, 64), 1.01 * largest)
    with pytest.raises(Refusal, match="use --gguf f32"):
        write_model(merger, tmp_path / "m", kind, name="x", chat_template="")


def test_the_feed_forward_may_be_of_another_width(tmp_path):
    config = checkpoints.vinai_config(d_model=64, n_heads=4, n_layers=1, vocab_size=4096,
                                      max_seq_len=64, expansion_ratio=2)
    checkpoints.write_checkpoint(tmp_path / "base", config)
    write_model(Merger(tmp_path / "base"), tmp_path / "m", "f16", name="x", chat_template="")
    fields, tensors = read(tmp_path / "m")
    assert fields["mpt.feed_forward_length"] == 128
    assert list(tensors["blk.0.ffn_up.weight"].shape) == [64, 128]


@pytest.mark.parametrize("small", [1e-6, 1.0, 3e5])
def test_values_too_small_or_too_large_for_16_bits_are_moved_to_the_other_half(small):
    from phogpt_raw.export.gguf import balanced

    dice = torch.Generator().manual_seed(0)
    A, B = torch.randn(4, 32, generator=dice), small * torch.randn(16, 4, generator=dice)
    one, other = balanced(A, B)
    assert torch.equal(other.double() @ one.double(), B.double() @ A.double())  # equal bit for bit
    for part in (one, other):
        assert (part.half().float() - part).abs().max() < 1e-3 * part.abs().max()
    zero = torch.zeros(16, 4)
    assert torch.equal(balanced(A, zero)[0], A)
