"""The adapters' flat buffer, and adapter files that are exchanged with stock PEFT.

Stock PEFT runs on the oracle: transformers' MPT with biases added (oracle.py).
"""

import json
import shutil
import socket
import warnings

import peft
import pytest
import torch
from oracle import lively_tensors, oracle, ours, random_ids, small_config
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from phogpt_raw.decode.engine import answer
from phogpt_raw.model.adapter_config import named_base
from phogpt_raw.model.adapters import TARGETS, load_adapters, new_adapters, same_base
from phogpt_raw.model.flat import FlatBuffer
from phogpt_raw.model.weights import load_base
from phogpt_raw.refusal import Refusal

CONFIG = small_config(6, 8, 2)  # at rank 5 no matrix has a multiple of 256 elements
SUBSETS = pytest.mark.parametrize("targets", [TARGETS, ("Wqkv",), ("out_proj", "down_proj")],
                                  ids="+".join)
# The tolerance is for fp32. Stock PEFT and this project compute the same W x + s B (A x), but add
# the products in different orders.
STOCK = dict(rtol=0, atol=3e-5)


def base():
    return ours(CONFIG, lively_tensors(CONFIG)).requires_grad_(False)


def trained(*, rank=5, alpha=7, seed=1, **kwargs):
    """A model with adapters.

    Their B matrices are random, because new B matrices are zero and would not change any output.
    """
    model = base()
    adapters = new_adapters(model, rank=rank, alpha=alpha, base="vinai/PhoGPT-4B", **kwargs)
    dice = torch.Generator().manual_seed(seed)
    for name, view in adapters.views:
        if "lora_B" in name:
            view.normal_(std=0.1, generator=dice)
    return model, adapters


@torch.no_grad()
def logits_of(model):
    return model.logits(model(random_ids(CONFIG, 2, 20)))


@pytest.fixture
def saved(tmp_path):
    model, adapters = trained()
    adapters.save(tmp_path / "adapter")
    return tmp_path / "adapter", model, adapters


# -- the flat buffer


def check_flat(model, adapters):
    flat = adapters.flat
    first, last = flat.data_ptr(), flat.data_ptr() + flat.nbytes
    end, count = 0, 0
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert [n for n, _ in adapters.views] == list(trainable)
    for name, view in adapters.views:
        parameter = trainable[name]
        assert "lora_" in name and parameter.dtype == torch.float32
        assert parameter.data_ptr() == view.data_ptr() and parameter.shape == view.shape
        assert first <= view.data_ptr() and view.data_ptr() + view.nbytes <= last
        offset = (view.data_ptr() - first) // 4
        assert offset % 256 == 0 and offset >= end  # 256: the 8-bit optimizer's block size
        assert parameter.grad.data_ptr() - flat.grad.data_ptr() == 4 * offset
        end, count = offset + view.numel(), count + view.numel()
    assert count == adapters.count
    assert flat.dtype == flat.grad.dtype == torch.float32 and flat.is_leaf and flat.requires_grad
    return trainable


@SUBSETS
def test_every_adapter_is_an_aligned_view_of_the_flat_buffer(targets):
    model, adapters = trained(targets=targets)
    trainable = check_flat(model, adapters)
    assert {n.split(".lora_")[0].split(".")[-1] for n in trainable} == set(targets)
    assert len(trainable) == 2 * len(targets) * CONFIG["n_layers"]
    adapters.flat.data += 1.0
    for name, view in adapters.views:
        assert torch.equal(view, trainable[name])


