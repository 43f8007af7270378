"""The trace of a step: its operations, and each tensor's storage with its lifetime and purpose.

trace.py records the trace, and names the purpose of each storage that exists before the step. The
purpose of every other storage follows from the phase and the block that created it, and from its
lifetime. A saved activation still exists when the forward of the block that created it has ended. A
temporary is freed before that forward ends.
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
    """The memory of a tensor. It exists from operation `born` until just before operation `died`.

    died: None if the storage exists until the end of the step. scope: the name of the module that
    created it, such as "block 0"; "" outside the model.
    """

    nbytes: int
    born: int
    phase: str
    scope: str
    kind: str | None = None
    died: int | None = None
    scope_end: int | None = None  # the operation at which the forward of the module `scope` ended


@dataclass(frozen=True)
class Op:
    """An operation that runs kernels. flops: FLOPs of its matrix products. moved: bytes that it
    reads and writes."""

    name: str
    phase: str
    flops: float
    moved: int


@dataclass
class Moment:
    """The memory in use at one operation, in bytes. allocated and reserved: as the allocator counts
    them. kinds: bytes of each kind of storage."""

    op: int
    phase: str
    allocated: int
    reserved: int
    kinds: dict[str, int]
    blocks: dict[str, int]  # bytes of saved activations by block


@dataclass
class Trace:
    """All operations of a step, and all storages, including storages from before the step."""

    ops: list[Op]
    events: list[tuple[Storage, bool]]  # True: allocated, False: freed
    begun: int  # index of the first event of the step
    pages: int  # bytes of the optimizer's state in CUDA's managed memory

    @property
    def resident(self) -> int:
        """Bytes of the tensors that exist before the step."""
        return sum(s.nbytes if taken else -s.nbytes for s, taken in self.events[:self.begun])

    def replay(self, limit: float = float("inf"), workspace: int = 0, watch=None) -> Allocator:
        """Replay the allocations through the simulated allocator; its peaks are those of the step.

        Raises MemoryError if `limit` bytes are too few. workspace: bytes that torch allocates for
        cuBLAS and keeps. watch(allocator, n): a function that is called after each event n of the
        step.
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
        """The first moment at which the most bytes are allocated."""
        return max(self.moments(workspace), key=lambda m: m.allocated)

    def moments(self, workspace: int = 0) -> list[Moment]:
        """The memory at each operation that allocates memory, in the order of the step."""
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
    """The recorded kind of a storage. If none is recorded, the kind follows from the storage's
    phase, block and lifetime."""
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
