"""ALiBi slopes and attention with a bias: masks, blocks and packed documents.

The results are compared with slow loops, and the slopes with those of transformers.

In fp32 the tolerances are for sums of at most 40 terms of size about 4, which the two sides add in
different orders. Each addition may be wrong by a few units in the last place. In 16 bits the limit
of the norm of the error is a number of roundings. One rounding changes a value by at most eps / 2
of its size.
"""

import doctest
import math

import pytest
import torch
from einops import rearrange
from oracle import lively_tensors, ours, random_ids, small_config
from torch.nn.attention import SDPBackend
from torch.utils.checkpoint import checkpoint
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from phogpt_raw.model import attention
from phogpt_raw.model import documents as variable_length
from phogpt_raw.model.attention import (
    ALIGNMENT,
    BIAS_MIB,
    BLOCK,
    AttentionChoice,
    Bias,
    BlockAttention,
    alibi_slopes,
    attend,
    block_size,
    choose_attention,
    choose_kernel,
)
from phogpt_raw.model.cache import Piece
from phogpt_raw.model.phogpt import ModelConfig
from phogpt_raw.model.recompute import recomputed
from phogpt_raw.refusal import Refusal

# Document numbers of two rows of 7 tokens; 9 is padding. Row 0: two packed documents, then padding.
# Row 1: padding, then one document.
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 9, 9], [9, 9, 9, 0, 0, 0, 0]])


def slow_bias(slopes_H, queries, keys, doc_BS):
    """The bias [B, H, L, S] by its definition, one element at a time.

    If doc_BS is None, a row is one document.
    """
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


def whole_bias(*args):
    """The bias of all queries as one tensor."""
    bias = Bias(*args)
    return bias.of(slice(0, bias.queries))


def rows_of(bias):
    return [rows for rows, _ in bias.blocks()]


