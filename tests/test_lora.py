"""Outputs and gradients of the fused LoRA layer equal those of its plain version and of PEFT.

The tolerance in fp32 is 1e-5 of the largest element, because sums of up to 96 products are computed
in different orders. One rounding to bf16 changes a value by at most 2^-8 of its size. If many
random values are rounded, the norm of the error is less than 2^-9 of their norm.
"""

import math

import pytest
import torch
from oracle import lively_tensors, ours, random_ids, small_config
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from phogpt_raw.model import adapters as adapters_module
from phogpt_raw.model.adapters import Adapters, fuse, inject, new_adapters, plain_adapter
from phogpt_raw.model.lora import LoraLinear, dense, lora_linear, lora_linear_plain
from phogpt_raw.model.nf4 import nf4_linear
from phogpt_raw.model.weights import load_base

BASES = pytest.mark.parametrize("nf4", [True, False], ids=["nf4", "plain"])


class Net(nn.Module):
    """A model of one frozen linear layer with random weights, for PEFT to wrap."""

    def __init__(self, d_in, d_out, *, nf4, bias=True, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.is_loaded_in_4bit = nf4
        plain = nn.Linear(d_in, d_out, bias=bias, dtype=dtype)
        weight = torch.randn(d_out, d_in).to(dtype) / math.sqrt(d_in)
        plain.weight = nn.Parameter(weight)
        self.linear = nf4_linear(weight, dtype, "cpu", plain.bias) if nf4 else plain
        self.head = torch.empty(0, dtype=dtype)  # its dtype is the compute dtype
        self.requires_grad_(False)

    def forward(self, x):
        return self.linear(x)


def lora_layer(d_in=32, d_out=48, *, nf4=False, base_bias=True, dtype=torch.float32, **config):
    """(model, adapters): PEFT's LoRA layer, fused. A and B are random, fp32, in a flat buffer."""
    net = Net(d_in, d_out, nf4=nf4, bias=base_bias, dtype=dtype)
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["linear"], **config})
    inject_adapter_in_model(config, net)
    fuse(net)
    enliven(net)
    return net, Adapters(net)


def enliven(module, seed=1):
    dice = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3, generator=dice)


def peft_forward(layer, x):
    return type(layer).forward(layer, x)


def random(*shape, seed=2, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run(forward, x, parameters, grad):
    """[y, dx, dA, dB] of `forward` for the incoming gradient `grad`."""
    x = x.clone().requires_grad_()
    y = forward(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *parameters], grad)]


def both(net, x):
    """[y, dx, dA, dB] of the fused forward and of PEFT's, for the same x and incoming gradient."""
    layer = net.linear
    parameters = [p for p in layer.parameters() if p.requires_grad]
    grad = random(*x.shape[:-1], layer.out_features, seed=3, dtype=x.dtype)
    return [run(f, x, parameters, grad) for f in (net, lambda x: peft_forward(layer, x))]


def assert_near(got, wanted, tolerance=1e-5):
    assert got.shape == wanted.shape and got.dtype == wanted.dtype
    size = wanted.abs().max().item()
    assert size > 0
    torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance * size)


def calls_fused(monkeypatch):
    """A list that gets one entry for each call of the fused function."""
    calls = []

    def counting(*args):
        calls.append(args)
        return lora_linear(*args)

    monkeypatch.setattr(adapters_module, "lora_linear", counting)
    return calls


# -- equal to the plain version


@BASES
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("shape", [(7, 32), (2, 5, 32), (2, 3, 2, 32), (32,)], ids=str)
def test_values_and_gradients_are_those_of_the_plain_version(nf4, bias, shape):
    net = Net(32, 48, nf4=nf4, bias=bias)
    A, B = (random(*s, seed=n).requires_grad_() for n, s in enumerate([(3, 32), (48, 3)]))
    grad = random(*shape[:-1], 48, seed=3)
    fused, plain = (run(lambda x, f=f: f(x, net.linear, A, B, 1.7), random(*shape), [A, B], grad)
                    for f in (lora_linear, lora_linear_plain))
    for got, wanted in zip(fused, plain, strict=True):
        assert_near(got, wanted)


