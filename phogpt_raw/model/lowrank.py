"""LoRA over a frozen linear, 4-bit or plain, as one autograd function.

    y = x Wᵀ + bias + s (x Aᵀ) Bᵀ                    Hu et al. 2021, arXiv:2106.09685
    dx = g W + (s g B) A      dA = (s g B)ᵀ x      dB = s gᵀ (x Aᵀ)

PEFT composes the same sum from separate layers: in 16 bits it casts the activations to fp32 and
back around every adapter and makes several tensors of the output's size on the way. Here the
low-rank products are added in place to the base's, in the compute dtype, and what is kept for
backward is x and the narrow x Aᵀ. The surprise: a 4-bit W exists in full for the length of one
matmul only. Backward makes it from its 4 bits again; kept, it would take 13 GB on PhoGPT-7B5.

A and B are fp32 views of the adapters' flat buffer, cast in each call. One cast of the whole buffer
a step would save small kernels, but nothing could tell that such a copy is stale: the views are
written without the buffer's version counter moving.

N rows, D in, O out, R rank.
"""

import torch
from torch import nn
from torch.autograd.function import once_differentiable


def low_rank_linear(x, base: nn.Linear, A_RD, B_OR, scaling: float) -> torch.Tensor:
    """x [..., D] -> [..., O] through `base` (nn.Linear or Linear4bit, frozen) and its adapter.

    x is in the compute dtype, which is W's. Gradients go to x, A and B alone. Without gradients
    the base layer runs its own forward: bitsandbytes' kernels read the 4 bits of a decoding step's
    few rows directly, where dequantising first would move nine times the bytes.
    """
    if torch.is_grad_enabled():
        return LowRankLinear.apply(x, base.weight, base.bias, A_RD, B_OR, scaling)
    y = base(x)
    add_low_rank(y.view(-1, y.shape[-1]), rows(x), A_RD, B_OR, scaling)
    return y


class LowRankLinear(torch.autograd.Function):
    """`low_rank_linear` with the gradients written out; A and B get theirs in their own dtype.

    Also in 16 bits matmuls accumulate in fp32 inside the kernels (where cuBLAS splits a long sum it
    may join the parts in 16 bits); s g B and the gradients of A and B are rounded to the compute
    dtype once, like every other gradient on its way.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, A_RD, B_OR, scaling):
        x_ND, w_OD = rows(x), dense(weight)
        y_NO = x_ND @ w_OD.t() if bias is None else torch.addmm(bias, x_ND, w_OD.t())
        xa_NR = add_low_rank(y_NO, x_ND, A_RD, B_OR, scaling)
        ctx.save_for_backward(x, xa_NR, A_RD, B_OR)
        ctx.weight, ctx.scaling = weight, scaling
        return y_NO.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, xa_NR, A_RD, B_OR = ctx.saved_tensors
        g_NO = rows(g)
        gb_NR = (g_NO @ B_OR.to(g.dtype)).mul_(ctx.scaling)
        dA_RD = (gb_NR.t() @ rows(x)).to(A_RD.dtype)
        dB_OR = (g_NO.t() @ xa_NR).to(B_OR.dtype).mul_(ctx.scaling)
        dx = None
        if ctx.needs_input_grad[0]:  # the first block's x comes from the frozen embedding
            dx = (g_NO @ dense(ctx.weight)).addmm_(gb_NR, A_RD.to(g.dtype)).view(x.shape)
        return dx, None, None, dA_RD, dB_OR, None


def add_low_rank(y_NO, x_ND, A_RD, B_OR, scaling: float) -> torch.Tensor:
    """Add s (x Aᵀ) Bᵀ to y in place; returns x Aᵀ [N, R]."""
    xa_NR = x_ND @ A_RD.to(x_ND.dtype).t()
    y_NO.addmm_(xa_NR, B_OR.to(x_ND.dtype).t(), alpha=scaling)
    return xa_NR


def rows(x) -> torch.Tensor:
    """[..., D] -> [N, D]; a view wherever the memory allows one."""
    return x.reshape(-1, x.shape[-1])


def dense(weight) -> torch.Tensor:
    """W [O, D]: of NF4 in the dtype that its quant_state names, a plain weight as it is."""
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight, state)
