"""Bench of time: seconds of a training step, and seconds per example.

    python bench/step_time.py                           7B5 on a T4 and a V100
    python bench/step_time.py --data rows.jsonl         hours for your rows
    python bench/step_time.py --measured --seq-len 512  on this GPU

The step is train.py's own. Without a GPU, the step is simulated for each card. A simulated
operation takes the time of its arithmetic or of its memory access, whichever is longer, at the
card's sustained rates. On a GPU, the step is measured after a warm-up, by phase and by kind of
kernel, and simulated for comparison. A setting that does not fit in memory is marked in the table.
"""

import argparse
import statistics
from dataclasses import asdict, replace

import torch

from bench import command_line, dataset_time, report, results
from bench.command_line import MOST_STEPS, Setting, as_in_train, within
from bench.gpu_kernels import ceiling
from bench.measure import Bench, Times, median_step, step_times, times
from bench.simulated import Traces, cards, resolved
from bench.windows import Epoch, Simulation, plan
from phogpt_raw.cards import dtype_name
from phogpt_raw.data.batches import Window
from phogpt_raw.refusal import Refusal, exits_cleanly
from phogpt_raw.show.console import out
from phogpt_raw.simulate.rates import KNOWN
from phogpt_raw.simulate.roofline import step_seconds

PHASES = ("forward", "backward", "clip", "optimizer")


def measure(options) -> None:
    """Print a table of this machine's times. On a GPU the table shows the simulated times too."""
    dataset = dataset_time.read(options) if options.data else None  # reports a bad file early
    bench = Bench(options)
    out.print(report.remark(bench))
    gpu = bench.card.device == "cuda"
    limit = ceiling(bench.dtype) if gpu else None
    traces = Traces(options, bench.dtype) if gpu else None
    card = replace(bench.card, memory_gib=options.cap or bench.card.memory_gib)
    known = next((k for k in KNOWN.values() if gpu and k.card.name == bench.card.name), None)
    # use the matmul rate that was measured on this card in this dtype
    rates = known and replace(known.rates, matmul=(limit["sustained"],) * 2)
    settings = [resolved(traces, s, card) for s in options.settings]
    rows = []
    for setting, found in bench.rows(settings, times):
        row = asdict(setting) | {"rank": options.rank, "fits": found is not None}
        if found is not None:
            row |= measured_row(setting, found, limit)
            if rates:
                seconds = step_seconds(traces.on(card, setting).trace.ops, rates)
                row["simulated_s"] = seconds.middle if found.captured else seconds.eager
        rows.append(row)
    for table in report.measured_time(rows, options.steps, limit):
        out.print(table)
    more = {}
    if dataset:
        epoch = plan(dataset.examples, dataset.config, card, bench.model.config.n_layers, traces)
        more["dataset"] = dataset_time.estimate(
            options, dataset, epoch, dataset_time.MEASURED, window_seconds(bench, epoch))
        out.print(dataset_time.line(more["dataset"]))
    if options.save:
        file = results.save("step_time", bench.card, options, bench.dtype, rows,
                            **bench.described(), matmul_flops_per_s=limit, **more)
        out.print(f"saved {file}")


def measured_row(setting: Setting, found: Times, limit: dict | None) -> dict:
    low, step, high = quantiles(step_times(found.phases))
    row = {"captured": found.captured, "step_s": step, "step_s_20": low, "step_s_80": high,
           "phases_s": {p: statistics.median(t[p] for t in found.phases) for p in PHASES},
           "tokens_per_s": setting.tokens / step}
    if limit:
        row |= {"matmul_flops": found.flops, "kernels_s": found.kernels_s, "kernels": found.kernels,
                "share_of_matmul": {k: found.flops / step / v for k, v in limit.items()}}
    return row


def window_seconds(bench: Bench, epoch: Epoch):
    """Return a function that measures a step over an accumulation window on this machine.

    The function returns a tuple of one value, the median seconds of the step. It returns None if
    the step does not fit in memory.
    """
    def seconds(window: Window) -> tuple[float] | None:
        length = max(length for _, length in window.shapes(epoch.micro_batch))
        setting = Setting(length, epoch.micro_batch, 1, str(epoch.choice.recompute))
        median = median_step(bench, setting, window)
        return median and (median,)

    return seconds


def simulate(options) -> None:
    """Print a table for each GPU of --card, with the seconds of a step at the GPU's higher and
    lower rates."""
    dataset = dataset_time.read(options) if options.data else None
    for card, rates, traces in cards(options):
        if traces.dtype == torch.float32:
            raise Refusal("--dtype fp32: only 16-bit types can be simulated; leave the flag out")
        out.print(f"simulated for {card.name}: {options.model}, {dtype_name(traces.dtype)}, rank "
                  f"{options.rank}, as CUDA graphs")
        rows = [asdict(setting) | {"rank": options.rank} | traces.on(card, setting).time_row(rates)
                for setting in options.settings]
        out.print(report.simulated_time(rows, rates))
        more = {}
        if dataset:
            epoch = plan(dataset.examples, dataset.config, card, traces.shape.n_layers, traces)
            more["dataset"] = dataset_time.estimate(
                options, dataset, epoch, dataset_time.SIMULATED,
                Simulation(traces, epoch, card, rates).seconds)
            out.print(dataset_time.line(more["dataset"]))
        if options.save:
            file = results.save("step_time", card, options, traces.dtype, rows,
                                source="simulated", loss_mib=options.loss_mib,
                                attention=options.attention, sources=rates.source, **more)
            out.print(f"saved {file}")


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """Return (20 % quantile, median, 80 % quantile) of one or more values."""
    ordered = sorted(values)
    low, high = (ordered[min(len(ordered) - 1, int(q * len(ordered)))] for q in (0.2, 0.8))
    return low, statistics.median(values), high


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    parser = command_line.parser(__doc__)
    parser.add_argument("--steps", type=within(1, MOST_STEPS), default=10, metavar="N",
                        help="with --measured: timed steps for each result (default 10)")
    parser.add_argument("--warmup", type=within(0, MOST_STEPS), default=3, metavar="N",
                        help="with --measured: untimed steps before the timed ones (default 3)")
    parser.add_argument("--data", metavar="FILE",
                        help="a file of rows: print its seconds per example and the hours of a run")
    parser.add_argument("--epochs", type=within(0.001, 1_000_000, float), default=3,
                        metavar="X", help="passes over --data (default 3)")
    parser.add_argument("--packing", action=argparse.BooleanOptionalAction, default=True,
                        help="put several examples of --data into one row (default on)")
    parser.add_argument("--batch-tokens", type=as_in_train("batch_tokens"), metavar="N",
                        help="most tokens in one step over --data (default: 8 examples)")
    parser.add_argument("--max-len", type=as_in_train("max_len"), default=1024,
                        metavar="N", help="most tokens in one example of --data (default 1024)")
    parser.add_argument("--tokenizer", metavar="BASE", help="its tokenizer counts the tokens of "
                        "--data: nano, a folder, a hub id (default the model's; for 7b5 and 4b "
                        "nano's)")
    options = command_line.parse(parser, arguments)
    (measure if options.measured else simulate)(options)


if __name__ == "__main__":
    main()
