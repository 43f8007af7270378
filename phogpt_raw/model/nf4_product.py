"""Compute x Wᵀ for the few rows of x in a decoding step, directly from the 4-bit weights.

A decoding step reads every weight once, so the speed of the GPU's memory limits the step. NF4
weights take a quarter of the bytes of 16-bit weights. Dequantising them to 16 bits first would move
nine times as many bytes. The Triton kernel `one_row` is for a single row of x. The kernel
`some_rows` is for 2 to 16 rows and uses tensor cores. Triton does not support the tensor cores of
GPUs older than Ampere. On those GPUs `one_row` computes each row of x separately. While the result
is in registers, the kernels also add the bias, the adapter's product and the residual, and apply
GELU. `product_plain` computes the same values in ordinary operations. Without Triton, model/lora.py
uses bitsandbytes' kernel.

Three details are not obvious.

A byte contains two weights of a row of W: one from an even column, and one from the next column.
So x is passed in halves, [N, 2, D / 2]: its even elements, then its odd elements (`halves`). The
elements of x that a thread needs for its bytes are then next to each other in memory.

The kernels take the 16 NF4 values from registers, not from a table in memory. PRMT is the GPU's
instruction that permutes bytes: each selector chooses one of eight bytes. A weight is stored in
four bits (a nibble). The lower three bits of the nibble are such a selector. Two permutations find
the low byte of the weight's fp16 value: one among the first eight NF4 values, one among the last
eight. Two other permutations find the high byte. The top bit of the nibble chooses between the
first eight and the last eight values. With a table in memory, the kernels would have to read the
table once for each byte of weights. This would lower their speed to two thirds, even if the table
stayed in the GPU's cache.

If W has few rows, several Triton programs (instances of the kernel) compute the same rows of W
together: each program takes a part of the columns (`split`). The program that finishes last adds
the partial sums in a fixed order, so the result does not depend on timing.

N rows, D in, O out, R rank.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from phogpt_raw.model.nf4 import WEIGHTS, dequantise_plain
from phogpt_raw.private_apis import NF4Fields

try:
    import triton
    import triton.language as tl
except ImportError:  # only torch for CUDA on Linux installs Triton
    triton = None

MOST = 16  # the largest number of rows of x
TENSOR_CORES = (8, 0)  # the lowest compute capability on which Triton uses tensor cores
# The columns of a row of W are split among at most SPLIT programs, so that one product has at
# least PROGRAMS programs in total if possible.
SPLIT, PROGRAMS = 8, 256
# The 16 NF4 values are quantiles of a normal distribution (arXiv:2305.14314, appendix E).
VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0)


@dataclass(frozen=True)
class Linear:
    """The tensors of a frozen linear layer, as the kernels read them. If the layer has an adapter,
    A and B are the adapter's matrices in the compute dtype."""

    packed: torch.Tensor  # uint8 [O, D / 2]
    fields: NF4Fields
    offset: float  # fields.offset as a Python float
    bias_O: torch.Tensor | None
    A_RD: torch.Tensor | None = None
    B_OR: torch.Tensor | None = None
    scaling: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        """(O, D)."""
        return tuple(self.fields.shape)


def halves(x_ND: torch.Tensor) -> torch.Tensor:
    """[N, D] -> [N, 2, D / 2]: the even elements, then the odd ones.

    >>> halves(torch.tensor([[0, 1, 2, 3]])).tolist()
    [[[0, 2], [1, 3]]]
    """
    return x_ND.unflatten(-1, (-1, 2)).mT.contiguous()


def whole(x_N2: torch.Tensor) -> torch.Tensor:
    """The inverse of `halves`: [N, 2, D / 2] -> [N, D]."""
    return x_N2.mT.flatten(-2)


