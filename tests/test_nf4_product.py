"""Products of a few rows with 4-bit weights: the plain version, the PTX code, the kernels."""

import doctest
import re

import pytest
import torch
import torch.nn.functional as F

from phogpt_raw.decode.fused import linear_of
from phogpt_raw.model import nf4_product as module
from phogpt_raw.model.nf4 import dequantise, nf4_linear
from phogpt_raw.model.nf4_product import (
    MOST,
    VALUES,
    Scratch,
    choose,
    dequantise_asm,
    fits,
    halves,
    product,
    product_plain,
    whole,
)


def made(out, width, rank=None, bias=True, dtype=torch.float32, device="cpu", seed=0):
    """(NF4 layer, Linear of its weight with an adapter of `rank`, function for random tensors)."""
    dice = torch.Generator(device).manual_seed(seed)

    def normal(*shape, std=1.0):
        return torch.randn(shape, generator=dice, device=device).mul(std).to(dtype)

    bias_O = torch.nn.Parameter(normal(out), requires_grad=False) if bias else None
    layer = nf4_linear(normal(out, width, std=0.02), dtype, device, bias_O)
    linear = linear_of(layer)
    if rank:
        linear = module.Linear(linear.packed, linear.fields, linear.offset, linear.bias_O,
                               normal(rank, width, std=0.1), normal(out, rank, std=0.1), 2.0)
    return layer, linear, normal


def test_doctest():
    assert doctest.testmod(module).failed == 0


def test_halves_and_whole_are_inverse():
    x_ND = torch.arange(24.0).view(3, 8)
    assert torch.equal(whole(halves(x_ND)), x_ND)
    assert halves(x_ND)[0].tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]


@pytest.mark.parametrize("bias", [True, False])
def test_the_plain_product_is_the_linears_own(bias):
    layer, linear, normal = made(32, 128, rank=4, bias=bias)
    x_ND, low_NR, add_NO = normal(3, 128), normal(3, 4), normal(3, 32)
    y = F.linear(x_ND, dequantise(layer.weight), layer.bias) + low_NR @ linear.B_OR.t()
    for found, wanted in (
            (product_plain(halves(x_ND), linear, low_NR), y),
            (product_plain(halves(x_ND), linear, low_NR, gelu=True), F.gelu(y)),
            (product_plain(halves(x_ND), linear, low_NR, add_NO), y + add_NO)):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_the_values_are_bitsandbytes():
    from bitsandbytes.functional import get_4bit_type

    assert torch.equal(torch.tensor(VALUES), get_4bit_type("nf4", device="cpu").float())


# -- the PTX instructions, run by a small interpreter


def run(program: str, packed: int, registers: int) -> list[int]:
    """Interpret PTX code of dequantise_asm; return its outputs as bit patterns."""
    values = {f"${registers}": packed}

    def read(name):
        return values[name] if name in values else int(name, 0)

    for line in program.strip("{}\n").split("\n"):
        operation, *names = re.split(r",?\s+", line.rstrip(";").replace("{x, y}", "x_y"))
        if operation.startswith(".reg"):
            continue
        target, *sources = names
        a, *more = [read(s) for s in sources]
        if operation == "and.b32":
            values[target] = a & more[0]
        elif operation == "shr.u32":
            values[target] = a >> more[0]
        elif operation == "lop3.b32":
            assert more[2] == 0xEA  # (a & b) | c
            values[target] = a & more[0] | more[1]
        elif operation == "prmt.b32":
            eight = (a | more[0] << 32).to_bytes(8, "little")
            picked = [more[1] >> 4 * n & 15 for n in range(4)]
            assert all(p < 8 for p in picked)  # 8 to 15 would copy a sign bit
            values[target] = int.from_bytes(bytes(eight[p] for p in picked), "little")
        elif operation == "mov.b32":
            values["x"], values["y"] = a & 0xFFFF, a >> 16
        elif operation == "cvt.f32.f16":
            values[target] = a
        else:
            raise AssertionError(line)
    return [values[f"${n}"] for n in range(registers)]


@pytest.mark.parametrize("to_fp32", [True, False], ids=["fp32", "pairs"])
def test_the_instructions_give_each_nibble_its_value_in_fp16(to_fp32):
    """All 256 values of a byte are tested.

    The output has the high nibbles of all four bytes first, then their low nibbles.
    """
    bits = torch.tensor(VALUES).half().view(torch.uint16).tolist()
    for byte in range(256):
        four = [byte, byte * 7 % 256, 255 - byte, byte ^ 0x5A]
        found = run(dequantise_asm(to_fp32), int.from_bytes(bytes(four), "little"),
                    8 if to_fp32 else 4)
        if not to_fp32:
            found = [half for pair in found for half in (pair & 0xFFFF, pair >> 16)]
        assert found == [bits[b >> 4] for b in four] + [bits[b & 15] for b in four]


# -- the kernels


