"""NF4: frozen weights are stored in 4 bits, and dequantised for one matrix product at a time.

A weight matrix is divided into blocks of 64 values. The scale of a block is its largest absolute
value. Each value is stored as a 4-bit index into 16 fixed values from -1 to 1. Dequantising
multiplies the fixed value by the scale. The scales are quantised too, which is called double
quantisation. Their mean is subtracted, and the differences are stored in 8 bits each, in blocks of
256. In total a weight takes 4.13 bits (Dettmers et al. 2023, arXiv:2305.14314).

bitsandbytes quantises the weights. Dequantising has three versions, whose results are equal bit for
bit:

- `dequantise_plain` shows the arithmetic.
- bitsandbytes' version runs three kernels.
- `nf4_kernel` below is one fused kernel. It is twice as fast as bitsandbytes' three kernels.

`dequantise` uses the fused kernel if it works on the GPU, else bitsandbytes' version.

Dequantising is a large part of a training step. It reads 0.5 bytes and writes 2 bytes per weight,
once in forward and once in backward. For PhoGPT-7B5 this is 32 GB per micro-batch, whatever the
number of tokens. If a micro-batch has 512 tokens, dequantising takes over a quarter of the step's
time on a fast GPU.

O out, D in.
"""

import functools

import torch
from torch import nn

from phogpt_raw.private_apis import (
    NF4Fields,
    attach_state,
    make_nf4_state,
    nf4_fields,
    nf4_state,
    set_dequantised_dtype,
)

try:
    import triton
    import triton.language as tl
except ImportError:  # only torch for CUDA on Linux installs Triton
    triton = None

WEIGHTS, SCALES = 64, 256  # values in a block of weights, and in a block of scales
ROWS = 64  # blocks of weights that one Triton program (an instance of the kernel) dequantises
# Bytes per weight. A weight takes half a byte. The scale of a block of weights takes 1 byte. The
# scale of a block of scales takes 4 bytes.
NF4_BYTES = 0.5 + (1 + 4 / SCALES) / WEIGHTS


def quantise(weight_OD: torch.Tensor, dtype: torch.dtype):
    """(packed, state) of an NF4 weight. packed: uint8 [O * D / 2, 1], two weights per byte. state:
    bitsandbytes' QuantState.

    dtype: the dtype of the dequantised weight. Pass weight_OD in the checkpoint's dtype, without a
    cast.
    """
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(weight_OD, quant_type="nf4", compress_statistics=True)
    set_dequantised_dtype(state, dtype)
    # The offset is the mean of the scales. The fused kernel takes it as a Python float. Reading the
    # float from the GPU at each call would wait for the GPU, so it is read once, here.
    # bitsandbytes' kernels read the offset on the device.
    state.offset_on_host = None if weight_OD.is_meta else float(nf4_fields(state).offset)
    return packed, state


def stored_state(fields: NF4Fields):
    """The QuantState that `quantise` returned, rebuilt from its stored fields."""
    state = make_nf4_state(fields)
    state.offset_on_host = float(fields.offset)
    return state


