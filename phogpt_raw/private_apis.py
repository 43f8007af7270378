"""Every private API of torch and bitsandbytes that the project calls, in one place.

A private API can change or disappear in any version without notice. No other module may name one.
tests/test_private_apis.py checks that, tests each entry, and says what to do when the entry is
gone. The title of a section names the oldest version with which the tests have passed: torch 2.10
(also 2.11 and 2.13), bitsandbytes 0.50.

B micro-batch, H heads, L queries, S keys, K head width, T tokens.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend

# torch 2.10: a context in which each operation passes through __torch_dispatch__ before it runs;
# and the formula of each operation's FLOPs.
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils.flop_counter import flop_registry as flop_registry

aten = torch.ops.aten


# -- torch 2.10: the fused attention kernels behind F.scaled_dot_product_attention
#
# Called directly, because the public function would choose a kernel for each block of queries, and
# its backward would make gradients of the keys' full length for each block. A forward returns the
# output, then what its backward takes after `out`; bias is [1 or B, H, L, S] in the inputs' dtype.


def efficient_attention(q, k, v, bias, scale):
    """The memory-efficient kernel, for every CUDA card."""
    bias = bias.expand(len(q), q.shape[1], -1, -1)
    return aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, scale=scale)


def efficient_attention_backward(g, q, k, v, bias, out, lse, seed, offset, scale):
    """The gradients (dq, dk, dv) of efficient_attention."""
    bias = bias.expand(len(q), q.shape[1], -1, -1)
    return aten._scaled_dot_product_efficient_attention_backward(
        g, q, k, v, bias, out, lse, seed, offset, 0.0, [True, True, True, False], scale=scale)[:3]


def cudnn_attention(q, k, v, bias, scale):
    """cuDNN's kernel, which torch prefers on Hopper in 16 bits."""
    return aten._scaled_dot_product_cudnn_attention(q, k, v, bias, True, scale=scale)[:-1]


def cudnn_attention_backward(g, q, k, v, bias, out, lse, cum_q, cum_k, max_q, max_k, seed, offset,
                             scale):
    """The gradients (dq, dk, dv) of cudnn_attention."""
    return aten._scaled_dot_product_cudnn_attention_backward(
        g, q, k, v, out, lse, seed, offset, bias, cum_q, cum_k, max_q, max_k, 0.0, False,
        scale=scale)


def cpu_attention(q, k, v, bias, scale):
    """The CPU's fused kernel."""
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias, scale=scale)


def cpu_attention_backward(g, q, k, v, bias, out, lse, scale):
    """The gradients (dq, dk, dv) of cpu_attention."""
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        g, q, k, v, out, lse, 0.0, False, attn_mask=bias, scale=scale)


CAUSAL = 1  # custom_mask_type: query i sees the keys up to i, counted from each document's start


def efficient_documents(q, k, v, starts, longest: int, scale):
    """The memory-efficient kernel over [1, T, H, K], causal within each document. Returns the
    output, then what its backward takes after `out`. starts: [documents + 1]; longest: an upper
    bound on the length of a document."""
    return aten._efficient_attention_forward(q, k, v, None, starts, starts, longest, longest, 0.0,
                                             CAUSAL, True, scale=scale)[:4]


def efficient_documents_backward(g, q, k, v, out, lse, seed, offset, starts, longest: int, scale):
    """The gradients (dq, dk, dv) of efficient_documents."""
    # torch's version for the meta device lacks the argument `out` (to 2.13), so it cannot take the
    # scale as well, which changes no shape.
    more = {} if g.is_meta else {"scale": scale}
    return aten._efficient_attention_backward(
        g, q, k, v, None, out, starts, starts, longest, longest, lse, 0.0, seed, offset, CAUSAL,
        False, **more)[:3]


def flash_documents(q, k, v, starts, longest: int, scale):
    """The flash kernel over [T, H, K], causal within each document. Returns the output, then what
    its backward takes after `out`."""
    return aten._flash_attention_forward(q, k, v, starts, starts, longest, longest, 0.0, True,
                                         False, scale=scale)[:4]


def flash_documents_backward(g, q, k, v, out, lse, state, unused, starts, longest: int, scale):
    """The gradients (dq, dk, dv) of flash_documents."""
    return aten._flash_attention_backward(g, q, k, v, out, lse, starts, starts, longest, longest,
                                          0.0, True, state, unused, scale=scale)


def choose_attention_kernel(q, k, v, bias) -> SDPBackend:
    """The kernel that F.scaled_dot_product_attention chooses for these tensors; bias None: causal.

    The choice depends on shapes, dtypes and devices, not on values.
    """
    return SDPBackend(torch._fused_sdp_choice(q, k, v, attn_mask=bias, is_causal=bias is None))


def is_attention_choice(operation) -> bool:
    """Whether a dispatched operation is the one behind choose_attention_kernel. Its bias is the
    fourth argument or `attn_mask`."""
    return operation is aten._fused_sdp_choice.default