SHAPES = [(12288, 4096), (4096, 4096), (16384, 4096), (4096, 16384),  # 7B5
          (9216, 3072), (3072, 3072), (12288, 3072), (3072, 12288),  # 4B
          (768, 256), (256, 1024)]  # nano


@pytest.mark.parametrize("out, width", SHAPES)
@pytest.mark.parametrize("some", [True, False])
def test_the_programs_cover_each_matrix_once(out, width, some):
    block, columns, split, warps = choose(some, out, width)
    assert fits(out, width)
    assert out % block == 0 and width // 2 % (columns * split) == 0 and columns % 32 == 0
    assert (block * columns) % (32 * warps) == 0  # each thread has a byte
    assert split == 1 or some


def is_plain(out, width, dtype, rows, low, how):
    """Whether the kernels' product equals the plain product within 3 eps of the largest value.

    The 3 eps are for the rounding of W, of the sums and of the result. The product is computed
    twice, because GPU programs that share a row of the weight use counters, and the first product
    must reset them.
    """
    _, linear, normal = made(out, width, rank=16, dtype=dtype, device="cuda")
    scratch = Scratch(out, "cuda")
    x_N2, low_NR, add_NO = halves(normal(rows, width)), normal(rows, 16), normal(rows, out)
    gelu, in_halves, add = (how.get(name, False) for name in ("gelu", "in_halves", "add"))
    low_NR, add_NO = low_NR if low else None, add_NO if add else None
    wanted = product_plain(x_N2, linear, low_NR, add_NO, gelu).float()
    for _ in range(2):
        found = product(x_N2, linear, scratch, low_NR, add_NO.clone() if add else None, gelu,
                        in_halves)
        found = whole(found) if in_halves else found
        error = (found.float() - wanted).abs().max() / wanted.abs().max()
        if error >= 3 * torch.finfo(dtype).eps:
            return False
    return True


@pytest.mark.gpu
@pytest.mark.parametrize("out, width", SHAPES)
def test_the_kernels_are_the_plain_product_at_every_shape(out, width):
    for rows in (1, 2, 5, MOST):
        assert is_plain(out, width, torch.float16, rows, low=True, how=dict(add=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("how", [{}, dict(gelu=True), dict(add=True),
                                 dict(gelu=True, in_halves=True)], ids=str)
def test_the_kernels_add_what_the_plain_product_adds(dtype, how):
    for low in (True, False):
        for rows in (1, 7):
            assert is_plain(768, 256, dtype, rows, low, how)


@pytest.mark.gpu
def test_a_gpu_without_tensor_cores_for_triton_takes_row_by_row(monkeypatch):
    monkeypatch.setattr(module, "TENSOR_CORES", (99, 0))
    assert is_plain(768, 256, torch.float16, 7, low=True, how=dict(add=True))


@pytest.mark.gpu
def test_a_product_repeats_to_the_bit():
    """GPU programs that share a row of the weight finish in any order. The sum must not depend on
    this order."""
    _, linear, normal = made(4096, 16384, rank=16, dtype=torch.float16, device="cuda")
    x_N2, low_NR, scratch = halves(normal(8, 16384)), normal(8, 16), Scratch(4096, "cuda")
    first = product(x_N2, linear, scratch, low_NR)
    assert all(torch.equal(product(x_N2, linear, scratch, low_NR), first) for _ in range(20))


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [1, 8, 64, 100])
def test_an_adapter_may_have_any_rank(rank):
    _, linear, normal = made(768, 256, rank=rank, dtype=torch.float16, device="cuda")
    for rows in (1, 3):
        x_N2, low_NR = halves(normal(rows, 256)), normal(rows, rank)
        torch.testing.assert_close(product(x_N2, linear, Scratch(768, "cuda"), low_NR),
                                   product_plain(x_N2, linear, low_NR), rtol=0, atol=0.02)


TYPES = dict(packed="*u8", scales="*u8", scale_code="*fp32", scale_scales="*fp32", offset="fp32",
             x="*fp16", y="*fp16", bias="*fp16", low="*fp16", B="*fp16", parts="*fp32",
             arrived="*i32", rows="i32", out="i32")


@pytest.mark.parametrize("capability", [70, 75, 80, 90])
@pytest.mark.parametrize("rows", [1, 8])
def test_the_kernels_compile_for_gpus_that_are_not_here(capability, rows):
    """Triton can compile for a GPU that the computer does not have. The test measures no speed."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    out, width = 4096, 4096
    some = rows > 1 and capability >= 80
    block, columns, split, warps = choose(some, out, width)
    fixed = dict(width=width, rank=16, BLOCK=block, COLUMNS=columns, SPLIT=split, RANK=16,
                 BIAS=True, LOW=True, ADD=True, GELU=False, HALVES=False)
    source = ASTSource(module.some_rows if some else module.one_row,
                       {**TYPES, **dict.fromkeys(fixed, "constexpr")}, fixed)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32),
                              options={"num_warps": warps})
    assert compiled.asm["cubin"]
