"""Packing puts several short examples into one row, which makes a training step faster.

Each pass through the model dequantises all weights, even if the pass has few tokens. So one pass
with many tokens needs less time than several passes with few tokens. An example, which is a
question with its answer, usually has about a hundred tokens. An accumulation window, which is the
set of examples of one optimizer step, has eight examples by default. If all eight are packed into
one row, this row has about a thousand tokens. Examples in the same row do not attend to each other
(model/documents.py), so packing changes only the speed of a step.

The method is best-fit decreasing: the examples are sorted from the longest to the shortest, and
each is put into the fullest row that has room for it. The rows of a run have only a few different
lengths, because each new length costs time for compiling and for capturing CUDA graphs. The lengths
are chosen before the first step, from the examples of the run.

>>> best_fit([50, 60, 40, 30, 20], capacity=100)
[[1, 2], [0, 3, 4]]
"""

import math
from bisect import bisect_left, insort
from collections import Counter
from dataclasses import dataclass, replace
from heapq import heapreplace

from phogpt_raw.data.prompt import Example

LENGTHS = 4  # largest number of row lengths in a run
WORTH = 1.01  # a smaller set of row lengths is used if it costs at most 1 % more time
ALIGNED = 16  # row lengths in tokens are multiples of ALIGNED
STEPS = 128  # largest number of candidates for a row length
TRIED = 24  # choose_packing compares about this number of capacities (greatest row lengths)
ENOUGH = 8192  # choose_packing compares packings of at most about this number of examples
# Largest number of examples in a row. If a row has room for more than four of the longest examples,
# the limit is higher: MOST / 4 times the number of longest examples for which the row has room.
MOST = 64
TILE = 128  # tokens; a GPU computes a matrix product in whole tiles (blocks) of this many tokens
# One part of the time that a row needs is proportional to the row's length, rounded up to whole
# tiles. The rest is proportional to the length itself. IN_TILES is the first part divided by the
# whole time. Matrix products, which are computed in whole tiles, need 0.6 of the time of a step.
# Yet IN_TILES is 0.4. With 0.4, the chosen lengths leave less padding in the rows than with 0.6,
# and a step is at most 0.3 % slower than with the fastest lengths.
IN_TILES = 0.4


@dataclass(frozen=True)
class DocumentBounds:
    """A row has at most `count` documents, with at most `longest` tokens each.

    The padding of a row is divided into documents too, and `count` includes them. Both bounds are
    known before the first step, so the sizes of kernels and CUDA graphs can depend on the bounds.
    """

    count: int
    longest: int


