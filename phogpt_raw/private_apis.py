"""Every private API of torch and bitsandbytes that the project calls, in one place.

A private API can change or disappear in any version without notice. No other module may use a
private API. tests/test_private_apis.py checks this rule, and it tests each entry of this file. If
an entry disappears, its test says what to do. The title of each section names the oldest version
with which the tests have passed. For torch this is 2.10; the tests also passed with 2.11 and 2.13.
For bitsandbytes it is 0.50.

B micro-batch, H heads, L queries, S keys, K head width, T tokens.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend

# torch 2.10. TorchDispatchMode is a context in which each operation passes through
# __torch_dispatch__ before it runs. flop_registry has a formula for the FLOPs of each operation.
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils.flop_counter import flop_registry as flop_registry

aten = torch.ops.aten


# -- torch 2.10: the fused attention kernels behind F.scaled_dot_product_attention
#
# The project calls these kernels directly, for one block of queries at a time. The public function
# would choose a kernel for each block. In backward it would also allocate gradients of the keys'
# full length for each block. A forward function returns the output, and then the values that its
# backward function needs as the arguments after `out`. The bias is [1 or B, H, L, S] in the inputs'
# dtype.


def efficient_attention(q, k, v, bias, scale):
    """Attention by the memory-efficient kernel, which runs on every CUDA GPU."""
    bias = bias.expand(len(q), q.shape[1], -1, -1)
    return aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, scale=scale)


def efficient_attention_backward(g, q, k, v, bias, out, lse, seed, offset, scale):
    """The gradients (dq, dk, dv) of efficient_attention."""
    bias = bias.expand(len(q), q.shape[1], -1, -1)
    return aten._scaled_dot_product_efficient_attention_backward(
        g, q, k, v, bias, out, lse, seed, offset, 0.0, [True, True, True, False], scale=scale)[:3]


def cudnn_attention(q, k, v, bias, scale):
    """Attention by cuDNN's kernel, which torch prefers on Hopper for 16-bit dtypes."""
    return aten._scaled_dot_product_cudnn_attention(q, k, v, bias, True, scale=scale)[:-1]


def cudnn_attention_backward(g, q, k, v, bias, out, lse, cum_q, cum_k, max_q, max_k, seed, offset,
                             scale):
    """The gradients (dq, dk, dv) of cudnn_attention."""
    return aten._scaled_dot_product_cudnn_attention_backward(
        g, q, k, v, out, lse, seed, offset, bias, cum_q, cum_k, max_q, max_k, 0.0, False,
        scale=scale)


def cpu_attention(q, k, v, bias, scale):
    """Attention by the CPU's fused kernel."""
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias, scale=scale)


def cpu_attention_backward(g, q, k, v, bias, out, lse, scale):
    """The gradients (dq, dk, dv) of cpu_attention."""
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        g, q, k, v, out, lse, 0.0, False, attn_mask=bias, scale=scale)


# A value of the argument custom_mask_type of the kernels below. With this value, token i of a
# document attends to tokens 0 to i of that document.
CAUSAL = 1


def efficient_documents(q, k, v, starts, longest: int, scale):
    """Causal attention within each document, by the memory-efficient kernel. q, k, v: [1, T, H, K].

    Returns (out, lse, seed, offset) for efficient_documents_backward. starts: a tensor with the
    first position of each document, and T as its last element, [documents + 1]. longest: an upper
    bound on the number of tokens in a document.
    """
    return aten._efficient_attention_forward(q, k, v, None, starts, starts, longest, longest, 0.0,
                                             CAUSAL, True, scale=scale)[:4]


def efficient_documents_backward(g, q, k, v, out, lse, seed, offset, starts, longest: int, scale):
    """The gradients (dq, dk, dv) of efficient_documents."""
    # Up to torch 2.13, the implementation for the meta device has no parameter for `out`. For this
    # reason, that implementation fails if `scale` is given too. On the meta device only shapes
    # matter, and `scale` changes no shape. So `scale` is not given.
    more = {} if g.is_meta else {"scale": scale}
    return aten._efficient_attention_backward(
        g, q, k, v, None, out, starts, starts, longest, longest, lse, 0.0, seed, offset, CAUSAL,
        False, **more)[:3]


def flash_documents(q, k, v, starts, longest: int, scale):
    """Causal attention within each document, by the flash kernel. q, k, v: [T, H, K].

    Returns (out, lse, state, unused) for flash_documents_backward. starts and longest: see
    efficient_documents.
    """
    return aten._flash_attention_forward(q, k, v, starts, starts, longest, longest, 0.0, True,
                                         False, scale=scale)[:4]


def flash_documents_backward(g, q, k, v, out, lse, state, unused, starts, longest: int, scale):
    """The gradients (dq, dk, dv) of flash_documents."""
    return aten._flash_attention_backward(g, q, k, v, out, lse, starts, starts, longest, longest,
                                          0.0, True, state, unused, scale=scale)


def choose_attention_kernel(q, k, v, bias) -> SDPBackend:
    """Return the kernel that F.scaled_dot_product_attention chooses for these tensors.

    If bias is None, the attention is causal. The choice depends on shapes, dtypes and devices, not
    on values.
    """
    return SDPBackend(torch._fused_sdp_choice(q, k, v, attn_mask=bias, is_causal=bias is None))


def is_attention_choice(operation) -> bool:
    """Return whether a dispatched operation is the operation that choose_attention_kernel calls.

    The bias of this operation is its fourth argument, or its keyword argument `attn_mask`.
    """
    return operation is aten._fused_sdp_choice.default


