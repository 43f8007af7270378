"""For step_time.py: a step's GPU kernels by kind, and the matmul rate that the GPU can sustain."""

import re
import time
from collections import defaultdict

import torch
from torch.profiler import ProfilerActivity, profile

# {family: a regular expression}. A kernel belongs to the first family whose expression is found in
# the kernel's name.
FAMILIES = {
    "attention": r"sdpa|fmha|flash|attention|cudnn.*(dot_do_o|convert_dq)",
    "NF4 to 16 bits": r"nf4|[dD]equantize",
    "matmul": r"nvjet|gemm|gemv|splitK|cublas|wgmma|hmma",
    "optimizer": r"kOptimizer",
    "norm": r"layer_norm",
    "GELU": r"[gG]elu",
    "copy": r"[mM]emcpy|[mM]emset|copy|Cat|[fF]ill",
    "elementwise": r"elementwise|reduce|softmax|SoftMax|scatter|gather|index",
}


def kernels(bench, window) -> tuple[dict[str, float], int]:
    """Return ({family: seconds of its kernels in a step}, number of all kernels).

    The step is slower than usual, because the profiler runs.
    """
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        bench.run(window)
        torch.cuda.synchronize()
    families, count = defaultdict(float), 0
    for event in seen.key_averages():
        families[family(event.key)] += event.self_device_time_total / 1e6
        count += event.count
    return dict(families), count


def family(kernel: str) -> str:
    """The family of a kernel, by its name.

    >>> family("void cublasLt::splitKreduce_kernel<32>"), family("fmha_cutlassF_f16_aligned")
    ('matmul', 'attention')
    """
    return next((name for name, pattern in FAMILIES.items() if re.search(pattern, kernel)), "other")


def ceiling(dtype: torch.dtype, size: int = 8192, seconds: float = 2.0) -> dict[str, float]:
    """FLOP/s of matmuls of two size x size matrices on this GPU.

    `short` is the rate of the first ten matmuls. `sustained` is the rate after about `seconds`
    seconds of matmuls, when the GPU is warm.
    """
    a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))

    def rate(count: int) -> float:
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(count):
            a @ b
        torch.cuda.synchronize()
        return 2 * size**3 * count / (time.perf_counter() - begun)

    rate(3)
    short = rate(10)
    rate(int(seconds * short / (2 * size**3)))
    return {"short": short, "sustained": rate(200)}
