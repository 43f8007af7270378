"""Attention of packed rows with torch's variable-length kernels, which keep documents separate.

attention.py masks other documents with a bias. So for a row of 8,192 tokens it computes all scores
of the row, even if each document has only a hundred tokens. The kernels used here take the position
at which each document begins. Their work grows with the sum of the squared document lengths.

These kernels accept no bias, so ALiBi is added through extra columns of the queries and keys. Of
-slope * (i - j) only slope * j is needed, because softmax ignores a value that is constant along a
row. j counts from the beginning of the document. The value slope * j / (scale * COLUMN) is split
into three values of the compute dtype, because their sum is more precise than one value. Each key
has three extra columns, one for each of these values. The same columns of each query contain the
constant COLUMN. Five more columns are zero, because the kernels read eight elements at once.

`plain` computes the same attention, one document at a time. Tests compare the kernels with it.

B micro-batch, L length, T = B * L tokens, H heads, K head width.
"""

import math

import torch
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend

from phogpt_raw import private_apis
from phogpt_raw.data.packing import DocumentBounds
from phogpt_raw.model.attention import Bias

# The value in the extra columns of the queries. Dividing by a power of two is exact. Dividing by 16
# keeps the values in the keys' columns within the range of fp16.
COLUMN = 16.0
PARTS, COLUMNS = 3, 8
# The memory-efficient kernel is slow for heads wider than 128, and the extra columns make heads
# wider. On an H100, this kernel needs 95.9 ms per layer for forward and backward of a row of 8,192
# tokens whose longest document has 8,000 tokens. Attention with the masked bias (attention.py)
# needs 35.9 ms for such a row, whatever its documents. This is 3/8 of 95.9 ms. So if the longest
# document has more than 3/8 of a row's tokens, the masked bias is used.
LONGEST_SHARE = 3 / 8


class Documents:
    """The documents of a micro-batch, in the form that the kernels take. All layers use the
    same Documents."""

    def __init__(self, slopes_H: torch.Tensor, doc_BL: torch.Tensor, bounds: DocumentBounds,
                 kernel: SDPBackend):
        self.slopes_H, self.longest, self.kernel = slopes_H, bounds.longest, KERNELS[kernel]
        self.starts, self.place_T = starts_of(doc_BL, bounds.count)
        self.made = None  # the result of `columns`, computed when the first layer needs it

    def columns(self, dtype: torch.dtype, scale: float) -> torch.Tensor:
        """The extra columns of queries, keys and values, [T, 3, H, 8]."""
        if self.made is None:
            self.made = columns(self.slopes_H, self.place_T, dtype, scale)
        return self.made


def columns(slopes_H: torch.Tensor, place_T: torch.Tensor, dtype: torch.dtype,
            scale: float) -> torch.Tensor:
    """The extra columns of queries, keys and values, [T, 3, H, 8].

    The dot product of a query's columns and a key's columns is slope * place / scale, with the
    place of the key in its document. The columns of the values are zero.
    """
    rest_TH = slopes_H.double() * place_T[:, None] / (scale * COLUMN)
    tokens, heads = rest_TH.shape
    made = torch.zeros(tokens, 3, heads, COLUMNS, dtype=dtype, device=place_T.device)
    made[:, 0, :, :PARTS] = COLUMN
    for n in range(PARTS):
        made[:, 1, :, n] = rest_TH
        rest_TH = rest_TH - made[:, 1, :, n].double()
    return made


