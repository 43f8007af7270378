"""The token streams that `prepare` writes, and the rows that pretraining reads from them.

A stream is all documents one after another, each ended by </s>. A row is `seq_len` consecutive
tokens of it and may hold the end of one document and the beginning of the next.

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
    """corpus.json, and the training and the held-out stream as int32 on the device."""
    for name in ("corpus.json", "train.bin", "heldout.bin", *TOKENIZER_FILES):
        if not (data / name).is_file():
            raise Refusal(f"--data {data}: {name} is missing; run "
                          f"python -m phogpt_raw.nano.recipe.prepare --out {data} first")
    counts = json.loads((data / "corpus.json").read_text())
    streams = [np.fromfile(data / name, dtype=np.uint16) for name in ("train.bin", "heldout.bin")]
    return counts, *(torch.from_numpy(s.astype(np.int32)).to(device) for s in streams)


def rows_at(stream: torch.Tensor, starts_B: torch.Tensor, seq_len: int):
    """ids, document numbers and targets, each [B, L], of the rows that begin at `starts_B`.

    </s> belongs to the document that it ends. It does not predict the first token of the next
    document (target -100). All three are on the stream's device.
    """
    tokens = stream[starts_B[:, None] + torch.arange(seq_len + 1, device=stream.device)].long()
    ids_BL, targets_BL = tokens[:, :-1], tokens[:, 1:]
    ends_BL = ids_BL == EOS
    doc_BL = ends_BL.cumsum(1) - ends_BL.long()
    return ids_BL, doc_BL, targets_BL.masked_fill(ends_BL, -100)


def shuffled_starts(tokens: int, seq_len: int, generator: torch.Generator) -> torch.Tensor:
    """Where the rows of one epoch begin: adjacent rows from a random offset, in random order."""
    offset = int(torch.randint(min(seq_len, tokens - seq_len), (), generator=generator))
    rows = (tokens - 1 - offset) // seq_len
    return offset + seq_len * torch.randperm(rows, generator=generator)


def steps_of_epoch(tokens: int, seq_len: int, rows: int) -> int:
    """How many batches of `rows` rows an epoch has, for any offset."""
    return (tokens - seq_len) // seq_len // rows


def batches(stream: torch.Tensor, seq_len: int, rows: int, seed: int) -> Iterator[tuple]:
    """The results of `rows_at` for batch after batch, epoch after epoch, without end."""
    generator = torch.Generator().manual_seed(seed)
    epoch = steps_of_epoch(len(stream), seq_len, rows)
    while True:
        starts = shuffled_starts(len(stream), seq_len, generator).to(stream.device)
        for starts_B in starts[: epoch * rows].split(rows):
            yield rows_at(stream, starts_B, seq_len)
