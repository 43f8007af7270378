"""Estimate the time of a step on a GPU from its operations, by the roofline model.

The model is from Williams et al. 2009, doi:10.1145/1498765.1498785. The time of an operation's
arithmetic is its FLOPs divided by the sustained rate. The time of its memory traffic is its bytes
divided by the sustained bandwidth. The operation takes the longer of these two times, plus the time
of a launch. Caches are not modelled, and operations do not overlap. The rate of matrix products is
assumed to be the same for all shapes. An eager step takes at least the time that Python needs to
launch its kernels.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from phogpt_raw.simulate.ledger import Op
from phogpt_raw.simulate.rates import Rates


@dataclass(frozen=True)
class Seconds:
    """The time of a step, in seconds.

    low: at the card's higher rates. high: at the card's lower rates. host: (low, high) of the time
    that Python needs to launch the step's kernels eagerly.
    """

    low: float
    high: float
    host: tuple[float, float] = (0.0, 0.0)

    @property
    def middle(self) -> float:
        return (self.low + self.high) / 2

    @property
    def eager(self) -> float:
        """Seconds of an eager step: the mean time of the GPU or the mean time of the host,
        whichever is longer."""
        return max(self.middle, sum(self.host) / 2)

    @property
    def host_bound(self) -> bool:
        """Whether the GPU waits for Python in an eager step, even at the GPU's lower rates and with
        the shorter time of the host."""
        return self.host[0] > self.high


def op_seconds(op: Op, rates: Rates, at: int) -> float:
    """Seconds of one operation, at the card's low rates (at = 0) or high rates (at = 1)."""
    rate = rates.matmul[at] * (rates.attention[at] if "attention" in op.name else 1)
    return max(op.flops / rate, op.moved / rates.bandwidth[at]) + rates.launch[1 - at]


def step_seconds(ops: Iterable[Op], rates: Rates) -> Seconds:
    """Seconds of a step that runs as CUDA graphs."""
    ops = list(ops)
    slow, fast = (sum(op_seconds(op, rates, at) for op in ops) for at in (0, 1))
    return Seconds(fast, slow, tuple(len(ops) * host for host in rates.host))


def by_phase(ops: Iterable[Op], rates: Rates) -> dict[str, Seconds]:
    """The result of step_seconds for each phase."""
    phases: dict[str, list[Op]] = {}
    for op in ops:
        phases.setdefault(op.phase, []).append(op)
    return {phase: step_seconds(those, rates) for phase, those in phases.items()}
