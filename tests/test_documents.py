"""Attention of packed documents: in every implementation a document attends only to itself."""

import math
from contextlib import nullcontext

import pytest
import torch
from conftest import example
from oracle import lively_tensors, ours, random_ids, small_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from traces import on_meta

from phogpt_raw.data.batches import Window
from phogpt_raw.data.packing import DocumentBounds, Packing
from phogpt_raw.model import documents as module
from phogpt_raw.model.adapters import new_adapters
from phogpt_raw.model.attention import Bias, alibi_slopes, attend
from phogpt_raw.model.documents import (
    Documents,
    attend_documents,
    choose_kernel,
    columns,
    plain,
    starts_of,
    visible,
)
from phogpt_raw.model.weights import load_base
from phogpt_raw.simulate.trace import Kernels, trace_step
from phogpt_raw.training.setup import wire
from phogpt_raw.training.step import train_step

EFFICIENT, FLASH = SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION
LENGTHS = {1: [96], 2: [70, 26], 7: [5, 30, 1, 20, 12, 18, 10], 40: [*range(1, 32), *[8] * 9]}


def documents_of(lengths: list[int], device="cpu") -> torch.Tensor:
    """doc_BL [1, L] of one row with documents of these lengths."""
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None].to(
        device)


def distance(mine, reference) -> float:
    mine, reference = mine.detach().double(), reference.detach().double()
    return float((mine - reference).norm() / reference.norm())


# -- the plain form, the masked bias and the columns compute the same function


@pytest.mark.parametrize("block", [None, 32])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_the_masked_bias_is_each_document_alone(lengths, block):
    """In fp32 only the order of the sums differs."""
    torch.manual_seed(0)
    length, heads, width = sum(lengths), 3, 16
    q, k, v = (torch.randn(length, heads, width) for _ in range(3))
    slopes = alibi_slopes(heads)
    bias = Bias(slopes, length, length, torch.float32, documents_of(lengths), block)
    found = attend(*(x.transpose(0, 1)[None] for x in (q, k, v)), bias, None)[0].transpose(0, 1)
    alone = plain(q, k, v, slopes, lengths, 1 / math.sqrt(width))
    torch.testing.assert_close(found, alone, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.float16, 1e-6),
                                          (torch.bfloat16, 1e-5)])
@pytest.mark.parametrize("heads, length", [(32, 2048), (24, 8192)])
def test_the_columns_hold_alibi_far_below_the_rounding_of_a_score(dtype, bound, heads, length):
    """Three extra columns of a key hold its ALiBi term as a sum of three parts.

    Three fp16 values have 3 * 11 bits, so their sum is more exact than fp32, which has 24 bits.
    Three bf16 values have 3 * 8 bits, so their sum is as exact as fp32.
    """
    slopes, place, scale = alibi_slopes(heads), torch.arange(length), 1 / math.sqrt(128)
    of_queries, of_keys, of_values = columns(slopes, place, dtype, scale).unbind(1)
    assert of_queries.dtype == of_keys.dtype == dtype and of_keys.isfinite().all()
    assert not of_values.any()
    product = scale * (of_queries.double() * of_keys.double()).sum(-1)
    wanted = slopes.double() * place[:, None]
    assert float((product - wanted).abs().max()) <= bound * float(wanted.max())


def test_the_starts_of_documents_and_the_place_of_each_token():
    doc = torch.tensor([[0, 0, 0, 1, 1, 2], [0, 1, 1, 1, 1, 1]])
    starts, place = starts_of(doc, count=4)
    assert starts.tolist() == [0, 3, 5, 6, 6, 7, 12, 12, 12]  # documents without tokens are empty
    assert place.tolist() == [0, 1, 2, 0, 1, 0, 0, 0, 1, 2, 3, 4]
    assert starts.dtype == torch.int32


# -- the whole function on a CPU, where no variable-length kernel exists


class StandIn:
    """A stand-in for a kernel. It calls `plain` in fp32 for queries and keys with ALiBi columns.

    The slopes are zero, so ALiBi comes from the columns alone.
    """

    @staticmethod
    def attention(q, k, v, documents, scale):
        lengths = [n for n in documents.starts.diff().tolist() if n]
        assert max(lengths) <= documents.longest
        slopes = torch.zeros(q.shape[1])
        return plain(q.float(), k.float(), v.float(), slopes, lengths, scale).to(q.dtype)

    @staticmethod
    def forward(q, k, v, documents, scale):
        return [StandIn.attention(q, k, v, documents, scale)]

    @staticmethod
    def backward(g, q, k, v, out, documents, scale):
        with torch.enable_grad():
            heads = [x.detach().requires_grad_() for x in (q, k, v)]
            return torch.autograd.grad(StandIn.attention(*heads, documents, scale), heads, g)


