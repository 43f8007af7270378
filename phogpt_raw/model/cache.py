"""Keys and values of the tokens so far, so that decoding computes one token at a time.

Memory for all positions is taken at once and filled from the left; attention sees a view of what is
filled. On PhoGPT-7B5 a token takes 0.5 MiB in 16 bits.

B rows, L new tokens, S positions, H heads, K head width.
"""

import torch


class Cache:
    """The cache of all layers, and the documents [B, S] of the positions that they hold."""

    def __init__(self, layers: int, rows: int, heads: int, positions: int, width: int, *, dtype,
                 device):
        self.filled = 0
        self.doc_BS = torch.zeros(rows, positions, dtype=torch.long, device=device)
        self.layers = [
            LayerCache(torch.empty(2, rows, heads, positions, width, dtype=dtype, device=device))
            for _ in range(layers)
        ]

    def advance(self, queries: int, doc_BL: torch.Tensor | None) -> tuple[int, torch.Tensor]:
        """Note the next tokens' documents; return how many keys they see, and all documents."""
        start, self.filled = self.filled, self.filled + queries
        if doc_BL is not None:
            self.doc_BS[:, start : self.filled] = doc_BL
        return self.filled, self.doc_BS[:, : self.filled]


class LayerCache:
    """Keys and values of one layer, [2, B, H, S, K]."""

    def __init__(self, kv: torch.Tensor):
        self.kv, self.filled = kv, 0

    def extend(self, k_BHLK, v_BHLK):
        """Append the new tokens' keys and values; return all so far, [B, H, filled, K] each."""
        start, self.filled = self.filled, self.filled + k_BHLK.shape[2]
        self.kv[0, :, :, start : self.filled] = k_BHLK
        self.kv[1, :, :, start : self.filled] = v_BHLK
        return self.kv[:, :, :, : self.filled].unbind(0)


def rows_that_fit(layers: int, width: int, positions: int, itemsize: int, limit_mib: int) -> int:
    """Rows of `positions` tokens whose cache stays within limit_mib, at least one.

    >>> rows_that_fit(layers=32, width=4096, positions=256, itemsize=2, limit_mib=512)  # 7B5, fp16
    4
    """
    return max(1, limit_mib * 2**20 // (2 * layers * width * positions * itemsize))
