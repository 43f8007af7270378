"""The summed loss has the value and gradient of plain cross-entropy, and it keeps no logits.

In fp32 the tolerance is a relative error of 1e-6, which is about ten units in the last place,
because both sides add the same values in another order. In bf16 the tolerances are for a number of
roundings. bf16 has 8 significant bits, so one rounding changes a value by at most 2^-8 of its size.
If many random values are rounded, the norm of the error is less than 2^-9 of their norm.
"""

import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from phogpt_raw.training.loss import BYTES_A_LOGIT, chunk_rows, summed_loss


def problem(rows=23, width=16, vocabulary=101, ignored=(0, 5, 22), dtype=torch.float32, scale=1.0):
    dice = torch.Generator().manual_seed(0)
    hidden_TD = (scale * torch.randn(rows, width, generator=dice)).to(dtype).requires_grad_()
    head_VD = torch.randn(vocabulary, width, generator=dice).to(dtype)
    targets_T = torch.randint(0, vocabulary, (rows,), generator=dice)
    targets_T[list(ignored)] = -100
    return hidden_TD, head_VD, targets_T


def plain(hidden_TD, head_VD, targets_T):
    """(loss, gradient of the hidden states) by cross_entropy with all logits at once, in fp32."""
    hidden_TD = hidden_TD.detach().float().requires_grad_()
    loss = F.cross_entropy(hidden_TD @ head_VD.float().T, targets_T, reduction="sum",
                           ignore_index=-100)
    loss.backward()
    return loss.detach(), hidden_TD.grad


def error(mine, reference):
    return float((mine.float() - reference).norm() / reference.norm())


@pytest.mark.parametrize("chunk", [1, 7, 23, 1000])
@pytest.mark.parametrize("ignored", [(), (0, 5, 22), range(23)])
def test_value_and_gradient_are_cross_entropys_for_every_chunk(chunk, ignored):
    hidden_TD, head_VD, targets_T = problem(ignored=ignored)
    loss = summed_loss(hidden_TD, head_VD, targets_T, chunk)
    loss.backward()
    value, gradient = plain(hidden_TD, head_VD, targets_T)
    torch.testing.assert_close(loss.detach(), value, rtol=1e-6, atol=0)
    assert (hidden_TD.grad - gradient).norm() <= 1e-6 * gradient.norm()
    assert not hidden_TD.grad[list(ignored)].any()


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_bf16_is_off_by_roundings_only(chunk):
    """Three results are rounded to bf16: the logits, the softmax and the gradient.

    The logits have a standard deviation of 4, so rounding changes each of them by about
    4 * 2^-9 = 0.008. The signs of these errors are random. A limit of 2^-7 = 0.008 for the relative
    error of the gradient covers the three roundings.
    """
    hidden_TD, head_VD, targets_T = problem(rows=200, ignored=(3,), dtype=torch.bfloat16)
    loss = summed_loss(hidden_TD, head_VD, targets_T, chunk)
    loss.backward()
    value, gradient = plain(hidden_TD, head_VD, targets_T)
    assert (loss.dtype, hidden_TD.grad.dtype) == (torch.float32, torch.bfloat16)
    assert error(loss.detach(), value) < 2**-9
    assert error(hidden_TD.grad, gradient) < 2**-7


def test_the_upstream_gradient_scales_the_gradient():
    hidden_TD, head_VD, targets_T = problem()
    (3 * summed_loss(hidden_TD, head_VD, targets_T, 7) / 40).backward()
    _, gradient = plain(hidden_TD, head_VD, targets_T)
    assert error(hidden_TD.grad, gradient * 3 / 40) < 1e-6


def test_gradient_agrees_with_finite_differences():
    hidden_TD, head_VD, targets_T = problem(rows=4, width=5, vocabulary=9, ignored=(1,))
    _, head_VD = hidden_TD.double(), head_VD.double()

    def loss(hidden):
        return summed_loss(hidden, head_VD, targets_T, 3)

    # The loss is an fp32 value with an error of about 1e-6, so the slope over a step of 1e-2 has an
    # error of 1e-6 / 1e-2 = 1e-4. The curvature of the loss adds to this error.
    hidden = hidden_TD.detach().double().requires_grad_()
    loss(hidden).backward()
    for place in [(0, 0), (2, 3), (3, 4), (1, 2)]:
        step = torch.zeros_like(hidden)
        step[place] = 1e-2
        with torch.no_grad():
            slope = (loss(hidden + step) - loss(hidden - step)) / 2e-2
        assert abs(float(slope) - float(hidden.grad[place])) < 2e-3


