"""Examples become windows of micro-batches; any step's window, without replaying those before.

A window is the accumulation window: all that one optimizer step sees. Which examples it holds
follows from the step's number alone (one permutation for each epoch, seeded by seed and epoch), so
a resumed run reads on where it stopped. How many of them go through the model at once is decided
when the step asks for micro-batches, and can change between steps.

A MicroBatch says which tokens may attend to each other by `doc_BL`: each token's document in its
row, ascending; None where a row is one document and its padding stands behind it, where causal
attention never reaches. The positions that carry loss are a list of rows, not a mask over all
positions, because with a vocabulary of 250,880 every row through the head is expensive.

B micro-batch, L length, T supervised rows (padded to a few sizes; padding has target -100).

>>> a, b = Example([5, 6, 7], [IGNORED, 7, IGNORED]), Example([8, 9], [9, IGNORED])
>>> batch = collate([a, b], pad_id=3, multiple=4, rows_multiple=4)
>>> batch.ids_BL.tolist()
[[5, 6, 7, 3], [8, 9, 3, 3]]
>>> batch.rows_T.tolist(), batch.targets_T.tolist()     # row 1 predicts 7, row 4 predicts 9
([1, 4, 0, 0], [7, 9, -100, -100])
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import pad

from phogpt_raw.data.prompt import IGNORED, Example


@dataclass(frozen=True)
class MicroBatch:
    """rows_T index the hidden states flattened to [B*L], targets_T are what they predict."""

    ids_BL: torch.Tensor
    doc_BL: torch.Tensor | None
    rows_T: torch.Tensor
    targets_T: torch.Tensor

    def to(self, device) -> "MicroBatch":
        pin = torch.device(device).type == "cuda"
        return MicroBatch(*(
            t if t is None else (t.pin_memory() if pin else t).to(device, non_blocking=True)
            for t in (self.ids_BL, self.doc_BL, self.rows_T, self.targets_T)
        ))


class Window:
    """The examples of one optimizer step, shortest first, so that little of a batch is padding.

    `supervised` counts the tokens that carry loss (at least one), `tokens` all tokens.
    """

    def __init__(self, examples: list[Example], pad_id: int):
        self.examples = sorted(examples, key=lambda e: len(e.ids))
        self.pad_id = pad_id
        self.supervised = sum(e.supervised for e in examples)
        self.tokens = sum(len(e.ids) for e in examples)
        assert self.supervised, "a window without supervised tokens has no loss"

    def micro_batches(self, size: int) -> Iterator[MicroBatch]:
        """At most `size` examples at a time."""
        for start in range(0, len(self.examples), size):
            yield collate(self.examples[start : start + size], self.pad_id)


class Stream:
    """The windows of a run, `batch_size` examples each."""

    def __init__(self, examples: list[Example], *, batch_size: int, pad_id: int, seed: int = 0):
        self.examples, self.pad_id, self.seed = examples, pad_id, seed
        self.batch_size = batch_size
        self.permutations: dict[int, list[int]] = {}

    def steps(self, epochs: float) -> int:
        """Windows that cover so many epochs; the last one reads on into the next epoch."""
        return max(1, math.ceil(epochs * len(self.examples) / self.batch_size))

    def window(self, step: int) -> Window:
        """The window of step 0, 1, 2, …"""
        first = step * self.batch_size
        picked = [self.examples[self.row(p)] for p in range(first, first + self.batch_size)]
        return Window(picked, self.pad_id)

    def row(self, position: int) -> int:
        """The example at a place of the endless order, each epoch a permutation of its own."""
        epoch, place = divmod(position, len(self.examples))
        if epoch not in self.permutations:
            dice = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self.permutations[epoch] = torch.randperm(len(self.examples), generator=dice).tolist()
            self.permutations.pop(epoch - 2, None)
        return self.permutations[epoch][place]


def collate(examples: list[Example], pad_id: int, multiple: int = 32,
            rows_multiple: int = 64) -> MicroBatch:
    """Right-pad the examples to a multiple: a few shapes instead of one for each batch."""
    length = round_up(max(len(e.ids) for e in examples), multiple)
    ids_BL = torch.full((len(examples), length), pad_id)
    targets_BL = torch.full_like(ids_BL, IGNORED)
    for n, example in enumerate(examples):
        ids_BL[n, : len(example.ids)] = tensor(example.ids)
        targets_BL[n, : len(example.ids)] = tensor(example.targets)
    rows_T = (targets_BL.flatten() != IGNORED).nonzero().flatten()
    targets_T = targets_BL.flatten()[rows_T]
    padding = (0, round_up(len(rows_T), rows_multiple) - len(rows_T))
    return MicroBatch(ids_BL, None, pad(rows_T, padding), pad(targets_T, padding, value=IGNORED))


def tensor(ids: list[int]) -> torch.Tensor:
    """By way of numpy, which reads a list five times faster than torch does."""
    return torch.from_numpy(np.array(ids))


def round_up(n: int, multiple: int) -> int:
    return max(1, -(-n // multiple)) * multiple