@pytest.mark.parametrize("nf4", [True, False], ids=["nf4", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_adapters_are_fp32_and_all_that_trains_over_any_base(adapted, nf4, dtype):
    model, adapters = adapted(nf4=nf4, dtype=dtype)
    check_flat(model, adapters)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert {p.dtype for p in frozen} == ({torch.uint8, dtype} if nf4 else {dtype})
    logits_BLV = model.logits(model(torch.tensor([[5, 6, 7]])))
    assert logits_BLV.dtype == dtype
    logits_BLV.float().square().sum().backward()
    check_flat(model, adapters)  # autograd added to the views and did not replace them
    assert adapters.flat.grad.isfinite().all()
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
    assert all(p.grad is None for p in frozen)


def test_gradients_land_in_the_flat_buffer():
    """The gradients of the adapters are views of one flat buffer.

    They accumulate over two backward passes. The gaps between the views stay zero.
    """
    model, adapters = trained()
    plain, _ = trained()
    for parameter in plain.parameters():
        parameter.grad = None  # torch then allocates a separate gradient
    ids_BL = random_ids(CONFIG, 2, 9)
    for _ in range(2):
        for m in (model, plain):
            m.logits(m(ids_BL)).square().sum().backward()
    expected = {n: p.grad for n, p in plain.named_parameters() if p.requires_grad}
    total = 0.0
    for (name, view), (_, parameter) in zip(
        adapters.views, filter(lambda np: np[1].requires_grad, model.named_parameters()),
        strict=True,
    ):
        start = (view.data_ptr() - adapters.flat.data_ptr()) // 4
        piece = adapters.flat.grad[start : start + view.numel()].view_as(view)
        assert torch.equal(piece, expected[name]) and torch.equal(parameter.grad, piece), name
        total += piece.double().square().sum().item()
    # The whole buffer has the same norm as the adapters' gradients, so the gaps are zero.
    assert adapters.flat.grad.double().square().sum().item() == pytest.approx(total, rel=1e-12)
    assert total > 0


# -- the copy in the compute dtype


def bf16_pair(adapted, **lora):
    """Two models with the same weights.

    The first model reads the adapters' shared bf16 copy. The second model casts an adapter at each
    use.
    """
    model, adapters = adapted(dtype=torch.bfloat16, **lora)
    reference, theirs = adapted(dtype=torch.bfloat16, **lora)
    for p in reference.parameters():
        if p.requires_grad:
            del p.compute_copy
    return model, adapters, reference, theirs


def step(model, ids_BL, recompute):
    """Return the logits, and add the gradient of the loss to the accumulated gradients."""
    logits = model.logits(model(ids_BL, recompute=recompute)).float()
    logits.square().mean().backward()
    return logits.detach()


@pytest.mark.parametrize("nf4", [True, False], ids=["nf4", "plain"])
@pytest.mark.parametrize("recompute", [0, 2])
def test_one_cast_an_update_gives_what_a_cast_a_layer_gives(adapted, nf4, recompute):
    """One cast in each update and a cast in each layer give equal results, bit for bit.

    This holds for two accumulated micro-batches, after a change of the weights, and in no_grad.
    """
    model, adapters, reference, theirs = bf16_pair(adapted, nf4=nf4)
    assert adapters.compute.dtype == torch.bfloat16 and adapters.flat.dtype == torch.float32
    dice = torch.Generator().manual_seed(7)
    for _ in range(3):
        change = 0.01 * torch.randn(adapters.flat.shape, generator=dice)
        for a in (adapters, theirs):
            a.flat.data += change  # stands for an optimizer's update
            a.cast()
            a.flat.grad.zero_()
        for _ in range(2):
            ids_BL = torch.randint(4, 4096, (2, 9), generator=dice)
            mine, wanted = (step(m, ids_BL, recompute) for m in (model, reference))
            assert torch.equal(mine, wanted)
        assert adapters.flat.grad.norm() > 0
        assert torch.equal(adapters.flat.grad, theirs.flat.grad)
        with torch.no_grad():
            assert torch.equal(model(ids_BL), reference(ids_BL))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_new_weights_count_from_the_next_cast_on(adapted, grad, training):
    model, adapters = adapted(dtype=torch.bfloat16)
    model.train(training)
    ids_BL = torch.tensor([[5, 6, 7, 8]])
    with torch.set_grad_enabled(grad):
        first = model(ids_BL).detach().clone()
        adapters.flat.data.mul_(-3)
        assert torch.equal(model(ids_BL), first)
        adapters.cast()
        second = model(ids_BL).detach()
    assert not torch.equal(first, second)
    for name, view in adapters.views:
        parameter = dict(model.named_parameters())[name]
        assert torch.equal(parameter.compute_copy, view.bfloat16())


def test_loaded_adapters_count_at_the_next_forward_in_bf16(adapted, tmp_path):
    model, adapters = adapted(dtype=torch.bfloat16)
    ids_BL = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        wanted = model(ids_BL).clone()
        adapters.save(tmp_path / "adapter")
        adapters.flat.data.zero_()
        adapters.cast()
        assert not torch.equal(model(ids_BL), wanted)
        adapters.load(tmp_path / "adapter")
        assert torch.equal(model(ids_BL), wanted)


def test_in_fp32_the_adapters_have_no_copy(adapted):
    model, adapters = adapted()
    assert adapters.compute is None
    assert not any(hasattr(p, "compute_copy") for p in model.parameters())


def test_the_copy_is_no_part_of_what_is_saved(adapted, tmp_path):
    _, adapters = adapted(dtype=torch.bfloat16)
    adapters.save(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.float32}
    assert len(saved) == len(adapters.views)


# -- adapters that are not trained


class Reads(TorchDispatchMode):
    """Counts the operations that have an argument in the memory of `buffer`."""

    def __init__(self, buffer):
        super().__init__()
        self.memory, self.count = buffer.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        self.count += any(t.untyped_storage().data_ptr() == self.memory for t in given)
        return operation(*args, **(kwargs or {}))


@pytest.fixture
def loaded(adapted, tiny, tmp_path):
    """A function that loads tiny with a saved adapter and returns (model, adapters)."""
    adapted()[1].save(tmp_path / "adapter")

    def load(dtype, trainable, nf4=True):
        model, _ = load_base(str(tiny), nf4=nf4, dtype=dtype, device="cpu")
        return model, load_adapters(model, tmp_path / "adapter", trainable=trainable)

    return load


@pytest.mark.parametrize("nf4", [True, False], ids=["nf4", "plain"])
def test_decoding_in_bf16_casts_no_adapter(monkeypatch, loaded, nf4):
    """Decoding does not read the fp32 buffer. So it casts neither the buffer nor a single weight.
    """
    model, adapters = loaded(torch.bfloat16, trainable=False, nf4=nf4)
    casts = []
    monkeypatch.setattr(FlatBuffer, "cast", casts.append)
    with Reads(adapters.flat) as reads:
        answer(model, [[5, 6, 7]], eos_id=2, pad_id=3, max_new_tokens=5)
    assert casts == [] and reads.count == 0
    with reads:
        adapters.flat.sum()
    assert reads.count == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_adapters_that_are_not_trained_have_no_gradient_and_answer_the_same(loaded, dtype):
    model, adapters = loaded(dtype, trainable=False)
    trained_model, trained_adapters = loaded(dtype, trainable=True)
    ids_BL = torch.tensor([[5, 6, 7, 8]])
    assert not model(ids_BL).requires_grad
    assert not adapters.flat.requires_grad and adapters.flat.grad is None
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    check_flat(trained_model, trained_adapters)
    with torch.no_grad():
        assert torch.equal(trained_model(ids_BL), model(ids_BL))
    assert torch.equal(adapters.flat, trained_adapters.flat)


def test_adapters_that_are_not_trained_can_be_saved_and_loaded_into(loaded, tmp_path):
    _, adapters = loaded(torch.bfloat16, trainable=False)
    adapters.save(tmp_path / "again")
    before = adapters.compute.clone()
    adapters.flat.data.zero_()
    adapters.cast()
    adapters.load(tmp_path / "again")
    assert torch.equal(adapters.compute, before) and before.any()
    file = "adapter_model.safetensors"
    assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "adapter" / file).read_bytes()


# -- new adapters


def test_a_fresh_adapter_changes_nothing_and_follows_the_seed():
    model, plain = base(), base()
    adapters = new_adapters(model, rank=5, alpha=7, seed=3)
    assert torch.equal(logits_of(model), logits_of(plain))
    for name, view in adapters.views:
        assert (view.abs().max() == 0) == ("lora_B" in name)
    again, other = (new_adapters(base(), rank=5, alpha=7, seed=s) for s in (3, 4))
    assert torch.equal(adapters.flat, again.flat) and not torch.equal(adapters.flat, other.flat)


def test_nf4_layers_get_pefts_4_bit_lora(adapted):
    from peft.tuners.lora import Linear as PlainLora
    from peft.tuners.lora.bnb import Linear4bit as NF4Lora

    for nf4, kind in ((True, NF4Lora), (False, PlainLora)):
        model, _ = adapted(nf4=nf4)
        for block in model.transformer.blocks:
            for layer in (block.attn.Wqkv, block.attn.out_proj, block.ffn.up_proj,
                          block.ffn.down_proj):
                assert type(layer) is kind


# -- files


@SUBSETS
def test_saving_and_loading_is_bit_equal(tmp_path, targets):
    model, adapters = trained(targets=targets)
    adapters.save(tmp_path / "new" / "folder")
    other = base()
    loaded = load_adapters(other, tmp_path / "new" / "folder")
    check_flat(other, loaded)
    assert torch.equal(adapters.flat, loaded.flat)
    assert torch.equal(logits_of(model), logits_of(other))
    loaded.save(tmp_path / "again")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        file = tmp_path / "new" / "folder" / name
        assert file.read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_loading_into_existing_adapters_keeps_the_views(saved):
    folder, _, adapters = saved
    other_model, other = trained(seed=2)
    assert not torch.equal(adapters.flat, other.flat)
    other.load(folder)
    check_flat(other_model, other)
    assert torch.equal(adapters.flat, other.flat)


def test_files_are_as_stock_peft_writes_them(saved):
    folder, _, adapters = saved
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["inference_mode"] is True and config["peft_type"] == "LORA"
    assert config["base_model_name_or_path"] == named_base(folder) == "vinai/PhoGPT-4B"
    assert config["task_type"] == "CAUSAL_LM" and config["target_modules"] == sorted(TARGETS)
    assert (config["r"], config["lora_alpha"], config["bias"]) == (5, 7, "none")
    tensors = load_file(folder / "adapter_model.safetensors")
    assert len(tensors) == len(adapters.views)
    assert "base_model.model.transformer.blocks.1.ffn.up_proj.lora_B.weight" in tensors
    assert all(t.dtype == torch.float32 for t in tensors.values())
    size = (folder / "adapter_model.safetensors").stat().st_size
    assert size < 4 * adapters.count + 10_000  # the whole buffer is not written for each view


def test_saving_leaves_the_model_training(saved):
    _, model, adapters = saved
    assert model.peft_config["default"].inference_mode is False
    check_flat(model, adapters)


def test_saving_does_not_ask_the_hub(tmp_path, monkeypatch):
    """The base's name looks like a hub id. By default PEFT would ask the hub for the base's config.
    """
    asked = []

    def no_network(*address, **kwargs):
        asked.append(address)
        raise OSError("no network")  # PEFT would catch this error silently

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    _, adapters = trained()
    adapters.save(tmp_path)
    assert load_file(tmp_path / "adapter_model.safetensors")
    assert asked == []


@SUBSETS
@torch.no_grad()
def test_stock_peft_loads_what_we_save(tmp_path, targets, recwarn):
    model, adapters = trained(targets=targets)
    adapters.save(tmp_path)
    stock = peft.PeftModel.from_pretrained(oracle(CONFIG, lively_tensors(CONFIG)), tmp_path)
    ids_BL = random_ids(CONFIG, 2, 20)
    expected = stock.eval()(ids_BL).logits
    torch.testing.assert_close(logits_of(model), expected, **STOCK)
    assert (expected - logits_of(base())).abs().max() > 0.05  # the adapter changes the logits
    assert not [w for w in recwarn if "adapter keys" in str(w.message)]


@pytest.mark.parametrize("training", [True, False])
def test_injected_layers_are_in_the_models_mode(training):
    """For example, the new layers must not apply dropout in eval mode."""
    model = base().train(training)
    new_adapters(model, rank=2, alpha=2, dropout=0.5)
    assert {module.training for module in model.modules()} == {training}


@SUBSETS
@torch.no_grad()
def test_what_stock_peft_saves_is_loaded(tmp_path, targets):
    stock = peft.get_peft_model(oracle(CONFIG, lively_tensors(CONFIG)), peft.LoraConfig(
        r=3, lora_alpha=12, lora_dropout=0.1, target_modules=list(targets), task_type="CAUSAL_LM",
        init_lora_weights=False))  # B is random and not zero
    stock.save_pretrained(tmp_path)
    model = base()
    adapters = load_adapters(model, tmp_path)
    check_flat(model, adapters)
    ids_BL = random_ids(CONFIG, 2, 20)
    expected = stock.eval()(ids_BL).logits
    torch.testing.assert_close(logits_of(model), expected, **STOCK)
    assert (expected - logits_of(base())).abs().max() > 0.05


def test_gradients_are_stock_pefts(tmp_path):
    model, adapters = trained()
    adapters.save(tmp_path)
    stock = peft.PeftModel.from_pretrained(
        oracle(CONFIG, lively_tensors(CONFIG)), tmp_path, is_trainable=True)
    ids_BL = random_ids(CONFIG, 2, 20)
    targets = torch.randint(4, 256, (2, 20), generator=torch.Generator().manual_seed(0))
    for logits_BLV in (model.logits(model(ids_BL)), stock(ids_BL).logits):
        nn.functional.cross_entropy(logits_BLV.flatten(0, 1), targets.flatten()).backward()
    theirs = {n.removeprefix("base_model.model."): p.grad
              for n, p in stock.named_parameters() if p.requires_grad}
    mine = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert mine.keys() == theirs.keys()
    for name, grad in theirs.items():  # the two sides add fp32 values in different orders
        size = grad.abs().max().item()
        assert size > 0
        torch.testing.assert_close(mine[name], grad, rtol=1e-4, atol=1e-5 * size)


def test_an_adapter_folders_rank_and_alpha_win(tmp_path):
    model, adapters = trained(rank=2, alpha=32)
    adapters.save(tmp_path)
    other = base()
    load_adapters(other, tmp_path)
    layer = other.transformer.blocks[0].attn.Wqkv
    assert layer.r["default"] == 2 and layer.scaling["default"] == 16
    assert other.peft_config["default"].lora_alpha == 32
    assert torch.equal(logits_of(model), logits_of(other))


# -- refusals


@pytest.mark.parametrize("targets", [("q_proj",), ("Wqkv", "q_proj"), ("Wqkv", "lm_head"),
                                     ("Wqkv", "wte"), ("Wqkv", "norm_1")], ids="+".join)
def test_targets_that_the_model_lacks_are_refused_by_name(targets):
    model = base()
    with pytest.raises(Refusal, match=f"no linear layer {targets[-1]}.*Wqkv.*up_proj"):
        new_adapters(model, rank=4, alpha=8, targets=targets)
    assert not any("lora" in name for name, _ in model.named_parameters())


NAME = "base_model.model.transformer.blocks.0.attn.Wqkv.lora_A.weight"


@pytest.mark.parametrize(("change", "parts"), [
    (lambda t: t.pop(NAME), ("lacks", NAME)),
    (lambda t: t.update({NAME.replace("blocks.0", "blocks.9"): t[NAME].clone()}),
     ("unknown", NAME.replace("blocks.0", "blocks.9"))),
    (lambda t: t.update({NAME: t[NAME][:, :-1].contiguous()}), (NAME, "[5, 47]", "[5, 48]")),
    (lambda t: t.update({NAME: t[NAME][:3].contiguous()}), (NAME, "[3, 48]", "[5, 48]")),
], ids=["missing", "extra", "misshapen", "other-rank"])
def test_a_file_that_does_not_fit_is_refused_by_the_tensors_name(saved, change, parts):
    folder, _, adapters = saved
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    for load in (lambda: load_adapters(base(), folder), lambda: adapters.load(folder)):
        with pytest.raises(Refusal) as refusal:
            load()
        for part in (str(file), *parts):
            assert part in str(refusal.value)


def test_an_adapter_without_pefts_prefix_is_refused(saved):
    """Stock PEFT would only warn and not load the adapter's weights."""
    folder, _, adapters = saved
    tensors = load_file(folder / "adapter_model.safetensors")
    stripped = {name.removeprefix("base_model.model."): t for name, t in tensors.items()}
    save_file(stripped, folder / "adapter_model.safetensors")
    with pytest.raises(Refusal, match=r"lacks tensor base_model\.model\.transformer\.blocks\.0"):
        adapters.load(folder)


def test_an_adapter_of_a_wider_model_is_refused(saved):
    folder, _, _ = saved
    wide = small_config(6, 16, 2)
    with pytest.raises(Refusal, match=r"has shape \[.*this model needs \["):
        load_adapters(ours(wide, lively_tensors(wide)).requires_grad_(False), folder)


@pytest.mark.parametrize("config", [
    peft.IA3Config(target_modules=["Wqkv"], feedforward_modules=[]),
    peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
], ids=lambda c: c.peft_type.value)
def test_an_adapter_that_is_not_lora_is_refused(saved, config):
    folder, _, _ = saved
    config.save_pretrained(folder)
    with pytest.raises(Refusal, match=r"adapter_config\.json.*only LoRA is supported"):
        load_adapters(base(), folder)


def test_a_spoiled_folder_is_refused_by_file(saved, tmp_path):
    folder, _, adapters = saved

    def refused(name, content):
        spoiled = tmp_path / "spoiled"
        shutil.rmtree(spoiled, ignore_errors=True)
        shutil.copytree(folder, spoiled)
        if content is None:
            (spoiled / name).unlink()
        else:
            (spoiled / name).write_bytes(content)
        with pytest.raises(Refusal) as refusal:
            load_adapters(base(), spoiled)
        assert str(spoiled / name) in str(refusal.value)
        return str(refusal.value)

    whole = (folder / "adapter_model.safetensors").read_bytes()
    assert "missing" in refused("adapter_model.safetensors", None)
    assert "cannot be read" in refused("adapter_model.safetensors", whole[:-100])
    assert "missing" in refused("adapter_config.json", None)
    assert "not JSON" in refused("adapter_config.json", b'{"peft_type": "LORA"')
    with pytest.raises(Refusal, match=r"adapter_config\.json: missing"):
        load_adapters(base(), tmp_path / "nowhere")
    assert adapters.count


@pytest.mark.parametrize("changed, line", [
    ({"layers_to_transform": [0, 40]}, "layers_to_transform 40, but the base's blocks are 0 to 1"),
    ({"layers_to_transform": 2}, "layers_to_transform 2, but the base's blocks are 0 to 1"),
    ({"rank_pattern": {"q_proj": 3}}, "rank_pattern names q_proj, but no layer of that name has"),
    ({"alpha_pattern": {"blocks.7.attn.Wqkv": 3}}, "alpha_pattern names blocks.7.attn.Wqkv, but"),
    ({"alpha_pattern": {"kv": 3}}, "alpha_pattern names kv, but no layer of that name has"),
    ({"r": 2**16}, "rank 65536, but the highest rank of its weights is 5"),
    ({"rank_pattern": {"Wqkv": 6}}, "rank 6, but the highest rank of its weights is 5"),
    ({"target_modules": ".*"}, "its layers do not match this base"),
    ({"target_modules": "zz"}, "its layers do not match this base .*zz not found")])
def test_a_configuration_of_another_model_is_one_line_with_its_file(saved, tmp_path, changed, line):
    other = shutil.copytree(saved[0], tmp_path / "other")
    file = other / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    with pytest.raises(Refusal, match=f"^{file}: {line}") as refused, warnings.catch_warnings(
            action="error"):
        load_adapters(base(), other)
    assert len(str(refused.value)) < 500 and "\n" not in str(refused.value)


def test_strengths_of_single_layers_are_honoured(saved, tmp_path):
    other = shutil.copytree(saved[0], tmp_path / "other")
    file = other / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {
        "layers_to_transform": [0, 1], "alpha_pattern": {"blocks.1.attn.Wqkv": 40}}))
    model = base()
    load_adapters(model, other)
    scales = [block.attn.Wqkv.scaling["default"] for block in model.transformer.blocks]
    assert scales[1] == 40 / 5 != scales[0]


