"""The key-value cache: its rows become longer and move to other places."""

import doctest

import torch
from oracle import lively_tensors, ours, random_ids, small_config

from phogpt_raw.model import cache as module
from phogpt_raw.model.cache import Piece, Step


def test_doctest():
    assert doctest.testmod(module).failed == 0


def filled(rows=3, positions=8):
    config = small_config(6)
    model = ours(config, lively_tensors(config)).eval()
    cache = model.new_cache(rows, positions)
    ids_BL = random_ids(config, rows, 6)
    with torch.no_grad():
        model(ids_BL, cache=Piece(cache))
    cache.place_B[:] = 6
    return model, cache, ids_BL


@torch.no_grad()
def test_a_cache_that_has_grown_holds_what_it_held():
    model, cache, ids_BL = filled()
    before = [kv.clone() for kv in cache.kv]
    cache.grow(20)
    assert cache.positions == 20
    for kv, old in zip(cache.kv, before, strict=True):
        assert torch.equal(kv[:, :, :, :8], old) and not kv[:, :, :, 8:].any()
    hidden = model(ids_BL[:, :1], cache=Step(cache, 3, 20))
    whole = model(torch.cat([ids_BL, ids_BL[:, :1]], 1))[:, -1:]
    torch.testing.assert_close(hidden, whole, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_row_that_is_moved_goes_on_as_it_would_have():
    model, cache, ids_BL = filled()
    cache.place_B[2] = 4  # row 2 gets shorter; its later positions are not read
    cache.move(2, 0)
    hidden = model(ids_BL[2:, 4:5], cache=Step(cache, 1, 8))
    torch.testing.assert_close(hidden, model(ids_BL[2:, :5])[:, -1:], rtol=0, atol=1e-5)
    assert cache.place_B.tolist() == [4, 6, 4]


@torch.no_grad()
def test_what_stands_behind_a_rows_end_is_not_seen():
    model, cache, ids_BL = filled()
    cache.place_B[:] = 3
    wanted = model(ids_BL[:, 3:4], cache=Step(cache, 3, 8))
    for kv in cache.kv:
        kv[:, :, :, 4:] = 1e4
    torch.testing.assert_close(model(ids_BL[:, 3:4], cache=Step(cache, 3, 8)), wanted)
