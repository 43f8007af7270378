"""Dequantising NF4: plain PyTorch, bitsandbytes and the fused kernel agree bit for bit.

All three round at the same points. A scale is a product plus an offset: the product is rounded to
fp32, and so is the sum. The value times the scale is rounded to fp32, then to the weight's dtype.
"""

import copy

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit

from phogpt_raw.model import nf4
from phogpt_raw.model.nf4 import (
    ROWS,
    SCALES,
    WEIGHTS,
    dequantise,
    dequantise_fused,
    dequantise_plain,
    fused_works,
    nf4_linear,
    stored_shapes,
)
from phogpt_raw.private_apis import nf4_fields

SIXTEEN_BIT = [torch.float16, torch.bfloat16]
# 7B5's qkv and output projections, and a weight with one block of scales. The fused kernel supports
# these shapes.
SHAPES = [(12288, 4096), (4096, 4096), (256, 64)]


def random_nf4(shape, dtype, device):
    """An NF4 weight. The sizes of its values differ from row to row, and so do its blocks' scales.
    """
    dice = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=dice) * torch.rand(shape[0], 1, generator=dice)
    return nf4_linear(values.to(dtype), dtype, device).weight


def plain(weight):
    return dequantise_plain(weight, nf4_fields(weight.quant_state))


def fail(*_):
    raise AssertionError("the fused kernel was called")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(256, 64), (65, 3), (17, 40)], ids=str)
def test_on_the_cpu_it_is_bitsandbytes_own(monkeypatch, shape, dtype):
    monkeypatch.setattr(nf4, "dequantise_fused", fail)
    monkeypatch.setattr(nf4, "fused_works", lambda *_: True)
    weight = random_nf4(shape, dtype, "cpu")
    dense = dequantise(weight)
    assert (dense.shape, dense.dtype) == (torch.Size(shape), dtype)
    assert torch.equal(dense, dequantize_4bit(weight, weight.quant_state))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN_BIT])
@pytest.mark.parametrize("shape", [(256, 64), (65, 3), (17, 40), (700, 96)], ids=str)
def test_plain_dequantising_is_bitsandbytes_to_the_bit(shape, dtype, device):
    """The shape (700, 96) has five blocks of scales, and the last block is not full.

    bitsandbytes gets the values as one row. On a CPU with AVX-512 its kernel (0.50.2) uses wrong
    scales if a row is not a multiple of 64 values, for example 96.
    """
    weight = random_nf4(shape, dtype, device)
    dense = plain(weight)
    assert dense.dtype == dtype and dense.abs().max() > 1
    state = copy.copy(weight.quant_state)
    state.shape = torch.Size((1, dense.numel()))
    assert torch.equal(dense, dequantize_4bit(weight.data, state).view(shape))


def test_plain_dequantising_of_a_byte_worked_by_hand():
    """All 64 values are in one block, whose scale is 2.

    It is the only scale, so the offset, which is the mean of all scales, is 2 too. The nibbles 0, 7
    and 15 mean -1, 0 and 1. The first value is in the upper half of a byte.
    """
    values = torch.zeros(1, 64)
    values[0, :4] = torch.tensor([2.0, 0.0, -2.0, 2.0])
    weight = nf4_linear(values, torch.float32, "cpu").weight
    assert weight.flatten()[:2].tolist() == [0xF7, 0x0F]
    assert plain(weight)[0, :4].tolist() == [2.0, 0.0, -2.0, 2.0]


def test_the_offset_of_the_scales_is_known_to_the_host():
    """If dequantising read the offset from the GPU each time, it would wait for the GPU."""
    state = random_nf4((256, 64), torch.float32, "cpu").quant_state
    assert state.offset_on_host == float(state.offset)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("shape", [(256, 64), (65, 3), (17, 40), (700, 96)], ids=str)
def test_the_parts_of_a_weight_have_the_shapes_that_a_cache_expects(shape, device):
    weight = random_nf4(shape, torch.float32, device)
    fields = nf4_fields(weight.quant_state)
    for part, kind in stored_shapes(torch.Size(shape)).items():
        tensor = getattr(fields, part, weight.data)
        assert (tensor.dtype, tuple(tensor.shape)) == kind, part
        assert tensor.device.type == device


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 3, 16, 200])
@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
def test_bitsandbytes_own_kernels_still_read_the_weights(dtype, rows):
    """Without gradients a Linear4bit itself reads the 4-bit values, the scales and the offset."""
    weight = random_nf4((512, 256), dtype, "cuda")
    layer = nf4_linear(torch.zeros(512, 256, dtype=dtype), dtype, "cuda")
    layer.weight = weight
    x = torch.randn(rows, 256, device="cuda", dtype=dtype)
    with torch.no_grad():
        y = layer(x)
    wanted = x.double() @ dequantise(weight).double().T
    assert (y.double() - wanted).norm() < 4 * torch.finfo(dtype).eps * wanted.norm()


def test_without_triton_the_fused_kernel_does_not_work(monkeypatch):
    monkeypatch.setattr(nf4, "triton", None)
    fused_works.cache_clear()
    assert not fused_works(torch.device("cpu"), torch.bfloat16)
    fused_works.cache_clear()


@pytest.mark.parametrize("broken", ["raises", "is off"])
def test_a_kernel_that_fails_its_trial_is_not_taken(monkeypatch, broken):
    def right(packed, fields, offset):
        return dequantise_plain(packed, fields)

    def wrong(packed, fields, offset):
        if broken == "raises":
            raise RuntimeError("no toolchain")
        dense = dequantise_plain(packed, fields)
        dense[3, 2] += 2.0**-7
        return dense

    monkeypatch.setattr(nf4, "triton", object())
    for function, works in ((right, True), (wrong, False)):
        monkeypatch.setattr(nf4, "dequantise_fused", function)
        fused_works.cache_clear()
        assert fused_works(torch.device("cpu"), torch.bfloat16) is works
    fused_works.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_fused_kernel_is_bitsandbytes_to_the_bit(shape, dtype):
    if not fused_works(torch.device("cuda", 0), dtype):
        pytest.skip("Triton makes no kernel for this card")
    weight = random_nf4(shape, dtype, "cuda")
    state = weight.quant_state
    assert weight.numel() * 2 % (WEIGHTS * ROWS) == 0
    dense = dequantise_fused(weight, nf4_fields(state), state.offset_on_host)
    assert dense.dtype == dtype and dense.isfinite().all()
    assert torch.equal(dense, dequantize_4bit(weight, state))
    assert torch.equal(dense, dequantise(weight))
    assert torch.equal(dense, plain(weight))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
@pytest.mark.parametrize("shape", [(65, 64), (17, 40)], ids=str)
def test_a_weight_that_the_fused_kernel_does_not_fit_is_bitsandbytes_own(monkeypatch, shape, dtype):
    monkeypatch.setattr(nf4, "dequantise_fused", fail)
    weight = random_nf4(shape, dtype, "cuda")
    assert torch.equal(dequantise(weight), dequantize_4bit(weight, weight.quant_state))


@pytest.mark.gpu
def test_the_fused_kernel_reads_scales_of_more_than_one_block():
    """The blocks contain scales of very different sizes. So a wrong block gives a large error."""
    rows = SCALES * WEIGHTS // 64
    values = torch.randn(4 * rows, 64) * torch.logspace(-3, 2, 4).repeat_interleave(rows)[:, None]
    weight = nf4_linear(values.half(), torch.float16, "cuda").weight
    assert torch.equal(dequantise(weight), dequantize_4bit(weight, weight.quant_state))
