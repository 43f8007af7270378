"""Compute the pretraining loss, in nats, of a batch of rows or of a whole token stream.

B rows, L tokens of a row.
"""

import torch
import torch.nn.functional as F

from phogpt_raw.model.phogpt import PhoGPT
from phogpt_raw.nano.recipe.stream import rows_at


def loss_of(model: PhoGPT, ids_BL, doc_BL, targets_BL, reduction: str = "mean") -> torch.Tensor:
    """Return the cross-entropy of the rows' targets, in nats. Targets of -100 are ignored."""
    logits = model.logits(model(ids_BL, doc_BL))
    return F.cross_entropy(logits.flatten(0, 1), targets_BL.flatten(), reduction=reduction)


@torch.no_grad()
def evaluate(
    model: PhoGPT, stream: torch.Tensor, seq_len: int, rows: int, autocast
) -> list[float]:
    """Return [sum of the loss in nats, number of predicted tokens] over the stream.

    A batch has `rows` rows. The last row is the rest of the stream and may be shorter.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=stream.device)
    starts = torch.arange(0, len(stream) - seq_len, seq_len, device=stream.device)
    groups = [(group, seq_len) for group in starts.split(rows)]
    rest = len(starts) * seq_len
    if len(stream) - 1 > rest:
        groups.append((torch.tensor([rest], device=stream.device), len(stream) - 1 - rest))
    for group, length in groups:
        ids_BL, doc_BL, targets_BL = rows_at(stream, group, length)
        with autocast():
            sums[0] += loss_of(model, ids_BL, doc_BL, targets_BL, reduction="sum")
        sums[1] += (targets_BL >= 0).sum()
    return sums.tolist()