def test_without_gradients_it_is_only_the_value():
    hidden_TD, head_VD, targets_T = problem()
    value, _ = plain(hidden_TD, head_VD, targets_T)
    with torch.no_grad():
        loss = summed_loss(hidden_TD, head_VD, targets_T, 7)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, value, rtol=1e-6, atol=0)
    frozen = summed_loss(hidden_TD.detach(), head_VD, targets_T, 7)
    assert not frozen.requires_grad
    assert torch.equal(frozen, loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_stay_finite(dtype):
    """With logits of 1e4, exp overflows. Loss and gradient must still be finite.

    The loss is a difference of large logits. In bf16 each logit may be wrong by 1e4 * 2^-9 = 20 or
    more, so the tolerance for the loss is 2^-9 of its size.
    """
    hidden_TD, head_VD, targets_T = problem(scale=2500.0, dtype=dtype)
    assert (hidden_TD @ head_VD.T).abs().max() > 1e4
    loss = summed_loss(hidden_TD, head_VD, targets_T, 7)
    loss.backward()
    value, _ = plain(hidden_TD, head_VD, targets_T)
    assert torch.isfinite(hidden_TD.grad).all()
    assert error(loss.detach(), value) < (1e-6 if dtype == torch.float32 else 2**-9)


class Peak(TorchDispatchMode):
    """The peak bytes of all tensors whose last axis is the vocabulary, without the head itself."""

    def __init__(self, head_VD):
        super().__init__()
        self.head_VD, self.alive, self.bytes = head_VD, {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if not isinstance(t, torch.Tensor) or t.shape[-1:] != self.head_VD.shape[:1]:
                continue
            storage = t.untyped_storage()
            at = storage.data_ptr()
            if at not in self.alive and at != self.head_VD.untyped_storage().data_ptr():
                self.alive[at] = storage.nbytes()
                weakref.finalize(t, self.alive.pop, at, None)
        self.bytes = max(self.bytes, sum(self.alive.values()))
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_more_than_a_chunk_of_logits_is_ever_alive(dtype):
    vocabulary, chunk = 1001, 8
    peaks = []
    for rows in (64, 256):
        hidden_TD, head_VD, targets_T = problem(rows=rows, vocabulary=vocabulary, dtype=dtype)
        with Peak(head_VD) as peak:
            summed_loss(hidden_TD, head_VD, targets_T, chunk).backward()
        peaks.append(peak.bytes)
        assert not peak.alive  # no logits are kept for backward
    assert peaks[0] == peaks[1]
    assert chunk * vocabulary * 4 <= peaks[0] <= chunk * vocabulary * BYTES_A_LOGIT
    with Peak(head_VD) as peak:  # checks Peak itself: cross_entropy keeps all logits
        F.cross_entropy((hidden_TD @ head_VD.T).float(), targets_T).backward()
    assert peak.bytes >= 256 * vocabulary * 4


def test_chunk_rows_keeps_a_chunk_within_its_limit():
    assert chunk_rows(250_880, 256) == 128
    for vocabulary in (4096, 20_480, 250_880):
        for mib in (16, 256, 1024):
            rows = chunk_rows(vocabulary, mib)
            assert rows * vocabulary * BYTES_A_LOGIT <= mib * 2**20
            step = 1 if rows < 8 else 8
            assert (rows + step) * vocabulary * BYTES_A_LOGIT > mib * 2**20
            assert rows % step == 0
    assert chunk_rows(250_880, 1) == 1  # at least one row


def test_a_vocabulary_of_7b5s_size_runs():
    hidden_TD, head_VD, targets_T = problem(rows=3, width=8, vocabulary=250_880, ignored=(1,))
    loss = summed_loss(hidden_TD, head_VD, targets_T, 2)
    loss.backward()
    value, gradient = plain(hidden_TD, head_VD, targets_T)
    # The limit for the gradient is 5e-5. For each element both sides add 250,880 fp32 values. After
    # the large value of the target is added, each further addition may have an error of 2^-24 of
    # this value. The signs are random, so the error is about sqrt(250,880) * 2^-24 = 3e-5.
    assert error(loss.detach(), value) < 1e-5
    assert error(hidden_TD.grad, gradient) < 5e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gap", [9.1875, 6.9375], ids=["p=0.9999", "p=0.999"])
def test_a_well_predicted_tokens_gradient_keeps_its_relative_precision(dtype, gap):
    """The gradient is p - 1, where p is the probability of the target, which is near 1.

    If p were rounded to 16 bits, p - 1 would be 0, or its error would be as large as p - 1 itself.

    The limit of the relative error is two roundings of eps / 2, plus the error of log p in fp32.
    For a logit of 9 this last error is 9 * 2^-24, which is half a per cent of p - 1 = -1e-4.
    """
    hidden_TD = torch.tensor([[1.0, 0.0]], dtype=dtype, requires_grad=True)
    head_VD = torch.tensor([[0.0, 0.0], [gap, 1.0]], dtype=dtype)
    summed_loss(hidden_TD, head_VD, torch.tensor([1]), 1).backward()
    wanted = -1 / (1 + math.exp(gap))  # p - 1, which is the gradient in the second column
    limit = torch.finfo(dtype).eps + 9 * 2**-24 / abs(wanted)
    assert float(hidden_TD.grad[0, 1]) == pytest.approx(wanted, rel=limit)
    assert float(hidden_TD.grad[0, 0]) == pytest.approx(wanted * gap, rel=limit)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_upstream_gradient_is_not_rounded_to_sixteen_bits(dtype):
    """The upstream gradient is 1e5, which would be inf in fp16 and 99,840 in bf16.

    So the gradient must be multiplied by the upstream gradient before the product is rounded to 16
    bits.
    """
    hidden_TD, head_VD, targets_T = problem()
    hidden_TD = (hidden_TD.detach() * 1e-3).to(dtype).requires_grad_()
    head_VD = (head_VD * 1e-3).to(dtype)
    summed_loss(hidden_TD, head_VD, targets_T, 7).backward()
    once, hidden_TD.grad = hidden_TD.grad.float(), None
    (summed_loss(hidden_TD, head_VD, targets_T, 7) * 1e5).backward()
    wanted = once * 1e5
    # The limit is eps, because each element is rounded once in each of the two gradients, and
    # subnormal fp16 values of `once` are less exact.
    assert (hidden_TD.grad.float() - wanted).norm() <= torch.finfo(dtype).eps * wanted.norm()
    assert torch.isfinite(hidden_TD.grad).all()