@pytest.mark.parametrize("heads", [1, 3, 6, 8, 24, 32])
def test_slopes_are_transformers(heads):
    # Equal bit for bit: alibi_slopes and transformers round a power of two to fp32 once.
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
    bias = whole_bias(slopes_H, queries, 7, torch.float32, documents)
    # Equal bit for bit: both biases are the fp32 product of a slope and a small integer.
    torch.testing.assert_close(bias, slow_bias(slopes_H, queries, 7, documents), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bias_in_16_bits_is_rounded_once(dtype):
    # The row has 1,500 positions, but bf16 cannot hold every whole number above 256. So in bf16,
    # MPT's own form slope * (j - L + 1) is wrong by whole positions next to the diagonal. Our bias
    # is wrong by at most half a unit in its last place.
    slopes_H = alibi_slopes(6)
    exact = whole_bias(slopes_H, 1, 1500, torch.float32)
    rounded = whole_bias(slopes_H, 1, 1500, dtype).float()
    torch.testing.assert_close(rounded, exact, rtol=torch.finfo(dtype).eps / 2, atol=2.0**-25)


@pytest.mark.parametrize("block", [7, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_row_is_nan_with_padding_on_either_side(dtype, block):
    slopes_H = alibi_slopes(4)
    q, k, v = heads_of(DOCUMENTS.shape, heads=4, dtype=dtype, scale=8.0)
    bias = Bias(slopes_H, 7, 7, dtype, DOCUMENTS, block)
    out = attend(q, k, v, bias, None)
    out.float().square().sum().backward()
    for tensor in (*map(bias.of, rows_of(bias)), out, q.grad, k.grad, v.grad):
        assert tensor.isfinite().all()


def test_packed_documents_are_what_they_are_alone():
    """Outputs and gradients agree within fp32 rounding. The orders of the sums may differ."""
    slopes_H, lengths = alibi_slopes(6), (5, 1, 9, 4)
    documents = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    q, k, v = heads_of((1, sum(lengths)), heads=6)
    packed = attend(q, k, v, Bias(slopes_H, 19, 19, q.dtype, documents), 0.3)
    weight = torch.randn(packed.shape, generator=torch.Generator().manual_seed(5))
    (packed * weight).sum().backward()
    start = 0
    for length in lengths:
        piece = slice(start, start := start + length)
        alone = [t.detach()[:, :, piece].requires_grad_() for t in (q, k, v)]
        out = attend(*alone, Bias(slopes_H, length, length, q.dtype), 0.3)
        (out * weight[:, :, piece]).sum().backward()
        torch.testing.assert_close(packed[:, :, piece], out, rtol=1e-5, atol=1e-6)
        for whole, part in zip((q, k, v), alone, strict=True):
            torch.testing.assert_close(whole.grad[:, :, piece], part.grad, rtol=1e-5, atol=1e-6)


def test_attention_is_a_slow_softmax():
    slopes_H = alibi_slopes(3)
    q, k, v = heads_of(DOCUMENTS.shape, heads=3, scale=2.0)
    bias = Bias(slopes_H, 7, 7, torch.float32, DOCUMENTS)
    scores = torch.einsum("bhlk,bhsk->bhls", q.double(), k.double()) / math.sqrt(q.shape[-1])
    weights = torch.softmax(scores + slow_bias(slopes_H, 7, 7, DOCUMENTS), -1)
    slow = torch.einsum("bhls,bhsk->bhlk", weights, v.double())
    # The tolerance is for fp32 sums of at most 8 terms of size about 4, compared with fp64 sums.
    torch.testing.assert_close(attend(q, k, v, bias, None).double(), slow, rtol=1e-5, atol=5e-6)


def test_doctest():
    assert doctest.testmod(attention).failed == 0


# -- blocks of queries


SHAPES = pytest.mark.parametrize(("queries", "keys", "block"), [
    (7, 7, 3), (8, 8, 2), (7, 7, 1), (37, 37, 16), (33, 33, 16), (16, 16, 16), (16, 16, 99),
    (5, 12, 2), (20, 37, 16), (1, 9, 1), (9, 40, 4),
])
PACKED = pytest.mark.parametrize("packed", [False, True], ids=["one-document", "documents"])


def documents(keys):
    """Document numbers [2, keys].

    Row 0: two packed documents, then padding. Row 1: padding, then one document.
    """
    j = torch.arange(keys)
    first, second = (j * 3 // keys), (j < keys // 3).long()
    return torch.stack([first, 9 * second])


def slow_attention(q, k, v, bias, scale=None):
    """Attention by its formula, with the whole score matrix at once."""
    scale = scale or q.shape[-1] ** -0.5
    scores = scale * torch.einsum("bhlk,bhsk->bhls", q, k)
    return torch.einsum("bhls,bhsk->bhlk", torch.softmax(scores + bias, -1), v)


def part_of(x, queries):
    return x[:, :, -queries:].detach().clone().requires_grad_()


def values_and_gradients(function, q, k, v, *rest):
    """[out, dq, dk, dv] as fp64. The incoming gradient is random, and the same in every call."""
    out = function(q, k, v, *rest)
    slope = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out.dtype)
    return [t.detach().double() for t in (out, *torch.autograd.grad(out, (q, k, v), slope))]


def problem(queries, keys, packed, dtype=torch.float32, heads=3):
    q, k, v = heads_of((2, keys), heads=heads, dtype=dtype, scale=1.5)
    return (part_of(q, queries), k, v), (documents(keys) if packed else None)


@PACKED
@SHAPES
def test_blocks_of_the_bias_are_those_of_a_slow_loop(queries, keys, block, packed):
    slopes_H, doc_BS = alibi_slopes(3), documents(keys) if packed else None
    whole = slow_bias(slopes_H, queries, keys, doc_BS)
    bias, future = Bias(slopes_H, queries, keys, torch.float32, doc_BS, block), whole.min()
    covered = []
    for rows, seen in bias.blocks():
        assert 0 < rows.stop - rows.start <= block
        assert torch.equal(bias.of(rows), whole[:, :, rows, seen])  # equal bit for bit
        assert (whole[:, :, rows, seen.stop :] == future).all()
        covered = [*range(rows.start, rows.stop), *covered]
        assert seen.stop == keys - queries + rows.stop  # later keys are left out
    assert covered == list(range(queries))


@PACKED
@SHAPES
def test_blocks_attend_as_the_whole_and_as_a_slow_softmax(queries, keys, block, packed):
    qkv, doc_BS = problem(queries, keys, packed)
    slopes_H = alibi_slopes(3)
    exact = [t.detach().double().requires_grad_() for t in qkv]
    slow = values_and_gradients(slow_attention, *exact,
                                slow_bias(slopes_H, queries, keys, doc_BS).double(), 0.4)
    for size in (block, queries):
        bias = Bias(slopes_H, queries, keys, torch.float32, doc_BS, size)
        got = values_and_gradients(attend, *qkv, bias, 0.4)
        for mine, wanted in zip(got, slow, strict=True):
            torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=2e-5)


@PACKED
@SHAPES
def test_blocks_in_bf16_are_off_by_roundings_only(queries, keys, block, packed):
    """The limit is a number of roundings. Each rounding changes a value by at most eps / 2.

    Five roundings do not depend on the number of blocks: two of the scores' gradient, two of the
    probabilities, and one of the result. In dk and dv each block causes two more roundings: one of
    the block's part, and one of the sum of the parts so far. The signs of the errors are random, so
    n blocks count as only 2 sqrt(n) roundings.
    """
    dtype = torch.bfloat16
    qkv, doc_BS = problem(queries, keys, packed, dtype)
    bias = Bias(alibi_slopes(3), queries, keys, dtype, doc_BS, block)
    exact = [t.detach().double().requires_grad_() for t in qkv]
    whole = slow_bias(alibi_slopes(3), queries, keys, doc_BS).to(dtype).double()
    slow = values_and_gradients(slow_attention, *exact, whole)
    steps = len(list(bias.blocks()))
    for mine, wanted in zip(values_and_gradients(attend, *qkv, bias, None), slow, strict=True):
        limit = (5 + 2 * math.sqrt(steps)) * torch.finfo(dtype).eps / 2
        assert (mine - wanted).norm() <= limit * wanted.norm() + 1e-9  # with one key, dq = dk = 0


def test_blocks_accumulate_where_only_some_need_gradients():
    (q, k, v), _ = problem(9, 9, False)
    whole, blocks = (Bias(alibi_slopes(3), 9, 9, q.dtype, None, size) for size in (9, 4))
    for wanted in ([q], [k], [v], [q, v]):
        frozen = [t if any(t is w for w in wanted) else t.detach() for t in (q, k, v)]
        mine, theirs = (torch.autograd.grad(attend(*frozen, bias, None).square().sum(), wanted)
                        for bias in (blocks, whole))
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_blocks_need_no_gradient():
    (q, k, v), _ = problem(9, 9, False)
    blocks = Bias(alibi_slopes(3), 9, 9, q.dtype, None, 4)
    with torch.no_grad():
        out = attend(q, k, v, blocks, None)
    assert not out.requires_grad
    assert torch.equal(out, attend(q, k, v, blocks, None))


@pytest.mark.parametrize("around", ["checkpoint", "recomputed", "both"])
@PACKED
def test_blocks_give_the_same_gradients_recomputed_and_under_hooks(around, packed):
    """The gradients are equal bit for bit. Only the place of the results in memory differs."""
    (q, k, v), doc_BS = problem(11, 11, packed)
    bias = Bias(alibi_slopes(3), 11, 11, q.dtype, doc_BS, 4)

    def plain(q, k, v):
        return attend(q.tanh(), k, v, bias, None)

    def hooked(q, k, v):
        with recomputed(torch.tanh, q) as changed:
            return attend(changed, k, v, bias, None)

    inner = plain if around == "checkpoint" else hooked
    outer = inner if around == "recomputed" else \
        lambda *qkv: checkpoint(inner, *qkv, use_reentrant=False)
    expected = values_and_gradients(plain, q, k, v)
    for mine, wanted in zip(values_and_gradients(outer, q, k, v), expected, strict=True):
        assert torch.equal(mine, wanted)


@pytest.mark.parametrize("recompute", [0, 1, 2])
@PACKED
def test_a_model_of_blocks_is_the_model_of_whole_rows(monkeypatch, recompute, packed):
    """The tolerance for fp32 and two layers is 1e-5 of each gradient's largest element."""
    config = small_config(6, 8, 2)
    model = ours(config, lively_tensors(config)).train()
    ids_BL, doc_BL = random_ids(config, 2, 21), documents(21) if packed else None
    calls = []

    def counted(*args):
        calls.append(args[3].whole)
        return apply(*args)

    apply = BlockAttention.apply
    monkeypatch.setattr(BlockAttention, "apply", counted)

    def gradients(depth):
        model.zero_grad()
        model.logits(model(ids_BL, doc_BL, recompute=depth)).square().mean().backward()
        return [p.grad.clone() for p in model.parameters()]

    wanted = gradients(0)
    assert calls == [True, True]
    monkeypatch.setattr(attention, "BLOCK", 8)
    kept, again = gradients(0), gradients(recompute)
    assert calls[2:] == [False] * (2 + 2 + recompute)
    for whole, block, same in zip(wanted, kept, again, strict=True):
        torch.testing.assert_close(block, whole, rtol=0, atol=1e-5 * whole.abs().max().item())
        assert torch.equal(same, block)


@torch.no_grad()
def test_a_cache_is_filled_by_blocks_as_by_whole_rows(monkeypatch):
    config = small_config(6, 8, 2)
    model = ours(config, lively_tensors(config)).eval()
    ids_BL = random_ids(config, 2, 21)
    wanted = model(ids_BL)
    monkeypatch.setattr(attention, "BLOCK", 4)
    cache = model.new_cache(2, 21)
    got = torch.cat([model(ids_BL[:, start:stop], cache=Piece(cache, start=start))
                     for start, stop in ((0, 6), (6, 20), (20, 21))], 1)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())


# -- memory and alignment


@PACKED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("queries", "keys", "block"),
                         [(37, 37, 16), (100, 100, 32), (64, 64, 16), (33, 50, 16)])
