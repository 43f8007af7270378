"""Packing: the choice of the examples that share a row, and the lengths of rows."""

import doctest
import json
from pathlib import Path

import pytest
from conftest import example
from hypothesis import given, settings
from hypothesis import strategies as st

from phogpt_raw.data import packing as module
from phogpt_raw.data.batches import Stream, TokenStream
from phogpt_raw.data.packing import (
    ALIGNED,
    LENGTHS,
    Packing,
    best_fit,
    choose_lengths,
    choose_packing,
    row_cost,
)

REAL = json.loads((Path(__file__).parents[1] / "bench" / "lengths.json").read_text("utf-8"))
SIZES = st.lists(st.integers(1, 100), min_size=1, max_size=60)


def examples_of(lengths):
    return [example([7] * n, max(1, n // 2), f"row:{i}") for i, n in enumerate(lengths)]


def test_doctest():
    assert doctest.testmod(module).failed == 0


@given(SIZES, st.integers(100, 300), st.none() | st.integers(1, 5))
def test_best_fit_puts_each_item_into_one_bin_that_has_room(sizes, capacity, most):
    bins = best_fit(sizes, capacity, most)
    assert sorted(item for row in bins for item in row) == list(range(len(sizes)))
    assert all(sum(sizes[i] for i in row) <= capacity for row in bins)
    assert most is None or max(map(len, bins)) <= most


@given(SIZES, st.integers(100, 300))
def test_best_fit_is_within_its_bound(sizes, capacity):
    """First fit decreasing needs at most 11/9 of the fewest possible bins, plus 6/9 (Dosa 2007).

    The same bound holds for best fit decreasing.
    """
    fewest = -(-sum(sizes) // capacity)
    assert len(best_fit(sizes, capacity)) <= 11 / 9 * max(fewest, 1) + 1 + len(
        [size for size in sizes if size > capacity / 2])


def test_an_item_that_is_larger_than_a_bin_is_an_error():
    with pytest.raises(ValueError, match="item 1 of size 12 is larger than 10"):
        best_fit([3, 12], 10)


@given(SIZES)
def test_the_lengths_hold_every_row(totals):
    lengths = choose_lengths(totals)
    assert list(lengths) == sorted(set(lengths)) and 1 <= len(lengths) <= LENGTHS
    assert max(totals) <= lengths[-1] < max(totals) + ALIGNED
    assert all(length % ALIGNED == 0 for length in lengths)


def test_a_row_costs_the_time_of_whole_tiles_and_of_its_tokens():
    assert row_cost(1024) == 1024 and row_cost(1025) > row_cost(1024) + 50
    assert row_cost(1152) - row_cost(1040) == pytest.approx(0.6 * (1152 - 1040))


@given(st.lists(st.integers(1, 160), min_size=1, max_size=12))
@settings(max_examples=60)
def test_the_lengths_are_the_best_but_for_a_hundredth(totals):
    """The test compares the cost of the chosen row lengths with the cost of every other choice.

    A choice is at most four lengths, each a multiple of ALIGNED.
    """
    from itertools import combinations

    multiples = range(ALIGNED, max(totals) + ALIGNED, ALIGNED)

    def time(lengths):
        return sum(row_cost(next((n for n in lengths if n >= total), 10**9)) for total in totals)

    best = min(time(choice) for count in range(1, LENGTHS + 1)
               for choice in combinations(multiples, count))
    assert time(choose_lengths(totals)) <= 1.01 * best + 1e-6


@given(SIZES, st.integers(100, 400), st.integers(1, 9))
def test_no_example_is_lost_or_doubled_in_rows(lengths, capacity, window):
    made = examples_of(lengths)
    windows = [made[i : i + window] for i in range(0, len(made), window)]
    packing = choose_packing(windows, max(lengths), capacity)
    assert packing.lengths[-1] <= capacity + ALIGNED
    for examples in windows:
        rows = packing.rows(examples)
        assert sorted(e.where for row, _ in rows for e in row) == sorted(e.where for e in examples)
        for row, length in rows:
            assert sum(len(e.ids) for e in row) <= length in packing.lengths
            assert len(row) + -(-length // packing.longest) <= packing.bounds(length).count


@given(SIZES, st.integers(1, 200))
def test_an_example_longer_than_all_that_were_looked_at_has_a_row(lengths, longest):
    """The longest example may be a held-out row, or in a step that the plan does not look at."""
    packing = choose_packing([examples_of(lengths)], max(longest, *lengths), 200)
    [(row, length)] = packing.rows(examples_of([max(longest, *lengths)]))
    assert len(row) == 1 and max(longest, *lengths) <= length in packing.lengths


@pytest.mark.parametrize("shorts", [500, 2000])
def test_one_long_example_leaves_other_rows_full(shorts):
    made = examples_of([20] * shorts + [2000])
    packing = choose_packing([made], 2000, 2048)
    rows = packing.rows(made)
    assert sum(length for _, length in rows) * 0.8 < sum(len(e.ids) for e in made)
    assert packing.most <= 128 and packing.bounds(packing.lengths[-1]).count <= 130


def test_rows_are_bounded_by_the_examples_that_they_have(capacity=2048):
    """The kernels' statistics need memory for the largest number of examples in a row, here eight.
    """
    made = examples_of([100] * 24)
    packing = choose_packing([made[:8], made[8:16], made[16:]], 100, capacity)
    assert packing.most == 8 and len(packing.rows(made)) == 3


def fill(stream, epochs, capacity):
    """The fraction of the positions in all packed rows of a run that are not padding."""
    steps = stream.steps(epochs)
    windows = [stream.picked(step) for step in range(steps)]
    longest = max(len(e.ids) for e in stream.examples)
    stream.packing = choose_packing(windows, longest, capacity)
    made = [stream.window(step) for step in range(steps)]
    padded = sum(rows * length for window in made for rows, length in window.shapes(1))
    return sum(window.tokens for window in made) / padded


def test_fill_of_real_lengths():
    """The lengths are those of 256 real questions with their answers.

    An accumulation window has 8 of these examples, or up to 4,096 tokens.
    """
    made = examples_of([prompt + answer for prompt, answer in REAL["lengths"]])
    for seed in range(3):
        assert fill(Stream(made, batch_size=8, pad_id=3, seed=seed), 1, 2048) >= 0.92
        assert fill(TokenStream(made, batch_tokens=4096, pad_id=3, seed=seed), 3, 2048) >= 0.97


def test_fill_of_two_very_different_lengths():
    made = examples_of([20] * 128 + [900] * 128)
    for seed in range(3):
        for capacity in (1024, 2048, 4096):
            assert fill(Stream(made, batch_size=8, pad_id=3, seed=seed), 3, capacity) >= 0.92
            stream = TokenStream(made, batch_tokens=4096, pad_id=3, seed=seed)
            assert fill(stream, 3, capacity) >= 0.92


def test_a_row_is_as_long_as_its_examples_need():
    packing = Packing((32, 64), longest=30, most=16)
    rows = packing.rows(examples_of([30, 30, 20]))
    assert [(len(row), length) for row, length in rows] == [(1, 32), (2, 64)]