@BASES
def test_in_bf16_it_is_as_near_to_fp64_as_the_plain_version(nf4):
    """Both versions round the weights, each product and the sum.

    The plain version also rounds the scaled product, so its error is usually larger. By chance the
    error of the fused version may be a few per cent larger.
    """
    net = Net(96, 64, nf4=nf4, dtype=torch.bfloat16)
    A, B = (random(*s, seed=n).requires_grad_() for n, s in enumerate([(4, 96), (64, 4)]))
    x, grad = (random(2, 50, n, seed=n, dtype=torch.bfloat16) for n in (96, 64))
    fused, plain = (run(lambda x, f=f: f(x, net.linear, A, B, 1.7), x, [A, B], grad)
                    for f in (lora_linear, lora_linear_plain))
    w, bias = dense(net.linear.weight).double(), net.linear.bias.double()
    exact = run(lambda x: x @ w.t() + bias + 1.7 * (x @ A.double().t() @ B.double().t()),
                x.double(), [A, B], grad.double())
    for name, got, theirs, wanted in zip(NAMES, fused, plain, exact, strict=True):
        assert got.dtype == theirs.dtype
        assert 0 < relative_error(got, wanted) <= 1.05 * relative_error(theirs, wanted), name


# -- equal to PEFT's own


@BASES
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(("shape", "d_out"), [((7, 32), 48), ((2, 5, 32), 96), ((3, 1, 96), 32),
                                              ((2, 3, 2, 33), 17), ((1, 65), 1), ((40,), 24)],
                         ids=str)
def test_values_and_gradients_are_pefts(monkeypatch, nf4, bias, shape, d_out):
    calls = calls_fused(monkeypatch)
    net, _ = lora_layer(shape[-1], d_out, nf4=nf4, base_bias=bias, r=3, lora_alpha=5)
    fused, own = both(net, random(*shape))
    assert len(calls) == 1
    for got, wanted in zip(fused, own, strict=True):
        assert_near(got, wanted)


@BASES
@pytest.mark.parametrize("config", [dict(use_rslora=True), dict(r=1, lora_alpha=1),
                                    dict(rank_pattern={"linear": 7}, alpha_pattern={"linear": 3})],
                         ids=["rslora", "rank-1", "patterns"])
def test_ranks_and_scalings_are_pefts(nf4, config):
    net, _ = lora_layer(nf4=nf4, **config)
    fused, own = both(net, random(2, 5, 32))
    for got, wanted in zip(fused, own, strict=True):
        assert_near(got, wanted)


def test_a_changed_scale_and_a_changed_adapter_count_at_once():
    """The layer keeps no copy of A, B or the scaling from an earlier call."""
    net, adapters = lora_layer(nf4=True)
    x = random(5, 32)
    before = net(x).detach()
    net.linear.set_scale("default", 3.0)
    assert (net(x) - before).abs().max() > 0.1
    for change in (lambda: adapters.flat.data.mul_(1.5), lambda: adapters.views[0][1].neg_()):
        change()
        fused, own = both(net, x)
        for got, wanted in zip(fused, own, strict=True):
            assert_near(got, wanted)


@BASES
def test_input_that_is_no_view_of_rows_and_gradient_that_is_expanded(nf4):
    net, _ = lora_layer(nf4=nf4)
    parameters = [p for p in net.parameters() if p.requires_grad]
    x = random(5, 32, 3).transpose(1, 2)
    grad = random(1, 1, 48).expand(5, 3, 48)
    fused, own = (run(f, x, parameters, grad)
                  for f in (net, lambda x: peft_forward(net.linear, x)))
    for got, wanted in zip(fused, own, strict=True):
        assert_near(got, wanted)


@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck_over_plain_weights(bias):
    linear = nn.Linear(5, 6, bias=bias, dtype=torch.float64).requires_grad_(False)
    x, A, B = (random(*shape, dtype=torch.float64).requires_grad_()
               for shape in ((2, 3, 5), (2, 5), (6, 2)))
    assert torch.autograd.gradcheck(lambda *xab: lora_linear(xab[0], linear, *xab[1:], 1.7),
                                    (x, A, B))


@BASES
def test_without_gradients_the_values_are_the_same(nf4):
    net, _ = lora_layer(nf4=nf4)
    for x in (random(2, 9, 32), random(1, 1, 32)):
        with_gradients = net(x)
        assert with_gradients.requires_grad
        for off in (torch.no_grad(), torch.inference_mode()):
            with off:
                y = net.eval()(x)
            assert not y.requires_grad
            assert_near(y.clone(), with_gradients.detach())


