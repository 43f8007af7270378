"""Decoding on a GPU with NF4 weights: one token through all blocks, with nine kernels per block.

For one token the model's own forward launches about thirty kernels per block, most of them tiny.
Most of the time then goes to launches, and to small tensors that are written to memory and read
back. Here `one_token` computes the whole step. Its matrix products are in model/nf4_product.py.
Three more functions compute everything between the products. In this file, the plain version of a
function is just before the function:

    norm_low     layer norm, and x Aᵀ for the next linear layer
    attend_low   attention over parts of the cache, the combination of the parts, and x Aᵀ
    low_rank     only x Aᵀ

B rows, D hidden, H heads, K head width, S positions, P parts, R rank. A "2" in a name means that
even elements come first, then odd elements (`halves`).
"""

import functools
import math
from dataclasses import replace

import torch
from torch import nn

from phogpt_raw.decode.prefill import Block, Norm, blocks_of, read_prompt
from phogpt_raw.model.adapters import base_and_adapter
from phogpt_raw.model.cache import Cache, Piece
from phogpt_raw.model.lora import compute_copy
from phogpt_raw.model.nf4 import can_fuse, dequantise_fused
from phogpt_raw.model.nf4_product import MOST, Linear, Scratch, fits, halves, product, whole
from phogpt_raw.model.phogpt import PhoGPT
from phogpt_raw.private_apis import nf4_fields, nf4_state

try:
    import triton
    import triton.language as tl
except ImportError:  # only torch for CUDA on Linux installs Triton
    triton = None

# Attention divides the cached positions of a row into at most PARTS parts. A part has at least PART
# positions.
PART, PARTS = 128, 16


