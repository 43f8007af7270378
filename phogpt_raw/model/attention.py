"""ALiBi causal attention between tokens of one document.

ALiBi has no position embedding: head h adds `-slope_h * (i - j)` to the score of query i and key j
(Press et al. 2022, arXiv:2108.12409). With the causal mask and the document mask that is one
additive bias, in the compute dtype, built once a forward and shared by all layers; the scores
themselves never leave `scaled_dot_product_attention`.

The surprise: the bias is written as a distance, 0 on the diagonal. MPT writes `slope * (j - L + 1)`
in fp32, which differs by a constant a row; softmax does not see it, but it is largest exactly where
the weights are, and 16 bits would round it there. The distance is small where it matters.

B micro-batch, L queries, S keys, H heads, K head width.
"""

import math

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend


def alibi_slopes(heads: int, bias_max: float = 8.0) -> torch.Tensor:
    """Slopes [H] in fp32: `2^(-bias_max * i / n)` for i = 1…n, n the next power of two.

    Where H is not a power of two (PhoGPT-4B has 24) MPT takes the odd places first, then the even:

    >>> alibi_slopes(4).tolist()
    [0.25, 0.0625, 0.015625, 0.00390625]
    >>> alibi_slopes(3).tolist()
    [0.0625, 0.00390625, 0.25]
    """
    n = 2 ** math.ceil(math.log2(heads))
    # on the CPU by name: real numbers, even while the model is being built on the meta device
    i = torch.arange(1, n + 1, dtype=torch.float64, device="cpu")
    slopes = 2.0 ** (-bias_max / n * i)
    if n != heads:
        slopes = torch.cat([slopes[1::2], slopes[::2]])[:heads]
    return slopes.float()


def attention_bias(
    slopes_H: torch.Tensor,
    queries: int,
    keys: int,
    dtype: torch.dtype,
    doc_BS: torch.Tensor | None = None,
) -> torch.Tensor:
    """Bias of the last `queries` of `keys` positions: [B, H, L, S]; B is 1 without doc_BS.

    A key is seen when it is not in the future and is of the query's document (doc_BS: the number
    of each position's document; None: one document a row). Every query sees at least itself, in
    padding too, so no softmax row is empty.
    """
    device = slopes_H.device
    j = torch.arange(keys, device=device)
    i = j[keys - queries :]
    distance_LS = i[:, None] - j[None, :]
    bias = torch.empty(1, len(slopes_H), queries, keys, dtype=dtype, device=device)
    torch.mul(-slopes_H[:, None, None], distance_LS, out=bias[0])
    hidden = distance_LS < 0
    if doc_BS is not None:
        hidden = hidden | (doc_BS[:, keys - queries :, None] != doc_BS[:, None, :])
        hidden = hidden[:, None]
    fill = bias.masked_fill if hidden.dim() == 4 and len(hidden) > 1 else bias.masked_fill_
    return fill(hidden, torch.finfo(dtype).min)


def attend(q_BHLK, k_BHSK, v_BHSK, bias, scale: float | None) -> torch.Tensor:
    """Softmax(q k^T * scale + bias) v -> [B, H, L, K]; statistics in fp32 inside the kernel."""
    return F.scaled_dot_product_attention(q_BHLK, k_BHSK, v_BHSK, attn_mask=bias, scale=scale)


def backend(slopes_H: torch.Tensor, config, length: int, dtype: torch.dtype) -> str:
    """The kernel scaled_dot_product_attention takes for rows of `length`, as torch names it."""
    shape = (1, config.n_heads, length, config.d_model // config.n_heads)
    q = torch.empty(shape, dtype=dtype, device=slopes_H.device, requires_grad=True)
    bias = attention_bias(slopes_H, length, length, dtype)
    choice = torch._fused_sdp_choice(q, q, q, attn_mask=bias, scale=config.softmax_scale)
    return SDPBackend(choice).name.lower().replace("_", " ")
