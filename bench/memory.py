"""Bench of memory: the peak memory of a training step. It shows which settings fit a GPU.

    python bench/memory.py                          7B5 on a T4 and a V100
    python bench/memory.py --card t4 --model 4b --seq-len 4096,8192
    python bench/memory.py --measured --cap 14.56   on this GPU, as a T4

The step is train.py's own. Without a GPU, the step is simulated for each card, on tensors without
values. On a GPU, the step is measured, and simulated for comparison.
"""

from dataclasses import asdict, replace

from bench import command_line, figures, report, results
from bench.measure import Bench, peaks
from bench.simulated import OnCard, Traces, cards, resolved
from phogpt_raw.cards import Card, dtype_name
from phogpt_raw.refusal import exits_cleanly
from phogpt_raw.show.console import out

LONGEST = 16_384  # tokens of the longest row that is simulated


def measure(options) -> None:
    """Print a table of this machine's peaks. On a GPU the table shows the simulated peaks too."""
    bench = Bench(options)
    out.print(report.remark(bench))
    gpu = bench.card.device == "cuda"
    traces = Traces(options, bench.dtype) if gpu else None
    card = replace(bench.card, memory_gib=options.cap or bench.card.memory_gib)
    settings = [resolved(traces, s, card) for s in options.settings]
    rows = []
    for setting, found in bench.rows(settings, peaks):
        row = asdict(setting) | {"rank": options.rank, "fits": found is not None}
        if found is not None:
            row |= {"peak_gib": found.by_phase, "loss": found.loss}
            row |= found.graphs or {"graphs_reserved_gib": None}
        if gpu:
            row["simulated"] = traces.on(card, setting).memory_row()
        rows.append(row)
    out.print(report.measured_memory(rows, gpu))
    if options.save:
        file = results.save("memory", bench.card, options, bench.dtype, rows, **bench.described())
        out.print(f"saved {file}")


def simulate(options) -> None:
    """Print a table for each GPU of --card. Then show one step of each GPU in more detail: the
    step's memory over time as a figure, and its memory at the peak as a table.

    The chosen step fits the GPU, and its rows are not longer than the model's context. Of all such
    steps it has the most tokens.
    """
    shown: dict[str, OnCard] = {}
    for card, rates, traces in cards(options):
        found = [traces.on(card, setting) for setting in options.settings]
        rows = [asdict(f.setting) | {"rank": options.rank} | f.memory_row() for f in found]
        out.print(f"simulated for {card.name}, {card.memory_gib:g} GiB: {options.model}, "
                  f"{dtype_name(traces.dtype)}, rank {options.rank}")
        out.print(report.simulated_memory(rows))
        longest = longest_row(traces, card, found)
        out.print(f"longest row that fits, {options.micro_batch[0]} at a time, every "
                  f"block recomputed: {longest:,} tokens"
                  + (" at least" if longest >= LONGEST else "") + "\n")
        made_for = traces.shape.max_seq_len
        fitting = [f for f in found if f.fits and f.setting.seq_len <= made_for]
        if fitting:
            shown[card.name] = max(fitting, key=lambda f: f.setting.tokens)
        if options.save:
            file = results.save("memory", card, options, traces.dtype, rows, source="simulated",
                                loss_mib=options.loss_mib, attention=options.attention,
                                longest_row=longest, sources=rates.source)
            out.print(f"saved {file}")
        if card.name in shown:
            out.print(figures.memory(shown[card.name], rates, options), markup=False)
    if shown:
        out.print(report.ledger(shown))


def longest_row(traces: Traces, card: Card, found: list[OnCard], step: int = 512) -> int:
    """Tokens of the longest row that fits if all blocks are recomputed, exact to `step` tokens.

    The search starts from the longest row in `found` that fits.
    """
    def fits(length: int) -> bool:
        return traces.on(card, replace(found[0].setting, seq_len=length, recompute="all")).fits

    of_this_size = [f.setting.seq_len for f in found
                    if f.fits and f.setting.micro_batch == found[0].setting.micro_batch]
    low, high = max(of_this_size, default=0), LONGEST
    if low >= high or fits(high):
        return max(low, high)
    while high - low > step:
        middle = (low + high) // 2 // step * step
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    options = command_line.parse(command_line.parser(__doc__), arguments)
    (measure if options.measured else simulate)(options)


if __name__ == "__main__":
    main()