@pytest.fixture
def stand_in(monkeypatch):
    """Replace the kernel, so that `visible` uses variable-length attention on the CPU too."""
    monkeypatch.setitem(module.KERNELS, FLASH, StandIn)
    monkeypatch.setattr(module, "choose_kernel", lambda *_: FLASH)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_documents_with_columns_are_each_document_alone(stand_in, lengths, dtype):
    """The test compares the output and the gradients of two packed rows.

    In fp32 only the order of the sums differs. In 16 bits the result is rounded once, and the norm
    of this error is at most eps / sqrt(12) of the result's norm. Some slopes and the scale are not
    powers of two. So the error would be larger if an ALiBi term had one part instead of three.
    """
    torch.manual_seed(0)
    length, heads, width = sum(lengths), 12, 24
    doc = documents_of(lengths).repeat(2, 1)
    qkv = torch.randn(2, length, 3, heads, width).to(dtype).requires_grad_()
    g = torch.randn(2, length, heads, width).to(dtype)
    slopes = alibi_slopes(heads)
    seen = visible(slopes, width, length, dtype, doc,
                   DocumentBounds(len(lengths) + 2, max(lengths)))
    out = attend_documents(qkv, seen, None)
    exact = qkv.detach().double().requires_grad_()
    alone = torch.stack([plain(*row.unbind(1), slopes.double(), lengths, width**-0.5)
                         for row in exact])
    [gradient] = torch.autograd.grad(out, qkv, g)
    [wanted] = torch.autograd.grad(alone, exact, g.double())
    bound = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps / math.sqrt(12)
    assert distance(out, alone) <= bound and distance(gradient, wanted) <= bound


@pytest.mark.parametrize("recompute", [0, 1, 2])
def test_a_model_with_bounds_is_the_model_with_the_masked_bias(stand_in, recompute):
    """The tolerance is for fp32 and two layers.

    Norms and GELU are always recomputed; `recompute` is the number of recomputed blocks.
    """
    config = small_config(6, 8, 2)
    model, ids = ours(config, lively_tensors(config)).train(), random_ids(config, 2, 21)
    doc = torch.tensor([[0] * 9 + [1] * 12, [0] * 5 + [1] * 7 + [2] * 9])

    def gradients(bounds):
        model.zero_grad()
        hidden = model(ids, doc, recompute=recompute, bounds=bounds)
        model.logits(hidden).square().mean().backward()
        return [hidden.detach(), *(p.grad.clone() for p in model.parameters())]

    pairs = zip(gradients(DocumentBounds(4, 12)), gradients(None), strict=True)
    for mine, masked in pairs:
        torch.testing.assert_close(mine, masked, rtol=0, atol=1e-5 * masked.abs().max().item())


# -- the choice of the kernel


@pytest.mark.parametrize("chosen, longest, kernel", [
    (FLASH, 900, FLASH), (SDPBackend.CUDNN_ATTENTION, 900, FLASH),
    (EFFICIENT, 384, EFFICIENT), (EFFICIENT, 385, None), (SDPBackend.MATH, 100, None)])
def test_the_kernel_follows_torchs_choice_and_the_longest_document(monkeypatch, chosen, longest,
                                                                   kernel):
    monkeypatch.setattr(module.private_apis, "choose_attention_kernel", lambda *_: chosen)
    slopes, bounds = torch.empty(2, device="meta"), DocumentBounds(8, longest)
    assert choose_kernel(slopes, 128, 1024, torch.float16, bounds) == kernel
    assert choose_kernel(slopes, 128, 1024, torch.float32, bounds) is None
    assert choose_kernel(torch.empty(2), 128, 1024, torch.float16,
                         bounds) is None


@pytest.mark.parametrize("width, taken", [(64, True), (128, True), (20, False), (100, False)])
def test_heads_that_the_kernels_cannot_read_in_vectors_have_the_masked_bias(monkeypatch, width,
                                                                            taken):
    asked = []
    monkeypatch.setattr(module.private_apis, "choose_attention_kernel",
                        lambda q, *_: asked.append(q.shape[-1]) or FLASH)
    found = choose_kernel(torch.empty(2, device="meta"), width, 1024, torch.float16,
                          DocumentBounds(8, 100))
    assert found == (FLASH if taken else None)
    assert not taken or asked == [width + 8]  # the width that the kernel sees


def test_without_bounds_or_on_a_cpu_it_is_the_masked_bias():
    slopes, doc, bounds = alibi_slopes(2), documents_of([5, 3]), DocumentBounds(4, 8)
    for documents, given in ((doc, None), (None, bounds), (doc, bounds)):
        seen = visible(slopes, 16, 8, torch.float32, documents, given)
        assert isinstance(seen, Bias)


# -- in a simulated step