def stored_shapes(shape: torch.Size) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """(dtype, shape) of each tensor that stores an NF4 weight of `shape`, by the tensor's name. The
    names are `packed` and the names of the tensors in NF4Fields."""
    blocks = -(-shape.numel() // WEIGHTS)
    return {
        "packed": (torch.uint8, (-(-shape.numel() // 2), 1)),
        "scales": (torch.uint8, (blocks,)),
        "code": (torch.float32, (16,)),
        "offset": (torch.float32, ()),
        "scale_scales": (torch.float32, (-(-blocks // SCALES),)),
        "scale_code": (torch.float32, (256,)),
    }


def kept_in_nf4(module: nn.Module, kind: str) -> bool:
    """Whether an NF4 model stores a parameter of `module` in 4 bits. `kind` is the parameter's name
    in the module. Only weights of linear layers are stored in 4 bits."""
    return kind == "weight" and isinstance(module, nn.Linear)


def nf4_linear(weight_OD: torch.Tensor, dtype: torch.dtype, device,
               bias: nn.Parameter | None = None):
    """A bitsandbytes Linear4bit with `weight_OD` in NF4. It computes in `dtype`."""
    return linear_of(*quantise(weight_OD.to(device), dtype), bias)


def linear_of(packed: torch.Tensor, state, bias: nn.Parameter | None = None):
    """A bitsandbytes Linear4bit made from the result of `quantise`."""
    import bitsandbytes as bnb

    fields = nf4_fields(state)
    out_features, in_features = fields.shape
    with torch.device("meta"):
        linear = bnb.nn.Linear4bit(in_features, out_features, bias=False,
                                   compute_dtype=fields.dtype, quant_type="nf4")
    linear.weight = bnb.nn.Params4bit(
        packed, requires_grad=False, quant_type="nf4", quant_state=state, module=linear,
        bnb_quantized=True)
    attach_state(linear, state)
    linear.bias = bias
    return linear


def dequantise(weight: torch.Tensor) -> torch.Tensor:
    """The dequantised W [O, D] of an NF4 `weight`, in the dtype that was given to `quantise`."""
    from bitsandbytes.functional import dequantize_4bit

    state = nf4_state(weight)
    if weight.is_cuda and hasattr(state, "offset_on_host"):
        fields = nf4_fields(state)
        if can_fuse(fields):
            return dequantise_fused(weight, fields, state.offset_on_host)
    return dequantize_4bit(weight, state)


def can_fuse(fields: NF4Fields) -> bool:
    """Whether dequantise_fused can be used for a weight on a GPU."""
    return (fields.shape.numel() % (WEIGHTS * ROWS) == 0
            and fused_works(fields.scales.device, fields.dtype))


def dequantise_plain(packed: torch.Tensor, fields: NF4Fields) -> torch.Tensor:
    """The dequantised W [O, D] in plain PyTorch. Tests compare the kernels with it."""
    block = torch.arange(len(fields.scales), device=packed.device)
    scale = fields.scale_code[fields.scales.int()] * fields.scale_scales[block // SCALES]
    scale = scale + fields.offset
    byte = packed.flatten().int()
    nibble = torch.stack([byte >> 4, byte & 15], dim=1).flatten()[: fields.shape.numel()]
    value = fields.code[nibble] * scale.repeat_interleave(WEIGHTS)[: len(nibble)]
    return value.to(fields.dtype).view(fields.shape)


@functools.cache
def fused_works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the fused kernel compiles on this GPU and agrees with bitsandbytes bit for bit."""
    from bitsandbytes.functional import dequantize_4bit

    if triton is None:
        return False
    packed, state = quantise(torch.randn(WEIGHTS * SCALES, 4, device=device, dtype=dtype), dtype)
    try:
        dense = dequantise_fused(packed, nf4_fields(state), state.offset_on_host)
        return torch.equal(dense, dequantize_4bit(packed, state))
    except Exception:  # any compiler error: the GPU is too old, or the toolchain is missing
        return False


def dequantise_fused(packed: torch.Tensor, fields: NF4Fields, offset: float) -> torch.Tensor:
    """The dequantised W [O, D], computed by the Triton kernel. O * D must be a multiple of
    WEIGHTS * ROWS.

    offset: fields.offset as a Python float.
    """
    dense = torch.empty(fields.shape, dtype=fields.dtype, device=packed.device)
    # No fused multiply-add: it rounds only once, but bitsandbytes rounds the product and the sum.
    nf4_kernel[(dense.numel() // (WEIGHTS * ROWS),)](
        packed, fields.code, fields.scales, fields.scale_code, fields.scale_scales,
        offset, dense, ROWS, num_warps=4, enable_fp_fusion=False)
    return dense


if triton is not None:

    @triton.jit
    def nf4_kernel(packed, code, scales, scale_code, scale_scales, offset, out,
                   ROWS: tl.constexpr):
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        coded = tl.load(scale_code + tl.load(scales + row).to(tl.int32))
        scale = (coded * tl.load(scale_scales + row // 256) + offset)[:, None]
        byte = tl.load(packed + row[:, None] * 32 + tl.arange(0, 32)[None, :]).to(tl.int32)
        first, second = tl.load(code + (byte >> 4)), tl.load(code + (byte & 15))
        place = out + row[:, None] * 64 + tl.arange(0, 64)[None, :]
        tl.store(place, tl.interleave(first * scale, second * scale).to(out.dtype.element_ty))
