"""The key-value cache. With it, decoding computes only the new token of each sequence.

A row of the cache holds one sequence, from position 0 on. Each row has its own length. The tensor
`place_B` holds the lengths on the device. So a step of one token per row needs no value from the
host, and can be a CUDA graph. Positions after a row's end may contain old values. Attention masks
these positions.

The model accesses the cache through one of two views. `Piece` is for the next L tokens of the
prompts in some rows. `Step` is for one more token in each row.

In 16 bits, one token of PhoGPT-7B5 takes 0.5 MiB of the cache.

B rows, L new tokens, S positions, H heads, K head width.
"""

import torch

from phogpt_raw.model.attention import Bias, OneTokenBias


class Cache:
    """kv: a tensor [2, B, H, S, K] for each layer. The layer's keys have index 0 in it, and the
    layer's values have index 1. place_B: the position of each row's next token."""

    def __init__(self, layers: int, rows: int, heads: int, positions: int, width: int, *, dtype,
                 device):
        # Zeros, because uninitialised memory may contain inf. Attention multiplies masked values by
        # the weight 0, and 0 * inf is nan.
        self.kv = [torch.zeros(2, rows, heads, positions, width, dtype=dtype, device=device)
                   for _ in range(layers)]
        self.place_B = torch.zeros(rows, dtype=torch.long, device=device)

    @property
    def rows(self) -> int:
        return self.kv[0].shape[1]

    @property
    def positions(self) -> int:
        return self.kv[0].shape[3]

    def grow(self, positions: int) -> None:
        """Enlarge each row to `positions` positions. Replaces all tensors of `kv`.

        It copies one layer at a time, so at most one layer is in memory twice.
        """
        for n, old in enumerate(self.kv):
            new = old.new_zeros(*old.shape[:3], positions, old.shape[4])
            new[:, :, :, : old.shape[3]] = old
            self.kv[n] = new

    def move(self, source: int, target: int) -> None:
        """Copy row `source` to row `target`."""
        for kv in self.kv:
            kv[:, target] = kv[:, source]
        self.place_B[target] = self.place_B[source]


class Piece:
    """The next tokens of the prompts in rows `first`, `first` + 1, … of the cache.

    start: the position of the first of these tokens in each prompt.
    """

    def __init__(self, cache: Cache, first: int = 0, start: int = 0):
        self.cache, self.first, self.start = cache, first, start

    def seen(self, slopes_H, queries: int, dtype: torch.dtype) -> Bias:
        return Bias(slopes_H, queries, self.start + queries, dtype)

    def extend(self, layer: int, k_BHLK, v_BHLK):
        """Store the keys and values of the new tokens. Returns (keys, values) of all tokens so far,
        [B, H, S, K] each."""
        end = self.start + k_BHLK.shape[2]
        kv = self.cache.kv[layer][:, self.first : self.first + len(k_BHLK), :, :end]
        kv[0, :, :, self.start :], kv[1, :, :, self.start :] = k_BHLK, v_BHLK
        return kv.unbind(0)


class Step:
    """One new token in each of the first `rows` rows, at the row's own position.

    positions: the number of cache positions that attention reads. It must be greater than the
    length of each row.
    """

    def __init__(self, cache: Cache, rows: int, positions: int):
        self.cache, self.rows, self.positions = cache, rows, positions
        self.row_B = torch.arange(rows, device=cache.place_B.device)
        self.place_B = cache.place_B[:rows]

    def seen(self, slopes_H, queries: int, dtype: torch.dtype) -> Bias:
        assert queries == 1
        return OneTokenBias(slopes_H, self.place_B, self.positions, dtype)

    def extend(self, layer: int, k_BHLK, v_BHLK):
        """Like Piece.extend, but each row's new key and value go to the row's own position."""
        kv = self.cache.kv[layer][:, : self.rows]
        for all_BHSK, new_BHLK in zip(kv, (k_BHLK, v_BHLK), strict=True):
            all_BHSK[self.row_B, :, self.place_B] = new_BHLK[:, :, 0]
        return kv[:, :, :, : self.positions].unbind(0)


def cache_bytes(layers: int, width: int, rows: int, positions: int, itemsize: int) -> int:
    """The size in bytes of a cache with `rows` rows of `positions` positions each.

    width: the hidden size of the model.

    >>> cache_bytes(layers=32, width=4096, rows=1, positions=1, itemsize=2)  # 7B5, fp16
    524288
    """
    return 2 * layers * width * rows * positions * itemsize
