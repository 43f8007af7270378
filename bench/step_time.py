"""Seconds of a training step: how long will an item take?

    python bench/step_time.py                               PhoGPT-7B5 on a T4 and a V100
    python bench/step_time.py --data rows.jsonl --epochs 3  the items of a file, hours of a run
    python bench/step_time.py --measured --seq-len 512      on this GPU

The step is train.py's own. Without a GPU it is simulated for each card: every operation takes the
larger of its arithmetic and its memory at the rates that the card sustains. On a GPU it is measured
there, by phase and by kind of kernel, after warm-up, and simulated beside it. A setting that does
not fit is a row that says so.
"""

import statistics
from dataclasses import asdict, dataclass, replace

import torch

from bench import command_line as commandline
from bench import harness, items
from bench.command_line import Setting, count
from bench.gpu_kernels import FAMILIES, ceiling, kernels
from bench.meter import Stopwatch
from bench.simulated import OnCard, Plans, cards, resolved
from phogpt_raw.cards import Card, dtype_name
from phogpt_raw.data.batches import Window
from phogpt_raw.data.prompt import Example
from phogpt_raw.refusal import Refusal, exits_cleanly
from phogpt_raw.show.console import out
from phogpt_raw.simulate.rates import KNOWN, Rates
from phogpt_raw.simulate.roofline import Seconds, by_phase, step_seconds

PHASES = ("forward", "backward", "clip", "optimizer")


@dataclass(frozen=True)
class Measured:
    """Seconds by phase of each timed step; whether it ran as graphs; its matmul FLOPs; kernels of
    one step more."""

    phases: list[dict[str, float]]
    captured: bool
    flops: float
    kernels_s: dict[str, float]
    kernels: int


def timed(bench, setting, window) -> list[dict[str, float]]:
    """Seconds by phase of each of --steps steps, after --warmup others."""
    bench.begin(setting, capture=bench.options.capture)
    for _ in range(bench.options.warmup):
        bench.run(window)
    watch, taken = Stopwatch(), []
    for _ in range(bench.options.steps):
        bench.run(window, mark=watch)
        taken.append(watch.read())
    return taken


def measure(bench, setting, window) -> Measured:
    phases = timed(bench, setting, window)
    on_gpu = kernels(bench, window) if bench.card.device == "cuda" else ({}, 0)
    return Measured(phases, bench.captured, flops(bench, setting, window), *on_gpu)


def whole(phases: list[dict[str, float]]) -> list[float]:
    """Seconds of each step."""
    return [sum(seconds.values()) for seconds in phases]


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
    examples = items.read(options) if options.data else None  # a bad file before an hour's work
    bench = harness.Bench(options)
    out.print(harness.remark(bench))
    gpu = bench.card.device == "cuda"
    limit = ceiling(bench.dtype) if gpu else None
    plans = Plans(options, bench.dtype) if gpu else None
    card = replace(bench.card, memory_gib=options.cap or bench.card.memory_gib)
    known = next((k for k in KNOWN.values() if gpu and k.card.name == bench.card.name), None)
    # products at the rate that this very card holds in this dtype
    rates = known and replace(known.rates, matmul=(limit["sustained"],) * 2)
    settings = [resolved(plans, s, card) for s in commandline.settings(options)]
    rows = []
    for setting, found in bench.rows(settings, measure):
        row = asdict(setting) | {"rank": options.rank, "fits": found is not None}
        if found is not None:
            row |= measured_row(setting, found, limit)
            if rates:
                seconds = step_seconds(plans.on(card, setting).plan.ops, rates)
                row["simulated_s"] = seconds.middle if found.captured else seconds.eager
        rows.append(row)
    show(rows, options, limit)
    more = {}
    if examples:
        depth = str(plans.fit_rows(examples[0], card).recompute) if gpu else options.recompute
        more["items"] = told = items.estimate(options, *examples, timing(bench, depth))
        out.print(items.line(told))
    if options.save:
        file = harness.save("step_time", bench.card, options, bench.dtype, rows, **bench.told(),
                            matmul_flops_per_s=limit, **more)
        out.print(f"saved {file}")


def measured_row(setting, found: Measured, limit: dict | None) -> dict:
    low, step, high = quantiles(whole(found.phases))
    row = {"captured": found.captured, "step_s": step, "step_s_20": low, "step_s_80": high,
           "phases_s": {p: statistics.median(t[p] for t in found.phases) for p in PHASES},
           "tokens_per_s": setting.tokens / step}
    if limit:
        row |= {"matmul_flops": found.flops, "kernels_s": found.kernels_s, "kernels": found.kernels,
                "share_of_matmul": {k: found.flops / step / v for k, v in limit.items()}}
    return row


