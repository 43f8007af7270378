"""Group examples into windows of micro-batches. The window of a step can be computed without those
of earlier steps.

A window is the accumulation window: the examples of one optimizer step. They follow from the step's
number alone (each epoch has an order seeded by seed and epoch), so a resumed run continues with the
right ones. The step itself chooses how they are laid out in rows and how many rows go through the
model at once. That changes the speed of a step, not its result.

A MicroBatch says which tokens may attend to each other by `doc_BL`: each token's document in its
row, ascending. It is None where each row is one document; padding then comes after it, where causal
attention never looks. The positions that carry loss are a list of rows, not a mask over all
positions: with a vocabulary of 250,880 each row through the head is expensive.

B micro-batch, L length, T supervised rows (padded to a few sizes; padding has target -100).

>>> a, b = Example([5, 6, 7], [IGNORED, 7, IGNORED]), Example([8, 9], [9, IGNORED])
>>> batch = collate([[a], [b]], length=4, pad_id=3, rows_multiple=4)
>>> batch.ids_BL.tolist()
[[5, 6, 7, 3], [8, 9, 3, 3]]
>>> batch.rows_T.tolist(), batch.targets_T.tolist()     # row 1 predicts 7, row 4 predicts 9
([1, 4, 0, 0], [7, 9, -100, -100])
>>> packed = collate([[a, b]], length=8, pad_id=3, bounds=DocumentBounds(4, longest=3))
>>> packed.ids_BL.tolist(), packed.doc_BL.tolist()
([[5, 6, 7, 8, 9, 3, 3, 3]], [[0, 0, 0, 1, 1, 2, 2, 2]])
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from phogpt_raw.data.packing import DocumentBounds, Packing, best_fit, round_up, spread
from phogpt_raw.data.prompt import IGNORED, Example

PADDED = 32  # tokens; unpacked rows have a multiple of this length
ROOMY, ENOUGH = 0.99, 1.02  # fill to 99 %, to have room to shuffle, if that is <= 2 % more windows
BLURS = (1, 1 / 4, 1 / 16, 1 / 64, 0)  # random part of a length, as a share of the longest example


@dataclass(frozen=True)
class MicroBatch:
    """rows_T: positions in the hidden states flattened to [B*L]; targets_T: what they predict.

    bounds: of the documents, where a row has several.
    """

    ids_BL: torch.Tensor
    doc_BL: torch.Tensor | None
    rows_T: torch.Tensor
    targets_T: torch.Tensor
    bounds: DocumentBounds | None = None

    def to(self, device) -> "MicroBatch":
        pin = torch.device(device).type == "cuda"
        return MicroBatch(*(
            t if t is None else (t.pin_memory() if pin else t).to(device, non_blocking=True)
            for t in (self.ids_BL, self.doc_BL, self.rows_T, self.targets_T)
        ), self.bounds)


class Window:
    """The examples of one optimizer step, one to a row or packed by `packing`.

    supervised: tokens that carry loss (at least one); tokens: all tokens.
    """

    def __init__(self, examples: list[Example], pad_id: int, packing: Packing | None = None):
        self.examples = sorted(examples, key=lambda e: len(e.ids))
        self.pad_id, self.packing = pad_id, packing
        self.supervised = sum(e.supervised for e in examples)
        self.tokens = sum(len(e.ids) for e in examples)
        assert self.supervised, "a window without supervised tokens has no loss"

    def layout(self, size: int) -> Iterator[tuple[list[list[Example]], int]]:
        """(examples of each row, tokens of a row) of each micro-batch of at most `size` rows.

        All rows of a micro-batch have one length. The shortest come first, which keeps padding
        small.
        """
        if self.packing is None:
            for start in range(0, len(self.examples), size):
                part = self.examples[start : start + size]
                yield [[e] for e in part], round_up(len(part[-1].ids), PADDED)
            return
        rows = self.packing.rows(self.examples)
        for length in self.packing.lengths:
            alike = [examples for examples, found in rows if found == length]
            for start in range(0, len(alike), size):
                yield alike[start : start + size], length

    def micro_batches(self, size: int) -> Iterator[MicroBatch]:
        for rows, length in self.layout(size):
            yield collate(rows, length, self.pad_id, self.packing and self.packing.bounds(length))

    def shapes(self, size: int) -> list[tuple[int, int]]:
        """(rows, tokens of a row) of each micro-batch."""
        return [(len(rows), length) for rows, length in self.layout(size)]


class Stream:
    """The windows of a run, `batch_size` examples each; set `packing` before the first one."""

    def __init__(self, examples: list[Example], *, batch_size: int, pad_id: int, seed: int = 0):
        self.examples, self.pad_id, self.seed = examples, pad_id, seed
        self.batch_size = batch_size
        self.packing: Packing | None = None
        self.orders: dict[int, list] = {}  # of the current epochs

    def steps(self, epochs: float) -> int:
        """How many windows cover `epochs`; the last one continues into the next epoch."""
        return max(1, math.ceil(epochs * len(self.examples) / self.batch_size))

    def window(self, step: int) -> Window:
        """The window of step 0, 1, 2, …"""
        return Window(self.picked(step), self.pad_id, self.packing)

    def picked(self, step: int) -> list[Example]:
        """The examples of a step: the next ones of an endless order in which each epoch is a
        permutation."""
        first = step * self.batch_size
        places = (divmod(p, len(self.examples)) for p in range(first, first + self.batch_size))
        return [self.examples[self.order(epoch)[place]] for epoch, place in places]

    def order(self, epoch: int) -> list:
        """The order of an epoch: a pure function of seed, epoch and data."""
        if epoch not in self.orders:
            self.orders[epoch] = self.shuffled(self.generator(epoch))
            self.orders.pop(epoch - 2, None)
        return self.orders[epoch]

    def generator(self, epoch: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)

    def shuffled(self, generator: torch.Generator) -> list[int]:
        return torch.randperm(len(self.examples), generator=generator).tolist()


class TokenStream(Stream):
    """Windows of at most `batch_tokens` tokens, of nearly equal size. Each epoch has the same
    number of windows and holds each example once.

    The longest examples are distributed first, each to the window with the fewest tokens. A random
    part is added to the lengths that order them, so that each epoch has other windows.
    """

    def __init__(self, examples: list[Example], *, batch_tokens: int, pad_id: int, seed: int = 0):
        super().__init__(examples, batch_size=0, pad_id=pad_id, seed=seed)
        self.batch_tokens, self.sizes = batch_tokens, [len(e.ids) for e in examples]
        least = self.count(batch_tokens)
        roomy = self.count(max(max(self.sizes), int(ROOMY * batch_tokens)))
        self.windows = roomy if roomy <= 1 + ENOUGH * least else least

    def count(self, tokens: int) -> int:
        """How many windows of at most `tokens` tokens hold all examples."""
        exact = sorted(range(len(self.sizes)), key=lambda i: -self.sizes[i])
        windows = len(best_fit(self.sizes, tokens))
        while self.fullest(spread(exact, self.sizes, windows)) > tokens:
            windows = min(len(exact), windows + 1 + windows // 100)
        return windows

    def steps(self, epochs: float) -> int:
        return max(1, math.ceil(epochs * self.windows))

    def picked(self, step: int) -> list[Example]:
        epoch, place = divmod(step, self.windows)
        return [self.examples[i] for i in self.order(epoch)[place]]

    def fullest(self, windows: list[list[int]]) -> int:
        return max(sum(self.sizes[i] for i in window) for window in windows)

    def shuffled(self, generator: torch.Generator) -> list[list[int]]:
        """The windows of an epoch, as indices of examples."""
        any_order = super().shuffled(generator)
        chance = torch.rand(len(self.sizes), generator=generator).tolist()
        for blur in BLURS:  # the last, 0, always fits: `count` chose the number of windows so
            tokens = blur * max(self.sizes)
            order = sorted(any_order, key=lambda i: -self.sizes[i] - tokens * chance[i])
            found = spread(order, self.sizes, self.windows)
            if self.fullest(found) <= self.batch_tokens:
                break
        return [found[i] for i in torch.randperm(self.windows, generator=generator).tolist()]


def collate(rows: list[list[Example]], length: int, pad_id: int,
            bounds: DocumentBounds | None = None, rows_multiple: int = 64) -> MicroBatch:
    """Rows of `length` tokens: examples one after the other, then padding.

    With `bounds` each example is a document, and so is each bounds.longest tokens of padding;
    without, a row is one document.
    """
    ids_BL = np.full((len(rows), length), pad_id)
    targets_BL = np.full_like(ids_BL, IGNORED)
    doc_BL = np.zeros_like(ids_BL)
    for n, examples in enumerate(rows):
        start = 0
        for document, example in enumerate(examples):
            stop = start + len(example.ids)
            ids_BL[n, start:stop] = example.ids
            targets_BL[n, start:stop] = example.targets
            doc_BL[n, start:stop] = document
            start = stop
        if bounds:
            doc_BL[n, start:] = len(examples) + np.arange(length - start) // bounds.longest
    if bounds:
        assert doc_BL.max() < bounds.count
        assert max(len(e.ids) for examples in rows for e in examples) <= bounds.longest
    [found] = (targets_BL.ravel() != IGNORED).nonzero()
    rows_T = np.zeros(round_up(len(found), rows_multiple), dtype=np.int64)
    rows_T[: len(found)] = found
    targets_T = np.full_like(rows_T, IGNORED)
    targets_T[: len(found)] = targets_BL.ravel()[found]
    ids_BL, doc_BL, rows_T, targets_T = map(torch.from_numpy, (ids_BL, doc_BL, rows_T, targets_T))
    return MicroBatch(ids_BL, doc_BL if bounds else None, rows_T, targets_T, bounds)
