"""Seconds of a training step, by phase, on the machine at hand.

    python bench/step_time.py                                          nano
    python bench/step_time.py --model 7b5 --seq-len 512,1024 --save    PhoGPT-7B5's shape, on a GPU

The step is train.py's own, after warm-up. A setting that does not fit is a row that says so.
"""

import statistics
from dataclasses import asdict

import harness

from phogpt_raw.console import out
from phogpt_raw.meter import Stopwatch
from phogpt_raw.refusal import exits_cleanly


def seconds(bench, setting, window):
    """[{phase: seconds}] of each timed step."""
    for _ in range(bench.options.warmup):
        bench.run(setting, window)
    watch = Stopwatch()
    taken = []
    for _ in range(bench.options.steps):
        bench.run(setting, window, mark=watch)
        taken.append(watch.read())
    return taken


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--steps", type=harness.count, default=10, help="timed steps a row")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    options = parser.parse_args(arguments)
    bench = harness.Bench(options)
    out.print(harness.remark(bench))
    phases = ("forward", "backward", "clip", "optimizer")
    table = harness.table(
        f"milliseconds, medians of {options.steps} steps",
        ["work", "recomp.", "forward", "backward", "clip", "optim.", "step", "20 %", "80 %",
         "tokens/s"],
        caption="20 % and 80 %: quantiles of the step",
    )
    rows = []
    for setting, taken in bench.rows(harness.settings(options), seconds):
        label = f"{setting.micro_batch} x {setting.seq_len}"
        row = asdict(setting) | {"fits": taken is not None}
        if taken is None:
            table.add_row(label, setting.recompute, "out of", "memory")
        else:
            steps = [sum(t.values()) for t in taken]
            low, step, high = quantiles(steps)
            split = {p: statistics.median(t[p] for t in taken) for p in phases}
            row |= {"step_s": step, "step_s_20": low, "step_s_80": high, "phases_s": split,
                    "tokens_per_s": setting.tokens / step}
            times = [*split.values(), step, low, high]
            table.add_row(label, setting.recompute, *(f"{1e3 * s:.1f}" for s in times),
                          f"{setting.tokens / step:,.0f}")
        rows.append(row)
    out.print(table)
    if options.save:
        out.print(f"saved {harness.save('step_time', bench, rows)}")


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """(20 %, median, 80 %) of one or more values."""
    ordered = sorted(values)
    low, high = (ordered[min(len(ordered) - 1, int(q * len(ordered)))] for q in (0.2, 0.8))
    return low, statistics.median(values), high


if __name__ == "__main__":
    main()
