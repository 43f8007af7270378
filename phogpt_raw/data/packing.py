"""Packing: short examples share a row, so that a step over them is as fast as over long rows.

Each pass through the model dequantises all weights, however few tokens it has. One question and
answer has about a hundred tokens; a row with all examples of a window has a thousand. Examples in a
row do not see each other (model/documents.py), so packing changes only the speed of a step.

Best fit decides which examples share a row: the longest example first, each into the fullest row
that has room for it. The rows of a run have few different lengths, because compiling and capturing
take time for each new length. The lengths are chosen before the first step, from the run's own
rows.

>>> best_fit([50, 60, 40, 30, 20], capacity=100)
[[1, 2], [0, 3, 4]]
"""

import math
from bisect import bisect_left, insort
from collections import Counter
from dataclasses import dataclass, replace
from heapq import heapreplace

from phogpt_raw.data.prompt import Example

LENGTHS = 4  # most row lengths of a run
WORTH = 1.01  # one more length must save 1 % of the time
ALIGNED = 16  # tokens; row lengths are multiples of it
STEPS = 128  # most candidates for a row length; limits their number for long rows
TRIED = 24  # capacities that are compared
ENOUGH = 8192  # examples used for the comparison, at most
MOST = 64  # most examples in a row; more where it has room for over four of the longest
TILE = 128  # tokens; matrix products compute whole tiles of this size
IN_TILES = 0.4  # share of a row's cost that is in whole tiles. Products are 0.6 of a step; with 0.4
# the time is within 0.3 % of the least, and rows are fuller.


@dataclass(frozen=True)
class DocumentBounds:
    """A row holds at most `count` documents, those of padding included, of at most `longest` tokens
    each.

    Both are known before the first step, so kernels and CUDA graphs can be sized by them.
    """

    count: int
    longest: int


@dataclass(frozen=True)
class Packing:
    """The rows of a run: each has the smallest of `lengths` (tokens, ascending) that holds its
    examples. longest: an upper bound on the tokens of an example. most: the most examples in a
    row."""

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
        """The row length for a sum of `tokens`."""
        return self.lengths[bisect_left(self.lengths, tokens)]

    def bounds(self, length: int) -> DocumentBounds:
        """The bounds of a row of this length. Its padding is cut into documents too."""
        return DocumentBounds(self.most + -(-length // self.longest), self.longest)


def best_fit(sizes: list[int], capacity: int, most: int | None = None) -> list[list[int]]:
    """Indices into `sizes` of each bin; a bin has at most `most` items and a total of at most
    `capacity`.

    Best fit decreasing; equal sizes keep their order. Raises ValueError for a size above the
    capacity.
    """
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room left, bin) of the bins with room, ascending
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
    """The items in `count` bins of nearly equal sums: in this order, each into the emptiest bin.

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
    """The best packing of these windows into rows of at most `capacity` tokens.

    longest: tokens of the longest example; rows may always be that long. The best rows may be
    shorter than `capacity`: if a few windows have many tokens, two rows for each of them cost less
    than padding in all rows.
    """
    windows = windows[:: -(-sum(map(len, windows)) // ENOUGH)]
    longest = round_up(longest, ALIGNED)
    capacity = max(longest, capacity // ALIGNED * ALIGNED)
    step = max(ALIGNED, round_up((capacity - longest) // TRIED, ALIGNED))
    return min((packed(windows, longest, tried) for tried in range(capacity, longest - 1, -step)),
               key=lambda packing: cost(packing, windows))


def packed(windows: list[list[Example]], longest: int, capacity: int) -> Packing:
    """The packing into rows of at most `capacity` tokens, with a few lengths up to it.

    The number of examples in a row is limited, because the variable-length kernels keep statistics
    of `longest` tokens for each example, however short.
    """
    whole = Packing((capacity,), longest, most=max(MOST, MOST // 4 * -(-capacity // longest)))
    rows = [row for window in windows for row, _ in whole.rows(window)]
    # The longest example may be in none of these windows, but must fit a row.
    totals = [longest, *(sum(len(e.ids) for e in row) for row in rows)]
    return replace(whole, lengths=choose_lengths(totals), most=max(map(len, rows)))


def cost(packing: Packing, windows: list[list[Example]]) -> float:
    """The time of all rows, in units of the time of a token. Dequantising the weights takes about
    as long as one tile, for each row."""
    return sum(row_cost(length) + TILE for window in windows for _, length in packing.rows(window))


def row_cost(length: int) -> float:
    """The time of a row, in units of the time of a token.

    >>> row_cost(1024), row_cost(1040), row_cost(1152)
    (1024.0, 1084.8, 1152.0)
    """
    return IN_TILES * round_up(length, TILE) + (1 - IN_TILES) * length


def choose_lengths(totals: list[int], most: int = LENGTHS) -> tuple[int, ...]:
    """At most `most` row lengths that give rows of these `totals` of tokens the least time.

    >>> choose_lengths([100, 100, 100, 900, 1000], most=2)
    (112, 1008)
    """
    aligned = max(ALIGNED, 2 ** math.ceil(math.log2(max(totals) / STEPS)))
    rows = Counter(round_up(total, aligned) for total in totals)
    candidates = sorted(rows)
    before = [0]  # before[j]: rows shorter than candidate j
    for candidate in candidates:
        before.append(before[-1] + rows[candidate])
    # best[j]: (cost, lengths), the lowest for the rows up to candidate j with so many lengths
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
