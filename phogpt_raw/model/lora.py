"""LoRA over a frozen linear, 4-bit or plain, as one autograd function.

    y = x Wᵀ + bias + s (x Aᵀ) Bᵀ                    Hu et al. 2021, arXiv:2106.09685
    dx = g W + (s g B) A      dA = (s g B)ᵀ x      dB = s gᵀ (x Aᵀ)

`lora_linear_plain` is the first line, with autograd's gradients. `lora_linear` computes the same
with the gradients written out, and is cheaper than PEFT's layers. In 16 bits PEFT casts the
activations to fp32 and back around every adapter, and makes several tensors of the output's size.
Here the adapter's product is computed first, in the compute dtype, and the base's product is added
to it in place. Only x and the narrow s x Aᵀ are saved for backward.

A 4-bit W exists in full only during one product; backward dequantises it again. Keeping it would
take 13 GB on PhoGPT-7B5.

N rows, D in, O out, R rank.
"""

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from phogpt_raw.model.matmul import matmul_to, scaled_matmul
from phogpt_raw.model.nf4 import dequantise
from phogpt_raw.private_apis import nf4_state

FEW = 16  # rows of x


def lora_linear(x, base: nn.Linear, A_RD, B_OR, scaling: float) -> torch.Tensor:
    """x [..., D] -> [..., O] through `base` (nn.Linear or Linear4bit, frozen) and its adapter.

    x is in the compute dtype, like W. Only x, A and B get gradients. Without gradients and for the
    few rows of a decoding step the base layer runs its own forward: bitsandbytes' kernels then read
    the 4 bits directly, where dequantising first would move nine times the bytes.
    """
    if torch.is_grad_enabled() or len(rows(x)) > FEW:
        return LoraLinear.apply(x, base.weight, base.bias, A_RD, B_OR, scaling)
    y = base(x)
    xa_NR = scaled_matmul(rows(x), compute_copy(A_RD, x.dtype).t(), scaling)
    y.view(-1, y.shape[-1]).addmm_(xa_NR, compute_copy(B_OR, x.dtype).t())
    return y


def lora_linear_plain(x, base: nn.Linear, A_RD, B_OR, scaling: float) -> torch.Tensor:
    """`lora_linear` by ordinary operations and autograd, to read and to test against."""
    xa = x @ A_RD.to(x.dtype).t()
    return base(x) + scaling * (xa @ B_OR.to(x.dtype).t())


class LoraLinear(torch.autograd.Function):
    """`lora_linear` with the gradients written out; those of A and B are in the dtype of A and B.

    A matrix product sums in fp32 inside its kernel also in 16 bits, and the gradients of A and B
    stay fp32. s x Aᵀ and s g B are rounded once to the compute dtype, as every activation is.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, A_RD, B_OR, scaling):
        x_ND, B_OR = rows(x), compute_copy(B_OR, x.dtype)
        ctx.dtype, ctx.A_RD, ctx.B_OR = A_RD.dtype, compute_copy(A_RD, x.dtype), B_OR
        xa_NR = scaled_matmul(x_ND, ctx.A_RD.t(), scaling)
        # The adapter's product first: the kernel of the base's product then adds to it.
        y_NO = xa_NR @ B_OR.t() if bias is None else torch.addmm(bias, xa_NR, B_OR.t())
        y_NO.addmm_(x_ND, dense(weight).t())
        ctx.save_for_backward(x, xa_NR)
        ctx.weight, ctx.scaling = weight, scaling
        return y_NO.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, xa_NR = ctx.saved_tensors
        g_NO = rows(g)
        gb_NR = scaled_matmul(g_NO, ctx.B_OR, ctx.scaling)
        dA_RD = matmul_to(ctx.dtype, gb_NR.t(), rows(x))
        dB_OR = matmul_to(ctx.dtype, g_NO.t(), xa_NR)
        dx = None
        if ctx.needs_input_grad[0]:  # the first block's x comes from the frozen embedding
            dx = (gb_NR @ ctx.A_RD).addmm_(g_NO, dense(ctx.weight)).view(x.shape)
        return dx, None, None, dA_RD, dB_OR, None


def compute_copy(adapter: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """An fp32 adapter weight in the compute dtype: its copy in the flat buffer if there is one,
    else a cast."""
    return getattr(adapter, "compute_copy", adapter).to(dtype)


def rows(x) -> torch.Tensor:
    """[..., D] -> [N, D]; a view where possible."""
    return x.reshape(-1, x.shape[-1])


def dense(weight) -> torch.Tensor:
    """W [O, D]: an NF4 weight dequantised, any other unchanged."""
    return weight if nf4_state(weight) is None else dequantise(weight)
