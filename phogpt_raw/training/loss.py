"""Next-token loss through the frozen head, with only a chunk of the logits in memory.

PhoGPT-7B5's head has 250,880 rows: the fp32 logits of 2,048 tokens take 1.9 GiB, and a plain
cross-entropy holds three such tensors. But the head is frozen, so backward needs only the gradient
of the hidden rows, (softmax - one-hot) times the head. It is computed in the same pass as the loss,
chunk by chunk. No tensor of size V outlives its chunk, and nothing is computed twice.

T supervised rows, C rows of a chunk, D hidden, V vocabulary.
"""

import torch

from phogpt_raw.model.matmul import matmul_to

BYTES_A_LOGIT = 8  # the logit and its log-probability in fp32


def chunk_rows(vocabulary: int, limit_mib: int) -> int:
    """Rows of a chunk whose temporary tensors stay within limit_mib; a multiple of 8 where
    possible, which suits the kernels."""
    rows = limit_mib * 2**20 // (vocabulary * BYTES_A_LOGIT)
    return rows // 8 * 8 or max(1, rows)


class HeadLoss(torch.autograd.Function):
    """`summed_loss`; its forward already computes the gradient of the hidden rows."""

    @staticmethod
    def forward(ctx, hidden_TD, head_VD, targets_T, chunk_rows):
        total = torch.zeros((), dtype=torch.float32, device=hidden_TD.device)
        gradient_TD = torch.empty_like(hidden_TD) if ctx.needs_input_grad[0] else None
        for start in range(0, len(targets_T), chunk_rows):
            rows = slice(start, start + chunk_rows)
            counts_C1 = (targets_T[rows] >= 0)[:, None]
            targets_C1 = targets_T[rows].clamp(min=0)[:, None]
            log_p_CV = matmul_to(torch.float32, hidden_TD[rows], head_VD.T).log_softmax(1)
            picked_C1 = log_p_CV.gather(1, targets_C1)
            total -= (picked_C1 * counts_C1).sum()
            if gradient_TD is not None:
                slope_CV = torch.exp(log_p_CV, out=torch.empty_like(log_p_CV, dtype=head_VD.dtype))
                # The target's p - 1 is expm1(log p): p = 0.9999 in 16 bits would be 1, and p - 1 0.
                slope_CV.scatter_(1, targets_C1, picked_C1.expm1().to(slope_CV.dtype))
                torch.mm(slope_CV, head_VD, out=gradient_TD[rows]).mul_(counts_C1)
                del slope_CV
            del log_p_CV  # else it would stay alive beside the next chunk's
        ctx.save_for_backward(gradient_TD)
        return total

    @staticmethod
    def backward(ctx, upstream):
        (gradient_TD,) = ctx.saved_tensors
        # In fp32: in 16 bits the factor itself would be rounded, or overflow.
        return (gradient_TD.float() * upstream).to(gradient_TD.dtype), None, None, None


def summed_loss(hidden_TD, head_VD, targets_T, chunk_rows: int) -> torch.Tensor:
    """The sum over rows of -log softmax(hidden @ head.T)[target], in nats, fp32; targets < 0 are
    ignored.

    chunk_rows: rows at a time. Only hidden_TD gets a gradient: the head must be frozen.
    """
    return HeadLoss.apply(hidden_TD, head_VD, targets_T, chunk_rows)
