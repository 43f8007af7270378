"""NF4 weights as numbers again: bitsandbytes' own result, to the bit, whoever makes it."""

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit

from phogpt_raw.model import nf4 as dequant
from phogpt_raw.model.nf4 import ROWS, SCALES, WEIGHTS, dequantise, fused_works
from phogpt_raw.model.weights import nf4_linear

SIXTEEN_BIT = [torch.float16, torch.bfloat16]
# 7B5's qkv and output projections, and one block of scales; numel a multiple of WEIGHTS * ROWS
SHAPES = [(12288, 4096), (4096, 4096), (256, 64)]


def nf4(shape, dtype, device):
    dice = torch.Generator().manual_seed(0)
    numbers = torch.randn(shape, generator=dice) * torch.rand(shape[0], 1, generator=dice)
    return nf4_linear(numbers.to(dtype), dtype, device).weight


def trap(*_):
    raise AssertionError("the fused kernel was asked for")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(256, 64), (65, 3), (17, 40)], ids=str)
def test_on_the_cpu_it_is_bitsandbytes_own(monkeypatch, shape, dtype):
    monkeypatch.setattr(dequant, "fused", trap)
    monkeypatch.setattr(dequant, "fused_works", lambda *_: True)
    weight = nf4(shape, dtype, "cpu")
    dense = dequantise(weight)
    assert (dense.shape, dense.dtype) == (torch.Size(shape), dtype)
    assert torch.equal(dense, dequantize_4bit(weight, weight.quant_state))


def test_the_offset_of_the_scales_is_known_to_the_host():
    """From a GPU each dequantising would wait for it."""
    state = nf4((256, 64), torch.float32, "cpu").quant_state
    assert state.offset_number == float(state.offset)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 3, 16, 200])
@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
def test_bitsandbytes_own_kernels_still_read_the_weights(dtype, rows):
    """Without gradients a Linear4bit reads 4 bits and scales itself, the offset on the device."""
    weight = nf4((512, 256), dtype, "cuda")
    layer = nf4_linear(torch.zeros(512, 256, dtype=dtype), dtype, "cuda")
    layer.weight = weight
    x = torch.randn(rows, 256, device="cuda", dtype=dtype)
    with torch.no_grad():
        y = layer(x)
    wanted = x.double() @ dequantise(weight).double().T
    assert (y.double() - wanted).norm() < 4 * torch.finfo(dtype).eps * wanted.norm()


def test_without_triton_the_fused_kernel_does_not_work(monkeypatch):
    monkeypatch.setattr(dequant, "triton", None)
    fused_works.cache_clear()
    assert not fused_works(torch.device("cpu"), torch.bfloat16)
    fused_works.cache_clear()


@pytest.mark.parametrize("broken", ["raises", "is off"])
def test_a_kernel_that_fails_its_trial_is_not_taken(monkeypatch, broken):
    def fused(weight, state):
        if broken == "raises":
            raise RuntimeError("no toolchain")
        wrong = dequantize_4bit(weight, state)
        wrong[3, 2] += 2.0**-7
        return wrong

    monkeypatch.setattr(dequant, "triton", object())
    monkeypatch.setattr(dequant, "fused", dequantize_4bit)
    for function, works in ((dequantize_4bit, True), (fused, False)):
        monkeypatch.setattr(dequant, "fused", function)
        fused_works.cache_clear()
        assert fused_works(torch.device("cpu"), torch.bfloat16) is works
    fused_works.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_fused_kernel_is_bitsandbytes_to_the_bit(shape, dtype):
    if not fused_works(torch.device("cuda", 0), dtype):
        pytest.skip("Triton makes no kernel for this card")
    weight = nf4(shape, dtype, "cuda")
    state = weight.quant_state
    assert weight.numel() * 2 % (WEIGHTS * ROWS) == 0
    dense = dequant.fused(weight, state)
    assert dense.dtype == dtype and dense.isfinite().all()
    assert torch.equal(dense, dequantize_4bit(weight, state))
    assert torch.equal(dense, dequantise(weight))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
@pytest.mark.parametrize("shape", [(65, 64), (17, 40)], ids=str)
def test_a_weight_that_the_fused_kernel_does_not_fit_is_bitsandbytes_own(monkeypatch, shape, dtype):
    monkeypatch.setattr(dequant, "fused", trap)
    weight = nf4(shape, dtype, "cuda")
    assert torch.equal(dequantise(weight), dequantize_4bit(weight, weight.quant_state))


@pytest.mark.gpu
def test_the_fused_kernel_reads_scales_of_more_than_one_block():
    """Blocks of scales of very different size: one taken for another would be off by as much."""
    rows = SCALES * WEIGHTS // 64
    numbers = torch.randn(4 * rows, 64) * torch.logspace(-3, 2, 4).repeat_interleave(rows)[:, None]
    weight = nf4_linear(numbers.half(), torch.float16, "cuda").weight
    assert torch.equal(dequantise(weight), dequantize_4bit(weight, weight.quant_state))