def test_a_block_begins_and_each_row_of_it_where_a_kernel_reads_a_vector(queries, keys, block,
                                                                         dtype, packed):
    doc_BS = documents(keys) if packed else None
    bias = Bias(alibi_slopes(3), queries, keys, dtype, doc_BS, block)
    for rows, _ in bias.blocks():
        part = bias.of(rows)
        assert part.data_ptr() % (ALIGNMENT * dtype.itemsize) == 0
        assert all(stride % ALIGNMENT == 0 for stride in part.stride()[:-1])
        assert part.stride()[-1] == 1


@pytest.mark.parametrize("heads", [24, 32])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_bias_stays_within_its_memory_however_long_the_row(heads, dtype):
    sizes = [block_size(heads, 2**n, dtype) for n in range(5, 20)]
    for n, size in zip(range(5, 20), sizes, strict=True):
        bytes_a_row = heads * 2**n * dtype.itemsize
        assert size <= BLOCK and size * bytes_a_row <= BIAS_MIB * 2**20
        assert size == BLOCK or 2 * size * bytes_a_row > BIAS_MIB * 2**20  # no larger block fits
        assert size % ALIGNMENT == 0 or size * 2 > BIAS_MIB * 2**20 // bytes_a_row
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == BLOCK > sizes[-1]
    assert block_size(heads, 2**40, dtype) == 1