def product_plain(x_N2, linear: Linear, low_NR=None, add_NO=None, gelu: bool = False):
    """x Wᵀ + bias + low Bᵀ, [N, O]. Then GELU is applied if `gelu`, and then add_NO is added.

    It computes in fp32, and the result has the dtype of x. x_N2: x in halves. low_NR: the result of
    scaling * x Aᵀ.
    """
    y = whole(x_N2).float() @ dequantise_plain(linear.packed, linear.fields).float().t()
    if linear.bias_O is not None:
        y = y + linear.bias_O.float()
    if low_NR is not None:
        y = y + low_NR.float() @ linear.B_OR.float().t()
    if gelu:
        y = F.gelu(y)
    if add_NO is not None:
        y = y + add_NO.float()
    return y.to(x_N2.dtype)


class Scratch:
    """Working memory for the partial sums of programs that compute a row of W together. One
    Scratch serves all products on one CUDA stream. most_out: the largest O of these products."""

    def __init__(self, most_out: int, device):
        self.parts = torch.empty(SPLIT * MOST * most_out, device=device)
        self.arrived = torch.zeros(most_out, dtype=torch.int32, device=device)


def product(x_N2, linear: Linear, scratch: Scratch, low_NR=None, add_NO=None, gelu: bool = False,
            in_halves: bool = False) -> torch.Tensor:
    """`product_plain`, computed by the kernels, for at most MOST rows of x. If `in_halves`, the
    result is in halves, [N, 2, O / 2].

    If add_NO is given, the result overwrites it.
    """
    rows, (out, width) = len(x_N2), linear.shape
    assert rows <= MOST
    fields, rank = linear.fields, 0 if low_NR is None else low_NR.shape[1]
    y = add_NO if add_NO is not None else torch.empty(rows, out, dtype=x_N2.dtype,
                                                      device=x_N2.device)
    some = rows > 1 and torch.cuda.get_device_capability(y.device) >= TENSOR_CORES
    block, columns, split, warps = choose(some, out, width)
    kernel, beside = (some_rows, split) if some else (one_row, rows)
    kernel[(beside, out // block)](
        linear.packed, fields.scales, fields.scale_code, fields.scale_scales, linear.offset,
        x_N2, y, linear.bias_O, low_NR, linear.B_OR, scratch.parts, scratch.arrived,
        rows, out, width, rank, BLOCK=block, COLUMNS=columns, SPLIT=split,
        RANK=max(16, 2 ** math.ceil(math.log2(max(1, rank)))), BIAS=linear.bias_O is not None,
        LOW=rank > 0, ADD=add_NO is not None, GELU=gelu, HALVES=in_halves, num_warps=warps)
    return y.view(rows, 2, out // 2) if in_halves else y


def choose(some: bool, out: int, width: int) -> tuple[int, int, int, int]:
    """(rows of W per program, bytes of a row of W that are read at once, programs among which a
    row of W is divided, warps per program) for the kernel `some_rows` if `some` is True, else for
    the kernel `one_row`.

    The choice is based on measurements with the shapes of 7B5 and 4B on an H100 and an H200.
    """
    half = width // 2
    if not some:
        columns = math.gcd(half, 512 if half < 4096 else 2048)
        return 2, columns, 1, max(1, columns // 512)
    block, columns, split = math.gcd(64, out), math.gcd(128, half), 1
    while out // block * split < PROGRAMS and split < SPLIT and half % (2 * split * columns) == 0:
        split *= 2
    return block, columns, split, 4


def fits(out: int, width: int) -> bool:
    """Whether the kernels support a matrix of this shape."""
    return width % (2 * WEIGHTS) == 0 and out % 32 == 0


def dequantise_asm(to_fp32: bool) -> str:
    """PTX code that converts four packed bytes, which contain eight weights, to NF4 values.

    The first half of the outputs are the values of the high nibbles. The second half are the values
    of the low nibbles. The outputs are eight fp32 registers, $0 to $7, or four registers with two
    fp16 values each, $0 to $3. The register after the outputs is the input: $8 or $4.
    """
    bits = torch.tensor(VALUES).half().view(torch.uint16).tolist()
    low, high = ([sum((value >> shift & 255) << 8 * n for n, value in enumerate(bits[i : i + 4]))
                  for i in range(0, 16, 4)] for shift in (0, 8))
    packed = "$8" if to_fp32 else "$4"
    lines = [
        ".reg .b32 s<2>, t<2>, a, b, l<2>, h<2>, pair;", ".reg .b16 x, y;",
        f"and.b32 s0, {packed}, 0x77777777;",  # the lower three bits of each nibble
        f"shr.u32 t0, {packed}, 1;",  # the top bit (set for the last 8 values) as bit 2
        "lop3.b32 t0, t0, 0x44444444, 0x32103210, 0xEA;",  # (t0 & 0x4…) | 0x3210…
        "shr.u32 s1, s0, 16;", "shr.u32 t1, t0, 16;",
    ]
    for n in (0, 1):  # the nibbles of the first two bytes, then of the last two bytes
        for name, table in (("l", low), ("h", high)):
            lines += [f"prmt.b32 a, {table[0]}, {table[1]}, s{n};",
                      f"prmt.b32 b, {table[2]}, {table[3]}, s{n};",
                      f"prmt.b32 {name}{n}, a, b, t{n};"]
    for which, order in ((0, "0x7351"), (1, "0x6240")):  # bytes 1 and 3: high nibbles
        for n in (0, 1):
            if to_fp32:
                place = 4 * which + 2 * n
                lines += [f"prmt.b32 pair, l{n}, h{n}, {order};", "mov.b32 {x, y}, pair;",
                          f"cvt.f32.f16 ${place}, x;", f"cvt.f32.f16 ${place + 1}, y;"]
            else:
                lines.append(f"prmt.b32 ${2 * which + n}, l{n}, h{n}, {order};")
    return "\n".join(["{", *lines, "}"])


if triton is not None:
    AS_FP32 = tl.constexpr(dequantise_asm(to_fp32=True))
    AS_FP16 = tl.constexpr(dequantise_asm(to_fp32=False))
    EIGHT = tl.constexpr("=f,=f,=f,=f,=f,=f,=f,=f,r")
    FOUR = tl.constexpr("=r,=r,=r,=r,r")

    @triton.jit
    def scale_of(scales, scale_code, scale_scales, offset, block):
        coded = tl.load(scale_code + tl.load(scales + block).to(tl.int32))
        return coded * tl.load(scale_scales + block // 256) + offset

    @triton.jit
    def place_of(row, column, out, HALVES: tl.constexpr):
        if HALVES:
            return row * out + (column % 2) * (out // 2) + column // 2
        return row * out + column

    @triton.jit
    def finish(total, y, place, bias, column, mask, ADD: tl.constexpr, GELU: tl.constexpr,
               BIAS: tl.constexpr):
        if BIAS:
            total += tl.load(bias + column).to(tl.float32)
        if GELU:
            total = 0.5 * total * (1 + tl.erf(total * 0.7071067811865476))
        if ADD:
            total += tl.load(y + place, mask=mask).to(tl.float32)
        tl.store(y + place, total.to(y.dtype.element_ty), mask=mask)

    @triton.jit
    def one_row(packed, scales, scale_code, scale_scales, offset, x, y, bias, low, B, parts,
                arrived, rows, out, width: tl.constexpr, rank: tl.constexpr, BLOCK: tl.constexpr,
                COLUMNS: tl.constexpr, SPLIT: tl.constexpr, RANK: tl.constexpr,
                BIAS: tl.constexpr, LOW: tl.constexpr, ADD: tl.constexpr, GELU: tl.constexpr,
                HALVES: tl.constexpr):
        half: tl.constexpr = width // 2
        row = tl.program_id(0)  # for different rows of x, programs read the same cached part of W
        o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        sums = tl.zeros([BLOCK, COLUMNS // 32], tl.float32)
        for start in tl.static_range(0, half, COLUMNS):
            k = start + tl.arange(0, COLUMNS)
            block = start // 32 + tl.arange(0, COLUMNS // 32)
            four_bits = tl.load(packed + o[:, None] * half + k[None, :])
            scale = scale_of(scales, scale_code, scale_scales, offset,
                             o[:, None] * (width // 64) + block[None, :])
            even, odd = tl.inline_asm_elementwise(
                AS_FP32, EIGHT, [four_bits], dtype=(tl.float32, tl.float32), is_pure=True, pack=4)
            part = even * tl.load(x + row * width + k).to(tl.float32)[None, :]
            part += odd * tl.load(x + row * width + half + k).to(tl.float32)[None, :]
            sums += tl.sum(tl.reshape(part, [BLOCK, COLUMNS // 32, 32]), 2) * scale
        total = tl.sum(sums, 1)
        if LOW:
            r = tl.arange(0, RANK)
            b = tl.load(B + o[:, None] * rank + r[None, :], mask=(r < rank)[None, :], other=0)
            a = tl.load(low + row * rank + r, mask=r < rank, other=0).to(tl.float32)
            total += tl.sum(b.to(tl.float32) * a[None, :], 1)
        finish(total, y, place_of(row, o, out, HALVES), bias, o, None, ADD, GELU, BIAS)

    @triton.jit
    def some_rows(packed, scales, scale_code, scale_scales, offset, x, y, bias, low, B, parts,
                  arrived, rows, out, width: tl.constexpr, rank: tl.constexpr, BLOCK: tl.constexpr,
                  COLUMNS: tl.constexpr, SPLIT: tl.constexpr, RANK: tl.constexpr,
                  BIAS: tl.constexpr, LOW: tl.constexpr, ADD: tl.constexpr, GELU: tl.constexpr,
                  HALVES: tl.constexpr):
        half: tl.constexpr = width // 2
        share: tl.constexpr = half // SPLIT
        o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        n = tl.arange(0, 16)
        first = tl.program_id(0) * share
        total = tl.zeros([BLOCK, 16], tl.float32)
        for start in range(first, first + share, COLUMNS):
            k = start + tl.arange(0, COLUMNS)
            block = start // 32 + tl.arange(0, COLUMNS // 32)
            four_bits = tl.load(packed + o[:, None] * half + k[None, :])
            scale = scale_of(scales, scale_code, scale_scales, offset,
                             o[:, None] * (width // 64) + block[None, :])[:, :, None]
            even, odd = tl.inline_asm_elementwise(
                AS_FP16, FOUR, [four_bits], dtype=(tl.float16, tl.float16), is_pure=True, pack=4)
            even = tl.reshape(even, [BLOCK, COLUMNS // 32, 32])
            odd = tl.reshape(odd, [BLOCK, COLUMNS // 32, 32])
            if x.dtype.element_ty == tl.float16:
                even, odd = even * scale.to(tl.float16), odd * scale.to(tl.float16)
            else:
                even = (even.to(tl.float32) * scale).to(x.dtype.element_ty)
                odd = (odd.to(tl.float32) * scale).to(x.dtype.element_ty)
            x_place = x + n[None, :] * width + k[:, None]
            there = (n < rows)[None, :]
            total = tl.dot(tl.reshape(even, [BLOCK, COLUMNS]),
                           tl.load(x_place, mask=there, other=0), total)
            total = tl.dot(tl.reshape(odd, [BLOCK, COLUMNS]),
                           tl.load(x_place + half, mask=there, other=0), total)
        last = True
        if SPLIT > 1:
            part = parts + n[None, :] * out + o[:, None]
            tl.store(part + tl.program_id(0) * 16 * out, total)
            tl.debug_barrier()
            last = tl.atomic_add(arrived + tl.program_id(1), 1, sem="acq_rel") == SPLIT - 1
        if last:
            if SPLIT > 1:
                total = tl.zeros([BLOCK, 16], tl.float32)
                for s in range(SPLIT):
                    total += tl.load(part + s * 16 * out, cache_modifier=".cg")
                tl.store(arrived + tl.program_id(1), 0)
            there = (n < rows)[None, :]
            if LOW:
                r = tl.arange(0, RANK)
                b = tl.load(B + o[:, None] * rank + r[None, :], mask=(r < rank)[None, :], other=0)
                a = tl.load(low + n[None, :] * rank + r[:, None],
                            mask=(r < rank)[:, None] & there, other=0)
                total = tl.dot(b, a, total)
            finish(total, y, place_of(n[None, :], o[:, None], out, HALVES), bias, o[:, None], there,
                   ADD, GELU, BIAS)
