"""Accumulation windows and their micro-batches: examples, documents and targets."""

import doctest
import math
from collections import Counter
from itertools import combinations, pairwise

import pytest
import torch
from conftest import example, ragged_examples
from hypothesis import given, settings
from hypothesis import strategies as st

from phogpt_raw.data import batches as module
from phogpt_raw.data.batches import MicroBatch, Stream, TokenStream, Window, collate
from phogpt_raw.data.packing import Packing
from phogpt_raw.data.prompt import IGNORED, Example, next_tokens

PAD = 3


def stream(examples, **how):
    return Stream(examples, **{"batch_size": 4, "pad_id": PAD, **how})


def supervised_pairs(batches):
    """For every supervised token, count the pair (the tokens before it in its document, its id).

    Padding and the other documents in a packed row do not change these pairs.
    """
    pairs = Counter()
    for batch in batches:
        length = batch.ids_BL.shape[1]
        for place, target in zip(batch.rows_T.tolist(), batch.targets_T.tolist(), strict=True):
            if target != IGNORED:
                row, column = divmod(place, length)
                before = batch.ids_BL[row, : column + 1]
                if batch.doc_BL is not None:
                    documents = batch.doc_BL[row, : column + 1]
                    before = before[documents == documents[-1]]
                pairs[tuple(before.tolist()), target] += 1
    return pairs


def expected_pairs(examples):
    return Counter(
        (tuple(e.ids[: place + 1]), target)
        for e in examples for place, target in enumerate(e.targets) if target != IGNORED
    )


def rows_of(window):
    """The token ids of each example in an accumulation window, without padding.

    The examples contain no PAD.
    """
    return [tuple(ids[ids != PAD].tolist())
            for batch in window.micro_batches(2) for ids in batch.ids_BL]


def test_doctest():
    assert doctest.testmod(module).failed == 0


def test_targets_are_the_next_tokens_of_the_rows_named():
    batch = collate([[example([10, 11, 12, 13, 14], 3, "a:1")], [example([20, 21, 22], 1, "a:2")]],
                    8, PAD, rows_multiple=6)
    assert batch.ids_BL.tolist() == [[10, 11, 12, 13, 14, 3, 3, 3], [20, 21, 22, 3, 3, 3, 3, 3]]
    # In row 0, 11 predicts 12, 12 predicts 13, and 13 predicts 14. In row 1, which has the flat
    # positions 8 to 15, 21 predicts 22.
    assert batch.rows_T.tolist() == [1, 2, 3, 9, 0, 0]
    assert batch.targets_T.tolist() == [12, 13, 14, 22, IGNORED, IGNORED]
    assert batch.ids_BL.flatten()[batch.rows_T[:4]].tolist() == [11, 12, 13, 21]


def test_padding_is_behind_and_needs_no_documents():
    batch = collate([[example([PAD, 5, PAD], 1, "a:1")], [example([6, 7], 1, "a:2")]], 4, PAD)
    assert batch.doc_BL is None
    assert batch.ids_BL.tolist() == [[PAD, 5, PAD, PAD], [6, 7, PAD, PAD]]


@pytest.mark.parametrize("documents", [None, torch.tensor([[0, 0, 1]])], ids=["none", "packed"])
def test_a_batch_goes_to_a_device_with_or_without_documents(documents):
    batch = MicroBatch(torch.tensor([[5, 6, 7]]), documents, torch.tensor([1]), torch.tensor([7]))
    moved = batch.to("cpu")
    assert (moved.doc_BL is None) == (documents is None)
    assert documents is None or torch.equal(moved.doc_BL, documents)
    assert torch.equal(moved.ids_BL, batch.ids_BL)


def test_a_padded_row_gives_the_hidden_states_that_it_gives_alone(adapted):
    """One of the rows contains the id of padding.

    The tolerance is for fp32: padding makes the sums longer, so values around 1 may differ in their
    last places.
    """
    model, _ = adapted()
    examples = [*ragged_examples(3), example([5, PAD, 7, PAD, PAD, 9], 2, "a:1")]
    with torch.no_grad():
        batch = collate([[e] for e in examples], 64, PAD)
        together = model(batch.ids_BL, batch.doc_BL)
        for hidden, e in zip(together, examples, strict=True):
            alone = model(torch.tensor([e.ids]))[0]
            torch.testing.assert_close(hidden[: len(e.ids)], alone, rtol=0, atol=1e-5)


def test_shapes_are_a_few_sizes_only():
    for n in range(20):
        [batch] = Window(ragged_examples(3, seed=n), PAD).micro_batches(3)
        assert batch.ids_BL.shape[1] % 32 == 0
        assert len(batch.rows_T) == len(batch.targets_T)
        assert len(batch.rows_T) % 64 == 0


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 4, 7, 8, 100])
def test_micro_batches_only_regroup_a_window(micro_batch):
    examples = ragged_examples(11)
    for step in range(4):
        window = stream(examples, batch_size=7).window(step)
        batches = list(window.micro_batches(micro_batch))
        picked = stream(examples, batch_size=7).picked(step)
        assert supervised_pairs(batches) == expected_pairs(picked)
        assert Counter(rows_of(window)) == Counter(tuple(e.ids) for e in picked)
        assert window.supervised == sum(e.supervised for e in picked)
        assert window.tokens == sum(len(e.ids) for e in picked)
        assert max(len(batch.ids_BL) for batch in batches) == min(7, micro_batch)


