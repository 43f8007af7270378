"""A stopwatch and a memory meter for the phases of a step: `mark` callables for train_step.

`mark(phase)` ends the phase before and begins a new one. Time and memory are two runs: to read a
peak the host must wait for the GPU, which would count as time.
"""

import time
from collections import defaultdict

import psutil
import torch


class Stopwatch:
    """Seconds by phase, summed over a step: CUDA events on a GPU, the host's clock elsewhere."""

    def __init__(self):
        self.cuda = torch.cuda.is_available()
        self.points = []

    def __call__(self, phase: str) -> None:
        if self.cuda:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self.points.append((phase, now))

    def read(self) -> dict[str, float]:
        """End the last phase, wait for the GPU, return seconds by phase and begin anew."""
        self("end")
        if self.cuda:
            torch.cuda.synchronize()
        seconds = defaultdict(float)
        for (phase, start), (_, end) in zip(self.points, self.points[1:], strict=False):
            seconds[phase] += start.elapsed_time(end) / 1e3 if self.cuda else end - start
        self.points = []
        return dict(seconds)


def device_gib() -> float:
    """GPU memory in use by all processes, as the driver counts it."""
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**30


class MemoryMeter:
    """GiB by phase: peaks of torch's allocator and of what it has reserved, and the whole device.

    The whole device is what the driver counts as used at the phase's end, CUDA context, paged
    optimizer state and other programs included: torch gives nothing back within a phase, so that is
    its peak too. Without a GPU it is the process's resident memory at each phase's end.
    """

    def __init__(self):
        self.cuda = torch.cuda.is_available()
        self.phase = None
        self.peaks: dict[str, dict[str, float]] = {}

    def __call__(self, phase: str) -> None:
        if self.phase is not None:
            seen = self.peaks.setdefault(self.phase, {})
            for kind, gib in self.sample().items():
                seen[kind] = max(seen.get(kind, 0.0), gib)
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        self.phase = phase

    def sample(self) -> dict[str, float]:
        if not self.cuda:
            return {"resident": psutil.Process().memory_info().rss / 2**30}
        torch.cuda.synchronize()
        return {
            "allocated": torch.cuda.max_memory_allocated() / 2**30,
            "reserved": torch.cuda.max_memory_reserved() / 2**30,
            "device": device_gib(),
        }

    def read(self) -> dict[str, dict[str, float]]:
        """End the last phase and return {phase: {kind: peak GiB}}, beginning anew."""
        self("end")
        peaks, self.peaks, self.phase = self.peaks, {}, None
        return peaks
