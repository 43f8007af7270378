"""Seconds of a training step: how long will an item take?

    python bench/step_time.py                               PhoGPT-7B5 on a T4 and a V100
    python bench/step_time.py --data rows.jsonl --epochs 3  the items of a file, hours of a run
    python bench/step_time.py --measured --seq-len 512      on this GPU

The step is train.py's own. Without a GPU it is simulated for each card: every operation takes the
larger of its arithmetic and its memory at the rates that the card sustains. On a GPU it is measured
there, by phase and by kind of kernel, after warm-up, and simulated beside it. A setting that does
not fit is a row that says so.
"""

import re
import statistics
import time
from collections import defaultdict
from dataclasses import asdict, replace

import harness
import items
import torch
from simulated import OnCard, Plans, cards, resolved
from torch.profiler import ProfilerActivity, profile

from phogpt_raw.cards import KNOWN, Card, Rates, dtype_name
from phogpt_raw.console import out
from phogpt_raw.data.batches import Window
from phogpt_raw.data.prompt import Example
from phogpt_raw.meter import Stopwatch
from phogpt_raw.refusal import exits_cleanly
from phogpt_raw.roofline import Seconds, by_phase, step_seconds

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


def measure_here(options) -> None:
    """A table of this machine's times, on a GPU beside the simulation's."""
    bench = harness.Bench(options)
    out.print(harness.remark(bench))
    gpu = bench.card.device == "cuda"
    limit = ceiling(bench.dtype) if gpu else None
    plans = Plans(options, bench.dtype) if gpu else None
    card = replace(bench.card, memory_gib=options.cap or bench.card.memory_gib)
    known = next((k for k in KNOWN.values() if gpu and k.card.name == bench.card.name), None)
    if known:  # products at the rate that this very card holds in this dtype
        rates = replace(known.rates, matmul=(limit["sustained"],) * 2)
    table = harness.table(
        f"milliseconds, medians of {options.steps} steps",
        ["work", "recomp.", "forward", "backward", "clip", "optim.", "step", "20 %", "80 %",
         "tokens/s", *(["of matmul"] if gpu else []), *(["simul.", "apart"] if known else [])],
        caption="20 % and 80 %: quantiles of the step" + (
            f"; of matmul: the step's matmul FLOPs a second, of {limit['sustained'] / 1e12:.0f} "
            f"TFLOP/s that this card holds ({limit['short'] / 1e12:.0f} for a moment)"
            if gpu else ""),
    )
    split = harness.table("milliseconds of kernels in one step, by kind",
                          ["work", "recomp.", *FAMILIES, "other", "kernels"])
    settings = [resolved(plans, s, card) for s in harness.settings(options)]
    rows = []
    for setting, found in bench.rows(settings, measure):
        label = f"{setting.micro_batch} x {setting.seq_len}"
        row = asdict(setting) | {"rank": options.rank, "captured": options.capture and gpu,
                                 "fits": found is not None}
        if found is None:
            table.add_row(label, setting.recompute, "out of", "memory")
        else:
            taken, work, families, count = found
            low, step, high = quantiles([sum(t.values()) for t in taken])
            phases = {p: statistics.median(t[p] for t in taken) for p in PHASES}
            row |= {"step_s": step, "step_s_20": low, "step_s_80": high, "phases_s": phases,
                    "tokens_per_s": setting.tokens / step}
            cells = [f"{1e3 * s:.1f}" for s in (*phases.values(), step, low, high)]
            cells.append(f"{setting.tokens / step:,.0f}")
            if gpu:
                row |= {"matmul_flops": work, "kernels_s": families, "kernels": count,
                        "share_of_matmul": {k: work / step / v for k, v in limit.items()}}
                cells.append(f"{row['share_of_matmul']['sustained']:.0%}")
                split.add_row(label, setting.recompute, *(
                    f"{1e3 * families.get(name, 0):.1f}" for name in (*FAMILIES, "other")),
                    str(count))
            if known:
                seconds = step_seconds(plans.on(card, setting).plan.ops, rates)
                told = seconds.middle if options.capture else seconds.eager
                row["simulated_s"] = told
                cells += [f"{1e3 * told:.1f}", f"{told / step - 1:+.1%}"]
            table.add_row(label, setting.recompute, *cells)
        rows.append(row)
    out.print(table)
    if gpu:
        out.print(split)
    more = {}
    if options.data:
        examples, named = items.read(options)
        depth = plans.fit_rows(examples, card).recompute if gpu else 0
        more["items"] = told = items.estimate(options, examples, named,
                                              lambda window: (timed(bench, window, depth),))
        out.print(items.line(told))
    if options.save:
        file = harness.save("step_time", bench.card, options, bench.dtype, rows, **bench.told(),
                            matmul_flops_per_s=limit, **more)
        out.print(f"saved {file}")


