"""Packing: several short examples share a row, so that a step is as fast as one over long rows.

Each pass through the model dequantises all weights, however few tokens it carries. A row of one
question and answer has about a hundred tokens, a row that holds the examples of a whole window has
a thousand. Examples in a row do not see each other (model/documents.py), so packing changes the
speed of a step and nothing else.

Which examples share a row is decided by best fit: the longest example first, each into the fullest
row that still has room for it. Rows have few different lengths, since each length of a run is
compiled and captured once; they are chosen from the run's own rows before its first step.

>>> best_fit([50, 60, 40, 30, 20], capacity=100)
[[1, 2], [0, 3, 4]]
"""

import math
from bisect import bisect_left, insort
from collections import Counter
from dataclasses import dataclass, replace
from heapq import heapreplace

from phogpt_raw.data.prompt import Example

LENGTHS = 4  # different row lengths of a run, at most
WORTH = 1.01  # one more length must save a hundredth of the time
ALIGNED = 16  # tokens; row lengths are multiples of it
STEPS = 128  # and of so much that at most so many candidates remain
TRIED = 24  # capacities
ENOUGH = 8192  # examples by which they are compared
MOST = 64  # examples in a row where one may fill it; where rows are longer, so many in four
TILE = 128  # tokens; matrix products compute whole tiles of them
IN_TILES = 0.4  # share of a row's cost that counts whole tiles (products are 0.6 of a step; with
# 0.4 the time is within 0.3 % of the least, and rows are fuller)


@dataclass(frozen=True)
class DocumentBounds:
    """A row holds at most `count` documents, padding's included, each of at most `longest` tokens.

    Both are known before the first step, so that kernels and CUDA graphs can be sized by them.
    """

    count: int
    longest: int


@dataclass(frozen=True)
class Packing:
    """The rows of a run: each has the smallest of `lengths` (tokens, ascending) that holds its
    examples. `longest`: tokens of the longest example, at least; `most`: examples in a row, at
    most."""

    lengths: tuple[int, ...]
    longest: int
    most: int

    def rows(self, examples: list[Example]) -> list[tuple[list[Example], int]]:
        """(examples, length) of each row, the shortest rows first."""
        sizes = [len(e.ids) for e in examples]
        bins = best_fit(sizes, self.lengths[-1], self.most)
        rows = [([examples[i] for i in row], self.length(sum(sizes[i] for i in row)))
                for row in bins]
        return sorted(rows, key=lambda row: row[1])

    def length(self, tokens: int) -> int:
        """The row length that so many tokens take."""
        return self.lengths[bisect_left(self.lengths, tokens)]

    def bounds(self, length: int) -> DocumentBounds:
        """Of a row of this length. Its padding is cut into documents too."""
        return DocumentBounds(self.most + -(-length // self.longest), self.longest)


def best_fit(sizes: list[int], capacity: int, most: int | None = None) -> list[list[int]]:
    """Indices into `sizes` of each bin, at most `most` of them and at most `capacity` in all.

    Best fit decreasing; sizes that are equal keep their order. Raises ValueError where one is
    larger than the capacity.
    """
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room left, bin) of the bins that are open, ascending
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
    """The items in `count` bins of nearly equal sums: in this order, each into the emptiest.

    >>> spread([0, 1, 2, 3], sizes=[50, 40, 30, 25], count=2)
    [[0, 3], [1, 2]]
    """
    bins: list[list[int]] = [[] for _ in range(count)]
    sums = [(0, which) for which in range(count)]  # a heap
    for item in order:
        total, which = sums[0]
        bins[which].append(item)
        heapreplace(sums, (total + sizes[item], which))
    return bins


def choose_packing(windows: list[list[Example]], longest: int, capacity: int) -> Packing:
    """The packing of windows of examples into rows of at most `capacity` tokens, or of `longest`,
    the tokens of the longest example, where that is more.

    The capacity that is best for these windows may be smaller: a few windows of many tokens had
    better take two rows than that all rows be padded.
    """
    windows = windows[:: -(-sum(map(len, windows)) // ENOUGH)]
    longest = round_up(longest, ALIGNED)
    capacity = max(longest, capacity // ALIGNED * ALIGNED)
    step = max(ALIGNED, round_up((capacity - longest) // TRIED, ALIGNED))
    return min((packed(windows, longest, tried) for tried in range(capacity, longest - 1, -step)),
               key=lambda packing: cost(packing, windows))


def packed(windows: list[list[Example]], longest: int, capacity: int) -> Packing:
    """The packing into rows of at most `capacity` tokens, and into few lengths below it.

    Rows hold as many examples as they have room for, within reason: the variable-length kernels
    keep statistics of `longest` tokens for each example of a row, whatever its own length.
    """
    whole = Packing((capacity,), longest, most=max(MOST, MOST // 4 * -(-capacity // longest)))
    rows = [row for window in windows for row, _ in whole.rows(window)]
    # The longest example may stand in none of these windows, and still must have a row.
    totals = [longest, *(sum(len(e.ids) for e in row) for row in rows)]
    return replace(whole, lengths=choose_lengths(totals), most=max(map(len, rows)))


def cost(packing: Packing, windows: list[list[Example]]) -> float:
    """The time of all rows, in the time of a token; dequantising the weights for a row takes about
    as long as one tile."""
    return sum(row_cost(length) + TILE for window in windows for _, length in packing.rows(window))


def row_cost(length: int) -> float:
    """The time of a row, in the time of a token.

    >>> row_cost(1024), row_cost(1040), row_cost(1152)
    (1024.0, 1084.8, 1152.0)
    """
    return IN_TILES * round_up(length, TILE) + (1 - IN_TILES) * length


def choose_lengths(totals: list[int], most: int = LENGTHS) -> tuple[int, ...]:
    """At most `most` lengths in which rows of so many tokens take the least time.

    >>> choose_lengths([100, 100, 100, 900, 1000], most=2)
    (112, 1008)
    """
    aligned = max(ALIGNED, 2 ** math.ceil(math.log2(max(totals) / STEPS)))
    rows = Counter(round_up(total, aligned) for total in totals)
    candidates = sorted(rows)
    before = [0]  # rows shorter than each candidate
    for candidate in candidates:
        before.append(before[-1] + rows[candidate])
    # best[j]: (cost, lengths) of the rows up to candidate j with so many lengths
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