def test_an_adapter_that_names_no_base_says_so(tmp_path):
    model = base()
    new_adapters(model, rank=2, alpha=2).save(tmp_path)
    with pytest.raises(Refusal, match="names no base model; name it with --model"):
        named_base(tmp_path)


def test_targets_by_regular_expression_survive_saving(tmp_path):
    from peft import LoraConfig

    from phogpt_raw.model.adapters import inject

    model = base()
    inject(model, LoraConfig(r=4, target_modules=r".*\.(Wqkv|out_proj)")).save(tmp_path)
    again = load_adapters(base(), tmp_path)
    assert {name.split(".")[4] for name, _ in again.views} == {"Wqkv", "out_proj"}


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_an_adapter_that_trains_biases_is_refused_in_sixteen_bits(adapted, tmp_path, tiny, bias):
    """The biases of a base in 16 bits are frozen, so such a base cannot use this
    adapter."""
    adapted()[1].save(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"bias": bias}))
    model, _ = load_base(str(tiny), dtype=torch.bfloat16, device="cpu")
    with pytest.raises(Refusal, match=f"bias '{bias}' trains biases.*--dtype fp32"):
        load_adapters(model, tmp_path)


def test_no_target_at_all_is_refused():
    with pytest.raises(Refusal, match="--targets: names no linear layer; the model has Wqkv, "):
        new_adapters(base(), rank=4, alpha=8, targets=[])