def test_a_window_is_the_same_whether_or_not_earlier_ones_were_asked_for():
    examples = ragged_examples(10)
    straight = stream(examples, batch_size=3)
    for step in range(23):
        mine, fresh = straight.window(step), stream(examples, batch_size=3).window(step)
        for a, b in zip(mine.micro_batches(2), fresh.micro_batches(2), strict=True):
            assert a.doc_BL is b.doc_BL is None
            assert all(torch.equal(getattr(a, n), getattr(b, n))
                       for n in ("ids_BL", "rows_T", "targets_T"))
    again = straight.window(2)  # window 2 again, after later windows
    assert rows_of(again) == rows_of(stream(examples, batch_size=3).window(2))


@pytest.mark.parametrize("batch_size", [1, 3, 4, 10, 25])
def test_a_pass_covers_every_row_once_and_the_next_in_another_order(batch_size):
    examples = ragged_examples(10)
    order = stream(examples, batch_size=batch_size)
    passes = [order.order(epoch) for epoch in range(3)]
    assert all(sorted(one) == list(range(10)) for one in passes)
    assert passes[0] != passes[1] != passes[2]
    seen = Counter(row for step in range(10) for row in rows_of(order.window(step)))
    assert sum(seen.values()) == 10 * batch_size
    # 10 windows have 10 * batch_size examples, so each of the 10 rows occurs batch_size times
    assert set(seen.values()) == {batch_size}


def test_the_seed_decides_the_order():
    examples = ragged_examples(30)
    first, other, again = ([stream(examples, seed=seed).order(epoch) for epoch in (0, 1)]
                           for seed in (0, 1, 0))
    assert first == again
    assert first[0] != other[0]
    assert first[1] != other[0]  # pass 2 of seed 0 differs from pass 1 of seed 1


@pytest.mark.parametrize("rows, batch_size, epochs, steps", [
    (10, 4, 1, 3), (12, 4, 1, 3), (10, 4, 2, 5), (10, 4, 0.5, 2), (10, 100, 1, 1), (3, 4, 0.1, 1),
])
def test_epochs_become_windows_that_cover_them(rows, batch_size, epochs, steps):
    assert stream(ragged_examples(rows), batch_size=batch_size).steps(epochs) == steps


def test_a_window_without_supervised_tokens_has_no_loss_and_is_never_made():
    """The summed loss of such a window would be divided by zero, its number of supervised tokens.

    Every row that the program reads has at least one supervised token (test_prompt.py).
    """
    with pytest.raises(AssertionError, match="without supervised tokens"):
        Window([example([5, 6, 7], 0, "a:1")], PAD)


def test_a_fully_supervised_row_predicts_all_but_its_first_token():
    """The first token of a row is never a target. The row before does not predict this token."""
    text = Example([5, 6, 7], next_tokens([5, 6, 7], start=0))
    batch = collate([[text], [text]], 4, PAD, rows_multiple=4)
    assert batch.rows_T.tolist() == [0, 1, 4, 5]
    assert batch.targets_T.tolist() == [6, 7, 6, 7]


def test_several_supervised_spans_are_one_case():
    """The example is a chat with two turns: question, answer, question, answer."""
    ids = [10, 11, 12, 13, 14, 15, 16, 17]
    first, second = next_tokens(ids, 2, 4), next_tokens(ids, 6)
    both = [a if a != IGNORED else b for a, b in zip(first, second, strict=True)]
    window = Window([Example(ids, both), example([20, 21, 22], 1, "a:2")], PAD)
    assert window.supervised == 5
    assert supervised_pairs(window.micro_batches(2)) == Counter({
        ((10, 11), 12): 1, ((10, 11, 12), 13): 1, (tuple(ids[:6]), 16): 1, (tuple(ids[:7]), 17): 1,
        ((20, 21), 22): 1})


PACKINGS = [Packing((32, 64, 96), longest=64, most=3), Packing((64,), longest=64, most=16)]


@pytest.mark.parametrize("packing", PACKINGS, ids=["three lengths", "one length"])
@pytest.mark.parametrize("micro_batch", [1, 2, 100])
def test_packing_only_changes_the_layout_of_a_window(packing, micro_batch):
    """No token is lost or repeated. Each token is predicted from its own document alone."""
    examples = ragged_examples(11)
    window = Window(examples, PAD, packing)
    batches = list(window.micro_batches(micro_batch))
    assert supervised_pairs(batches) == expected_pairs(examples)
    assert [tuple(b.ids_BL.shape) for b in batches] == window.shapes(micro_batch)
    assert all(len(b.ids_BL) <= micro_batch for b in batches)
    assert all(b.ids_BL.shape[1] in packing.lengths for b in batches)
    plain = Window(examples, PAD)
    assert (window.supervised, window.tokens) == (plain.supervised, plain.tokens)
    assert len(window.shapes(100)) <= len(packing.lengths)


