"""Examples become windows of micro-batches; any step's window, without replaying those before.

A window is what one optimizer step sees. Which rows it holds follows from the step's number alone
(a permutation a pass, seeded by seed and pass), so a resumed run reads on where it stopped.

A MicroBatch says who may see whom by `doc_BL`: each token's document in its row, ascending; None
where a row is one document with its padding behind it, which attention from the left never
sees. What carries loss is a list of rows, not a mask over all positions, because with a vocabulary
of 250,880 every row through the head counts.

B micro-batch, L length, T supervised rows (padded to a few sizes; padding has target -100).

>>> batch = collate([([5, 6, 7], 1), ([8, 9], 1)], pad_id=3, multiple=4, rows_multiple=2)
>>> batch.ids_BL.tolist()
[[5, 6, 7, 3], [8, 9, 3, 3]]
>>> batch.rows_T.tolist(), batch.targets_T.tolist()     # row 1 predicts 7, row 4 predicts 9
([1, 4], [7, 9])
"""

import math
from dataclasses import dataclass

import torch

from phogpt_raw.data.prompt import Example

IGNORED = -100


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


@dataclass(frozen=True)
class Window:
    """One optimizer step's micro-batches; `supervised` tokens carry loss, `tokens` are read."""

    batches: list[MicroBatch]
    supervised: int
    tokens: int


class Stream:
    """The windows of a run: `batch_size` rows each, at most `micro_batch` of them at once."""

    def __init__(self, examples: list[Example], *, batch_size: int, micro_batch: int, pad_id: int,
                 seed: int = 0):
        self.examples, self.pad_id, self.seed = examples, pad_id, seed
        self.batch_size, self.micro_batch = batch_size, micro_batch
        self.permutations: dict[int, list[int]] = {}

    def steps(self, epochs: float) -> int:
        """Windows that cover so many passes; the last one reads on into the next pass."""
        return max(1, math.ceil(epochs * len(self.examples) / self.batch_size))

    def window(self, step: int) -> Window:
        """The window of step 0, 1, 2, …; rows of like length share a micro-batch."""
        first = step * self.batch_size
        picked = [self.examples[self.row(p)] for p in range(first, first + self.batch_size)]
        return make_window(picked, self.micro_batch, self.pad_id)

    def row(self, position: int) -> int:
        """The example at a place of the endless order, each pass a permutation of its own."""
        epoch, place = divmod(position, len(self.examples))
        if epoch not in self.permutations:
            dice = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self.permutations[epoch] = torch.randperm(len(self.examples), generator=dice).tolist()
            self.permutations.pop(epoch - 2, None)
        return self.permutations[epoch][place]


def make_window(examples: list[Example], micro_batch: int, pad_id: int) -> Window:
    """Micro-batches over the examples, sorted by length so that little is padding."""
    ordered = sorted(examples, key=lambda e: len(e.ids))
    batches = [
        collate([(e.ids, e.answer) for e in ordered[i : i + micro_batch]], pad_id)
        for i in range(0, len(ordered), micro_batch)
    ]
    return Window(
        batches,
        supervised=sum(e.answer for e in examples),
        tokens=sum(len(e.ids) for e in examples),
    )


def collate(rows: list[tuple[list[int], int]], pad_id: int, multiple: int = 32,
            rows_multiple: int = 64) -> MicroBatch:
    """Right-pad (ids, answer length) rows to a multiple; a few shapes instead of one a batch."""
    length = round_up(max(len(ids) for ids, _ in rows), multiple)
    ids_BL = torch.full((len(rows), length), pad_id)
    predicting, targets = [], []
    for n, (ids, answer) in enumerate(rows):
        ids_BL[n, : len(ids)] = torch.tensor(ids)
        start = len(ids) - answer
        predicting += range(n * length + start - 1, n * length + len(ids) - 1)
        targets += ids[start:]
    padding = round_up(len(targets), rows_multiple) - len(targets)
    return MicroBatch(
        ids_BL,
        doc_BL=None,
        rows_T=torch.tensor(predicting + [0] * padding),
        targets_T=torch.tensor(targets + [IGNORED] * padding),
    )


def round_up(n: int, multiple: int) -> int:
    return max(1, -(-n // multiple)) * multiple