def show(rows: list[dict], options, limit: dict | None) -> None:
    """The rows as a table, and on a GPU another of the kernels."""
    known = any("simulated_s" in row for row in rows)
    table = harness.table(
        f"milliseconds, medians of {options.steps} steps",
        ["work", "recomp.", "forward", "backward", "clip", "optim.", "step", "20 %", "80 %",
         "tokens/s", *(["of matmul"] if limit else []), *(["simul.", "apart"] if known else [])],
        caption="20 % and 80 %: quantiles of the step" + (
            f"; of matmul: the step's matmul FLOPs a second, of {limit['sustained'] / 1e12:.0f} "
            f"TFLOP/s that this card holds ({limit['short'] / 1e12:.0f} for a moment)"
            if limit else ""),
    )
    split = harness.table("milliseconds of kernels in one step, by kind",
                          ["work", "recomp.", *FAMILIES, "other", "kernels"])
    for row in rows:
        label = f"{row['micro_batch']} x {row['seq_len']}", row["recompute"]
        if not row["fits"]:
            table.add_row(*label, "out of", "memory")
            continue
        cells = [f"{1e3 * s:.1f}" for s in (*row["phases_s"].values(), row["step_s"],
                                            row["step_s_20"], row["step_s_80"])]
        cells.append(f"{row['tokens_per_s']:,.0f}")
        if limit:
            cells.append(f"{row['share_of_matmul']['sustained']:.0%}")
            split.add_row(*label, *(f"{1e3 * row['kernels_s'].get(name, 0):.1f}"
                                    for name in (*FAMILIES, "other")), str(row["kernels"]))
        if "simulated_s" in row:
            cells += [f"{1e3 * row['simulated_s']:.1f}",
                      f"{row['simulated_s'] / row['step_s'] - 1:+.1%}"]
        table.add_row(*label, *cells)
    out.print(table)
    if limit:
        out.print(split)


def simulate(options) -> None:
    """A table for each card of --card: seconds from its better to its worse rates."""
    examples = items.read(options) if options.data else None
    for card, rates, plans in cards(options):
        if plans.dtype == torch.float32:
            raise Refusal("--dtype fp32: the rates of the cards are of 16-bit products; leave the "
                          "flag out")
        out.print(f"simulated for {card.name}: {options.model}, {dtype_name(plans.dtype)}, rank "
                  f"{options.rank}, as CUDA graphs")
        table = harness.table("seconds of a step", [
            "work", "recomp.", "fits", "TFLOP", "GB", "seconds", "tokens/s", "s an item"],
            caption=f"GB: read and written. *: eagerly (--no-capture) Python is slower than this "
                    f"card. Rates: {rates.source}")
        rows = []
        for setting in commandline.settings(options):
            found = plans.on(card, setting)
            rows.append(row := asdict(setting) | {"rank": options.rank} | simulated_row(
                found, rates))
            table.add_row(
                f"{setting.micro_batch} x {setting.seq_len}", str(found.recompute),
                "yes" if row["fits"] else "no", items.span([row["flops"] / 1e12]),
                f"{row['bytes_moved'] / 1e9:,.0f}",
                items.span(row["step_s"]) + "*" * row["host_bound_eager"],
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


def timing(bench, recompute: str):
    """What gives the median seconds of a step over a window here, None where it does not fit."""
    def seconds(window: Window) -> tuple[float] | None:
        rows, length = window.batches[0].ids_BL.shape
        setting = resolved(None, Setting(length, rows, 1, recompute), bench.card)
        phases = bench.attempt(timed, setting, window)
        return phases and (statistics.median(whole(phases)),)

    return seconds


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    parser = commandline.parser(__doc__)
    parser.add_argument("--steps", type=count, default=10, help="timed steps a row")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--data", help="a file of rows: seconds an item, hours of a run")
    parser.add_argument("--epochs", type=float, default=3, help="passes over --data")
    parser.add_argument("--max-len", "--max_len", type=count, default=1024)
    parser.add_argument("--tokenizer", help="that of --data's lengths: nano, a folder, a hub id "
                        "(default the model's; for 7b5 and 4b nano's)")
    options = commandline.parse(parser, arguments)
    (measure_here if options.measured else simulate)(options)


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """(20 %, median, 80 %) of one or more values."""
    ordered = sorted(values)
    low, high = (ordered[min(len(ordered) - 1, int(q * len(ordered)))] for q in (0.2, 0.8))
    return low, statistics.median(values), high


if __name__ == "__main__":
    main()