def test_documents_ascend_in_their_row_within_the_bounds_and_padding_is_documents_too():
    packing = Packing((64, 128), longest=60, most=5)
    for batch in Window(ragged_examples(9), PAD, packing).micro_batches(2):
        assert batch.bounds == packing.bounds(batch.ids_BL.shape[1])
        steps = batch.doc_BL.diff(dim=1)
        assert set(steps.flatten().tolist()) <= {0, 1} and (batch.doc_BL[:, 0] == 0).all()
        assert batch.doc_BL.max() < batch.bounds.count
        for row in batch.doc_BL:
            assert row.bincount().max() <= batch.bounds.longest


def test_a_packed_row_never_predicts_across_a_border():
    """In plain text all tokens are supervised, except the first token of each document."""
    texts = [Example(ids, next_tokens(ids, start=0)) for ids in ([5, 6, 7], [8, 9], [10, 11, 12])]
    [batch] = Window(texts, PAD, Packing((8,), longest=3, most=5)).micro_batches(1)
    assert supervised_pairs([batch]) == expected_pairs(texts)
    borders = {row for row in range(7) if batch.doc_BL[0, row] != batch.doc_BL[0, row + 1]}
    supervised = batch.rows_T[batch.targets_T != IGNORED].tolist()
    assert len(borders) == 2 and not borders & set(supervised)


def token_stream(examples, tokens=160, seed=0):
    return TokenStream(examples, batch_tokens=tokens, pad_id=PAD, seed=seed)


@pytest.mark.parametrize("tokens", [60, 100, 160, 5000])
def test_windows_by_tokens_hold_each_example_once_an_epoch_and_are_about_equal(tokens):
    examples = ragged_examples(40)
    order = token_stream(examples, tokens)
    longest = max(len(e.ids) for e in examples)
    for epoch in range(6):
        windows = [order.picked(epoch * order.windows + n) for n in range(order.windows)]
        assert Counter(e.where for w in windows for e in w) == Counter(e.where for e in examples)
        sizes = [sum(len(e.ids) for e in w) for w in windows]
        assert min(sizes) > 0 and max(sizes) <= tokens
        assert max(sizes) - min(sizes) <= longest
    assert order.windows <= 1.15 * sum(len(e.ids) for e in examples) / tokens + 1


@given(st.lists(st.integers(1, 100), min_size=1, max_size=60), st.integers(100, 300))
@settings(max_examples=50)
def test_windows_by_tokens_are_neither_empty_nor_too_full(sizes, tokens):
    """The examples have random lengths. The search for windows always ends."""
    order = token_stream([example([7] * n, max(1, n // 2), f"row:{i}")
                          for i, n in enumerate(sizes)], tokens)
    for epoch in range(3):
        totals = [sum(len(e.ids) for e in order.picked(epoch * order.windows + n))
                  for n in range(order.windows)]
        assert min(totals) > 0 and max(totals) <= tokens and sum(totals) == sum(sizes)


def test_lengths_that_fill_a_window_exactly_take_no_more_windows():
    """Examples that are cut at --max-len have equal lengths. Here three of them fill a window.

    If a window kept any free space for shuffling, only two examples would fit into a window. The
    test would then need 50 windows instead of 33.
    """
    order = token_stream([example([7] * 100, 50, f"row:{i}") for i in range(99)], 300)
    assert order.windows == 33


@pytest.mark.parametrize("tokens", [1024, 2048, 4096])
def test_which_examples_share_a_window_is_random(tokens):
    """Two examples of one window are in one window of the next epoch only by chance.

    The test has one example of each length from 21 to 1,000. This is a hard case, because few
    examples are short enough to fill the rest of a window.
    """
    order = token_stream([example([7] * n, n // 2, f"row:{n}") for n in range(21, 1001)], tokens)
    epochs = [{pair for w in order.order(epoch) for pair in combinations(sorted(w), 2)}
              for epoch in range(4)]
    for one, other in pairwise(epochs):
        assert len(one & other) / len(one) < 1 / order.windows + 0.1


def test_windows_by_tokens_follow_from_seed_epoch_and_data():
    examples = ragged_examples(40)
    straight = token_stream(examples)
    for step in range(3 * straight.windows):
        assert rows_of(straight.window(step)) == rows_of(token_stream(examples).window(step))
    epochs = [{frozenset(w) for w in straight.order(epoch)} for epoch in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]  # the windows differ, not only their order
    assert token_stream(examples, seed=1).order(0) != token_stream(examples).order(0)


@pytest.mark.parametrize("epochs, share", [(1, 1), (2, 2), (0.5, 0.5)])
def test_epochs_of_windows_by_tokens(epochs, share):
    order = token_stream(ragged_examples(40))
    assert order.steps(epochs) == math.ceil(share * order.windows)