class FusedStep:
    """`one_token` for a model and a cache, with weights that are collected only once."""

    def __init__(self, model: PhoGPT, cache: Cache, blocks: list[Block]):
        self.model, self.cache, self.blocks = model, cache, blocks
        config = model.config
        self.scratch = Scratch(config.expansion_ratio * config.d_model, model.head.device)
        self.scale = config.softmax_scale or 1 / math.sqrt(config.d_model // config.n_heads)

    def __call__(self, ids_B: torch.Tensor, positions: int) -> torch.Tensor:
        """Hidden states [B, D] after the last norm, for one more token in each of the first B rows.

        `positions` is not used, because the kernels read each row's position on the device.
        """
        x = self.model.transformer.wte(ids_B)
        x = one_token(x, self.blocks, self.cache, self.model.slopes_H, self.scale, self.scratch)
        return self.model.transformer.norm_f(x)

    def read(self, ids_BL: torch.Tensor, piece: Piece) -> torch.Tensor:
        """Hidden states [B, L, D] after the last norm, for a piece of the prompts."""
        return read_prompt(self.model, ids_BL, piece, self.blocks, many_rows)

    def logits(self, hidden_BD: torch.Tensor) -> torch.Tensor:
        return self.model.logits(hidden_BD)


def one_token(x_BD, blocks: list[Block], cache: Cache, slopes_H, scale: float,
              scratch: Scratch) -> torch.Tensor:
    """The output of all blocks for x [B, D]. Writes each row's new key and value to the cache, at
    the row's position."""
    place_B = cache.place_B[: len(x_BD)]
    for block, kv in zip(blocks, cache.kv, strict=True):
        y_B2, low = norm_low(x_BD, block.norm_1, block.Wqkv)
        qkv = product(y_B2, block.Wqkv, scratch, low)
        y_B2, low = attend_low(qkv, kv, place_B, slopes_H, scale, block.out_proj)
        x_BD = product(y_B2, block.out_proj, scratch, low, add_NO=x_BD)
        y_B2, low = norm_low(x_BD, block.norm_2, block.up_proj)
        y_B2 = product(y_B2, block.up_proj, scratch, low, gelu=True, in_halves=True)
        x_BD = product(y_B2, block.down_proj, scratch, low_rank(y_B2, block.down_proj),
                       add_NO=x_BD)
    return x_BD


def many_rows(x_BLD: torch.Tensor, linear: Linear) -> torch.Tensor:
    """A linear layer and its adapter, applied to x. W is dequantised first. For many rows this is
    faster than a product that reads the 4-bit weights directly."""
    x_ND = x_BLD.flatten(0, 1)
    weight = dequantise_fused(linear.packed, linear.fields, linear.offset)
    y_NO = torch.addmm(linear.bias_O, x_ND, weight.t())
    if linear.A_RD is not None:
        y_NO.addmm_(x_ND @ linear.A_RD.t(), linear.B_OR.t(), alpha=linear.scaling)
    return y_NO.unflatten(0, x_BLD.shape[:2])


def linear_of(layer: nn.Module) -> Linear | None:
    """The weights and the adapter of a layer. None if the weights are not NF4, or if the adapter is
    not plain LoRA."""
    from bitsandbytes.nn import Linear4bit

    found = base_and_adapter(layer)
    if found is None:
        return None
    base, adapter = found
    state = nf4_state(base.weight) if isinstance(base, Linear4bit) else None
    if state is None:
        return None
    fields = nf4_fields(state)
    linear = Linear(base.weight.data.view(fields.shape[0], -1), fields, state.offset_on_host,
                    base.bias)
    if adapter is None:
        return linear
    A, B = (compute_copy(part[adapter].weight, fields.dtype).detach()
            for part in (layer.lora_A, layer.lora_B))
    return replace(linear, A_RD=A, B_OR=B, scaling=layer.scaling[adapter])


def fused_step(model: PhoGPT, cache: Cache) -> FusedStep | None:
    """A FusedStep with the model's current weights. None if the model's own forward must run.

    A FusedStep needs a GPU with Triton, 16 bits, NF4 weights, and adapters that are plain LoRA.
    """
    config, head = model.config, model.head
    width = config.d_model // config.n_heads
    if (triton is None or not head.is_cuda or head.dtype not in (torch.float16, torch.bfloat16)
            or cache.rows > MOST or config.clip_qkv is not None or config.no_bias
            or width not in (32, 64, 128, 256)):
        return None
    blocks = blocks_of(model, readable)
    if blocks is None or not works(head.device, head.dtype):
        return None
    return FusedStep(model, cache, blocks)


def readable(layer: nn.Module) -> Linear | None:
    """linear_of(layer), or None if the kernels do not support the layer's shape."""
    linear = linear_of(layer)
    return linear if linear and fits(*linear.shape) and can_fuse(linear.fields) else None


@functools.cache
def works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels of `product` compile for this GPU and agree with `product_plain`."""
    from phogpt_raw.model.nf4 import nf4_linear
    from phogpt_raw.model.nf4_product import product_plain

    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(64, 128, generator=generator, device=device)
    layer = nf4_linear(weight.to(dtype), dtype, device)
    x = torch.randn(1, 128, generator=generator, device=device, dtype=dtype)
    try:
        linear, scratch = linear_of(layer), Scratch(64, device)
        return all(torch.allclose(product(halves(x.expand(rows, -1)), linear, scratch).float(),
                                  product_plain(halves(x.expand(rows, -1)), linear).float(),
                                  rtol=0.02, atol=0.2) for rows in (1, 2))
    except Exception:  # any compiler error: the GPU is too old, or the toolchain is missing
        return False


# -- the functions between the products, each after its plain version


def low_rank_plain(x_B2, linear: Linear) -> torch.Tensor | None:
    """scaling * x Aᵀ, [B, R]. None if there is no adapter."""
    if linear.A_RD is None:
        return None
    return (linear.scaling * (whole(x_B2).float() @ linear.A_RD.float().t())).to(x_B2.dtype)


def low_rank(x_B2, linear: Linear) -> torch.Tensor | None:
    """`low_rank_plain` in one kernel."""
    if linear.A_RD is None:
        return None
    (rows, _, half), rank = x_B2.shape, len(linear.A_RD)
    low = torch.empty(rows, rank, dtype=x_B2.dtype, device=x_B2.device)
    low_kernel[(rank, rows)](x_B2, linear.A_RD, low, linear.scaling, rank, half,
                             WIDTH=triton.next_power_of_2(half), num_warps=8)
    return low


def norm_low_plain(x_BD, norm: Norm, linear: Linear):
    """(y, low): y is the layer norm of x, in halves. low is the low_rank of y."""
    y_B2 = halves(norm(x_BD))
    return y_B2, low_rank_plain(y_B2, linear)


def norm_low(x_BD, norm: Norm, linear: Linear):
    """`norm_low_plain` in one kernel. For each row of x, it has one program for each row of A, and
    one program that writes the norm.

    Each program computes the whole norm. This is faster than one more kernel, whose result these
    programs would have to wait for.
    """
    (rows, width), rank = x_BD.shape, 0 if linear.A_RD is None else len(linear.A_RD)
    y = torch.empty(rows, 2, width // 2, dtype=x_BD.dtype, device=x_BD.device)
    low = torch.empty(rows, rank, dtype=x_BD.dtype, device=x_BD.device) if rank else None
    norm_kernel[(rank + 1, rows)](x_BD, norm.weight, norm.bias, pointer(linear.A_RD, y), y,
                                  pointer(low, y), norm.eps, linear.scaling, rank, width,
                                  WIDTH=triton.next_power_of_2(width), num_warps=8)
    return y, low


def pointer(tensor: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    """`tensor`, or `other` if `tensor` is None, because a kernel must get a pointer. The kernel
    contains code that uses the pointer, but no program runs this code without an adapter."""
    return other if tensor is None else tensor


def attend_low_plain(qkv_BF, kv, place_B, slopes_H, scale: float, linear: Linear):
    """(y, low): y is the attention output of each row's token, in halves. low is the low_rank of y.

    The token attends to the earlier tokens of its row and to itself. qkv_BF [B, 3 D]: the token's
    query, key and value. kv [2, rows, H, S, K]: the layer's cache. The token's key and value are
    written into the cache.
    """
    heads, width = kv.shape[2], kv.shape[4]
    q_BHK, k_BHK, v_BHK = qkv_BF.view(len(qkv_BF), 3, heads, width).unbind(1)
    out = torch.empty_like(q_BHK)
    for n, place in enumerate(place_B.tolist()):
        kv[0, n, :, place], kv[1, n, :, place] = k_BHK[n], v_BHK[n]
        k_HSK, v_HSK = kv[:, n, :, : place + 1].float()
        distance_S = place - torch.arange(place + 1, device=kv.device)
        scores_HS = scale * (k_HSK @ q_BHK[n, :, :, None].float())[..., 0]
        weights_HS = (scores_HS - slopes_H[:, None] * distance_S).softmax(-1)
        out[n] = (weights_HS[:, None] @ v_HSK)[:, 0].to(out.dtype)
    y_B2 = halves(out.flatten(1))
    return y_B2, low_rank_plain(y_B2, linear)


def attend_low(qkv_BF, kv, place_B, slopes_H, scale: float, linear: Linear):
    """`attend_low_plain` in two kernels. The first kernel computes attention over each part of
    the cache in parallel. The second kernel combines the results of the parts."""
    _, _, heads, positions, width = kv.shape
    rows, rank = len(qkv_BF), 0 if linear.A_RD is None else len(linear.A_RD)
    part = max(PART, triton.next_power_of_2(-(-positions // PARTS)))
    parts = -(-positions // part)
    sums = qkv_BF.new_empty(rows, heads, parts, width, dtype=torch.float32)
    peaks = qkv_BF.new_empty(rows, heads, parts, 2, dtype=torch.float32)
    attend_kernel[(parts, heads, rows)](
        qkv_BF, kv[0], kv[1], place_B, slopes_H, sums, peaks, scale, kv.stride(1), positions,
        heads, part, WIDTH=width, BLOCK=64 if rows == 1 else 32, num_warps=8 if rows == 1 else 2)
    y = qkv_BF.new_empty(rows, 2, heads * width // 2)
    low = qkv_BF.new_empty(rows, rank) if rank else None
    join_kernel[(rank + 1, rows)](
        sums, peaks, place_B, pointer(linear.A_RD, y), y, pointer(low, y), linear.scaling, rank,
        heads, parts, part, HEAD=width, WIDTH=triton.next_power_of_2(heads * width), num_warps=16)
    return y, low


if triton is not None:

    @triton.jit
    def low_kernel(x, A, low, scaling, rank, half, WIDTH: tl.constexpr):
        j, row = tl.program_id(0), tl.program_id(1)
        k = tl.arange(0, WIDTH)
        there = k < half
        x += row * 2 * half
        A += j * 2 * half
        total = tl.load(x + k, mask=there, other=0).to(tl.float32) * tl.load(
            A + 2 * k, mask=there, other=0).to(tl.float32)
        total += tl.load(x + half + k, mask=there, other=0).to(tl.float32) * tl.load(
            A + 2 * k + 1, mask=there, other=0).to(tl.float32)
        tl.store(low + row * rank + j, (scaling * tl.sum(total)).to(low.dtype.element_ty))

    @triton.jit
    def low_or_halves(y, j, row, d, there, A, out, low, scaling, rank, width):
        """Program j == rank writes the row y in halves. Each program j < rank writes the scaled dot
        product of y and row j of A."""
        y = y.to(out.dtype.element_ty)
        if j == rank:
            tl.store(out + row * width + (d % 2) * (width // 2) + d // 2, y, mask=there)
        else:
            a = tl.load(A + j * width + d, mask=there, other=0).to(tl.float32)
            total = scaling * tl.sum(y.to(tl.float32) * a)
            tl.store(low + row * rank + j, total.to(out.dtype.element_ty))

    @triton.jit
    def norm_kernel(x, weight, bias, A, out, low, eps, scaling, rank, width, WIDTH: tl.constexpr):
        j, row = tl.program_id(0), tl.program_id(1)
        d = tl.arange(0, WIDTH)
        there = d < width
        y = tl.load(x + row * width + d, mask=there, other=0).to(tl.float32)
        y = tl.where(there, y - tl.sum(y) / width, 0)
        y = y * tl.rsqrt(tl.sum(y * y) / width + eps)
        y = y * tl.load(weight + d, mask=there, other=0).to(tl.float32)
        y = y + tl.load(bias + d, mask=there, other=0).to(tl.float32)
        low_or_halves(y, j, row, d, there, A, out, low, scaling, rank, width)

    @triton.jit
    def attend_kernel(qkv, keys, values, place, slopes, sums, peaks, scale, row_stride, positions,
                      heads, part, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
        """Attention over one part of the cache, for one head of one row, as in FlashAttention.

        A key's weight is exp(score - peak), where peak is the largest score of the part. `sums`
        gets the weighted sum of the values. `peaks` gets peak and the sum of the weights.
        """
        p, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        end, first = tl.load(place + row).to(tl.int32), p * part
        if first <= end:
            d = tl.arange(0, WIDTH)
            token = qkv + row * 3 * heads * WIDTH + head * WIDTH + d
            q = tl.load(token).to(tl.float32) * scale
            k = tl.load(token + heads * WIDTH)
            v = tl.load(token + 2 * heads * WIDTH)
            slope = tl.load(slopes + head)
            of_head = row.to(tl.int64) * row_stride + head * positions * WIDTH
            mine = end < first + part  # only the last part reads and writes the new token
            tl.store(keys + of_head + end * WIDTH + d, k, mask=mine & (d < WIDTH))
            tl.store(values + of_head + end * WIDTH + d, v, mask=mine & (d < WIDTH))
            peak = tl.where(mine, tl.sum(q * k.to(tl.float32)), float("-inf"))
            weight = tl.where(mine, 1.0, 0.0)
            total = tl.where(mine, v.to(tl.float32), 0.0)
            stop = tl.minimum(end, first + part)
            for start in range(first, stop, BLOCK):
                j = start + tl.arange(0, BLOCK)
                there = j < stop
                cached = of_head + j[:, None] * WIDTH + d[None, :]
                key = tl.load(keys + cached, mask=there[:, None], other=0).to(tl.float32)
                value = tl.load(values + cached, mask=there[:, None], other=0).to(tl.float32)
                score = tl.sum(q[None, :] * key, 1) - slope * (end - j)
                score = tl.where(there, score, float("-inf"))
                higher = tl.maximum(peak, tl.max(score))
                e = tl.exp(score - higher)
                shrink = tl.exp(peak - higher)
                weight = weight * shrink + tl.sum(e)
                total = total * shrink + tl.sum(e[:, None] * value, 0)
                peak = higher
            at = (row * heads + head) * tl.num_programs(0) + p
            tl.store(sums + at * WIDTH + d, total)
            tl.store(peaks + at * 2, peak)
            tl.store(peaks + at * 2 + 1, weight)

    @triton.jit
    def join_kernel(sums, peaks, place, A, out, low, scaling, rank, heads, parts, part,
                    HEAD: tl.constexpr, WIDTH: tl.constexpr):
        j, row = tl.program_id(0), tl.program_id(1)
        d = tl.arange(0, WIDTH)
        width = heads * HEAD
        there = d < width
        at = (row * heads + d // HEAD) * parts
        peak = tl.full([WIDTH], float("-inf"), tl.float32)
        weight = tl.zeros([WIDTH], tl.float32)
        total = tl.zeros([WIDTH], tl.float32)
        for p in range(tl.load(place + row).to(tl.int32) // part + 1):
            its_peak = tl.load(peaks + (at + p) * 2, mask=there, other=0)
            higher = tl.maximum(peak, its_peak)
            shrink, its = tl.exp(peak - higher), tl.exp(its_peak - higher)
            weight = weight * shrink + its * tl.load(peaks + (at + p) * 2 + 1, mask=there, other=1)
            total = total * shrink + its * tl.load(sums + (at + p) * HEAD + d % HEAD, mask=there,
                                                   other=0)
            peak = higher
        low_or_halves(total / weight, j, row, d, there, A, out, low, scaling, rank, width)
