"""Windows of micro-batches: who is in, who sees whom, and what predicts what."""

import doctest
from collections import Counter

import pytest
import torch
from conftest import example, ragged_examples

from phogpt_raw.data import batches as module
from phogpt_raw.data.batches import MicroBatch, Stream, Window, collate
from phogpt_raw.data.prompt import IGNORED, Example, next_tokens

PAD = 3


def stream(examples, **how):
    return Stream(examples, **{"batch_size": 4, "pad_id": PAD, **how})


def supervised_pairs(batches):
    """(what came before, what is predicted) of every supervised token: independent of padding."""
    pairs = Counter()
    for batch in batches:
        length = batch.ids_BL.shape[1]
        for place, target in zip(batch.rows_T.tolist(), batch.targets_T.tolist(), strict=True):
            if target != IGNORED:
                row, column = divmod(place, length)
                pairs[tuple(batch.ids_BL[row, : column + 1].tolist()), target] += 1
    return pairs


def expected_pairs(examples):
    return Counter(
        (tuple(e.ids[: place + 1]), target)
        for e in examples for place, target in enumerate(e.targets) if target != IGNORED
    )


def rows_of(window):
    """The examples' ids in a window; ragged examples hold no PAD, so that is what is taken off."""
    return [tuple(ids[ids != PAD].tolist())
            for batch in window.micro_batches(2) for ids in batch.ids_BL]


def test_doctest():
    assert doctest.testmod(module).failed == 0


def test_targets_are_the_next_tokens_of_the_rows_named():
    batch = collate([example([10, 11, 12, 13, 14], 3, "a:1"), example([20, 21, 22], 1, "a:2")],
                    PAD, multiple=8, rows_multiple=6)
    assert batch.ids_BL.tolist() == [[10, 11, 12, 13, 14, 3, 3, 3], [20, 21, 22, 3, 3, 3, 3, 3]]
    # 11 predicts 12, 12 predicts 13, 13 predicts 14; in row 1 (places 8…15) 21 predicts 22
    assert batch.rows_T.tolist() == [1, 2, 3, 9, 0, 0]
    assert batch.targets_T.tolist() == [12, 13, 14, 22, IGNORED, IGNORED]
    assert batch.ids_BL.flatten()[batch.rows_T[:4]].tolist() == [11, 12, 13, 21]


def test_padding_is_behind_and_needs_no_documents():
    batch = collate([example([PAD, 5, PAD], 1, "a:1"), example([6, 7], 1, "a:2")], PAD, multiple=4)
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
    """Also where the padding's id occurs in it, as the end of a chat's turn does.

    fp32 and another length of the sums: a few units in the last place of values around 1."""
    model, _ = adapted()
    examples = [*ragged_examples(3), example([5, PAD, 7, PAD, PAD, 9], 2, "a:1")]
    with torch.no_grad():
        batch = collate(examples, PAD)
        together = model(batch.ids_BL, batch.doc_BL)
        for hidden, e in zip(together, examples, strict=True):
            alone = model(torch.tensor([e.ids]))[0]
            torch.testing.assert_close(hidden[: len(e.ids)], alone, rtol=0, atol=1e-5)


def test_shapes_are_a_few_sizes_only():
    for n in range(20):
        batch = collate(ragged_examples(3, seed=n), PAD)
        assert batch.ids_BL.shape[1] % 32 == 0
        assert len(batch.rows_T) == len(batch.targets_T)
        assert len(batch.rows_T) % 64 == 0


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 4, 7, 8, 100])
def test_micro_batches_only_regroup_a_window(micro_batch):
    examples = ragged_examples(11)
    for step in range(4):
        window = stream(examples, batch_size=7).window(step)
        order = stream(examples, batch_size=7)
        batches = list(window.micro_batches(micro_batch))
        picked = [examples[order.row(p)] for p in range(7 * step, 7 * step + 7)]
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
    again = straight.window(2)  # and going back changes nothing
    assert rows_of(again) == rows_of(stream(examples, batch_size=3).window(2))


@pytest.mark.parametrize("batch_size", [1, 3, 4, 10, 25])
def test_a_pass_covers_every_row_once_and_the_next_in_another_order(batch_size):
    examples = ragged_examples(10)
    order = stream(examples, batch_size=batch_size)
    passes = [[order.row(10 * epoch + n) for n in range(10)] for epoch in range(3)]
    assert all(sorted(one) == list(range(10)) for one in passes)
    assert passes[0] != passes[1] != passes[2]
    seen = Counter(row for step in range(10) for row in rows_of(order.window(step)))
    assert sum(seen.values()) == 10 * batch_size
    assert set(seen.values()) == {batch_size}  # 10 windows are batch_size passes


def test_the_seed_decides_the_order():
    examples = ragged_examples(30)
    orders = [[stream(examples, seed=seed).row(p) for p in range(60)] for seed in (0, 1, 0)]
    assert orders[0] == orders[2]
    assert orders[0][:30] != orders[1][:30]
    assert orders[0][30:] != orders[1][:30]  # the second pass of one seed is not another seed's


@pytest.mark.parametrize("rows, batch_size, epochs, steps", [
    (10, 4, 1, 3), (12, 4, 1, 3), (10, 4, 2, 5), (10, 4, 0.5, 2), (10, 100, 1, 1), (3, 4, 0.1, 1),
])
def test_epochs_become_windows_that_cover_them(rows, batch_size, epochs, steps):
    assert stream(ragged_examples(rows), batch_size=batch_size).steps(epochs) == steps


def test_a_window_without_supervised_tokens_has_no_loss_and_is_never_made():
    """A row that is read has at least one (test_prompt.py); the loss would be divided by zero."""
    with pytest.raises(AssertionError, match="without supervised tokens"):
        Window([example([5, 6, 7], 0, "a:1")], PAD)


def test_a_fully_supervised_row_predicts_all_but_its_first_token():
    """Not the token before the row, nor the last of the row before."""
    text = Example([5, 6, 7], next_tokens([5, 6, 7], start=0))
    batch = collate([text, text], PAD, multiple=4, rows_multiple=4)
    assert batch.rows_T.tolist() == [0, 1, 4, 5]
    assert batch.targets_T.tolist() == [6, 7, 6, 7]


def test_several_supervised_spans_are_one_case():
    """Two turns of a chat: question, answer, question, answer."""
    ids = [10, 11, 12, 13, 14, 15, 16, 17]
    first, second = next_tokens(ids, 2, 4), next_tokens(ids, 6)
    both = [a if a != IGNORED else b for a, b in zip(first, second, strict=True)]
    window = Window([Example(ids, both), example([20, 21, 22], 1, "a:2")], PAD)
    assert window.supervised == 5
    assert supervised_pairs(window.micro_batches(2)) == Counter({
        ((10, 11), 12): 1, ((10, 11, 12), 13): 1, (tuple(ids[:6]), 16): 1, (tuple(ids[:7]), 17): 1,
        ((20, 21), 22): 1})
