"""For the benches: a stopwatch and a memory meter, passed to train_step as `mark`.

`mark(phase)` ends the current phase and starts a new one. Time and memory need separate runs,
because the host must wait for the GPU to read a peak, and this wait would be measured as time.
"""

import time
from collections import defaultdict

import psutil
import torch


class Stopwatch:
    """Measures the seconds of each phase of a step. It uses CUDA events on a GPU, and the host's
    clock on a CPU. If a phase occurs several times in a step, its times are added."""

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
        """End the last phase, wait for the GPU, and return {phase: seconds}. Reset the stopwatch.
        """
        self("end")
        if self.cuda:
            torch.cuda.synchronize()
        seconds = defaultdict(float)
        for (phase, start), (_, end) in zip(self.points, self.points[1:], strict=False):
            seconds[phase] += start.elapsed_time(end) / 1e3 if self.cuda else end - start
        self.points = []
        return dict(seconds)


def device_gib() -> float:
    """GiB of GPU memory that all processes use, as the driver reports it."""
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**30


class MemoryMeter:
    """Peak GiB by phase: allocated by torch, reserved by torch, and used on the whole device.

    The memory used on the whole device includes CUDA's context, the optimizer's pages and other
    programs. The driver reports this value at the end of the phase. torch releases no memory within
    a phase, so the value is also the phase's peak. Without a GPU, the meter reads the process's
    resident memory at the end of each phase.
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
        """End the last phase and return {phase: {kind: peak GiB}}. Reset the meter."""
        self("end")
        peaks, self.peaks, self.phase = self.peaks, {}, None
        return peaks
