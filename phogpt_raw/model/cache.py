"""The key-value cache, with which decoding computes one new token at a time.

A row of the cache is one sequence, from position 0 on. Each row has its own length. The lengths,
`place_B`, are on the device, so a step of one token for each row needs no value from the host and
can be a CUDA graph. Positions after a row's end contain old values, which attention never reads.

The model accesses the cache through a view: `Piece` for the next L tokens of some rows' prompts,
`Step` for one more token in each row.

On PhoGPT-7B5 a token takes 0.5 MiB in 16 bits.

B rows, L new tokens, S positions, H heads, K head width.
"""

import torch

from phogpt_raw.model.attention import Bias, OneTokenBias


class Cache:
    """kv: keys and values of each layer, [2, B, H, S, K]. place_B: the position of each row's next
    token."""

    def __init__(self, layers: int, rows: int, heads: int, positions: int, width: int, *, dtype,
                 device):
        # zeros: masked values have a weight of 0, but 0 * inf would be nan
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
        """Add positions, a layer at a time, so that only one layer is held twice. Replaces all
        tensors of `kv`."""
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
    """The tokens from position `start` on of the prompts in rows `first`, `first` + 1, …"""

    def __init__(self, cache: Cache, first: int = 0, start: int = 0):
        self.cache, self.first, self.start = cache, first, start

    def seen(self, slopes_H, queries: int, dtype: torch.dtype) -> Bias:
        return Bias(slopes_H, queries, self.start + queries, dtype)

    def extend(self, layer: int, k_BHLK, v_BHLK):
        """Store the new tokens' keys and values; returns all so far, [B, H, S, K] each."""
        end = self.start + k_BHLK.shape[2]
        kv = self.cache.kv[layer][:, self.first : self.first + len(k_BHLK), :, :end]
        kv[0, :, :, self.start :], kv[1, :, :, self.start :] = k_BHLK, v_BHLK
        return kv.unbind(0)


class Step:
    """One token for each of the first `rows` rows, at the row's own position.

    positions: how many of the cache attention reads; more than any of the rows holds.
    """

    def __init__(self, cache: Cache, rows: int, positions: int):
        self.cache, self.rows, self.positions = cache, rows, positions
        self.row_B = torch.arange(rows, device=cache.place_B.device)
        self.place_B = cache.place_B[:rows]

    def seen(self, slopes_H, queries: int, dtype: torch.dtype) -> Bias:
        assert queries == 1
        return OneTokenBias(slopes_H, self.place_B, self.positions, dtype)

    def extend(self, layer: int, k_BHLK, v_BHLK):
        """As Piece.extend; each row's new key and value go to its own position."""
        kv = self.cache.kv[layer][:, : self.rows]
        for all_BHSK, new_BHLK in zip(kv, (k_BHLK, v_BHLK), strict=True):
            all_BHSK[self.row_B, :, self.place_B] = new_BHLK[:, :, 0]
        return kv[:, :, :, : self.positions].unbind(0)


def cache_bytes(layers: int, width: int, rows: int, positions: int, itemsize: int) -> int:
    """Bytes of the keys and values of `rows` rows of `positions` positions.

    >>> cache_bytes(layers=32, width=4096, rows=1, positions=1, itemsize=2)  # 7B5, fp16
    524288
    """
    return 2 * layers * width * rows * positions * itemsize