def simulate(options) -> None:
    """A table for each card of --card: seconds from its better to its worse rates."""
    examples = items.read(options) if options.data else None
    for card, rates, plans in cards(options):
        out.print(f"simulated for {card.name}: {options.model}, {dtype_name(plans.dtype)}, rank "
                  f"{options.rank}, as CUDA graphs")
        table = harness.table("seconds of a step", [
            "work", "recomp.", "fits", "TFLOP", "GB", "seconds", "tokens/s", "s an item"],
            caption=f"GB: read and written. Rates: {rates.source}")
        rows = []
        for setting in harness.settings(options):
            found = plans.on(card, setting)
            rows.append(row := asdict(setting) | {"rank": options.rank} | simulated_row(
                found, rates))
            table.add_row(
                f"{setting.micro_batch} x {setting.seq_len}", str(found.recompute),
                "yes" if row["fits"] else "no", items.span([row["flops"] / 1e12]),
                f"{row['bytes_moved'] / 1e9:,.0f}", items.span(row["step_s"]),
                items.span(row["tokens_per_s"]), items.span(row["item_s"]))
        out.print(table)
        more = {}
        if examples:
            more["items"] = told = items.estimate(options, *examples,
                                                  windows(plans, card, rates, examples[0]))
            out.print(items.line(told))
        if options.save:
            file = harness.save("step_time", card, options, plans.dtype, rows,
                                source="simulated", loss_mib=options.loss_mib,
                                attention=options.attention, sources=rates.source, **more)
            out.print(f"saved {file}")


def simulated_row(found: OnCard, rates: Rates) -> dict:
    setting, seconds = found.setting, step_seconds(found.plan.ops, rates)
    both = ends(seconds)
    return {
        "blocks_recomputed": found.recompute, "fits": found.fits,
        "flops": sum(op.flops for op in found.plan.ops),
        "bytes_moved": sum(op.moved for op in found.plan.ops), "step_s": both,
        "tokens_per_s": [setting.tokens / s for s in both[::-1]],
        "item_s": [s / setting.micro_batch / setting.accumulate for s in both],
        "phases_s": {phase: ends(s) for phase, s in by_phase(found.plan.ops, rates).items()},
        "host_bound_eager": seconds.host_bound,
    }


def windows(plans: Plans, card: Card, rates: Rates, examples: list[Example]):
    """What gives (low, high) seconds of a step over a window of these examples on a card."""
    depth = plans.fit_rows(examples, card).recompute

    def seconds(window: Window) -> tuple[float, float]:
        return ends(step_seconds(plans.plan_of(window, depth, plans.kernel(card)).ops, rates))

    return seconds


def ends(seconds: Seconds) -> tuple[float, float]:
    return seconds.low, seconds.high


def timed(bench, window, recompute: int) -> float:
    """Median seconds of a step over one window, captured where the bench captures."""
    setting = harness.Setting(window.batches[0].ids_BL.shape[1], 1, 1, str(recompute))
    bench.begin(setting, capture=bench.options.capture)
    for _ in range(bench.options.warmup):
        bench.run(window)
    watch, taken = Stopwatch(), []
    for _ in range(bench.options.steps):
        bench.run(window, mark=watch)
        taken.append(sum(watch.read().values()))
    return statistics.median(taken)


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--steps", type=harness.count, default=10, help="timed steps a row")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--data", help="a file of rows: seconds an item, hours of a run")
    parser.add_argument("--epochs", type=float, default=3, help="passes over --data")
    parser.add_argument("--max-len", "--max_len", type=harness.count, default=1024)
    parser.add_argument("--tokenizer", help="that of --data's lengths: nano, a folder, a hub id "
                        "(default the model's; for 7b5 and 4b nano's)")
    options = harness.parse(parser, arguments)
    (measure_here if options.measured else simulate)(options)


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """(20 %, median, 80 %) of one or more values."""
    ordered = sorted(values)
    low, high = (ordered[min(len(ordered) - 1, int(q * len(ordered)))] for q in (0.2, 0.8))
    return low, statistics.median(values), high


if __name__ == "__main__":
    main()
