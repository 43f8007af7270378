"""ALiBi slopes, the bias with its masks, and packing, against slow loops and transformers."""

import math

import pytest
import torch
from einops import rearrange
from torch.nn.attention import SDPBackend
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from phogpt_raw.model.attention import alibi_slopes, attend, attention_bias, backend
from phogpt_raw.model.phogpt import ModelConfig

# Documents of two rows of 7: right padding (document 9) behind two packed ones, left padding.
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 9, 9], [9, 9, 9, 0, 0, 0, 0]])


def slow_bias(slopes_H, queries, keys, doc_BS):
    """The bias [B, H, L, S] as defined, one element at a time; doc_BS None is one document."""
    if doc_BS is None:
        doc_BS = torch.zeros(1, keys)
    bias = torch.full((len(doc_BS), len(slopes_H), queries, keys), torch.finfo(torch.float32).min)
    for b, doc_S in enumerate(doc_BS.tolist()):
        for h, slope in enumerate(slopes_H.tolist()):
            for row in range(queries):
                i = keys - queries + row
                for j in range(i + 1):
                    if doc_S[i] == doc_S[j]:
                        bias[b, h, row, j] = -slope * (i - j)
    return bias


@pytest.mark.parametrize("heads", [1, 3, 6, 8, 24, 32])
def test_slopes_are_transformers(heads):
    # Exact: a slope is one rounding of a power of two, in fp32 on both sides.
    alibi_H1L = build_mpt_alibi_tensor(heads, 2)  # slope * -1, slope * 0
    assert torch.equal(alibi_slopes(heads), -alibi_H1L[:, 0, 0])


def test_slopes_follow_bias_max():
    assert alibi_slopes(4, 16).tolist() == [2.0**-4, 2.0**-8, 2.0**-12, 2.0**-16]


def test_slopes_are_real_numbers_while_a_model_is_built_on_meta():
    with torch.device("meta"):
        assert alibi_slopes(2).tolist() == [2.0**-4, 2.0**-8]


@pytest.mark.parametrize("documents", [None, DOCUMENTS, DOCUMENTS * 0],
                         ids=["none", "packed-and-padded", "one-document"])
@pytest.mark.parametrize("queries", [7, 3, 1])
@pytest.mark.parametrize("heads", [3, 4])
def test_bias_is_that_of_a_slow_loop(heads, queries, documents):
    slopes_H = alibi_slopes(heads)
    bias = attention_bias(slopes_H, queries, 7, torch.float32, documents)
    # Exact: the same fp32 product of a slope and a small whole number.
    torch.testing.assert_close(bias, slow_bias(slopes_H, queries, 7, documents), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bias_in_16_bits_is_rounded_once(dtype):
    # 1,500 positions: where MPT's own form, slope * (j - L + 1), is off by whole units in bf16
    # next to the diagonal, ours is exact to half a unit in the last place of its own size.
    slopes_H = alibi_slopes(6)
    exact = attention_bias(slopes_H, 1, 1500, torch.float32)
    rounded = attention_bias(slopes_H, 1, 1500, dtype).float()
    torch.testing.assert_close(rounded, exact, rtol=torch.finfo(dtype).eps / 2, atol=2.0**-25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_row_is_nan_with_padding_on_either_side(dtype):
    slopes_H = alibi_slopes(4)
    q, k, v = heads_of(DOCUMENTS.shape, heads=4, dtype=dtype, scale=8.0)
    bias = attention_bias(slopes_H, 7, 7, dtype, DOCUMENTS)
    out = attend(q, k, v, bias, None)
    out.float().square().sum().backward()
    for tensor in (bias, out, q.grad, k.grad, v.grad):
        assert tensor.isfinite().all()


def test_packed_documents_are_what_they_are_alone():
    """Values and gradients; the kernel may add up in another order, hence fp32's few units."""
    slopes_H, lengths = alibi_slopes(6), (5, 1, 9, 4)
    documents = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    q, k, v = heads_of((1, sum(lengths)), heads=6)
    packed = attend(q, k, v, attention_bias(slopes_H, 19, 19, q.dtype, documents), 0.3)
    weight = torch.randn(packed.shape, generator=torch.Generator().manual_seed(5))
    (packed * weight).sum().backward()
    start = 0
    for length in lengths:
        piece = slice(start, start := start + length)
        alone = [t.detach()[:, :, piece].requires_grad_() for t in (q, k, v)]
        out = attend(*alone, attention_bias(slopes_H, length, length, q.dtype), 0.3)
        (out * weight[:, :, piece]).sum().backward()
        torch.testing.assert_close(packed[:, :, piece], out, rtol=1e-5, atol=1e-6)
        for whole, part in zip((q, k, v), alone, strict=True):
            torch.testing.assert_close(whole.grad[:, :, piece], part.grad, rtol=1e-5, atol=1e-6)


def test_attention_is_a_slow_softmax():
    slopes_H = alibi_slopes(3)
    q, k, v = heads_of(DOCUMENTS.shape, heads=3, scale=2.0)
    bias = attention_bias(slopes_H, 7, 7, torch.float32, DOCUMENTS)
    scores = torch.einsum("bhlk,bhsk->bhls", q.double(), k.double()) / math.sqrt(q.shape[-1])
    weights = torch.softmax(scores + slow_bias(slopes_H, 7, 7, DOCUMENTS), -1)
    slow = torch.einsum("bhls,bhsk->bhlk", weights, v.double())
    # fp32 against fp64: sums of at most 8 terms of size 4.
    torch.testing.assert_close(attend(q, k, v, bias, None).double(), slow, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backend_names_a_kernel_of_torch(dtype):
    config = ModelConfig(48, 6, 1, vocab_size=8, max_seq_len=64)
    name = backend(alibi_slopes(6), config, 64, dtype)
    assert name.upper().replace(" ", "_") in SDPBackend.__members__
    assert name != "error"


def heads_of(shape, *, heads, dtype=torch.float32, scale=1.0, width=8):
    """Random queries, keys and values [B, H, L, K] that want gradients."""
    dice = torch.Generator().manual_seed(3)
    qkv = scale * torch.randn(*shape, 3 * heads * width, generator=dice)
    q, k, v = rearrange(qkv, "b l (three h k) -> three b h l k", three=3, h=heads)
    return [t.to(dtype).clone().requires_grad_() for t in (q, k, v)]