# -- adapters from other programs


def test_an_adapter_in_the_older_format_is_read_weights_only(saved, tmp_path):
    folder, _, adapters = saved
    older = shutil.copytree(folder, tmp_path / "older")
    tensors = load_file(older / "adapter_model.safetensors")
    (older / "adapter_model.safetensors").unlink()
    torch.save(tensors, older / "adapter_model.bin")
    assert torch.equal(load_adapters(base(), older).flat, adapters.flat)
    torch.save({"x": Unpickled()}, older / "adapter_model.bin")
    with pytest.raises(Refusal, match=r"adapter_model\.bin: cannot be read"):
        load_adapters(base(), older)


class Unpickled:
    """A class outside torch. torch.load with weights_only=True does not create its objects."""


@pytest.mark.parametrize("kind", ["orthogonal", "gaussian", False])
def test_how_an_adapter_was_initialised_does_not_matter(saved, tmp_path, kind):
    folder, _, adapters = saved
    other = shutil.copytree(folder, tmp_path / "other")
    file = other / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_lora_weights": kind}))
    assert torch.equal(load_adapters(base(), other).flat, adapters.flat)


def test_a_target_that_matches_nothing_is_no_fault_of_a_finished_adapter(saved, tmp_path):
    """Stock PEFT can write a config that has a target without a matching layer.

    The adapter's file then has the tensors of all matching layers.
    """
    folder, _, adapters = saved
    other = shutil.copytree(folder, tmp_path / "other")
    file = other / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"target_modules": [*config["target_modules"], "q_proj"]}))
    assert torch.equal(load_adapters(base(), other).flat, adapters.flat)
    file.write_text(json.dumps(config | {"target_modules": ["q_proj"]}))
    with pytest.raises(Refusal, match=r"adapter_config\.json: .*q_proj"):
        load_adapters(base(), other)
    with pytest.raises(Refusal, match="--targets: the model has no linear layer q_proj"):
        new_adapters(base(), rank=4, alpha=8, targets=["Wqkv", "q_proj"])