NAMES = ("y", "dx", "dA", "dB")


def relative_error(got, exact):
    return ((got.double() - exact).norm() / exact.norm()).item()


@BASES
def test_bf16_is_as_near_to_fp64_as_pefts_own(nf4):
    """The limits of our errors depend on the number of roundings.

    For y and dx the limit is the error of PEFT's layer. Over NF4 our y and dx are rounded as often
    as PEFT's. Over plain weights PEFT adds the adapter's output in fp32. So PEFT rounds y once
    less, and our limit for y is 15 % higher.

    For dA and dB the limit is two roundings to bf16, because we round s g B and the result, and
    PEFT keeps both in fp32. The relative norm of the error of one rounding is less than 2^-9. The
    rounding error of g itself is larger (see the last test).
    """
    net, _ = lora_layer(96, 64, nf4=nf4, dtype=torch.bfloat16)
    x = random(2, 50, 96, dtype=torch.bfloat16)
    fused, own = both(net, x)
    exact = exact_twin(net.linear, x)
    wider = {"y": 1.0 if nf4 else 1.15, "dx": 1.0}
    for name, got, theirs, wanted in zip(NAMES, fused, own, exact, strict=True):
        limit = wider[name] * relative_error(theirs, wanted) if name in wider else 2 * 2**-9
        assert 0 < relative_error(got, wanted) <= limit, name
    assert [t.dtype for t in fused] == 2 * [torch.bfloat16] + 2 * [torch.float32]


def exact_twin(layer, x):
    """[y, dx, dA, dB] in fp64 for the weights of `layer`."""
    A, B = (p[n].weight.detach().double().requires_grad_()
            for p, n in ((layer.lora_A, "default"), (layer.lora_B, "default")))
    w, bias = dense(layer.base_layer.weight).double(), layer.base_layer.bias.double()
    grad = random(*x.shape[:-1], layer.out_features, seed=3, dtype=x.dtype).double()
    return run(lambda x: x @ w.t() + bias + layer.scaling["default"] * (x @ A.t() @ B.t()),
               x.double(), [A, B], grad)


# -- saved tensors and the place of gradients


@BASES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_only_x_and_its_product_with_A_are_kept(nf4, dtype):
    net, adapters = lora_layer(96, 64, nf4=nf4, dtype=dtype)
    x = random(2, 50, 96, dtype=dtype).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = net(x)
    assert {(t.shape, t.dtype) for t in kept} == {(x.shape, dtype), ((100, 4), dtype)}
    assert len(kept) == 2 and any(t.data_ptr() == x.data_ptr() for t in kept)
    # The autograd node holds three more tensors: the frozen weight as stored, and views of A and B
    # in the compute dtype. They belong to the model and take no additional memory.
    node = y.grad_fn
    while not isinstance(node, LoraLinear._backward_cls):
        node = node.next_functions[0][0]
    held = [v for v in vars(node).values() if isinstance(v, torch.Tensor)]
    whole = adapters.flat if adapters.compute is None else adapters.compute
    start, end = whole.data_ptr(), whole.data_ptr() + whole.nbytes
    shared = [v for v in held if start <= v.data_ptr() < end]
    assert {v.shape for v in shared} == {(4, 96), (64, 4)} and len(shared) == 2
    rest = [v for v in held if not any(v is s for s in shared)]
    assert len(rest) == 1 and rest[0] is net.linear.base_layer.weight
    y.sum().backward()


@BASES
def test_frozen_weights_get_no_gradient_and_stay(nf4):
    net, _ = lora_layer(nf4=nf4)
    base = net.linear.base_layer
    before = base.weight.clone(), base.bias.clone()
    for training in (True, False):
        net.train(training)(random(3, 32)).sum().backward()
        with torch.no_grad():
            net(random(3, 32))
    assert base.weight.grad is None and base.bias.grad is None
    assert torch.equal(base.weight, before[0]) and torch.equal(base.bias, before[1])


