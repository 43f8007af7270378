"""The simulated allocator: each of its rules, and a comparison with torch's allocator on a GPU."""

import gc
import random
from itertools import pairwise

import pytest
import torch

from phogpt_raw.simulate.allocator import Allocator

KIB, MIB = 2**10, 2**20


def filled(*sizes):
    """An allocator and its allocated blocks, in the order of `sizes`."""
    allocator = Allocator()
    return allocator, [allocator.take(size) for size in sizes]


@pytest.mark.parametrize("nbytes, counted", [(1, 512), (512, 512), (513, 1024), (MIB - 1, MIB),
                                             (3 * MIB + 1, 3 * MIB + 512)])
def test_what_is_taken_is_rounded_up_to_512_bytes(nbytes, counted):
    assert filled(nbytes)[0].allocated == counted


@pytest.mark.parametrize("nbytes, segment", [
    (1, 2 * MIB), (MIB, 2 * MIB),                        # small blocks
    (MIB + 1, 20 * MIB), (10 * MIB - 512, 20 * MIB),
    (10 * MIB - 511, 10 * MIB),                          # rounded up to 10 MiB: in its own segment
    (10 * MIB, 10 * MIB), (10 * MIB + 1, 12 * MIB), (33 * MIB, 34 * MIB),
])
def test_a_segment_is_of_2_of_20_or_of_whole_2_mib(nbytes, segment):
    assert filled(nbytes)[0].reserved == segment


def test_small_blocks_share_segments():
    allocator, _ = filled(*[512 * KIB] * 4)
    assert allocator.reserved == 2 * MIB
    allocator.take(1)
    assert allocator.reserved == 4 * MIB


def test_small_and_large_blocks_never_share():
    allocator, (large,) = filled(5 * MIB)
    allocator.give(large)
    allocator.take(MIB)
    assert allocator.reserved == 22 * MIB


@pytest.mark.parametrize("rest, cut", [(MIB, False), (MIB + 512, True)])
def test_a_large_block_is_cut_where_more_than_a_mib_is_left(rest, cut):
    allocator, _ = filled(9 * MIB)  # 11 of the segment's 20 MiB are free
    before = allocator.allocated
    allocator.take(11 * MIB - rest)
    assert allocator.allocated - before == 11 * MIB - (rest if cut else 0)


def test_a_small_block_is_always_cut():
    allocator, _ = filled(MIB, MIB - 512)
    assert allocator.allocated == 2 * MIB - 512
    allocator.take(512)
    assert allocator.allocated == allocator.reserved == 2 * MIB


def test_the_smallest_free_block_that_is_large_enough_is_taken():
    allocator, (five, _, three, _) = filled(5 * MIB, 2 * MIB, 3 * MIB, 2 * MIB)  # in one segment
    allocator.give(five)
    allocator.give(three)
    assert allocator.take(int(2.5 * MIB)).start == three.start
    assert allocator.take(int(4.5 * MIB)).start == five.start
    assert allocator.reserved == 20 * MIB


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 0, 2)])
def test_freed_neighbours_are_joined_and_used_again(order):
    allocator, blocks = filled(*[5 * MIB] * 3)
    for n in order:
        allocator.give(blocks[n])
    assert allocator.allocated == 0
    whole = allocator.take(19 * MIB)
    assert (whole.start, whole.size, allocator.reserved) == (0, 20 * MIB, 20 * MIB)


def test_what_is_in_use_is_not_joined():
    allocator, (first, _, third) = filled(*[6 * MIB] * 3)
    allocator.give(first)
    allocator.give(third)  # merges with the last 2 MiB, which are free
    allocator.take(9 * MIB)  # larger than each of the two free blocks (6 and 8 MiB)
    assert allocator.reserved == 40 * MIB


def test_peaks_stay_and_begin_again_from_what_is_there():
    allocator, (first, second) = filled(4 * MIB, 30 * MIB)
    allocator.give(second)
    allocator.empty_cache()
    assert (allocator.peak_allocated, allocator.peak_reserved) == (34 * MIB, 50 * MIB)
    allocator.reset_peaks()
    assert (allocator.peak_allocated, allocator.peak_reserved) == (4 * MIB, 20 * MIB)
    allocator.give(first)
    allocator.take(MIB + 1)
    assert (allocator.peak_allocated, allocator.peak_reserved) == (4 * MIB, 20 * MIB)


def test_only_segments_that_nothing_is_in_are_given_back():
    allocator, (first, second, _, small) = filled(6 * MIB, 16 * MIB, 2 * MIB, 100)
    for block in (first, second, small):  # the third block shares a segment with the first
        allocator.give(block)
    assert allocator.reserved == (20 + 16 + 2) * MIB
    allocator.empty_cache()
    assert (allocator.allocated, allocator.reserved) == (2 * MIB, 20 * MIB)
    assert allocator.take(5 * MIB).start == first.start  # from the remaining segment
    assert allocator.reserved == 20 * MIB


def test_at_the_limit_what_is_cached_goes_first_and_then_it_fails():
    allocator = Allocator(limit=24 * MIB)
    allocator.give(allocator.take(5 * MIB))
    allocator.take(MIB)
    assert allocator.reserved == 22 * MIB
    allocator.take(22 * MIB)  # fits only after the empty segment of 20 MiB is freed
    assert allocator.reserved == 24 * MIB
    allocator.take(MIB)  # needs no new segment
    with pytest.raises(MemoryError):
        allocator.take(1)
    assert (allocator.allocated, allocator.reserved) == (24 * MIB, 24 * MIB)


def random_series(count, seed=0):
    """A random sequence of (bytes to allocate, None) and (None, index of an allocation to free)."""
    dice, taken = random.Random(seed), 0
    for _ in range(count):
        if taken and dice.random() < 0.48:
            yield None, dice.randrange(taken)
            taken -= 1
        else:
            yield dice.randrange(1, dice.choice([2000, MIB, 12 * MIB, 30 * MIB])), None
            taken += 1


def test_after_any_series_segments_are_whole_and_no_two_free_neighbours_are_left():
    allocator, taken = Allocator(), []
    for nbytes, which in random_series(2000):
        if nbytes:
            taken.append(allocator.take(nbytes))
            assert taken[-1].size >= nbytes
        else:
            allocator.give(taken.pop(which))
        free = [block for cached in allocator.cached.values() for _, _, block in cached]
        assert allocator.allocated == sum(block.size for block in taken)
        assert allocator.reserved == allocator.allocated + sum(block.size for block in free)
    places = sorted((*taken, *free), key=lambda block: block.start)
    for block, following in pairwise(places):
        assert block.start + block.size == following.start
        assert (block.after is following) == (following.before is block)
        assert not (block.free and following.free and block.after is following)
    for block in taken:
        allocator.give(block)
    allocator.empty_cache()
    assert (allocator.allocated, allocator.reserved) == (0, 0)


@pytest.mark.gpu
def test_torchs_own_allocator_counts_the_same_at_every_point():
    allocator, taken = Allocator(), []
    gc.collect()  # frees objects of other tests now and not in the middle of this test
    pool = torch.cuda.MemPool()  # the default pool has memory of other tests
    torch.cuda.empty_cache()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    with torch.cuda.use_mem_pool(pool):
        for nbytes, which in random_series(1500):
            if nbytes:
                tensor = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
                taken.append((tensor, allocator.take(nbytes)))
            else:
                tensor, block = taken.pop(which)
                allocator.give(block)
            del tensor
            assert torch.cuda.memory_allocated() - allocated == allocator.allocated
            assert torch.cuda.memory_reserved() - reserved == allocator.reserved