def test_integers_are_no_weights(saved, tmp_path):
    folder, _, _ = saved
    other = shutil.copytree(folder, tmp_path / "other")
    tensors = load_file(other / "adapter_model.safetensors")
    save_file({name: tensor.to(torch.int8) for name, tensor in tensors.items()},
              other / "adapter_model.safetensors")
    with pytest.raises(Refusal, match=r"is stored as torch\.int8"):
        load_adapters(base(), other)


@pytest.mark.parametrize("nf4", [True, False])
def test_models_over_the_same_base_share_its_weights_and_not_their_adapters(tiny, nf4):
    base, _ = load_base(str(tiny), nf4=nf4)
    one, other = same_base(base), same_base(base)
    held = {p.data_ptr() for p in base.parameters()}
    ids_BL = random_ids({"vocab_size": base.config.vocab_size}, 2, 9)
    with torch.no_grad():
        plain = base(ids_BL)
        new_adapters(one, rank=4, alpha=8).flat.data.fill_(0.05)
        assert not torch.equal(one(ids_BL), plain)
        assert torch.equal(other(ids_BL), plain) and torch.equal(base(ids_BL), plain)
    for model in (one, other):
        frozen = [p for p in model.parameters() if not p.requires_grad]
        assert {p.data_ptr() for p in frozen} == held
        states = [getattr(module, "quant_state", None) for module in model.modules()]
        assert {id(state) for state in states if state} == {
            id(module.quant_state) for module in base.modules()
            if getattr(module, "quant_state", None)}


def test_an_adapter_in_the_place_of_a_model_is_refused_with_the_right_flag(tmp_path):
    from phogpt_raw.model.weights import read_config

    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(Refusal, match=r"holds an adapter, not a model; name it with --adapter"):
        read_config(tmp_path)