def test_a_row_as_long_as_a_block_is_whole_and_one_longer_is_two(monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 16)
    slopes_H = alibi_slopes(3)
    for length, blocks in ((15, 1), (16, 1), (17, 2), (32, 2), (33, 3)):
        bias = Bias(slopes_H, length, length, torch.float32)
        assert len(list(bias.blocks())) == blocks
        assert bias.last_1HLS.shape == (1, 3, min(16, length), length)


# -- the kernel


def no_fused_kernel(monkeypatch):
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *_, **__: SDPBackend.MATH.value)


@pytest.mark.parametrize("block", [7, 3])
def test_attention_without_a_fused_kernel_is_refused(monkeypatch, block):
    no_fused_kernel(monkeypatch)
    q, k, v = heads_of((2, 7), heads=3, dtype=torch.bfloat16)
    bias = Bias(alibi_slopes(3), 7, 7, torch.bfloat16, None, block)
    for ask in (lambda: choose_kernel(q, k, v, bias), lambda: attend(q, k, v, bias, None)):
        with pytest.raises(Refusal, match=r"no fused kernel on cpu for 3 heads of width 8 in bf"):
            ask()


def test_a_model_without_a_fused_kernel_refuses_instead_of_holding_the_scores(monkeypatch):
    config = small_config(6, 8, 2)
    model = ours(config, lively_tensors(config))
    no_fused_kernel(monkeypatch)
    with pytest.raises(Refusal, match="no fused kernel"):
        model(random_ids(config, 1, 5))
    with pytest.raises(Refusal, match="no fused kernel"):
        choose_attention(model.slopes_H, model.config, 5, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_choice_is_the_fused_kernel_and_the_blocks_that_attention_runs(monkeypatch, dtype):
    config = ModelConfig(48, 6, 1, vocab_size=8, max_seq_len=64)
    slopes_H = alibi_slopes(6)
    kernel = "FLASH_ATTENTION"  # the only fused kernel on the CPU
    assert choose_attention(slopes_H, config, 64, dtype) == AttentionChoice(kernel, 64, 1)
    monkeypatch.setattr(attention, "BLOCK", 16)
    for length in (15, 16, 17, 32, 40):
        choice = choose_attention(slopes_H, config, length, dtype)
        bias = Bias(slopes_H, length, length, dtype)
        assert choice == AttentionChoice(kernel, bias.block, len(list(bias.blocks())))
    assert choice == AttentionChoice(kernel, 16, 3)


def test_one_bias_serves_all_layers(monkeypatch):
    made = []

    class Counted(Bias):
        def __init__(self, *args):
            made.append(args)
            super().__init__(*args)

    monkeypatch.setattr(variable_length, "Bias", Counted)
    config = small_config(6, 8, 3)
    ours(config, lively_tensors(config))(random_ids(config, 2, 9))
    assert len(made) == 1


def heads_of(shape, *, heads, dtype=torch.float32, scale=1.0, width=8):
    """Random queries, keys and values [B, H, L, K] that require gradients."""
    dice = torch.Generator().manual_seed(3)
    qkv = scale * torch.randn(*shape, 3 * heads * width, generator=dice)
    q, k, v = rearrange(qkv, "b l (three h k) -> three b h l k", three=3, h=heads)
    return [t.to(dtype).clone().requires_grad_() for t in (q, k, v)]


def test_documents_are_masked_once_a_block_and_pass(monkeypatch):
    """The bias of a block is computed once in forward and once in backward. The choice of the
    kernel computes no bias."""
    doc_BS = torch.tensor([[0] * 20 + [1] * 20])
    bias = Bias(alibi_slopes(3), 40, 40, torch.float32, doc_BS, block=16)
    q, k, v = heads_of((1, 40), heads=3)
    times, masked = [], Bias.masked

    def counting(self, *given):
        times.append(given)
        return masked(self, *given)

    monkeypatch.setattr(Bias, "masked", counting)
    out = attend(q, k, v, bias, None)
    assert len(times) == 3
    out.sum().backward()
    assert len(times) == 6
