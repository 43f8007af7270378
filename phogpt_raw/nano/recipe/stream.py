"""Read the token streams that `prepare` writes, and cut them into rows for pretraining.

A stream has all documents one after another. Each document ends with </s>. A row is `seq_len`
consecutive tokens of the stream. So a row may contain the end of one document and the beginning of
the next document.

B rows, L tokens of a row.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from phogpt_raw.model.checkpoint_format import TOKENIZER_FILES
from phogpt_raw.nano.recipe.tokenizer import EOS
from phogpt_raw.refusal import Refusal


def read_data(data: Path, device: torch.device) -> tuple[dict, torch.Tensor, torch.Tensor]:
    """Return (content of corpus.json, training stream, held-out stream).

    Each stream is an int32 tensor [tokens] on the device.
    """
    for name in ("corpus.json", "train.bin", "heldout.bin", *TOKENIZER_FILES):
        if not (data / name).is_file():
            raise Refusal(f"--data {data}: {name} is missing; run "
                          f"python -m phogpt_raw.nano.recipe.prepare --out {data} first")
    counts = json.loads((data / "corpus.json").read_text())
    streams = [np.fromfile(data / name, dtype=np.uint16) for name in ("train.bin", "heldout.bin")]
    return counts, *(torch.from_numpy(s.astype(np.int32)).to(device) for s in streams)


def rows_at(stream: torch.Tensor, starts_B: torch.Tensor, seq_len: int):
    """Return (ids, document numbers, targets), each [B, L], of the rows that begin at `starts_B`.

    </s> belongs to the document that it ends. The position of </s> has the target -100, so that the
    model does not learn to predict the first token of the next document after </s>. All three
    tensors are on the stream's device.
    """
    tokens = stream[starts_B[:, None] + torch.arange(seq_len + 1, device=stream.device)].long()
    ids_BL, targets_BL = tokens[:, :-1], tokens[:, 1:]
    ends_BL = ids_BL == EOS
    doc_BL = ends_BL.cumsum(1) - ends_BL.long()
    return ids_BL, doc_BL, targets_BL.masked_fill(ends_BL, -100)


def shuffled_starts(tokens: int, seq_len: int, generator: torch.Generator) -> torch.Tensor:
    """Return the start positions of the rows of one epoch, in random order.

    The rows are adjacent. The first row begins at a random offset in the stream.
    """
    offset = int(torch.randint(min(seq_len, tokens - seq_len), (), generator=generator))
    rows = (tokens - 1 - offset) // seq_len
    return offset + seq_len * torch.randperm(rows, generator=generator)


def steps_of_epoch(tokens: int, seq_len: int, rows: int) -> int:
    """Return the number of batches of `rows` rows in an epoch.

    The number is possible with every random offset of `shuffled_starts`.
    """
    return (tokens - seq_len) // seq_len // rows


def batches(stream: torch.Tensor, seq_len: int, rows: int, seed: int) -> Iterator[tuple]:
    """Yield the result of `rows_at` for each batch of each epoch, without end."""
    generator = torch.Generator().manual_seed(seed)
    epoch = steps_of_epoch(len(stream), seq_len, rows)
    while True:
        starts = shuffled_starts(len(stream), seq_len, generator).to(stream.device)
        for starts_B in starts[: epoch * rows].split(rows):
            yield rows_at(stream, starts_B, seq_len)
