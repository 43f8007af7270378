"""How long a step would take on a GPU: each operation as long as its arithmetic or its memory.

The larger of FLOPs over the sustained rate and bytes over the sustained bandwidth, and a launch
(Williams et al. 2009, doi:10.1145/1498765.1498785). Left out: caches, overlap, and the difference
between matrix shapes, which share one rate. Where the host is slower than the GPU an eager step
takes at least the time that Python needs to launch its kernels.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from phogpt_raw.simulate.ledger import Op
from phogpt_raw.simulate.rates import Rates


@dataclass(frozen=True)
class Seconds:
    """Of a step at the card's better and worse rates; `host`: what Python needs eagerly."""

    low: float
    high: float
    host: tuple[float, float] = (0.0, 0.0)

    @property
    def middle(self) -> float:
        return (self.low + self.high) / 2

    @property
    def eager(self) -> float:
        """Of an eager step, in the middle: the card's time or the host's, whichever is longer."""
        return max(self.middle, sum(self.host) / 2)

    @property
    def host_bound(self) -> bool:
        """Whether an eager step waits for Python rather than for the card."""
        return self.host[0] > self.high


def op_seconds(op: Op, rates: Rates, at: int) -> float:
    """Of one operation at the low (0) or high (1) rates."""
    rate = rates.matmul[at] * (rates.attention[at] if "attention" in op.name else 1)
    return max(op.flops / rate, op.moved / rates.bandwidth[at]) + rates.launch[1 - at]


def step_seconds(ops: Iterable[Op], rates: Rates) -> Seconds:
    """Of a step that runs as CUDA graphs."""
    ops = list(ops)
    slow, fast = (sum(op_seconds(op, rates, at) for op in ops) for at in (0, 1))
    return Seconds(fast, slow, tuple(len(ops) * host for host in rates.host))


def by_phase(ops: Iterable[Op], rates: Rates) -> dict[str, Seconds]:
    """step_seconds of each phase."""
    phases: dict[str, list[Op]] = {}
    for op in ops:
        phases.setdefault(op.phase, []).append(op)
    return {phase: step_seconds(those, rates) for phase, those in phases.items()}
