"""Norms and GELU are recomputed in backward: equal gradients bit for bit, and fewer stored bytes.

In this file "save" always means that autograd keeps a tensor in memory until backward.

The reference is the same model with a plain call instead of `recomputed`. Autograd then saves the
output of the call.
"""

import contextlib
import gc

import pytest
import torch
import torch.nn.functional as F
from conftest import batch_loss, ragged_examples
from oracle import lively_tensors, ours, random_ids, small_config
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from phogpt_raw.data.batches import Window
from phogpt_raw.model import attention, phogpt
from phogpt_raw.model import recompute as module
from phogpt_raw.model.adapters import TARGETS, new_adapters
from phogpt_raw.model.cache import Piece
from phogpt_raw.model.recompute import recomputed
from phogpt_raw.model.weights import load_base

INPLACE = "modified by an inplace operation"


def saved(function, *inputs):
    """A plain call in place of `recomputed`. Autograd saves its output."""
    return contextlib.nullcontext(function(*inputs))


@pytest.fixture
def with_all_saved(monkeypatch):
    """A function that runs another function while a plain call replaces `recomputed`."""

    def run(function, *args, instead=saved):
        with monkeypatch.context() as patch:
            patch.setattr(phogpt, "recomputed", instead)
            return function(*args)

    return run


def nano(nf4, dtype):
    model, _ = load_base("nano", nf4=nf4, dtype=dtype, device="cpu")
    return model.train(), lively_adapters(model)


def lively_adapters(model, **lora):
    """New adapters with a random B. With B = 0 every gradient of A would be zero."""
    adapters = new_adapters(model, **{"rank": 4, "alpha": 8, **lora})
    dice = torch.Generator().manual_seed(1)
    for name, view in adapters.views:
        if "lora_B" in name:
            view.normal_(std=0.02, generator=dice)
    adapters.cast()
    return adapters


def small(layers=2, **lora):
    config = small_config(6, 8, layers)
    model = ours(config, lively_tensors(config)).requires_grad_(False).train()
    return model, lively_adapters(model, **lora)


def window_gradient(model, adapters, window, recompute=0):
    """The flat gradient of an accumulation window, summed over its micro-batches as in training."""
    adapters.flat.grad.zero_()
    for batch in window.micro_batches(2):
        loss = batch_loss(model, batch, chunk=64, recompute=recompute)
        (loss / window.supervised).backward()
    return adapters.flat.grad.clone()


# -- gradients of the model, bit for bit


