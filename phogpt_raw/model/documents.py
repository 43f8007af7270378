"""Attention of packed rows by torch's variable-length kernels, each document separately.

The bias of attention.py masks other documents, so a row of 8,192 tokens computes all scores of the
row even where its documents have a hundred tokens. The kernels here take the position at which each
document begins; their work grows with the sum of the squared lengths of the documents.

They accept no bias, so ALiBi goes into the product of queries and keys. Of -slope * (i - j) only
slope * j matters, since softmax ignores what is constant along a row; j counts from the beginning
of the document. Three extra columns of each key hold slope * j / (scale * COLUMN), split into three
parts that the compute dtype holds exactly. The same columns of each query hold COLUMN. Five more
columns are zero, because the kernels read eight elements at once.

`plain` computes the same, a document at a time, to read and to test against.

B micro-batch, L length, T = B * L tokens, H heads, K head width.
"""

import math

import torch
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend

from phogpt_raw import private_apis
from phogpt_raw.data.packing import DocumentBounds
from phogpt_raw.model.attention import Bias

COLUMN = 16.0  # a power of two, so exact; about as large as scores, so that no part overflows
PARTS, COLUMNS = 3, 8
# The memory-efficient kernel is slow for heads wider than 128. Forward and backward of 8,192 tokens
# whose longest document has 8,000 take 95.9 ms a layer on an H100. The masked bias takes 35.9 ms,
# 3/8 of that, for any lengths of documents. So the masked bias is used for a row where the longest
# document has more than 3/8 of the tokens.
LONGEST_SHARE = 3 / 8


class Documents:
    """The documents of a micro-batch as the kernels take them; shared by all layers."""

    def __init__(self, slopes_H: torch.Tensor, doc_BL: torch.Tensor, bounds: DocumentBounds,
                 kernel: SDPBackend):
        self.slopes_H, self.longest, self.kernel = slopes_H, bounds.longest, KERNELS[kernel]
        self.starts, self.place_T = starts_of(doc_BL, bounds.count)
        self.made = None  # the columns, computed at the first layer

    def columns(self, dtype: torch.dtype, scale: float) -> torch.Tensor:
        """The extra columns of queries, keys and values, [T, 3, H, 8]."""
        if self.made is None:
            self.made = columns(self.slopes_H, self.place_T, dtype, scale)
        return self.made


def columns(slopes_H: torch.Tensor, place_T: torch.Tensor, dtype: torch.dtype,
            scale: float) -> torch.Tensor:
    """[T, 3, H, 8]: columns whose query-key products sum to slope * place / scale; those of the
    values are zero."""
    rest_TH = slopes_H.double() * place_T[:, None] / (scale * COLUMN)
    tokens, heads = rest_TH.shape
    made = torch.zeros(tokens, 3, heads, COLUMNS, dtype=dtype, device=place_T.device)
    made[:, 0, :, :PARTS] = COLUMN
    for n in range(PARTS):
        made[:, 1, :, n] = rest_TH
        rest_TH = rest_TH - made[:, 1, :, n].double()
    return made


def starts_of(doc_BL: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The position at which each of B * count documents begins, [B * count + 1] int32, and the
    place of each token in its document, [T]. Unused documents are empty.

    Shapes do not depend on values, so nothing waits for the GPU.
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
    """Which keys each query sees, in the form that is fastest on the device; width: of a head.

    Without bounds and on a CPU it is the masked bias.
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
    """Queries, keys and values stay in one tensor, as the linear before gives them. One copy adds
    the columns to all three. The copy is saved for backward: 1/16 more memory for heads of 128."""

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
    """The variable-length kernel for rows of `length` tokens on the device of slopes_H, with heads
    of this width; None where the masked bias must be used or is faster."""
    if slopes_H.device.type == "cpu" or dtype.itemsize > 2:
        return None  # the CPU has no such kernel; in fp32 large scores would be rounded
    if width % COLUMNS:
        return None  # the kernels could not read the wider heads as vectors
    q = torch.empty(1, len(slopes_H), 1, width + COLUMNS, dtype=dtype, device=slopes_H.device)
    q = q.expand(-1, -1, length, -1)
    kernel = private_apis.choose_attention_kernel(q, q, q, None)
    if kernel == SDPBackend.CUDNN_ATTENTION:  # it has no variable-length form in torch
        kernel = SDPBackend.FLASH_ATTENTION
    is_long = bounds.longest > LONGEST_SHARE * length
    if kernel not in KERNELS or (kernel == SDPBackend.EFFICIENT_ATTENTION and is_long):
        return None
    return kernel


def plain(q_LHK, k_LHK, v_LHK, slopes_H: torch.Tensor, lengths: list[int], scale: float):
    """Attention with ALiBi within each document of one row, [L, H, K]."""
    outputs, start = [], 0
    for length in lengths:
        q, k, v = (x[start : start + length].transpose(0, 1) for x in (q_LHK, k_LHK, v_LHK))
        distance_LL = torch.arange(length)[:, None] - torch.arange(length)
        scores_HLL = scale * q @ k.mT - slopes_H[:, None, None] * distance_LL
        scores_HLL = scores_HLL.masked_fill(distance_LL < 0, -math.inf)
        outputs.append((scores_HLL.softmax(-1) @ v).transpose(0, 1))
        start += length
    return torch.cat(outputs)
