"""Next-token loss through the frozen head, with one chunk of the logits in memory at a time.

The head of PhoGPT-7B5 has 250,880 rows, one for each token of the vocabulary. The fp32 logits of
2,048 positions therefore take 1.9 GiB. A plain cross-entropy keeps three tensors of this size in
memory. The head is frozen, so backward needs only the gradient of the hidden states:
(softmax - one-hot) @ head. This module computes that gradient together with the loss, chunk by
chunk. A tensor with V columns is freed at the end of its chunk. Nothing is computed twice.

T supervised rows, C rows of a chunk, D hidden, V vocabulary.
"""

import torch

from phogpt_raw.model.matmul import matmul_to

BYTES_A_LOGIT = 8  # 4 for a logit in fp32, and 4 for its log-probability in fp32


def chunk_rows(vocabulary: int, limit_mib: int) -> int:
    """The number of rows in a chunk whose temporary tensors take at most limit_mib MiB.

    The result is at least 1. If at least 8 rows fit, it is a multiple of 8, because this suits the
    matrix kernels.
    """
    rows = limit_mib * 2**20 // (vocabulary * BYTES_A_LOGIT)
    return rows // 8 * 8 or max(1, rows)


class HeadLoss(torch.autograd.Function):
    """The autograd function of `summed_loss`. Its forward also computes the gradient of
    hidden_TD."""

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
                # The gradient at the target is p - 1. It is computed as expm1(log p), because in 16
                # bits p = 0.9999 is rounded to 1, and p - 1 would be 0.
                slope_CV.scatter_(1, targets_C1, picked_C1.expm1().to(slope_CV.dtype))
                torch.mm(slope_CV, head_VD, out=gradient_TD[rows]).mul_(counts_C1)
                del slope_CV
            del log_p_CV  # freed before the next chunk allocates its log_p_CV
        ctx.save_for_backward(gradient_TD)
        return total

    @staticmethod
    def backward(ctx, upstream):
        (gradient_TD,) = ctx.saved_tensors
        # Multiply in fp32: in 16 bits the factor `upstream` would be rounded, or overflow.
        return (gradient_TD.float() * upstream).to(gradient_TD.dtype), None, None, None


def summed_loss(hidden_TD, head_VD, targets_T, chunk_rows: int) -> torch.Tensor:
    """The sum over rows of -log softmax(hidden @ head.T)[target], in nats, as an fp32 scalar.

    Rows with a negative target are ignored. chunk_rows: number of rows computed at once. Only
    hidden_TD gets a gradient, so the head must be frozen.
    """
    return HeadLoss.apply(hidden_TD, head_VD, targets_T, chunk_rows)
