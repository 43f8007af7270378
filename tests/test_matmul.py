"""Matrix products with a fused factor or dtype, compared with fp64 products of the same values."""

import pytest
import torch

from phogpt_raw.model.matmul import matmul_to, scaled_matmul

ON_GPU = pytest.param("cuda", marks=pytest.mark.gpu)
DEVICES = pytest.mark.parametrize("device", ["cpu", ON_GPU])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def pair(dtype, device, *, rows=24, inner=40, columns=16, size=1.0):
    dice = torch.Generator().manual_seed(0)
    shapes = (rows, inner), (columns, inner)
    a, b = (size * torch.randn(*shape, generator=dice) for shape in shapes)
    return a.to(device, dtype), b.to(device, dtype).t()  # transposed, as the weights are


def off(got, wanted):
    return ((got.double() - wanted).norm() / wanted.norm()).item()


@DEVICES
@DTYPES
@pytest.mark.parametrize("to", [torch.float32, torch.bfloat16, torch.float16])
def test_a_product_comes_in_the_dtype_asked_for(device, dtype, to):
    """A product is rounded at most twice: to the operands' dtype and to the requested dtype."""
    a, b = pair(dtype, device)
    got = matmul_to(to, a, b)
    assert got.dtype == to
    limit = max(torch.finfo(t).eps for t in (dtype, to))
    assert off(got, a.double() @ b.double()) <= limit + 2**-20


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu_fp32_is_the_kernels_own_sum(dtype):
    """The relative error of an fp32 sum of at most 64 products is below 2^-18.

    A rounding of the sum to 16 bits would give an error of about 2^-9 (bf16) or 2^-12 (fp16).
    """
    for shape in (dict(), dict(rows=1, inner=64, columns=8), dict(rows=17, inner=33, columns=5)):
        a, b = pair(dtype, "cuda", **shape)
        assert off(matmul_to(torch.float32, a, b), a.double() @ b.double()) < 2**-18


@pytest.mark.gpu
def test_on_a_gpu_a_sum_above_fp16s_range_stays_finite():
    a, b = pair(torch.float16, "cuda", size=300.0)
    wanted = a.double() @ b.double()
    assert wanted.abs().max() > 2**16
    assert off(matmul_to(torch.float32, a, b), wanted) < 2**-18


@DEVICES
@DTYPES
@pytest.mark.parametrize("scale", [1.0, 2.0, 0.3, 0.0])
def test_a_scaled_product_is_scaled_once(device, dtype, scale):
    a, b = pair(dtype, device)
    got = scaled_matmul(a, b, scale)
    wanted = scale * (a.double() @ b.double())
    assert got.dtype == dtype and got.shape == wanted.shape
    # The limit is eps, two roundings: on the CPU the product is also rounded before it is scaled.
    assert (got - wanted).norm() <= (torch.finfo(dtype).eps + 2**-20) * wanted.norm()


@DEVICES
def test_a_scaled_product_reads_nothing_of_what_it_is_added_to(device, monkeypatch):
    """New memory may contain NaN, and 0 times NaN is NaN. So the product must not read new memory.
    """
    a, b = pair(torch.float32, device)
    monkeypatch.setattr(torch.Tensor, "new_empty",
                        lambda self, shape: self.new_full(shape, float("nan")))
    assert scaled_matmul(a, b, 2.0).isfinite().all()