@pytest.mark.parametrize("recompute", [0, 2])
@pytest.mark.parametrize("causal, names", [(EFFICIENT, "_efficient_attention"),
                                           (FLASH, "_flash_attention")], ids=["T4", "Hopper"])
def test_a_simulated_step_takes_the_kernel_of_documents_and_no_bias(causal, names, recompute):
    model, adapters = on_meta()
    training = wire(model, adapters, recompute=recompute)
    examples = [example([5] * n, 9, "row") for n in (60, 100, 90, 40)]
    window = Window(examples, 3, Packing((320,), longest=112, most=16))
    found = trace_step(training, window, Kernels(EFFICIENT, causal))
    attention = [op for op in found.ops if "attention" in op.name]
    # two blocks with a forward and a backward each, and one more forward for each recomputed block
    assert [names in op.name for op in attention] == (4 + recompute) * [True]
    assert attention[0].flops == 2 * 2 * 2 * 320 * 112 * 6 * (32 + 8)
    assert attention[-1].flops == 5 / 2 * attention[0].flops
    assert not any(moment.kinds.get("attention bias", 0) > 320 * 320 * 2
                   for moment in found.moments())


# -- on a GPU


def reference(q, k, v, g, slopes, doc_BL):
    """(out, dq, dk, dv) in fp64, from the whole score matrix."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    length = q.shape[2]
    place = torch.arange(length, device=q.device)
    apart = place[:, None] - place
    scores = q @ k.mT / math.sqrt(q.shape[-1]) - slopes.double()[:, None, None] * apart
    hidden = (doc_BL[:, :, None] != doc_BL[:, None, :]) | (apart < 0)
    out = scores.masked_fill(hidden[:, None], -math.inf).softmax(-1) @ v
    return out, *torch.autograd.grad(out, (q, k, v), g.double())


def run(q, k, v, g, seen):
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    if isinstance(seen, Bias):
        out = attend(q, k, v, seen, None)
    else:
        qkv = torch.stack([x.transpose(1, 2) for x in (q, k, v)], 2)
        out = attend_documents(qkv, seen, None)
        assert out.is_contiguous()
        out = out.transpose(1, 2)
    return out, *torch.autograd.grad(out, (q, k, v), g)


@pytest.mark.gpu
@pytest.mark.parametrize("heads, width", [(32, 128), (24, 128), (4, 64)])
@pytest.mark.parametrize("count", LENGTHS)
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("dtype, kernel", [
    (torch.float16, EFFICIENT), (torch.float16, FLASH), (torch.bfloat16, FLASH),
    (torch.bfloat16, EFFICIENT)], ids=str)
def test_variable_length_kernels_are_as_near_as_the_masked_bias(dtype, kernel, rows, count, heads,
                                                               width):
    torch.manual_seed(count)
    lengths = [4 * n for n in LENGTHS[count]]
    doc = documents_of(lengths, "cuda").repeat(rows, 1)
    if rows == 2:
        doc[1] = (torch.arange(doc.shape[1], device="cuda") >= 7).long()
    length, slopes = doc.shape[1], alibi_slopes(heads).cuda()
    qkv = torch.randn(rows, length, 3, heads, width, dtype=dtype, device="cuda")
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    g = torch.randn(rows, length, heads, width, dtype=dtype, device="cuda").transpose(1, 2)
    bounds = DocumentBounds(count + 3, length)
    wanted = reference(q, k, v, g, slopes, doc)
    found = run(q, k, v, g, Documents(slopes, doc, bounds, kernel))
    with sdpa_kernel(EFFICIENT):
        masked = run(q, k, v, g, Bias(slopes, length, length, dtype, doc))
    for mine, theirs, right in zip(found, masked, wanted, strict=True):
        assert distance(mine, right) <= 1.3 * distance(theirs, right) + 1e-6


def nano_step(packing, dtype, graphs=False, steps=1, recompute=0):
    """Train nano on one accumulation window.

    Returns (losses, gradient of the last step, parts of the step).
    """
    model, _ = load_base("nano", dtype=dtype, device="cuda")
    training = wire(model.train(), new_adapters(model, rank=16, alpha=32), lr=0.0, clip=1e9,
                    graphs=graphs, recompute=recompute)
    dice = torch.Generator().manual_seed(0)
    examples = [example(torch.randint(4, 4096, (n,), generator=dice).tolist(), n // 2, "row")
                for n in (40, 17, 64, 33, 90, 12)]
    window = Window(examples, 3, packing)
    losses = [float(train_step(training, window).loss) for _ in range(steps)]
    return losses, training.adapters.flat.grad.clone(), training


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("forced", [None, EFFICIENT], ids=["torch's choice", "a T4's kernel"])
def test_a_packed_step_of_nano_is_the_step_over_single_rows(dtype, forced):
    """The steps differ only by 16-bit rounding, like steps with different micro-batch sizes."""
    packing = Packing((272,), longest=96, most=16)
    with sdpa_kernel(forced) if forced else nullcontext():
        [loss], gradient, _ = nano_step(None, dtype)
        [packed_loss], packed, _ = nano_step(packing, dtype)
    rounding = 2.0**-10 if dtype == torch.float16 else 2.0**-7
    assert packed_loss == pytest.approx(loss, abs=rounding)
    assert distance(packed, gradient) < 6 * rounding


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("forced", [None, EFFICIENT], ids=["torch's choice", "a T4's kernel"])
def test_a_packed_step_of_nano_is_the_step_with_the_masked_bias(monkeypatch, dtype, forced):
    """Both steps use the same packed rows. Only the rounding in attention differs."""
    packing, chosen = Packing((272,), longest=96, most=16), []

    def noted(*args):
        chosen.append(choose_kernel(*args))
        return chosen[-1]

    monkeypatch.setattr(module, "choose_kernel", noted)
    with sdpa_kernel(forced) if forced else nullcontext():
        [loss], gradient, _ = nano_step(packing, dtype)
        assert chosen and None not in chosen  # else the test compares the bias with itself
        monkeypatch.setattr(module, "choose_kernel", lambda *_: None)
        [masked_loss], masked, _ = nano_step(packing, dtype)
    rounding = 2.0**-10 if dtype == torch.float16 else 2.0**-7
    assert loss == pytest.approx(masked_loss, abs=rounding)
    assert distance(gradient, masked) < 6 * rounding


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", [0, 3, 8])
@pytest.mark.parametrize("forced", [None, EFFICIENT], ids=["torch's choice", "a T4's kernel"])
def test_captured_it_is_the_eager_step(forced, recompute):
    packing = Packing((272,), longest=96, most=16)
    with sdpa_kernel(forced) if forced else nullcontext():
        eager, gradient, _ = nano_step(packing, torch.float16)
        captured, replayed, training = nano_step(packing, torch.float16, graphs=True, steps=3,
                                                 recompute=recompute)
    assert len(training.forward.graphs) == 1 and all(training.forward.graphs.values())
    assert captured == pytest.approx([eager[0]] * 3, abs=2.0**-10)
    assert distance(replayed, gradient) < 6 * 2.0**-10


@pytest.mark.gpu
def test_a_graph_serves_rows_with_other_documents():
    """A graph reads the places of documents from its inputs, so it also serves other documents."""
    packing = Packing((272,), longest=96, most=16)
    _, _, training = nano_step(packing, torch.float16, graphs=True, steps=2)
    dice = torch.Generator().manual_seed(1)
    other = Window([example(torch.randint(4, 4096, (n,), generator=dice).tolist(), n // 2, "row")
                    for n in (90, 90, 70)], 3, packing)
    replayed = float(train_step(training, other).loss)
    assert len(training.forward.graphs) == 1 and training.forward.replayed
    training.limits.graphs = False
    assert replayed == pytest.approx(float(train_step(training, other).loss), abs=2.0**-10)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", [EFFICIENT, FLASH], ids=["efficient", "flash"])
def test_a_long_document_is_as_near_as_with_the_masked_bias(kernel):
    """The largest attention scores exceed 3,000. fp32 numbers of this size are 2^-12 apart.

    If a score changes by this amount, a probability changes less than by one rounding to fp16.
    """
    doc, slopes = documents_of([4000, 96], "cuda"), alibi_slopes(32).cuda()[:4]
    qkv = torch.randn(1, 4096, 3, 4, 128, dtype=torch.float16, device="cuda")
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    g = torch.randn_like(q.transpose(1, 2)).transpose(1, 2)
    wanted = reference(q, k, v, g, slopes, doc)
    found = run(q, k, v, g, Documents(slopes, doc, DocumentBounds(4, 4000), kernel))
    masked = run(q, k, v, g, Bias(slopes, 4096, 4096, torch.float16, doc))
    for mine, theirs, right in zip(found, masked, wanted, strict=True):
        assert distance(mine, right) <= 1.3 * distance(theirs, right) + 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", [EFFICIENT, FLASH], ids=["efficient", "flash"])
def test_8192_tokens_of_documents_need_no_bias(kernel):
    """A masked bias would take 512 MiB, 32 times the memory of the queries.

    The limit is 24 times the memory of the queries. This has room for queries, keys and values with
    and without columns, for the output, and for the gradients of these tensors.
    """
    doc = documents_of([205] * 39 + [197], "cuda")
    qkv = torch.randn(1, 8192, 3, 8, 128, dtype=torch.float16, device="cuda")
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(q, k, v, torch.ones_like(q), Documents(alibi_slopes(8).cuda(), doc,
                                               DocumentBounds(48, 208), kernel))
    assert torch.cuda.max_memory_allocated() - before < 24 * q.nbytes