def is_document_attention(operation) -> bool:
    """Whether a dispatched operation is one of the four document operations above. Their first
    argument is [1, T, H, K] or [T, H, K]."""
    return operation in (
        aten._efficient_attention_forward.default, aten._efficient_attention_backward.default,
        aten._flash_attention_forward.default, aten._flash_attention_backward.default)


# -- torch 2.10: autograd


def current_saved_tensor_hooks() -> tuple[Callable, Callable] | None:
    """(pack, unpack) of the innermost active saved_tensors_hooks, or None.

    Of nested hooks autograd calls only the innermost; it must call the outer ones itself.
    """
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def version_of(tensor: torch.Tensor) -> int:
    """How often a tensor, or another view of its memory, was changed in place."""
    return tensor._version


def base_of(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor of which `tensor` is a view; `tensor` itself where it is no view."""
    return tensor if tensor._base is None else tensor._base


# -- torch 2.10: loss scaling


def found_inf(scaler: torch.amp.GradScaler, optimizer) -> torch.Tensor | None:
    """The flag (1.0 or 0.0, on the device) by which GradScaler skips the optimizer's update, after
    `unscale_` has looked for inf and nan; None where the scaler is disabled."""
    if not scaler.is_enabled():
        return None
    [flag] = scaler._found_inf_per_device(optimizer).values()
    return flag


# -- torch 2.10: operations and memory


def storage_key(storage: torch.UntypedStorage) -> int:
    """A number that identifies a storage while it is alive; all its Python objects share it.

    data_ptr() does not: on the meta device it is 0 for every storage.
    """
    return storage._cdata


def schema_of(operation):
    """The signature of an operation: arguments, returns, and which of them it writes."""
    return operation._schema


def unsafe_view():
    """The view that matrix products use internally; autograd does not track it as a view."""
    return aten._unsafe_view.default


def free_matmul_workspaces() -> None:
    """Free cuBLAS's workspaces: one for each stream, 32 MiB on Hopper."""
    torch._C._cuda_clearCublasWorkspaces()


# -- bitsandbytes 0.50: NF4 weights


def nf4_state(weight: torch.Tensor):
    """The QuantState of a 4-bit weight, None for any other tensor."""
    return getattr(weight, "quant_state", None)


def held_by(module: torch.nn.Module) -> list:
    """What a module itself holds: parameters, buffers, and the QuantState of an NF4 weight."""
    held = (*module._parameters.values(), *module._buffers.values(), nf4_state(module))
    return [value for value in held if value is not None]


class NF4Fields(NamedTuple):
    """All that is needed to decode an NF4 weight with double quantisation.

    A block of 64 weights has one scale; a block of 256 scales has one scale for the scales.
    """

    scales: torch.Tensor  # [blocks] uint8: the scale of each block of weights, coded
    code: torch.Tensor  # [16] fp32: the value of each nibble, in -1 … 1
    offset: torch.Tensor  # [] fp32: the mean of all scales, which was subtracted from each
    scale_scales: torch.Tensor  # [blocks of scales] fp32
    scale_code: torch.Tensor  # [256] fp32: the value of each coded scale
    shape: torch.Size  # of the weight
    dtype: torch.dtype  # of the weight when dequantised

    def tensors(self) -> list[torch.Tensor]:
        return [field for field in self if isinstance(field, torch.Tensor)]


def nf4_fields(state) -> NF4Fields:
    """The fields of a QuantState that quantize_4bit(…, compress_statistics=True) made."""
    return NF4Fields(state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code,
                     state.shape, state.dtype)


def make_nf4_state(fields: NF4Fields):
    """The QuantState with these fields, equal to the one that nf4_fields read them from."""
    from bitsandbytes.functional import QuantState

    of_scales = QuantState(absmax=fields.scale_scales, code=fields.scale_code, blocksize=256,
                           dtype=torch.float32)
    return QuantState(absmax=fields.scales, shape=fields.shape, code=fields.code, blocksize=64,
                      quant_type="nf4", dtype=fields.dtype, offset=fields.offset, state2=of_scales)


def set_dequantised_dtype(state, dtype: torch.dtype) -> None:
    """Set the dtype of the dequantised weight; the 4 bits do not depend on it."""
    state.dtype = dtype


def attach_state(linear, state) -> None:
    """Set the QuantState of a Linear4bit to that of its weight.

    It also switches off bitsandbytes' repacking: on a CPU with avx512_bf16 the layer would repack
    its weight for inference, in place and not exactly, but a frozen weight must not change.
    """
    linear.quant_state = state
    linear.support_avx512bf16_for_cpu = False


def make_scale_code() -> None:
    """Create the 256 values of coded scales now, on the CPU.

    bitsandbytes creates them on the first device on which it quantises and reuses them for all
    others. Created on the meta device they would have no values.
    """
    from bitsandbytes import functional

    functional.name2qmap.setdefault("dynamic", functional.create_dynamic_map())


# -- bitsandbytes 0.50: optimizer state


def make_state(optimizer, parameter: torch.nn.Parameter) -> None:
    """Allocate the state of a bitsandbytes optimizer now; otherwise its first step does.

    On a GPU the moments of a paged optimizer are in CUDA's managed memory.
    """
    optimizer.init_state(optimizer.param_groups[0], parameter, 0, 0)
