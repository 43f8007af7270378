"""LoRA over a frozen linear layer, in NF4 or not, as one autograd function.

    y = x Wᵀ + bias + s (x Aᵀ) Bᵀ                    Hu et al. 2021, arXiv:2106.09685
    dx = g W + (s g B) A      dA = (s g B)ᵀ x      dB = s gᵀ (x Aᵀ)

`lora_linear_plain` computes y and leaves the gradients to autograd. `lora_linear` computes the same
y, has its own code for the gradients, and is cheaper than PEFT's layers. In 16 bits, PEFT casts the
activations to fp32 and back around every adapter. PEFT also allocates several tensors of the
output's size. Here the adapter's product is computed first, in the compute dtype. The base's
product is then added to it in place. Backward needs only two saved tensors: x, and s x Aᵀ, which
has only R columns.

An NF4 weight is dequantised for one product at a time. Backward dequantises it again. Keeping all
dequantised weights of PhoGPT-7B5 would take 13 GB.

N rows, D in, O out, R rank.
"""

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from phogpt_raw.model.matmul import matmul_to, scaled_matmul
from phogpt_raw.model.nf4 import dequantise
from phogpt_raw.private_apis import nf4_state

FEW = 16  # the largest number of rows of x for which the base layer runs its own forward


def lora_linear(x, base: nn.Linear, A_RD, B_OR, scaling: float) -> torch.Tensor:
    """x [..., D] -> [..., O] through `base` (nn.Linear or Linear4bit, frozen) and its adapter.

    x and the dequantised W have the compute dtype. Only x, A and B get gradients. Without gradients
    and for at most FEW rows, as in decoding, the base layer runs its own forward. For an NF4 weight
    on a GPU this is bitsandbytes' kernel, which reads the 4 bits directly. Dequantising the weight
    first would move nine times as many bytes.
    """
    if torch.is_grad_enabled() or len(rows(x)) > FEW:
        return LoraLinear.apply(x, base.weight, base.bias, A_RD, B_OR, scaling)
    y = base(x)
    xa_NR = scaled_matmul(rows(x), compute_copy(A_RD, x.dtype).t(), scaling)
    y.view(-1, y.shape[-1]).addmm_(xa_NR, compute_copy(B_OR, x.dtype).t())
    return y


def lora_linear_plain(x, base: nn.Linear, A_RD, B_OR, scaling: float) -> torch.Tensor:
    """`lora_linear` in ordinary operations with autograd. Tests compare `lora_linear` with it."""
    xa = x @ A_RD.to(x.dtype).t()
    return base(x) + scaling * (xa @ B_OR.to(x.dtype).t())


class LoraLinear(torch.autograd.Function):
    """The autograd function of `lora_linear`. The gradients of A and B have the dtype of A and B.

    On a GPU, the kernel of a 16-bit matrix product sums in fp32. The fp32 gradients of A and B are
    these sums, without rounding to 16 bits. s x Aᵀ and s g B are rounded once to the compute dtype,
    like every activation.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, A_RD, B_OR, scaling):
        x_ND, B_OR = rows(x), compute_copy(B_OR, x.dtype)
        ctx.dtype, ctx.A_RD, ctx.B_OR = A_RD.dtype, compute_copy(A_RD, x.dtype), B_OR
        xa_NR = scaled_matmul(x_ND, ctx.A_RD.t(), scaling)
        # The adapter's product comes first, so that the kernel of the base's product can add to it.
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
        if ctx.needs_input_grad[0]:  # False if x comes from the frozen embedding
            dx = (gb_NR @ ctx.A_RD).addmm_(g_NO, dense(ctx.weight)).view(x.shape)
        return dx, None, None, dA_RD, dB_OR, None


def compute_copy(adapter: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """An fp32 adapter weight in `dtype`: its copy in the flat buffer (flat.py) if there is one,
    else a new cast."""
    return getattr(adapter, "compute_copy", adapter).to(dtype)


def rows(x) -> torch.Tensor:
    """x [..., D] as [N, D], without a copy if possible."""
    return x.reshape(-1, x.shape[-1])


def dense(weight) -> torch.Tensor:
    """The matrix W [O, D]. An NF4 weight is dequantised; another weight is returned unchanged."""
    return weight if nf4_state(weight) is None else dequantise(weight)
