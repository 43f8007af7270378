"""The flat buffer alone, with parameters that belong to no model."""

import doctest

import pytest
import torch
from torch import nn

from phogpt_raw.model import flat as module
from phogpt_raw.model.flat import ALIGNMENT, FlatBuffer

SHAPES = [(3, 5), (300,), (256,), (1,), (16, 32)]


def parameters():
    dice = torch.Generator().manual_seed(0)
    return [(f"p{n}", nn.Parameter(torch.randn(shape, generator=dice)))
            for n, shape in enumerate(SHAPES)]


def test_doctest():
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("trainable", [True, False])
def test_parameters_keep_their_values_and_become_aligned_views(trainable):
    named = parameters()
    before = [p.detach().clone() for _, p in named]
    buffer = FlatBuffer(named, torch.float32, trainable)
    assert [name for name, _ in buffer.views] == [name for name, _ in named]
    assert buffer.count == sum(p.numel() for p in before)
    assert buffer.flat.numel() == sum(-(-p.numel() // ALIGNMENT) * ALIGNMENT for p in before)
    for (_, p), (_, view), value in zip(named, buffer.views, before, strict=True):
        assert torch.equal(p, value) and p.data_ptr() == view.data_ptr()
        assert (view.data_ptr() - buffer.flat.data_ptr()) % (4 * ALIGNMENT) == 0
    buffer.flat.data.fill_(7)
    assert all((p == 7).all() for _, p in named)


def test_autograd_adds_into_the_flat_gradient():
    named = parameters()
    buffer = FlatBuffer(named, torch.float32)
    for _ in range(2):
        sum((n + 1) * p.sum() for n, (_, p) in enumerate(named)).backward()
    for n, (_, p) in enumerate(named):
        assert (p.grad == 2 * (n + 1)).all()
    wanted = sum(2 * (n + 1) * p.numel() for n, (_, p) in enumerate(named))
    assert buffer.flat.grad.sum() == wanted  # the sum is right, so the gaps are zero


def test_what_is_not_trained_has_no_gradient_buffer():
    named = parameters()
    buffer = FlatBuffer(named, torch.bfloat16, trainable=False)
    assert buffer.flat.grad is None and not buffer.flat.requires_grad
    assert all(p.grad is None and not p.requires_grad for _, p in named)


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_copy_in_the_compute_dtype_follows_by_cast_alone(dtype, trainable):
    named = parameters()
    buffer = FlatBuffer(named, dtype, trainable)
    memory = buffer.compute.untyped_storage().data_ptr()
    for _ in range(2):
        for _, p in named:
            assert torch.equal(p.compute_copy, p.detach().to(dtype))
            assert p.compute_copy.untyped_storage().data_ptr() == memory
            assert not p.compute_copy.requires_grad
        before = buffer.compute.clone()
        buffer.flat.data.mul_(1.5)
        assert torch.equal(buffer.compute, before)
        buffer.cast()
        assert not torch.equal(buffer.compute, before)


def test_in_fp32_there_is_no_copy():
    named = parameters()
    buffer = FlatBuffer(named, torch.float32)
    buffer.cast()
    assert buffer.compute is None and not hasattr(named[0][1], "compute_copy")