@BASES
def test_gradients_add_up_in_the_flat_buffer_and_x_need_not_have_one(nf4):
    net, adapters = lora_layer(nf4=nf4)
    for x in (random(5, 32, seed=4), random(2, 6, 32, seed=5)):  # x requires no gradient
        net(x).square().sum().backward()
    fused = adapters.flat.grad.clone()
    adapters.flat.grad.zero_()
    for x in (random(5, 32, seed=4), random(2, 6, 32, seed=5)):
        peft_forward(net.linear, x).square().sum().backward()
    assert_near(fused, adapters.flat.grad)
    for p, (_, view) in zip(filter(lambda p: p.requires_grad, net.parameters()), adapters.views,
                            strict=True):
        offset = view.data_ptr() - adapters.flat.data_ptr()
        assert p.grad.data_ptr() - adapters.flat.grad.data_ptr() == offset


@BASES
def test_checkpointing_changes_no_gradient(nf4):
    net, _ = lora_layer(nf4=nf4)
    parameters = [p for p in net.parameters() if p.requires_grad]
    x, grad = random(2, 5, 32), random(2, 5, 48)

    def whole(x):
        return nn.functional.gelu(net(x.sin()))

    kept, again = (run(f, x, parameters, grad)
                   for f in (whole, lambda x: checkpoint(whole, x, use_reentrant=False)))
    assert all(map(torch.equal, kept, again))


# -- layers that run PEFT's own forward


def check_own(net, calls, x=None):
    """Assert that the layer runs PEFT's own forward and returns its result."""
    x = random(2, 5, 32) if x is None else x
    calls.clear()
    torch.manual_seed(0)
    y = net(x)
    torch.manual_seed(0)
    assert torch.equal(y, peft_forward(net.linear, x)) and calls == []
    return y


@BASES
@pytest.mark.parametrize("config", [dict(use_dora=True), dict(lora_dropout=0.3),
                                    dict(lora_bias=True), dict(bias="all")],
                         ids=lambda c: next(iter(c)))
def test_more_than_plain_lora_is_pefts(monkeypatch, nf4, config):
    calls = calls_fused(monkeypatch)
    net, _ = lora_layer(nf4=nf4, **config)
    plain, _ = lora_layer(nf4=nf4)
    y = check_own(net, calls)
    if "bias" not in next(iter(config)):
        assert (y - plain(random(2, 5, 32))).abs().max() > 1e-2
    y.sum().backward()
    trained = [n for n, p in net.named_parameters() if p.grad is not None and p.grad.any()]
    assert ("linear.base_layer.bias" in trained) == (config == dict(bias="all"))
    assert len(trained) == (2 if "lora_dropout" in config else 3)


@BASES
def test_disabled_adapters_leave_the_base_and_come_back(monkeypatch, nf4):
    calls = calls_fused(monkeypatch)
    net, _ = lora_layer(nf4=nf4)
    x = random(2, 5, 32)
    adapted = net(x)
    net.linear.enable_adapters(False)
    assert torch.equal(check_own(net, calls), net.linear.base_layer(x))
    assert (adapted - net.linear.base_layer(x)).abs().max() > 0.1
    net.linear.enable_adapters(True)
    assert torch.equal(net(x), adapted) and len(calls) == 1


@BASES
@pytest.mark.filterwarnings("ignore:.*erge lora module to 4-bit")
def test_merged_and_unmerged(monkeypatch, nf4):
    calls = calls_fused(monkeypatch)
    net, _ = lora_layer(nf4=nf4)
    x = random(2, 5, 32)
    adapted = net(x).detach()
    net.linear.merge()
    merged = check_own(net, calls).detach()
    net.linear.unmerge()
    fused, own = both(net, x)
    assert len(calls) == 1
    for got, wanted in zip(fused, own, strict=True):
        assert_near(got, wanted)
    if not nf4:  # merge quantises an NF4 weight again
        assert_near(merged, adapted)
        assert_near(net(x).detach(), adapted)


