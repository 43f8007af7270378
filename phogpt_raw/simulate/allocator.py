"""Simulate torch's CUDA caching allocator, and count its allocated and reserved bytes.

The allocator requests segments of memory from the driver, and cuts blocks from them. For a new
block it uses the smallest free block that is large enough (best fit). A freed block is merged with
free neighbours. The allocator allocates more bytes than the tensors contain, for two reasons.
First, sizes are rounded up to multiples of 512 bytes. Second, in segments for sizes above 1 MiB, a
block is not split if the rest would have 1 MiB or less.

The constants and rules are those of c10/cuda/CUDACachingAllocator in torch 2.10 to 2.13, on one
stream and without PYTORCH_ALLOC_CONF.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass, field

MIB = 2**20
ROUND = 512  # the size of a block in bytes is a multiple of ROUND
SMALL = MIB  # blocks up to this size come from segments of 2 MiB
# Blocks above SMALL and below MEDIUM come from segments of 20 MiB. Larger blocks get a segment of
# their own.
MEDIUM = 10 * MIB
SEGMENTS = {"small": 2 * MIB, "medium": 20 * MIB}


@dataclass(eq=False)
class Block:
    """A piece of a segment, with links to the neighbouring pieces."""

    start: int
    size: int
    small: bool
    before: "Block | None" = field(default=None, repr=False)
    after: "Block | None" = field(default=None, repr=False)
    free: bool = False


class Allocator:
    """Allocates and frees blocks, and counts `allocated` and `reserved` bytes and their peaks.

    If a new segment would exceed `limit` reserved bytes, empty segments are first returned to the
    driver. If this does not free enough memory, MemoryError is raised.
    """

    def __init__(self, limit: float = float("inf")):
        self.limit = limit
        self.allocated = self.reserved = self.peak_allocated = self.peak_reserved = 0
        self.end = 0  # end of the addresses used so far
        self.cached: dict[bool, list[tuple[int, int, Block]]] = {True: [], False: []}

    def take(self, nbytes: int) -> Block:
        """Allocate a block of at least nbytes, from a cached block or from a new segment."""
        size = max(ROUND, -(-nbytes // ROUND) * ROUND)
        small = size <= SMALL
        cached = self.cached[small]
        place = bisect_left(cached, (size, -1))
        block = cached.pop(place)[2] if place < len(cached) else self.segment(size, small)
        block.free = False
        rest = block.size - size
        if rest >= ROUND if small else rest > SMALL:
            block.size = size
            other = Block(block.start + size, rest, small, block, block.after)
            if block.after:
                block.after.before = other
            block.after = other
            self.cache(other)
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return block

    def give(self, block: Block) -> None:
        """Free a block: merge it with free neighbours, and cache the result for later use."""
        self.allocated -= block.size
        for other in (block.before, block.after):
            if other is not None and other.free:
                self.cached[other.small].remove((other.size, other.start, other))
                block = joined(*((other, block) if other is block.before else (block, other)))
        self.cache(block)

    def segment(self, size: int, small: bool) -> Block:
        whole = (SEGMENTS["small"] if small else SEGMENTS["medium"] if size < MEDIUM
                 else -(-size // SEGMENTS["small"]) * SEGMENTS["small"])
        if self.reserved + whole > self.limit:
            self.empty_cache()
            if self.reserved + whole > self.limit:
                raise MemoryError
        self.reserved += whole
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        self.end += whole
        return Block(self.end - whole, whole, small)

    def cache(self, block: Block) -> None:
        block.free = True
        insort(self.cached[block.small], (block.size, block.start, block))

    def empty_cache(self) -> None:
        """Return to the driver all segments that contain no allocated block."""
        for small, cached in self.cached.items():
            whole = [entry for entry in cached if not (entry[2].before or entry[2].after)]
            self.reserved -= sum(size for size, _, _ in whole)
            self.cached[small] = [entry for entry in cached if entry not in whole]

    def reset_peaks(self) -> None:
        self.peak_allocated, self.peak_reserved = self.allocated, self.reserved


def joined(left: Block, right: Block) -> Block:
    """Merge two adjacent blocks into the left one, and return it."""
    left.size += right.size
    left.after = right.after
    if right.after:
        right.after.before = left
    return left
