"""The trace of a step: which operations run, which bytes are alive from when to when, and for what.

trace.py records it. Weights and adapters are named there; what every other tensor is for follows
from the phase and the block that made it, and from whether it outlived that block's forward: saved
activations do, temporaries do not.
"""

from collections import defaultdict
from dataclasses import dataclass

from phogpt_raw.simulate.allocator import Allocator

KINDS = (
    "NF4 weights", "NF4 constants", "plain weights", "embedding", "norms and biases",
    "adapters", "adapters' copy", "adapters' gradients", "optimizer state",
    "saved activations", "attention bias", "loss", "recomputed", "temporaries",
    "rounding", "matmul workspace",
)


@dataclass(eq=False)
class Storage:
    """Bytes alive from operation `born` until before operation `died` (None: to the end)."""

    nbytes: int
    born: int
    phase: str
    scope: str
    kind: str | None = None
    died: int | None = None
    scope_end: int | None = None  # the operation at which the forward of its block was over


@dataclass(frozen=True)
class Op:
    """An operation that runs kernels: FLOPs of matrix products, bytes read and written."""

    name: str
    phase: str
    flops: float
    moved: int


@dataclass
class Moment:
    """What is alive at one operation, by kind, in bytes as the allocator counts them."""

    op: int
    phase: str
    allocated: int
    reserved: int
    kinds: dict[str, int]
    blocks: dict[str, int]  # saved activations by block


@dataclass
class Trace:
    """All that a step does, after the tensors that are there before it."""

    ops: list[Op]
    events: list[tuple[Storage, bool]]  # allocated (True) or freed; those before the step too
    begun: int  # the event that the step begins with
    pages: int  # bytes of the optimizer's state in CUDA's managed memory

    @property
    def resident(self) -> int:
        """Bytes of the tensors that are alive as the step begins."""
        return sum(s.nbytes if taken else -s.nbytes for s, taken in self.events[:self.begun])

    def replay(self, limit: float = float("inf"), workspace: int = 0, watch=None) -> Allocator:
        """The allocations through torch's allocator (imitated), its peaks those of the step.

        MemoryError where `limit` bytes are too few. workspace: bytes that torch takes for cuBLAS
        and keeps. `watch(allocator, n)` is called after each event n of the step.
        """
        allocator, blocks = Allocator(limit), {}
        if workspace:
            allocator.take(workspace)
        for n, (storage, taken) in enumerate(self.events):
            if n == self.begun:
                allocator.reset_peaks()
            if taken:
                blocks[storage] = allocator.take(storage.nbytes)
            else:
                allocator.give(blocks.pop(storage))
            if watch and n >= self.begun:
                watch(allocator, n)
        return allocator

    def peak(self, workspace: int = 0) -> Moment:
        """The moment of most allocated bytes, the first of them."""
        return max(self.moments(workspace), key=lambda m: m.allocated)

    def moments(self, workspace: int = 0) -> list[Moment]:
        """The step, an entry an operation for which something was taken."""
        found: dict[int, Moment] = {}
        kinds, by_block = defaultdict(int), defaultdict(int)
        kinds["matmul workspace"] = workspace

        def count(storage: Storage, sign: int) -> None:
            kind = kind_of(storage)
            kinds[kind] += sign * storage.nbytes
            if kind == "saved activations":
                by_block[storage.scope] += sign * storage.nbytes

        for storage, taken in self.events[:self.begun]:
            count(storage, 1 if taken else -1)

        def watch(allocator: Allocator, n: int) -> None:
            storage, taken = self.events[n]
            count(storage, 1 if taken else -1)
            op = storage.born if taken else storage.died
            before = found.get(op)
            if taken and (before is None or allocator.allocated > before.allocated):
                alive = {k: v for k, v in kinds.items() if v}
                alive["rounding"] = allocator.allocated - sum(alive.values())
                found[op] = Moment(op, storage.phase, allocator.allocated, allocator.reserved,
                                   alive, {k: v for k, v in by_block.items() if v})

        self.replay(workspace=workspace, watch=watch)
        return list(found.values())


def kind_of(storage: Storage) -> str:
    """What bytes are for: named, or from where they were made and how long they lived."""
    if storage.kind:
        return storage.kind
    if storage.phase == "forward":
        if storage.scope == "model":
            return "attention bias"
        if storage.scope == "":
            return "loss"
        outlived = storage.died is None or storage.died > storage.scope_end
        return "saved activations" if outlived else "temporaries"
    return "recomputed" if storage.scope else "temporaries"