def starts_of(doc_BL: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(starts, place_T). starts: the position at which each of the B * count documents begins, and
    the end of the last document, int32 [B * count + 1]. place_T: each token's position in its
    document.

    A document number that does not occur gives a document of length 0. The shapes do not depend on
    values, so the host does not wait for the GPU.
    """
    rows, length = doc_BL.shape
    row_B1 = torch.arange(rows, device=doc_BL.device)[:, None]
    doc_T = (doc_BL + count * row_B1).flatten()
    sizes = torch.zeros(rows * count + 1, dtype=torch.int32, device=doc_BL.device)
    sizes.scatter_add_(0, doc_T + 1, torch.ones_like(doc_T, dtype=torch.int32))
    starts = sizes.cumsum(0, dtype=torch.int32)
    return starts, torch.arange(rows * length, device=doc_BL.device) - starts[doc_T]


def visible(slopes_H: torch.Tensor, width: int, length: int, dtype: torch.dtype,
            doc_BL: torch.Tensor | None, bounds: DocumentBounds | None) -> Bias | Documents:
    """A Bias or a Documents, which defines the keys that each query attends to. The faster of the
    two on the device is chosen. width: the width of a head.

    Without documents, without bounds, or on a CPU, the result is a Bias.
    """
    if bounds is not None and doc_BL is not None:
        kernel = choose_kernel(slopes_H, width, length, dtype, bounds)
        if kernel is not None:
            return Documents(slopes_H, doc_BL, bounds, kernel)
    return Bias(slopes_H, length, length, dtype, doc_BL)


def attend_documents(qkv_BL3HK: torch.Tensor, documents: Documents,
                     scale: float | None) -> torch.Tensor:
    """Softmax attention with ALiBi within each document -> [B, L, H, K]."""
    return DocumentAttention.apply(qkv_BL3HK, documents,
                                   scale or 1 / math.sqrt(qkv_BL3HK.shape[-1]))


class DocumentAttention(torch.autograd.Function):
    """The autograd function of `attend_documents`.

    Queries, keys and values stay in one tensor, the output of Wqkv. One copy appends the extra
    columns to all three. The copy is saved for backward. For heads of width 128 it takes 1/16 more
    memory than the output of Wqkv.
    """

    @staticmethod
    def forward(ctx, qkv, documents, scale):
        *rows, _three, _heads, width = qkv.shape
        made = documents.columns(qkv.dtype, scale)
        wide = torch.cat([qkv.flatten(0, 1), made], -1)  # [T, 3, H, K + 8]
        q, k, v = wide.unbind(1)
        out, *kept = documents.kernel.forward(q, k, v, documents, scale)
        out = out[..., :width].contiguous()  # [T, H, K]
        ctx.documents, ctx.scale, ctx.rows = documents, scale, rows
        ctx.save_for_backward(wide, out, *kept)
        return out.unflatten(0, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        wide, out, *kept = ctx.saved_tensors
        width, zeros = out.shape[-1], ctx.documents.made[:, 2].contiguous()
        g, out = (torch.cat([x, zeros], -1) for x in (g.flatten(0, 1), out))
        gradients = ctx.documents.kernel.backward(g, *wide.unbind(1), out, *kept, ctx.documents,
                                                  ctx.scale)
        together = torch.stack([x[..., :width] for x in gradients], 1)  # [T, 3, H, K]
        return together.unflatten(0, ctx.rows), None, None


class Efficient:
    """The memory-efficient kernel, for every CUDA card. It takes [1, T, H, K]."""

    @staticmethod
    def forward(q, k, v, documents, scale):
        out, *kept = private_apis.efficient_documents(
            q[None], k[None], v[None], documents.starts, documents.longest, scale)
        return out[0], *kept

    @staticmethod
    def backward(g, q, k, v, out, lse, seed, offset, documents, scale):
        gradients = private_apis.efficient_documents_backward(
            g[None], q[None], k[None], v[None], out[None], lse, seed, offset, documents.starts,
            documents.longest, scale)
        return [x[0] for x in gradients]


class Flash:
    """The flash kernel, for 16 bits from compute capability 8.0 on. It takes [T, H, K]."""

    @staticmethod
    def forward(q, k, v, documents, scale):
        return private_apis.flash_documents(q, k, v, documents.starts, documents.longest, scale)

    @staticmethod
    def backward(g, q, k, v, out, lse, state, unused, documents, scale):
        return private_apis.flash_documents_backward(
            g, q, k, v, out, lse, state, unused, documents.starts, documents.longest, scale)


KERNELS = {SDPBackend.EFFICIENT_ATTENTION: Efficient, SDPBackend.FLASH_ATTENTION: Flash}


def choose_kernel(slopes_H: torch.Tensor, width: int, length: int, dtype: torch.dtype,
                  bounds: DocumentBounds) -> SDPBackend | None:
    """The variable-length kernel for rows of `length` tokens and heads of this width, on the device
    of slopes_H. None if the masked bias must be used or is faster."""
    if slopes_H.device.type == "cpu" or dtype.itemsize > 2:
        return None  # a CPU has no variable-length kernel; in fp32, a large slope * j rounds scores
    if width % COLUMNS:
        return None  # the heads would not begin at multiples of eight elements
    q = torch.empty(1, len(slopes_H), 1, width + COLUMNS, dtype=dtype, device=slopes_H.device)
    q = q.expand(-1, -1, length, -1)
    kernel = private_apis.choose_attention_kernel(q, q, q, None)
    if kernel == SDPBackend.CUDNN_ATTENTION:  # torch has no variable-length form of this kernel
        kernel = SDPBackend.FLASH_ATTENTION
    is_long = bounds.longest > LONGEST_SHARE * length
    if kernel not in KERNELS or (kernel == SDPBackend.EFFICIENT_ATTENTION and is_long):
        return None
    return kernel


def plain(q_LHK, k_LHK, v_LHK, slopes_H: torch.Tensor, lengths: list[int], scale: float):
    """Attention with ALiBi within each document of one row, [L, H, K]. lengths: the number of
    tokens in each document."""
    outputs, start = [], 0
    for length in lengths:
        q, k, v = (x[start : start + length].transpose(0, 1) for x in (q_LHK, k_LHK, v_LHK))
        distance_LL = torch.arange(length)[:, None] - torch.arange(length)
        scores_HLL = scale * q @ k.mT - slopes_H[:, None, None] * distance_LL
        scores_HLL = scores_HLL.masked_fill(distance_LL < 0, -math.inf)
        outputs.append((scores_HLL.softmax(-1) @ v).transpose(0, 1))
        start += length
    return torch.cat(outputs)
