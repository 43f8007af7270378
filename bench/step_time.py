"""Seconds of a training step, by phase and by kind of kernel, on the machine at hand.

    python bench/step_time.py                                          nano
    python bench/step_time.py --model 7b5 --seq-len 512,1024 --save    PhoGPT-7B5's shape, on a GPU

The step is train.py's own, after warm-up. A setting that does not fit is a row that says so.
"""

import re
import statistics
import time
from collections import defaultdict
from dataclasses import asdict

import harness
import torch
from torch.profiler import ProfilerActivity, profile

from phogpt_raw.console import out
from phogpt_raw.meter import Stopwatch
from phogpt_raw.refusal import exits_cleanly

PHASES = ("forward", "backward", "clip", "optimizer")
# the first pattern that a kernel's name holds is its family
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


def measure(bench, setting, window):
    """({phase: seconds} of each timed step, its matmul FLOPs, {family: seconds} of one step more,
    the kernels in it)."""
    bench.begin(setting, capture=bench.options.capture)
    for _ in range(bench.options.warmup):
        bench.run(window)
    watch = Stopwatch()
    taken = []
    for _ in range(bench.options.steps):
        bench.run(window, mark=watch)
        taken.append(watch.read())
    on_gpu = kernels(bench, window) if bench.card.device == "cuda" else ({}, 0)
    return taken, flops(bench, setting, window), *on_gpu


def kernels(bench, window) -> tuple[dict[str, float], int]:
    """{family: seconds} of a step's kernels, and their number; the profiler slows the step."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        bench.run(window)
        torch.cuda.synchronize()
    families, count = defaultdict(float), 0
    for event in seen.key_averages():
        families[family(event.key)] += event.self_device_time_total / 1e6
        count += event.count
    return dict(families), count


def family(kernel: str) -> str:
    """
    >>> family("void cublasLt::splitKreduce_kernel<32>"), family("fmha_cutlassF_f16_aligned")
    ('matmul', 'attention')
    """
    return next((name for name, pattern in FAMILIES.items() if re.search(pattern, kernel)), "other")


def ceiling(dtype: torch.dtype, size: int = 8192, seconds: float = 2.0) -> dict[str, float]:
    """FLOP/s of size³ matmuls on this GPU: ten after a rest, and once it is as warm as in a run."""
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


def flops(bench, setting, window) -> float:
    """Matmul FLOPs of a step: 4 a weight of the blocks and token (6 where recomputed: forward
    again), 4 a weight of the head and supervised row; frozen weights have no gradient."""
    config = bench.model.config
    block = (4 + 2 * config.expansion_ratio) * config.d_model**2
    again = bench.model.recompute / config.n_layers
    tokens = setting.tokens * config.n_layers * block * (4 + 2 * again)
    return tokens + 4 * window.supervised * config.vocab_size * config.d_model


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--steps", type=harness.count, default=10, help="timed steps a row")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    options = parser.parse_args(arguments)
    bench = harness.Bench(options)
    out.print(harness.remark(bench))
    gpu = bench.card.device == "cuda"
    limit = ceiling(bench.dtype) if gpu else None
    table = harness.table(
        f"milliseconds, medians of {options.steps} steps",
        ["work", "recomp.", "forward", "backward", "clip", "optim.", "step", "20 %", "80 %",
         "tokens/s", *(["of matmul"] if gpu else [])],
        caption="20 % and 80 %: quantiles of the step" + (
            f"; of matmul: the step's matmul FLOPs a second, of {limit['sustained'] / 1e12:.0f} "
            f"TFLOP/s that this card holds ({limit['short'] / 1e12:.0f} for a moment)"
            if gpu else ""),
    )
    split = harness.table("milliseconds of kernels in one step, by kind",
                          ["work", "recomp.", *FAMILIES, "other", "kernels"])
    rows = []
    for setting, found in bench.rows(harness.settings(options), measure):
        label = f"{setting.micro_batch} x {setting.seq_len}"
        row = asdict(setting) | {"captured": options.capture and gpu, "fits": found is not None}
        if found is None:
            table.add_row(label, setting.recompute, "out of", "memory")
        else:
            taken, work, families, count = found
            low, step, high = quantiles([sum(t.values()) for t in taken])
            phases = {p: statistics.median(t[p] for t in taken) for p in PHASES}
            row |= {"step_s": step, "step_s_20": low, "step_s_80": high, "phases_s": phases,
                    "tokens_per_s": setting.tokens / step}
            times = [f"{1e3 * s:.1f}" for s in (*phases.values(), step, low, high)]
            share = []
            if gpu:
                row |= {"matmul_flops": work, "kernels_s": families, "kernels": count,
                        "share_of_matmul": {k: work / step / v for k, v in limit.items()}}
                share = [f"{row['share_of_matmul']['sustained']:.0%}"]
                split.add_row(label, setting.recompute, *(
                    f"{1e3 * families.get(name, 0):.1f}" for name in (*FAMILIES, "other")),
                    str(count))
            table.add_row(label, setting.recompute, *times, f"{setting.tokens / step:,.0f}", *share)
        rows.append(row)
    out.print(table)
    if gpu:
        out.print(split)
    if options.save:
        file = harness.save("step_time", bench.card, options, rows, **bench.told(),
                            matmul_flops_per_s=limit)
        out.print(f"saved {file}")


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """(20 %, median, 80 %) of one or more values."""
    ordered = sorted(values)
    low, high = (ordered[min(len(ordered) - 1, int(q * len(ordered)))] for q in (0.2, 0.8))
    return low, statistics.median(values), high


if __name__ == "__main__":
    main()