@pytest.mark.parametrize("recompute", [0, 1, 99], ids=lambda n: f"recompute-{n}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("nf4", [True, False], ids=["nf4", "plain"])
def test_adapter_gradients_are_the_same_to_the_bit(with_all_saved, nf4, dtype, recompute):
    model, adapters = nano(nf4, dtype)
    window = Window(ragged_examples(3, longest=20), pad_id=3)
    assert len(list(window.micro_batches(2))) == 2
    expected = with_all_saved(window_gradient, model, adapters, window, recompute)
    assert expected.norm() > 1e-3
    assert torch.equal(window_gradient(model, adapters, window, recompute), expected)


@pytest.mark.parametrize("targets", [TARGETS, ("Wqkv",), ("down_proj",), ("out_proj", "up_proj")],
                         ids="+".join)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_adapter_gradients_are_the_same_wherever_adapters_are(with_all_saved, targets, dropout):
    model, adapters = small(targets=targets, dropout=dropout)
    ids_BL = random_ids(small_config(6), 2, 15)

    def gradient():
        torch.manual_seed(0)  # for dropout
        adapters.flat.grad.zero_()
        model.logits(model(ids_BL)).square().mean().backward()
        return adapters.flat.grad.clone()

    expected = with_all_saved(gradient)
    assert expected.norm() > 0
    assert torch.equal(gradient(), expected)


def all_gradients(model, ids_BL, recompute=0):
    model.zero_grad()
    logits_BLV = model.logits(model(ids_BL, recompute=recompute))
    F.cross_entropy(logits_BLV[:, :-1].flatten(0, 1).float(), ids_BL[:, 1:].flatten()).backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("recompute", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("fields", [{}, dict(no_bias=True, attn_config=dict(clip_qkv=0.3))],
                         ids=["biases", "clipped"])
def test_every_parameters_gradient_is_the_same_to_the_bit(with_all_saved, fields, dtype, recompute):
    """Here all weights are trained. So every linear layer saves its input for a weight gradient."""
    config = small_config(6, 8, 3, **fields)
    model = ours(config, lively_tensors(config), dtype).train()
    ids_BL = random_ids(config, 3, 24)
    expected = with_all_saved(all_gradients, model, ids_BL, recompute)
    for a, b in zip(all_gradients(model, ids_BL, recompute), expected, strict=True):
        assert a.abs().max() > 0 and torch.equal(a, b)


def test_a_block_used_twice_has_the_same_gradient(with_all_saved):
    config = small_config(6, 8, 2)
    model = ours(config, lively_tensors(config)).train()
    model.transformer.blocks[1] = model.transformer.blocks[0]
    ids_BL = random_ids(config, 2, 12)
    expected = with_all_saved(all_gradients, model, ids_BL)
    for a, b in zip(all_gradients(model, ids_BL), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("recompute", [0, 1, 2])
def test_backward_twice_over_one_graph(with_all_saved, recompute):
    model, adapters = small()
    ids_BL = random_ids(small_config(6), 2, 15)

    def gradients():
        adapters.flat.grad.zero_()
        loss = model.logits(model(ids_BL, recompute=recompute)).square().mean()
        loss.backward(retain_graph=True)
        once = adapters.flat.grad.clone()
        loss.backward()
        return once, adapters.flat.grad.clone()

    once, twice = gradients()
    assert once.norm() > 0 and torch.equal(twice, 2 * once)
    for a, b in zip((once, twice), with_all_saved(gradients), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("wrong", [
    lambda f, x: F.gelu(x, approximate="tanh") if f is F.gelu else f(x),
    lambda f, x: f(x) if f is F.gelu else F.layer_norm(x, x.shape[-1:], f.weight, f.bias, eps=1e-3),
    lambda f, x: f(x) if f is F.gelu else F.layer_norm(x, x.shape[-1:], f.weight, None, f.eps),
], ids=["tanh's GELU", "another epsilon", "no bias"])
def test_a_wrong_recomputation_would_be_noticed(with_all_saved, wrong):
    """A wrong recomputation must change the gradients that the other tests compare."""
    model, adapters = small()
    window = Window(ragged_examples(2, longest=20, vocabulary=256), pad_id=3)
    expected = window_gradient(model, adapters, window)

    def planted(function, x):
        return recomputed(
            lambda x: function(x) if torch.is_grad_enabled() else wrong(function, x), x)

    assert not torch.equal(with_all_saved(window_gradient, model, adapters, window,
                                          instead=planted), expected)


# -- the saved tensors


def storages(tree):
    return [t.untyped_storage() for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]


class Alive(TorchDispatchMode):
    """Counts the bytes of storages that operations in the `with` block create.

    Only weak references are kept. Views create no storage.
    """

    def __init__(self):
        super().__init__()
        self.made, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        given = {storage._cdata for storage in storages((args, kwargs))}
        for storage in storages(result):
            if storage._cdata not in given:
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, self.nbytes())
        return result

    def nbytes(self) -> int:
        return sum(size for ref, size in self.made.values() if not ref.expired())


def bytes_saved(model, ids_BL, recompute=0):
    with Alive() as alive:
        hidden_BLD = model(ids_BL, recompute=recompute)
    assert hidden_BLD.requires_grad
    return alive.nbytes()


ROWS, LENGTH, HEADS, WIDTH, RANK = 3, 32, 6, 8, 4
TOKENS, D = ROWS * LENGTH, HEADS * WIDTH
ACTIVATION = TOKENS * D * 4  # bytes of one fp32 activation of width D
# Bytes that a block saves besides activations, all in fp32: the mean and the reciprocal standard
# deviation of two norms, the softmax statistics of each head, and A x of four adapters.
BESIDES = 4 * (2 * 2 * TOKENS + HEADS * TOKENS + 4 * RANK * TOKENS)


def test_a_block_saves_ten_activations_instead_of_sixteen(with_all_saved):
    """The test counts the bytes that one more block saves, in activations of width D.

    With and without `recomputed` a block saves 10 activations: 2 are the inputs of the norms, 3 the
    output of qkv, 1 the output of attention, and 4 the output of the up-projection. With plain
    calls it saves 6 more: 2 are the outputs of the norms, and 4 the output of GELU.
    """
    ids_BL = random_ids(small_config(HEADS, WIDTH), ROWS, LENGTH)

    def block_bytes():
        three, two = (bytes_saved(small(layers, rank=RANK)[0], ids_BL) for layers in (3, 2))
        return three - two

    assert with_all_saved(block_bytes) == 16 * ACTIVATION + BESIDES
    assert block_bytes() == 10 * ACTIVATION + BESIDES


def test_the_first_block_saves_its_norms_output_and_not_the_embedding(with_all_saved):
    """The first norm is not recomputed, because this would gain nothing.

    The norm's input, the embedding, would be saved instead of the norm's output, and nothing else
    saves the embedding. With recomputation each block saves 6 activations fewer, which would be 18
    fewer in three blocks. But the first norm's output is still saved, so three blocks save only 17
    fewer.
    """
    ids_BL = random_ids(small_config(HEADS, WIDTH), ROWS, LENGTH)
    model, _ = small(3)
    plain = with_all_saved(bytes_saved, model, ids_BL)
    assert plain - bytes_saved(model, ids_BL) == 17 * ACTIVATION


@pytest.mark.parametrize("recompute", [1, 2, 3])
def test_a_checkpointed_block_saves_no_more_than_a_plain_one(with_all_saved, recompute):
    """Hooks inside a checkpoint must pass tensors on to the checkpoint's own hooks.

    Otherwise the checkpoint does not see the tensors and cannot free them.
    """
    ids_BL = random_ids(small_config(HEADS, WIDTH), ROWS, LENGTH)
    model, _ = small(3)
    plain = with_all_saved(bytes_saved, model, ids_BL, recompute)
    now = bytes_saved(model, ids_BL, recompute)
    assert plain - now == 6 * (3 - recompute) * ACTIVATION


@pytest.mark.parametrize("gradients", [False, True], ids=["no_grad", "checkpoint"])
def test_a_forward_that_saves_nothing_needs_no_more_on_its_way(with_all_saved, gradients):
    """GELU's input, as large as four activations, is freed before the down-projection runs.

    A plain call also frees GELU's input at this point.
    """
    config = small_config(HEADS, WIDTH)
    ids_BL = random_ids(config, ROWS, LENGTH)
    model = ours(config, lively_tensors(config)).train()  # PEFT's layers would save more

    def peak():
        with torch.set_grad_enabled(gradients), Alive() as alive:
            model(ids_BL, recompute=2)
        return alive.peak

    plain = with_all_saved(peak)
    assert plain > 10 * ACTIVATION and peak() == plain


def test_it_runs_on_fake_tensors(with_all_saved, monkeypatch):
    """Fake tensors have no values. Code that runs on them reads no value.

    So a CUDA graph can capture this code.
    """
    # torch finds no fused kernel for fake tensors, so the test replaces the choice of a kernel. The
    # real choice reads no value either.
    monkeypatch.setattr(attention, "choose_kernel", lambda *_: SDPBackend.FLASH_ATTENTION)
    config = small_config(6)
    with FakeTensorMode():
        model = phogpt.PhoGPT(phogpt.ModelConfig.from_json(config)).train()
        ids_BL = torch.zeros(2, 7, dtype=torch.long)
        calls = []
        for context in (saved, recomputed):
            def counted(function, *inputs, context=context):
                def call(*tensors):
                    calls.append(context)
                    return function(*tensors)
                return context(call, *inputs)
            with_all_saved(all_gradients, model, ids_BL, instead=counted)
    assert calls.count(saved) == 6 and calls.count(recomputed) == 12


@pytest.mark.parametrize("recompute", [0, 2])
@pytest.mark.parametrize("backward", [True, False], ids=["backward", "dropped"])
@pytest.mark.parametrize("nf4", [True, False], ids=["nf4", "plain"])
def test_nothing_lives_on_and_no_cycle_holds_it(adapted, nf4, backward, recompute):
    model, adapters = adapted(nf4=nf4)
    adapters.flat.grad.zero_()
    gc.collect()
    gc.disable()
    try:
        with Alive() as alive:
            loss = model(torch.tensor([[5, 6, 7, 8]]), recompute=recompute).square().sum()
            during = alive.nbytes()
            if backward:
                loss.backward()
        del loss
        assert during > 0 and alive.nbytes() == 0
    finally:
        gc.enable()


def test_no_hooks_where_there_are_no_gradients(monkeypatch):
    model, _ = small()
    monkeypatch.setattr(module, "saved_tensors_hooks", None)
    with torch.no_grad():
        model(random_ids(small_config(6), 1, 5), cache=Piece(model.new_cache(1, 5)))
        model(random_ids(small_config(6), 1, 5))
    with pytest.raises(TypeError):
        model(random_ids(small_config(6), 1, 5))


# -- `recomputed` alone


class Double:
    """Computes 2 x and counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        return 2 * x


class SavesBoth(torch.autograd.Function):
    """sum((x W)^2) / 2 with its own backward. It saves its input and a view of the input."""

    @staticmethod
    def forward(ctx, x_BLD, w_DK):
        x_TD = x_BLD.view(-1, x_BLD.shape[-1])
        ctx.save_for_backward(x_BLD, x_TD, w_DK)
        return (x_TD @ w_DK).square().sum() / 2

    @staticmethod
    def backward(ctx, upstream):
        x_BLD, x_TD, w_DK = ctx.saved_tensors
        assert x_TD.shape == (x_BLD[..., 0].numel(), x_BLD.shape[-1])
        gradient = x_TD @ w_DK * upstream
        return (gradient @ w_DK.T).view_as(x_BLD), x_TD.T @ gradient


@pytest.fixture
def x_BLD():
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()


@pytest.fixture
def w_DK():
    return torch.randn(8, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()


def test_users_of_the_output_and_its_views_share_one_call_a_backward(x_BLD, w_DK):
    double = Double()
    with Alive() as alive, recomputed(double, x_BLD) as y:
        loss = SavesBoth.apply(y, w_DK) + F.linear(y, w_DK.T).sum()
        loss = loss + (y[:, 1::2] * w_DK.sum()).square().sum()
        made = alive.made[y.untyped_storage()._cdata][0]
    del y
    assert double.calls == 1 and made.expired()
    loss.backward(retain_graph=True)
    assert double.calls == 2
    x_BLD.grad, w_DK.grad = None, None
    loss.backward()
    assert double.calls == 3
    y, w = (2 * x_BLD.detach()).requires_grad_(), w_DK.detach().requires_grad_()
    ((y @ w).square().sum() / 2 + (y @ w).sum() + (y[:, 1::2] * w.sum()).square().sum()).backward()
    torch.testing.assert_close(x_BLD.grad, 2 * y.grad)
    torch.testing.assert_close(w_DK.grad, w.grad)


def test_a_partial_backward_leaves_the_next_one_right(x_BLD, w_DK):
    """Two operations save the output. First one operation runs backward, then both."""
    double = Double()
    with recomputed(double, x_BLD) as y:
        one, two = (y @ w_DK).sum(), (y * y).sum()
    torch.autograd.grad(one, w_DK, retain_graph=True)
    (gradient,) = torch.autograd.grad(one + two, x_BLD)
    torch.testing.assert_close(gradient, 8 * x_BLD.detach() + 2 * w_DK.detach().sum(1))


def test_second_derivatives_go_through(x_BLD):
    with recomputed(torch.exp, x_BLD) as y:
        loss = (y * y).sum()
    (first,) = torch.autograd.grad(loss, x_BLD, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x_BLD)
    torch.testing.assert_close(second, 4 * (2 * x_BLD.detach()).exp())


def test_only_the_very_tensor_is_recomputed(x_BLD, w_DK):
    """Here autograd saves copies of the output, and the output after a change in place.

    None of these is the tensor that `recomputed` gave, so none of them is recomputed.
    """
    double = Double()
    with recomputed(double, x_BLD) as y:
        loss = (y.clone() @ w_DK).sum() + (y.double() @ w_DK.double()).sum()
        y.add_(1)
        loss = loss + (y @ w_DK).sum()
    loss.backward()
    assert double.calls == 1
    row_D = (2 * (2 * x_BLD.detach()) + (2 * x_BLD.detach() + 1)).sum((0, 1))
    torch.testing.assert_close(w_DK.grad, row_D[:, None].expand_as(w_DK))


def test_a_change_to_the_output_after_it_was_saved_does_no_harm(x_BLD, w_DK):
    with recomputed(Double(), x_BLD) as y:
        loss = (y @ w_DK).sum()
    y.zero_()
    loss.backward()
    torch.testing.assert_close(w_DK.grad, (2 * x_BLD.detach()).sum((0, 1))[:, None].expand(8, 3))


def test_views_as_another_type_are_saved(x_BLD):
    double = Double()
    with recomputed(double, x_BLD) as y:
        z = torch.view_as_complex(y.unflatten(-1, (4, 2)))
        loss = (z * z).real.sum()
    loss.backward()
    assert double.calls == 1
    torch.testing.assert_close(x_BLD.grad, 8 * x_BLD.detach() * torch.tensor([1.0, -1.0]).repeat(4))


@pytest.mark.parametrize("what", ["input", "a view of it", "norm's weight", "norm's bias",
                                  "tensor passed on"])
def test_a_change_in_place_before_backward_raises(x_BLD, w_DK, what):
    norm, given = nn.LayerNorm(8).requires_grad_(False), x_BLD * 1
    with recomputed(norm, given) as y:
        z = y @ w_DK
        loss = (z * z).sum()
    changed = {"input": given, "a view of it": given[1:], "norm's weight": norm.weight,
               "norm's bias": norm.bias, "tensor passed on": z}[what]
    with torch.no_grad():
        changed.add_(1)
    with pytest.raises(RuntimeError, match=INPLACE):
        loss.backward()


def test_hooks_outside_see_what_is_passed_on(x_BLD, w_DK):
    """A checkpoint too has its hooks outside `recomputed`.

    The hooks of this test record the shapes of saved tensors. They negate a tensor when autograd
    saves it, and again when autograd reads it.
    """
    seen = []

    def pack(tensor):
        seen.append(tuple(tensor.shape))
        return -tensor.detach()

    outside = torch.autograd.graph.saved_tensors_hooks(pack, torch.neg)
    with outside, recomputed(Double(), x_BLD) as y:
        loss = (y @ w_DK).exp().sum()
    assert (2, 5, 3) in seen and (8, 3) in seen  # saved by exp and by the product
    assert (10, 8) not in seen and seen.count((2, 5, 8)) == 1  # `recomputed` saves its input only
    loss.backward()
    w = w_DK.detach().requires_grad_()
    (2 * x_BLD.detach() @ w).exp().sum().backward()
    assert torch.equal(w_DK.grad, w.grad)


def test_inside_a_checkpoint_the_input_is_freed(x_BLD, w_DK):
    def run(x):
        x = x.exp()  # created inside, so the checkpoint must not save it
        with recomputed(Double(), x) as y:
            return (y @ w_DK).square().sum()

    with Alive() as alive:
        loss = checkpoint(run, x_BLD, use_reentrant=False)
        assert alive.nbytes() <= loss.nbytes + 4  # + 4: empty tensors of the checkpoint
    loss.backward()
    expected = x_BLD.grad
    x_BLD.grad = None
    run(x_BLD).backward()
    assert torch.equal(x_BLD.grad, expected)
