"""For peer.py, epoch.py and decode.py: run a side of a comparison in its own process.

In the bench, a `Side` starts `python -m <module> …` as a new process and sends it requests. In the
new process, the module calls `serve`, which answers the requests. Requests and results are lines of
JSON. The measurements do not include the time to start a process and to load its weights. The
memory of each side is measured separately.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench.measure import limit_torch_to
from bench.meter import device_gib
from phogpt_raw.refusal import Refusal

ROOT = Path(__file__).parents[1]


class Side:
    """The process of a side. context_gib: GiB of GPU memory that the process uses outside torch's
    allocator."""

    def __init__(self, name: str, module: str, *arguments: str, **environment: str):
        self.name = name
        before = device_gib()
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | environment)
        self.context_gib = self.read()["beside_gib"] - before

    def read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise Refusal(f"the process of {self.name} ended; see its error above")
        return json.loads(line)

    def run(self, **order) -> dict:
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return self.read()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def serve(make: Callable, run: Callable[..., dict]) -> None:
    """Read requests from standard input, call run(side, **request) for each, and write its result
    and its peak GiB to standard output.

    make: a function that builds the side. `cap_gib` in a request: the GiB that torch may allocate;
    0: no limit.
    """
    answers, sys.stdout = sys.stdout, sys.stderr
    side = make()
    print(json.dumps({"beside_gib": side.context_gib}), file=answers, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        limit_torch_to(order.pop("cap_gib"))
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            found = run(side, **order)
            answer = {"allocated_gib": torch.cuda.max_memory_allocated() / 2**30,
                      "reserved_gib": torch.cuda.max_memory_reserved() / 2**30} | found
        except torch.OutOfMemoryError:
            answer = {"out_of_memory": True}
        side.release()
        print(json.dumps(answer), file=answers, flush=True)


def now() -> float:
    """Wait for the GPU; return the seconds of the host's clock."""
    torch.cuda.synchronize()
    return time.perf_counter()