def is_document_attention(operation) -> bool:
    """Return whether a dispatched operation is a forward or backward of efficient_documents or
    flash_documents.

    The first argument of these operations is [1, T, H, K] or [T, H, K].
    """
    return operation in (
        aten._efficient_attention_forward.default, aten._efficient_attention_backward.default,
        aten._flash_attention_forward.default, aten._flash_attention_backward.default)


# -- torch 2.10: autograd


def current_saved_tensor_hooks() -> tuple[Callable, Callable] | None:
    """Return (pack, unpack) of the innermost active saved_tensors_hooks, or None.

    If hooks are nested, autograd calls only the innermost hook. This hook must call the outer hooks
    itself.
    """
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def version_of(tensor: torch.Tensor) -> int:
    """Return how many times a tensor was changed in place. Changes through its views count too."""
    return tensor._version


def base_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return the base of the view `tensor`, or `tensor` itself if it is not a view."""
    return tensor if tensor._base is None else tensor._base


# -- torch 2.10: loss scaling


def found_inf(scaler: torch.amp.GradScaler, optimizer) -> torch.Tensor | None:
    """Return GradScaler's flag for skipping an update, or None if the scaler is disabled.

    The flag is a tensor on the device. It is 1.0 if a gradient is inf or nan, else 0.0. Call
    `scaler.unscale_(optimizer)` first, because it sets the flag.
    """
    if not scaler.is_enabled():
        return None
    [flag] = scaler._found_inf_per_device(optimizer).values()
    return flag


# -- torch 2.10: operations and memory


def storage_key(storage: torch.UntypedStorage) -> int:
    """Return a number that identifies a storage during its lifetime.

    All Python objects of one storage give the same number. data_ptr() cannot identify a storage on
    the meta device: it is 0 for every storage there.
    """
    return storage._cdata


def schema_of(operation):
    """Return the signature of an operation: its arguments, its results, and its in-place writes."""
    return operation._schema


def unsafe_view():
    """Return the view operation that matrix products use internally.

    Autograd does not track the result as a view.
    """
    return aten._unsafe_view.default


def free_matmul_workspaces() -> None:
    """Free cuBLAS's workspaces. Each stream has one workspace, of 32 MiB on Hopper."""
    torch._C._cuda_clearCublasWorkspaces()


# -- bitsandbytes 0.50: NF4 weights


def nf4_state(weight: torch.Tensor):
    """Return the QuantState of a 4-bit weight, or None for any other tensor."""
    return getattr(weight, "quant_state", None)


def held_by(module: torch.nn.Module) -> list:
    """List a module's own parameters and buffers, and the QuantState of its NF4 weight.

    The parameters and buffers of its submodules are not included.
    """
    held = (*module._parameters.values(), *module._buffers.values(), nf4_state(module))
    return [value for value in held if value is not None]


class NF4Fields(NamedTuple):
    """The values that decode an NF4 weight with double quantisation.

    Each block of 64 weights shares one scale. The scales are quantised too: each block of 256
    scales shares one scale of scales.
    """

    scales: torch.Tensor  # [blocks] uint8: the quantised scale of each block of weights
    code: torch.Tensor  # [16] fp32: the value of each 4-bit code, from -1 to 1
    offset: torch.Tensor  # [] fp32: the mean of all scales; it was subtracted before quantisation
    scale_scales: torch.Tensor  # [blocks of scales] fp32: the scale of each block of scales
    scale_code: torch.Tensor  # [256] fp32: the value of each 8-bit code in `scales`
    shape: torch.Size  # the shape of the weight
    dtype: torch.dtype  # the dtype of the dequantised weight

    def tensors(self) -> list[torch.Tensor]:
        return [field for field in self if isinstance(field, torch.Tensor)]


def nf4_fields(state) -> NF4Fields:
    """Return the fields of a QuantState from quantize_4bit(…, compress_statistics=True)."""
    return NF4Fields(state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code,
                     state.shape, state.dtype)


def make_nf4_state(fields: NF4Fields):
    """Return a QuantState with these fields. This function is the inverse of nf4_fields."""
    from bitsandbytes.functional import QuantState

    of_scales = QuantState(absmax=fields.scale_scales, code=fields.scale_code, blocksize=256,
                           dtype=torch.float32)
    return QuantState(absmax=fields.scales, shape=fields.shape, code=fields.code, blocksize=64,
                      quant_type="nf4", dtype=fields.dtype, offset=fields.offset, state2=of_scales)


def set_dequantised_dtype(state, dtype: torch.dtype) -> None:
    """Set the dtype of the dequantised weight; the 4 bits do not depend on it."""
    state.dtype = dtype


def attach_state(linear, state) -> None:
    """Give a Linear4bit the QuantState of its weight.

    This function also switches off bitsandbytes' repacking. On a CPU with avx512_bf16, the layer
    would repack its weight in place for inference, which changes the values slightly. A frozen
    weight must not change.
    """
    linear.quant_state = state
    linear.support_avx512bf16_for_cpu = False


def make_scale_code() -> None:
    """Create bitsandbytes' table of the 256 possible quantised scales now, on the CPU.

    bitsandbytes creates this table on the first device on which it quantises, and reuses it on all
    other devices. A table on the meta device would have no values.
    """
    from bitsandbytes import functional

    functional.name2qmap.setdefault("dynamic", functional.create_dynamic_map())


# -- bitsandbytes 0.50: optimizer state


def make_state(optimizer, parameter: torch.nn.Parameter) -> None:
    """Allocate the state of a bitsandbytes optimizer now, not in its first step.

    On a GPU the moments of a paged optimizer are in CUDA's managed memory.
    """
    optimizer.init_state(optimizer.param_groups[0], parameter, 0, 0)
