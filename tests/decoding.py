"""Helpers for the tests of one-token decoding steps.

They fill a key-value cache with prompts and compare a fast step with the model's own forward.
"""

import torch

from phogpt_raw.model.cache import Piece


def filled(model, lengths=(7, 3, 12), rows=None, positions=20):
    """A key-value cache whose first rows hold random prompts of these lengths."""
    device = model.head.device
    cache = model.new_cache(rows or len(lengths), positions)
    dice = torch.Generator().manual_seed(0)
    for n, length in enumerate(lengths):
        ids = torch.randint(4, 4096, (1, length), generator=dice).to(device)
        model(ids, cache=Piece(cache, first=n))
    cache.place_B[: len(lengths)] = torch.tensor(lengths, device=device)
    return cache


def reads_as_the_models_forward(model, step_over) -> None:
    """Assert that the fast step and the model's forward agree if a prompt is read in two pieces.

    Hidden states, keys and values must agree within fp32 rounding. `step_over(cache)` returns the
    fast step.
    """
    mine, other = model.new_cache(3, 30), model.new_cache(3, 30)
    fast = step_over(mine)
    ids_BL = torch.randint(4, 4096, (2, 25), generator=torch.Generator().manual_seed(0))
    for start, stop in ((0, 16), (16, 25)):
        found = fast.read(ids_BL[:, start:stop], Piece(mine, 1, start))
        wanted = model(ids_BL[:, start:stop], cache=Piece(other, 1, start))
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))
    holds_the_same(mine, other)


def holds_the_same(mine, other) -> None:
    for a, b in zip(mine.kv, other.kv, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def switch_adapters_off(model) -> None:
    for layer in model.modules():
        if hasattr(layer, "enable_adapters"):
            layer.enable_adapters(False)
