"""Causal attention with ALiBi. A token attends only to tokens of its own document.

ALiBi replaces position embeddings. Head h adds `-slope_h * (i - j)` to the score of query i and key
j (Press et al. 2022, arXiv:2108.12409). One additive bias in the compute dtype contains the ALiBi
term, the causal mask and the document mask. The scores exist only inside torch's fused kernels.

This bias differs from MPT's bias in two ways. First, the values of this bias depend only on the
distance i - j and are 0 on the diagonal. MPT's bias is `slope * (j - L + 1)` in fp32. For each
query, the two biases differ by a constant, and softmax ignores a constant. On the diagonal, MPT's
bias is `-slope * (L - 1 - i)`, a large value if L is large and i is small. In 16 bits such a value
would lose precision where the attention weights are largest. The distance is small near the
diagonal, so it keeps its precision.

Second, no bias of size L x L is stored. With PhoGPT-7B5 and L = 8,192, such a bias would take
4 GiB. The queries are processed in blocks. A block of queries attends to the keys up to the block's
last query. Counted back from this last key, all blocks have the same distances i - j. So one stored
bias serves all blocks and all layers. A block with fewer keys uses only the last columns of that
bias. Scores of keys after a block's last query are never computed.

B micro-batch, L queries, S keys, H heads, K head width.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend

from phogpt_raw import private_apis
from phogpt_raw.refusal import Refusal

BLOCK = 1024  # the largest number of queries in a block; fewer queries are a single block
BIAS_MIB = 512  # the largest size of a bias; with very many keys, blocks have fewer queries
# Each row of a bias begins at a multiple of this number of elements, because the kernels read
# several elements at once.
ALIGNMENT = 16


def alibi_slopes(heads: int, bias_max: float = 8.0) -> torch.Tensor:
    """Slopes [H] in fp32: `2^(-bias_max * i / n)` for i = 1…n.

    n is the smallest power of two that is at least H. If n is greater than H, MPT takes the slopes
    of even i first, then those of odd i, and keeps the first H. PhoGPT-4B has 24 heads, so n is 32.

    >>> alibi_slopes(4).tolist()
    [0.25, 0.0625, 0.015625, 0.00390625]
    >>> alibi_slopes(3).tolist()
    [0.0625, 0.00390625, 0.25]
    """
    n = 2 ** math.ceil(math.log2(heads))
    # On the CPU, because the slopes need values even if the model is built on the meta device.
    i = torch.arange(1, n + 1, dtype=torch.float64, device="cpu")
    slopes = 2.0 ** (-bias_max / n * i)
    if n != heads:
        slopes = torch.cat([slopes[1::2], slopes[::2]])[:heads]
    return slopes.float()


class Bias:
    """The attention bias of a micro-batch, one block of queries at a time.

    A query attends to the keys of its own document, up to and including its own position.
    queries, keys: the number of queries and the number of keys. The queries are at the last
        positions of the keys.
    doc_BS: the document number of each position. If it is None, each row is one document.

    Every query attends at least to itself, also in padding, so softmax never has only masked keys.
    """

    def __init__(self, slopes_H: torch.Tensor, queries: int, keys: int, dtype: torch.dtype,
                 doc_BS: torch.Tensor | None = None, block: int | None = None):
        self.queries, self.keys, self.doc_BS = queries, keys, doc_BS
        self.block = min(queries, block or block_size(len(slopes_H), keys, dtype))
        self.last_1HLS = distance_bias(slopes_H, self.block, keys, dtype)
        if self.whole and doc_BS is not None:  # a single block is masked once for all layers
            self.last_1HLS, self.doc_BS = self.masked(self.last_1HLS, 0, queries), None

    @property
    def whole(self) -> bool:
        """Whether one block holds all queries."""
        return self.block == self.queries

    def blocks(self) -> Iterator[tuple[slice, slice]]:
        """Yields (slice of queries, slice of their keys) for each block, the last block first.

        If one block is shorter than the others, it is the first block of the row. So the bias of
        every block begins at an aligned column.
        """
        for end in range(self.queries, 0, -self.block):
            yield slice(max(0, end - self.block), end), slice(0, self.keys - self.queries + end)

    def of(self, rows: slice) -> torch.Tensor:
        """The bias of one block of queries, [B, H, queries, keys]. Without documents, B is 1."""
        count, behind = rows.stop - rows.start, self.queries - rows.stop
        bias = self.last_1HLS[:, :, self.block - count :, behind:]
        return bias if self.doc_BS is None else self.masked(bias, rows.start, rows.stop)

    def masked(self, bias_1HLS, start: int, stop: int) -> torch.Tensor:
        before = self.keys - self.queries
        doc_BS = self.doc_BS[:, : before + stop]
        other_B1LS = doc_BS[:, None, before + start :, None] != doc_BS[:, None, None, :]
        shape = (len(doc_BS), *bias_1HLS.shape[1:])
        masked = empty(shape, bias_1HLS.dtype, bias_1HLS.device)
        return masked.copy_(bias_1HLS).masked_fill_(other_B1LS, torch.finfo(masked.dtype).min)


class OneTokenBias(Bias):
    """The bias of one query per row. Each row's query has its own position.

    place_B: the position of each row's query, on the device. keys: the number of cache positions
    that attention reads.
    """

    def __init__(self, slopes_H: torch.Tensor, place_B: torch.Tensor, keys: int,
                 dtype: torch.dtype):
        self.queries, self.keys, self.block, self.doc_BS = 1, keys, 1, None
        distance_BS = place_B[:, None] - torch.arange(keys, device=place_B.device)
        bias = empty((len(place_B), len(slopes_H), 1, keys), dtype, place_B.device)
        torch.mul(-slopes_H[:, None, None], distance_BS[:, None, None, :], out=bias)
        self.last_1HLS = bias.masked_fill_(distance_BS[:, None, None, :] < 0,
                                           torch.finfo(dtype).min)


def block_size(heads: int, keys: int, dtype: torch.dtype) -> int:
    """The number of queries in a block: the largest power of two that is at most BLOCK and for
    which the bias takes at most BIAS_MIB.

    >>> [block_size(32, keys, torch.float16) for keys in (2048, 8192, 16384)]
    [1024, 1024, 512]
    """
    rows = BIAS_MIB * 2**20 // (heads * keys * dtype.itemsize)
    return min(BLOCK, 2 ** int(math.log2(max(1, rows))))


def distance_bias(slopes_H, queries: int, keys: int, dtype: torch.dtype) -> torch.Tensor:
    """-slope * (i - j) with the causal mask, [1, H, L, S]. The queries i are the last `queries` of
    the `keys` positions."""
    device = slopes_H.device
    j = torch.arange(keys, device=device)
    distance_LS = j[keys - queries :, None] - j[None, :]
    bias = empty((1, len(slopes_H), queries, keys), dtype, device)
    torch.mul(-slopes_H[:, None, None], distance_LS, out=bias[0])
    return bias.masked_fill_(distance_LS < 0, torch.finfo(dtype).min)


def empty(shape, dtype: torch.dtype, device) -> torch.Tensor:
    """An uninitialised tensor of `shape` for a bias. Its rows begin at addresses from which the
    kernels can read several elements at once.

    F.scaled_dot_product_attention pads a bias for this purpose. This file calls the kernels
    directly, and they do not pad.
    """
    *rows, keys = shape
    width = -(-keys // ALIGNMENT) * ALIGNMENT
    return torch.empty(*rows, width, dtype=dtype, device=device)[..., :keys]


def attend(q_BHLK, k_BHSK, v_BHSK, bias: Bias, scale: float | None) -> torch.Tensor:
    """softmax(q k^T * scale + bias) v, [B, H, L, K]. The kernel keeps the softmax statistics in
    fp32. If `scale` is None, it is 1 / sqrt(K)."""
    return BlockAttention.apply(q_BHLK, k_BHSK, v_BHSK, bias, scale)


class BlockAttention(torch.autograd.Function):
    """The autograd function of `attend`. It processes one block of queries at a time.

    The gradients of k and v from all blocks are added in place. If autograd differentiated the
    slices itself, it would allocate gradients of the keys' full length for each block. Most of
    their values would be zero.
    """

    @staticmethod
    def forward(ctx, q, k, v, bias, scale):
        run, ctx.gradients = KERNELS[choose_kernel(q, k, v, bias)]
        ctx.bias, ctx.scale, ctx.kept = bias, scale, []
        out, statistics = None if bias.whole else zeros_BLHK(q), []
        for rows, keys in bias.blocks():
            part = q[:, :, rows], k[:, :, keys], v[:, :, keys], bias.of(rows)
            part_out, lse, *kept = run(*part, scale)
            if bias.whole:
                out = part_out
            else:
                out[:, :, rows] = part_out
            statistics.append(lse)
            ctx.kept.append(kept)
        ctx.save_for_backward(q, k, v, out, *statistics)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        q, k, v, out, *statistics = ctx.saved_tensors
        if ctx.bias.whole:
            return *ctx.gradients(g, q, k, v, ctx.bias.of(slice(0, ctx.bias.queries)), out,
                                  *statistics, *ctx.kept[0], ctx.scale), None, None
        dq, dk, dv = zeros_BLHK(q), zeros_BLHK(k), zeros_BLHK(v)
        for (rows, keys), lse, kept in zip(ctx.bias.blocks(), statistics, ctx.kept, strict=True):
            part = q[:, :, rows], k[:, :, keys], v[:, :, keys], ctx.bias.of(rows)
            dq[:, :, rows], dk_part, dv_part = ctx.gradients(
                g[:, :, rows], *part, out[:, :, rows], lse, *kept, ctx.scale)
            dk[:, :, keys] += dk_part
            dv[:, :, keys] += dv_part
        return dq, dk, dv, None, None


def zeros_BLHK(x_BHLK) -> torch.Tensor:
    """Zeros with the shape of x_BHLK, in memory order [B, L, H, K]. The linear layers before and
    after attention use this order."""
    return torch.zeros_like(x_BHLK.transpose(1, 2), memory_format=torch.contiguous_format) \
        .transpose(1, 2)


# (forward, backward) of the kernels from which F.scaled_dot_product_attention chooses
KERNELS = {
    SDPBackend.EFFICIENT_ATTENTION: (private_apis.efficient_attention,
                                     private_apis.efficient_attention_backward),
    SDPBackend.CUDNN_ATTENTION: (private_apis.cudnn_attention,
                                 private_apis.cudnn_attention_backward),
    # with a bias, torch chooses this kernel only on a CPU
    SDPBackend.FLASH_ATTENTION: (private_apis.cpu_attention, private_apis.cpu_attention_backward),
}


def choose_kernel(q, k, v, bias: Bias) -> SDPBackend:
    """The fused kernel that torch chooses for a block. Raises Refusal if there is no such kernel.

    Without a fused kernel, torch would silently use separate operations, which store all scores in
    memory.
    """
    rows, keys = next(bias.blocks())
    # The choice depends on shapes, not on values, so the bias needs no document mask here.
    choice = private_apis.choose_attention_kernel(
        q[:, :, rows], k[:, :, keys], v[:, :, keys], bias.last_1HLS)
    if choice not in KERNELS:
        raise Refusal(f"attention: torch {torch.__version__} has no fused kernel on "
                      f"{q.device.type} for {q.shape[1]} heads of width {q.shape[-1]} in "
                      f"{str(q.dtype).removeprefix('torch.')}; another --dtype may have one")
    return choice


@dataclass(frozen=True)
class AttentionChoice:
    """The attention kernel and the blocks for rows of one length.

    kernel: torch's name of the kernel, such as EFFICIENT_ATTENTION. block: the number of queries in
    a block. The bias of a head has block x length values. blocks: the number of blocks in a row.
    """

    kernel: str
    block: int
    blocks: int


def choose_attention(slopes_H: torch.Tensor, config, length: int,
                     dtype: torch.dtype) -> AttentionChoice:
    """The kernel and the blocks for rows of `length` tokens, on the device of slopes_H.

    config: the ModelConfig. Raises Refusal if torch has no fused kernel.
    """
    shape = (1, config.n_heads, length, config.d_model // config.n_heads)
    q = torch.empty(shape, dtype=dtype, device=slopes_H.device, requires_grad=True)
    bias = Bias(slopes_H, length, length, dtype)
    return AttentionChoice(choose_kernel(q, q, q, bias).name, bias.block,
                           math.ceil(length / bias.block))
