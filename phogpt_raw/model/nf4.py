"""NF4 weights as numbers again, for the length of one matmul.

The surprise is how much of a step this takes: 2.5 bytes a parameter and pass, 33 GB a step of
PhoGPT-7B5 whatever its length, more than a quarter of 512 tokens on a fast card. bitsandbytes needs
three kernels, the first two for the scales, which are 8-bit numbers with scales of their own. The
one below does the three at once, at twice the speed, with the same result to the bit. Where Triton
cannot make it, or a trial gives anything else, bitsandbytes' own run.

Dettmers et al. 2023 (arXiv:2305.14314): blocks of 64 weights with a scale, blocks of 256 scales.
"""

import functools

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # it comes with torch for CUDA on Linux, and only there
    triton = None

WEIGHTS, SCALES = 64, 256  # in a block of each
ROWS = 64  # blocks of weights that one program makes


def dequantise(weight: torch.Tensor) -> torch.Tensor:
    """W [O, D] in the dtype that the quant_state of its NF4 `weight` names."""
    from bitsandbytes.functional import dequantize_4bit

    state = weight.quant_state
    fits = hasattr(state, "offset_number") and state.shape.numel() % (WEIGHTS * ROWS) == 0
    if fits and weight.is_cuda and fused_works(weight.device, state.dtype):
        return fused(weight, state)
    return dequantize_4bit(weight, state)


@functools.cache
def fused_works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the fused kernel compiles on this card and agrees with bitsandbytes to the bit."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    if triton is None:
        return False
    numbers = torch.randn(WEIGHTS * SCALES, 4, device=device, dtype=dtype)
    weight, state = quantize_4bit(numbers, quant_type="nf4", compress_statistics=True)
    state.offset_number = float(state.offset)
    try:
        return torch.equal(fused(weight, state), dequantize_4bit(weight, state))
    except Exception:  # a compiler's, of whatever kind: the card is too old, or has no toolchain
        return False


def fused(weight: torch.Tensor, state) -> torch.Tensor:
    dense = torch.empty(state.shape, dtype=state.dtype, device=weight.device)
    # Without fusing a multiplication and an addition, so that both round as bitsandbytes' do.
    nf4_kernel[(dense.numel() // (WEIGHTS * ROWS),)](
        weight, state.code, state.absmax, state.state2.code, state.state2.absmax,
        state.offset_number, dense, ROWS, num_warps=4, enable_fp_fusion=False)
    return dense


if triton is not None:

    @triton.jit
    def nf4_kernel(packed, code, scale8, scale_code, scale_scale, offset, out, ROWS: tl.constexpr):
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        coded = tl.load(scale_code + tl.load(scale8 + row).to(tl.int32))
        scale = (coded * tl.load(scale_scale + row // 256) + offset)[:, None]
        pair = tl.load(packed + row[:, None] * 32 + tl.arange(0, 32)[None, :]).to(tl.int32)
        first, second = tl.load(code + (pair >> 4)), tl.load(code + (pair & 15))
        place = out + row[:, None] * 64 + tl.arange(0, 64)[None, :]
        tl.store(place, tl.interleave(first * scale, second * scale).to(out.dtype.element_ty))
