"""Group examples into accumulation windows, and divide each window into micro-batches.

An accumulation window, or window for short, is the set of examples of one optimizer step. The seed
and the number of the step determine these examples, so the window of a step can be computed without
the windows of earlier steps. For this reason, a resumed run continues with the same examples as an
uninterrupted run. The layout in rows and the size of a micro-batch change the speed of a step, but
not its result.

In a MicroBatch, `doc_BL` contains the document number of each token. Tokens attend only to tokens
of the same document. `doc_BL` is None if each row is one document. In this case the padding comes
after the document, so the tokens of the document do not attend to it, because attention is causal.
`rows_T` lists the positions that carry loss. With this list, the head computes logits only at these
positions. The head is expensive, because the vocabulary can have 250,880 tokens.

B micro-batch, L length, T supervised positions. T is rounded up to a multiple of `rows_multiple`;
the added positions have the target -100.

>>> a, b = Example([5, 6, 7], [IGNORED, 7, IGNORED]), Example([8, 9], [9, IGNORED])
>>> batch = collate([[a], [b]], length=4, pad_id=3, rows_multiple=4)
>>> batch.ids_BL.tolist()
[[5, 6, 7, 3], [8, 9, 3, 3]]
>>> batch.rows_T.tolist(), batch.targets_T.tolist()  # position 1 predicts 7, position 4 predicts 9
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

PADDED = 32  # the length of an unpacked row in tokens is a multiple of PADDED
# ROOMY: windows are filled to this share of --batch-tokens. The free 1 % lets the examples of a
# window differ from epoch to epoch. ENOUGH: ROOMY is not used if it needs more than 1 + ENOUGH * n
# windows per epoch. n is the number of windows if they are filled completely.
ROOMY, ENOUGH = 0.99, 1.02
# Upper limits of the random number that is added to each length (see TokenStream), as fractions of
# the longest length. `shuffled` tries these limits in this order, until no window has too many
# tokens.
BLURS = (1, 1 / 4, 1 / 16, 1 / 64, 0)


@dataclass(frozen=True)
class MicroBatch:
    """Rows that go through the model together.

    rows_T: the supervised positions, as indices into the hidden states flattened to [B*L].
    targets_T: the token that each of these positions must predict. bounds: the limits on the
    documents of a row, or None if each row is one document.
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
    """The examples of one optimizer step. Without `packing`, each row has one example.

    supervised: the number of tokens that carry loss (at least one). tokens: the number of all
    tokens.
    """

    def __init__(self, examples: list[Example], pad_id: int, packing: Packing | None = None):
        self.examples = sorted(examples, key=lambda e: len(e.ids))
        self.pad_id, self.packing = pad_id, packing
        self.supervised = sum(e.supervised for e in examples)
        self.tokens = sum(len(e.ids) for e in examples)
        assert self.supervised, "a window without supervised tokens has no loss"

    def layout(self, size: int) -> Iterator[tuple[list[list[Example]], int]]:
        """Yield (the examples of each row, the tokens of a row) for each micro-batch.

        A micro-batch has at most `size` rows, which are all padded to the same length. The rows are
        sorted by length, the shortest first. So the rows of a micro-batch have similar lengths and
        need little padding.
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
        """Return (number of rows, tokens of a row) for each micro-batch."""
        return [(len(rows), length) for rows, length in self.layout(size)]


class Stream:
    """The windows of a run, with `batch_size` examples each.

    Set `packing` before the first call of `window`.
    """

    def __init__(self, examples: list[Example], *, batch_size: int, pad_id: int, seed: int = 0):
        self.examples, self.pad_id, self.seed = examples, pad_id, seed
        self.batch_size = batch_size
        self.packing: Packing | None = None
        self.orders: dict[int, list] = {}  # {epoch: order}, only for the latest epochs

    def steps(self, epochs: float) -> int:
        """Return the number of windows that a run of this many epochs needs.

        The last window may continue into the next epoch.
        """
        return max(1, math.ceil(epochs * len(self.examples) / self.batch_size))

    def window(self, step: int) -> Window:
        """Return the window of a step. The first step is 0."""
        return Window(self.picked(step), self.pad_id, self.packing)

    def picked(self, step: int) -> list[Example]:
        """Return the examples of a step.

        The examples of all steps form an endless sequence, in which each epoch is a new permutation
        of the examples. A step has the next `batch_size` examples of this sequence.
        """
        first = step * self.batch_size
        places = (divmod(p, len(self.examples)) for p in range(first, first + self.batch_size))
        return [self.examples[self.order(epoch)[place]] for epoch, place in places]

    def order(self, epoch: int) -> list:
        """Return the result of `shuffled` for an epoch. Only seed, epoch and data determine the
        order."""
        if epoch not in self.orders:
            self.orders[epoch] = self.shuffled(self.generator(epoch))
            self.orders.pop(epoch - 2, None)
        return self.orders[epoch]

    def generator(self, epoch: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)

    def shuffled(self, generator: torch.Generator) -> list[int]:
        return torch.randperm(len(self.examples), generator=generator).tolist()


class TokenStream(Stream):
    """The windows of a run, with at most `batch_tokens` tokens each. All windows have nearly the
    same number of tokens. Each epoch has the same number of windows and contains each example once.

    The examples are sorted by length, the longest first. In this order, each example is put into
    the window that has the fewest tokens so far. Before the examples are sorted, a random number is
    added to each length, so that the windows differ from epoch to epoch.
    """

    def __init__(self, examples: list[Example], *, batch_tokens: int, pad_id: int, seed: int = 0):
        super().__init__(examples, batch_size=0, pad_id=pad_id, seed=seed)
        self.batch_tokens, self.sizes = batch_tokens, [len(e.ids) for e in examples]
        least = self.count(batch_tokens)
        roomy = self.count(max(max(self.sizes), int(ROOMY * batch_tokens)))
        self.windows = roomy if roomy <= 1 + ENOUGH * least else least

    def count(self, tokens: int) -> int:
        """Return a number of windows that is enough for all examples, if a window has at most
        `tokens` tokens. A smaller number may be possible, because `spread` does not always find the
        best distribution."""
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
        """Return the windows of an epoch, each as a list of indices into the examples."""
        any_order = super().shuffled(generator)
        chance = torch.rand(len(self.sizes), generator=generator).tolist()
        for blur in BLURS:  # with the last value, 0, no window is too full: `count` tested this
            tokens = blur * max(self.sizes)
            order = sorted(any_order, key=lambda i: -self.sizes[i] - tokens * chance[i])
            found = spread(order, self.sizes, self.windows)
            if self.fullest(found) <= self.batch_tokens:
                break
        return [found[i] for i in torch.randperm(self.windows, generator=generator).tolist()]


def collate(rows: list[list[Example]], length: int, pad_id: int,
            bounds: DocumentBounds | None = None, rows_multiple: int = 64) -> MicroBatch:
    """Build a micro-batch of rows with `length` tokens. The padding is at the end of each row.

    With `bounds`, each example is a document, and the padding is divided into documents of at most
    bounds.longest tokens. Without `bounds`, each row is one document.
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