@BASES
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_of_two_adapters_one_alone_is_fused_and_both_are_pefts(monkeypatch, nf4):
    calls = calls_fused(monkeypatch)
    net, _ = lora_layer(nf4=nf4)
    second = LoraConfig(r=2, lora_alpha=1, target_modules=["linear"])
    inject_adapter_in_model(second, net, adapter_name="second")
    enliven(net, seed=9)
    x, layer = random(2, 5, 32), net.linear
    layer.set_adapter("default")
    one = layer(x)
    layer.set_adapter("second")
    other = layer(x)
    assert len(calls) == 2 and calls[1][4] == 0.5
    assert_near(other.detach(), peft_forward(layer, x).detach())
    layer.set_adapter(["default", "second"])
    assert_near(check_own(net, calls).detach(), (one + other - layer.base_layer(x)).detach())
    layer.set_adapter("default")
    mixed = layer(x, adapter_names=["default", "second"])  # PEFT's mixed batches
    assert_near(mixed.detach(), torch.stack([one[0], other[1]]).detach())
    layer.set_adapter("unheard of")
    assert torch.equal(check_own(net, calls), layer.base_layer(x))


def test_linears_of_other_kinds_are_left_alone():
    class Loud(nn.Linear):
        def forward(self, x):
            return 100 * super().forward(x)

    net = Net(32, 48, nf4=False)
    net.linear = Loud(32, 48).requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["linear"]), net)
    fuse(net)
    assert "forward" not in vars(net.linear)


# -- whole models


def gradients(model, adapters, ids_BL, recompute=0):
    """(logits, flat gradient of the next-token loss of the ids)."""
    adapters.flat.grad.zero_()
    logits_BLV = model.logits(model(ids_BL, recompute=recompute))
    loss = nn.functional.cross_entropy(logits_BLV[:, :-1].flatten(0, 1).float(),
                                       ids_BL[:, 1:].flatten())
    loss.backward()
    return logits_BLV.detach(), adapters.flat.grad.clone()


def with_pefts_own(monkeypatch, call):
    with monkeypatch.context() as patch:
        patch.setattr(adapters_module, "plain_adapter", lambda layer: None)
        return call()


@BASES
@pytest.mark.parametrize("recompute", [0, 2])
def test_nano_gives_what_it_gives_with_pefts_forward(monkeypatch, nf4, recompute):
    model, tokenizer = load_base("nano", nf4=nf4, dtype=torch.float32, device="cpu")
    adapters = new_adapters(model, rank=16, alpha=21)
    enliven(model)
    adapters.flat.data.mul_(0.1)
    assert all(plain_adapter(m) for m in model.modules() if hasattr(m, "lora_A"))
    model.train()
    text = "Phở bò là món nước có bánh phở, thịt bò và nước dùng ninh từ xương, ăn với rau thơm."
    ids_BL = torch.tensor([tokenizer(text)["input_ids"]])
    calls = calls_fused(monkeypatch)
    logits, grad = gradients(model, adapters, ids_BL, recompute)
    count = 4 * model.config.n_layers
    assert len(calls) == count + 4 * recompute
    own_logits, own_grad = with_pefts_own(
        monkeypatch, lambda: gradients(model, adapters, ids_BL, recompute))
    assert len(calls) == count + 4 * recompute
    for got, wanted in ((logits, own_logits), (grad, own_grad)):
        assert (got - wanted).norm() <= 1e-5 * wanted.norm()
        assert_near(got, wanted)


def test_in_bf16_the_whole_models_gradient_is_as_exact_as_pefts(monkeypatch):
    """The rounding of dA and dB to bf16 is small compared with the error of the incoming g."""
    config = small_config(6, 16, 4)
    tensors = {n: t.bfloat16() for n, t in lively_tensors(config).items()}
    ids_BL = random_ids(config, 3, 60)

    def one(dtype):
        model = ours(config, tensors, dtype).requires_grad_(False)
        adapters = inject(model, LoraConfig(r=8, lora_alpha=16, target_modules=[
            "Wqkv", "out_proj", "up_proj", "down_proj"]))
        dice = torch.Generator().manual_seed(4)
        for _, view in adapters.views:
            view.normal_(std=0.05, generator=dice)
        adapters.cast()
        return gradients(model, adapters, ids_BL)

    exact = one(torch.float32)  # nearly exact: fp32 rounds 2^16 times finer than bf16
    fused = one(torch.bfloat16)
    own = with_pefts_own(monkeypatch, lambda: one(torch.bfloat16))
    for got, theirs, wanted in zip(fused, own, exact, strict=True):
        theirs = relative_error(theirs, wanted.double())
        assert 0 < relative_error(got, wanted.double()) <= 1.05 * theirs