@dataclass(frozen=True)
class Packing:
    """The rules by which the examples of a run are put into rows.

    lengths: the possible lengths of a row in tokens, ascending. A row has the smallest of these
    lengths that is enough for its examples. longest: an upper bound on the number of tokens in an
    example. most: the largest number of examples in a row.
    """

    lengths: tuple[int, ...]
    longest: int
    most: int

    def rows(self, examples: list[Example]) -> list[tuple[list[Example], int]]:
        """Return (examples, length in tokens) of each row, the shortest rows first."""
        sizes = [len(e.ids) for e in examples]
        bins = best_fit(sizes, self.lengths[-1], self.most)
        rows = [([examples[i] for i in row], self.length(sum(sizes[i] for i in row)))
                for row in bins]
        return sorted(rows, key=lambda row: row[1])

    def length(self, tokens: int) -> int:
        """Return the smallest row length that is enough for this number of tokens."""
        return self.lengths[bisect_left(self.lengths, tokens)]

    def bounds(self, length: int) -> DocumentBounds:
        """Return the bounds for a row of this length. Its padding is divided into documents too."""
        return DocumentBounds(self.most + -(-length // self.longest), self.longest)


def best_fit(sizes: list[int], capacity: int, most: int | None = None) -> list[list[int]]:
    """Put items of these sizes into bins. Returns the items of each bin, as indices into `sizes`.

    A bin has at most `most` items with a total size of at most `capacity`. The method is best-fit
    decreasing; items of equal size keep their order. Raises ValueError if a size is above the
    capacity.
    """
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (free room, bin) of each bin with free room, ascending
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        size = sizes[item]
        if size > capacity:
            raise ValueError(f"item {item} of size {size} is larger than {capacity}")
        place = bisect_left(rooms, (size, -1))
        if place < len(rooms):
            room, which = rooms.pop(place)
        else:
            room, which = capacity, len(bins)
            bins.append([])
        bins[which].append(item)
        if room > size and (most is None or len(bins[which]) < most):
            insort(rooms, (room - size, which))
    return bins


def spread(order: list[int], sizes: list[int], count: int) -> list[list[int]]:
    """Distribute items over `count` bins of nearly equal sums. Returns the items of each bin.

    The items are taken in the given order. Each item goes into the bin with the smallest sum.

    >>> spread([0, 1, 2, 3], sizes=[50, 40, 30, 25], count=2)
    [[0, 3], [1, 2]]
    """
    bins: list[list[int]] = [[] for _ in range(count)]
    sums = [(0, which) for which in range(count)]  # heap of (sum, bin)
    for item in order:
        total, which = sums[0]
        bins[which].append(item)
        heapreplace(sums, (total + sizes[item], which))
    return bins


def choose_packing(windows: list[list[Example]], longest: int, capacity: int) -> Packing:
    """Return the fastest packing of these windows into rows of at most `capacity` tokens.

    longest: the number of tokens in the longest example. Rows may have this length even if it is
    above `capacity`. Rows that are shorter than `capacity` may be the fastest. For example, if only
    a few windows have many tokens, each of these windows can be put into two short rows. Then the
    rows of the other windows need less padding.
    """
    windows = windows[:: -(-sum(map(len, windows)) // ENOUGH)]
    longest = round_up(longest, ALIGNED)
    capacity = max(longest, capacity // ALIGNED * ALIGNED)
    step = max(ALIGNED, round_up((capacity - longest) // TRIED, ALIGNED))
    return min((packed(windows, longest, tried) for tried in range(capacity, longest - 1, -step)),
               key=lambda packing: cost(packing, windows))


def packed(windows: list[list[Example]], longest: int, capacity: int) -> Packing:
    """Return the packing into rows of at most `capacity` tokens, with a few row lengths.

    The number of examples in a row is limited, because the variable-length attention kernels store
    statistics for `longest` tokens of each example, even of a short example.
    """
    whole = Packing((capacity,), longest, most=max(MOST, MOST // 4 * -(-capacity // longest)))
    rows = [row for window in windows for row, _ in whole.rows(window)]
    # A row must have room for the longest example, even if these windows do not contain this
    # example.
    totals = [longest, *(sum(len(e.ids) for e in row) for row in rows)]
    return replace(whole, lengths=choose_lengths(totals), most=max(map(len, rows)))


def cost(packing: Packing, windows: list[list[Example]]) -> float:
    """Return the estimated time of all rows, in units of the time of one token.

    The time of a row includes the time to dequantise the weights, which is about the time of TILE
    tokens.
    """
    return sum(row_cost(length) + TILE for window in windows for _, length in packing.rows(window))


def row_cost(length: int) -> float:
    """Return the estimated time of a row of `length` tokens, in units of the time of one token.

    >>> row_cost(1024), row_cost(1040), row_cost(1152)
    (1024.0, 1084.8, 1152.0)
    """
    return IN_TILES * round_up(length, TILE) + (1 - IN_TILES) * length


def choose_lengths(totals: list[int], most: int = LENGTHS) -> tuple[int, ...]:
    """Choose at most `most` row lengths, so that the rows need about the least total time.

    totals: for each row, the number of tokens in all its examples.

    >>> choose_lengths([100, 100, 100, 900, 1000], most=2)
    (112, 1008)
    """
    aligned = max(ALIGNED, 2 ** math.ceil(math.log2(max(totals) / STEPS)))
    rows = Counter(round_up(total, aligned) for total in totals)
    candidates = sorted(rows)
    before = [0]  # before[j]: the number of rows shorter than candidate j
    for candidate in candidates:
        before.append(before[-1] + rows[candidate])
    # best[j]: (the lowest cost of the rows shorter than candidate j, the lengths with this cost).
    # Each pass of the loop allows one length more than the pass before.
    best = [(0, ())] + [(math.inf, ())] * len(candidates)
    found = []
    for _ in range(min(most, len(candidates))):
        best = [(0, ())] + [
            min((best[i][0] + (before[j] - before[i]) * row_cost(candidates[j - 1]),
                 (*best[i][1], candidates[j - 1])) for i in range(j))
            for j in range(1, len(candidates) + 1)]
        found.append(best[-1])
    least = min(cost for cost, _ in found)
    return next(lengths for cost, lengths in found if cost <= WORTH * least)


def round_up(n: int, multiple: int) -> int:
    return max(1, -(-n // multiple)) * multiple
