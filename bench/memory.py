"""Peak memory of a training step: will it fit?

    python bench/memory.py                                      PhoGPT-7B5 on a T4 and a V100
    python bench/memory.py --card t4 --model 4b --seq-len 4096,8192
    python bench/memory.py --measured --cap 14.56               on this GPU, with a T4's memory

The step is train.py's own. Without a GPU it is simulated for each card, on tensors without numbers;
on a GPU it is measured there and simulated beside it.
"""

from dataclasses import asdict, replace

import torch

from bench import command_line as commandline
from bench import figures, harness
from bench.meter import Scale
from bench.simulated import OnCard, Plans, cards, resolved
from phogpt_raw.cards import Card, dtype_name
from phogpt_raw.refusal import exits_cleanly
from phogpt_raw.show.console import out
from phogpt_raw.simulate.ledger import KINDS

LONGEST = 16_384  # tokens; rows beyond that are not looked for


def peaks(bench, setting, window):
    """{phase: {kind: GiB}} of the second eager step: the first makes the optimizer's state; its
    loss; and, where the step can be captured, GiB reserved with its graphs."""
    bench.begin(setting, capture=False)
    bench.run(window)
    scale = Scale()
    loss = float(bench.run(window, mark=scale).loss)
    return scale.read(), loss, captured(bench, setting, window)


def captured(bench, setting, window) -> dict[str, float] | None:
    """Reserved GiB as the step runs as graphs, and the most on the way there (the first step is
    eager); None where it does not, or does not fit."""
    bench.begin(setting, capture=bench.options.capture)
    if bench.forward is bench.model:
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        for _ in range(3):
            bench.run(window)
    except torch.OutOfMemoryError:
        return None
    if not bench.captured:
        return None
    return {"graphs_reserved_gib": torch.cuda.memory_reserved() / 2**30,
            "graphs_reserved_peak_gib": torch.cuda.max_memory_reserved() / 2**30}


def measure(options) -> None:
    """A table of this machine's peaks, on a GPU beside the simulation's."""
    bench = harness.Bench(options)
    gpu = bench.card.device == "cuda"
    out.print(harness.remark(bench))
    plans = Plans(options, bench.dtype) if gpu else None
    card = replace(bench.card, memory_gib=options.cap or bench.card.memory_gib)
    kinds = ("allocated", "reserved", "device") if gpu else ("resident",)
    columns = ["work", "recomp.", "allocated", "simul.", "apart", "reserved", "simul.", "apart",
               "device", "graphs", "at most"] if gpu else ["work", "recomp.", "resident"]
    table = harness.table("peak GiB of a step", columns, caption=(
        "device: with CUDA's context and the optimizer's pages; graphs: reserved once the step "
        "runs as CUDA graphs, and at most on the way there" if gpu else None))
    settings = [resolved(plans, s, card) for s in commandline.settings(options)]
    rows = []
    for setting, found in bench.rows(settings, peaks):
        label = f"{setting.micro_batch} x {setting.seq_len}"
        row = asdict(setting) | {"rank": options.rank, "fits": found is not None}
        guess = plans.on(card, setting) if gpu else None
        if found is None:
            cells = ["out of", "memory"]
        else:
            by_phase, loss, graphs = found
            top = {kind: max(f[kind] for f in by_phase.values()) for kind in kinds}
            row |= {"peak_gib": by_phase, "loss": loss} | (graphs or {"graphs_reserved_gib": None})
            cells = [f"{top[kinds[0]]:.2f}"]
        if gpu:
            row["simulated"] = told = guess.row()
        if gpu and found is not None:
            cells = []
            for kind in ("allocated", "reserved"):
                seen, simulated = top[kind], told[f"{kind}_gib"]
                cells += [f"{seen:.2f}", f"{simulated:.2f}", f"{simulated / seen - 1:+.1%}"]
            cells += [f"{top['device']:.2f}",
                      *([f"{gib:.2f}" for gib in graphs.values()] if graphs else "--")]
        table.add_row(label, setting.recompute, *cells)
        rows.append(row)
    out.print(table)
    if options.save:
        file = harness.save("memory", bench.card, options, bench.dtype, rows, **bench.told())
        out.print(f"saved {file}")


def simulate(options) -> None:
    """A table for each card of --card; a ledger and a figure of the most tokens that fit it, in
    rows no longer than the model was made for."""
    shown: dict[str, OnCard] = {}
    for card, rates, plans in cards(options):
        found = [plans.on(card, setting) for setting in commandline.settings(options)]
        rows = [asdict(f.setting) | {"rank": options.rank} | f.row() for f in found]
        out.print(f"simulated for {card.name}, {card.memory_gib:g} GiB: {options.model}, "
                  f"{dtype_name(plans.dtype)}, rank {options.rank}")
        table = harness.table("peak GiB of a step", [
            "work", "recomp.", "fits", "allocated", "reserved", "on the card", "most of it"])
        for row in rows:
            kind, gib = max(row["kinds_gib"].items(), key=lambda item: item[1])
            table.add_row(
                f"{row['micro_batch']} x {row['seq_len']}", str(row["blocks_recomputed"]),
                "yes" if row["fits"] else "no", f"{row['allocated_gib']:.2f}",
                f"{row['reserved_gib']:.2f}", f"{row['device_gib']:.2f}", f"{kind} {gib:.2f}")
        out.print(table)
        longest = longest_row(plans, card, found)
        out.print(f"longest row that fits, {options.micro_batch.split(',')[0]} at a time, every "
                  f"block recomputed: {longest:,} tokens"
                  + (" at least" if longest >= LONGEST else "") + "\n")
        made_for = plans.shape.max_seq_len
        fitting = [f for f in found if f.fits and f.setting.seq_len <= made_for]
        if fitting:
            shown[card.name] = max(fitting, key=lambda f: f.setting.tokens)
        if options.save:
            file = harness.save("memory", card, options, plans.dtype, rows, source="simulated",
                                loss_mib=options.loss_mib, attention=options.attention,
                                longest_row=longest, sources=rates.source)
            out.print(f"saved {file}")
        if card.name in shown:
            out.print(figures.memory(shown[card.name], rates, options), markup=False)
    if shown:
        out.print(ledger(shown))


def longest_row(plans: Plans, card: Card, found: list[OnCard], step: int = 512) -> int:
    """Tokens of the longest row, a multiple of `step`, that fits with every block recomputed."""
    def fits(length: int) -> bool:
        return plans.on(card, replace(found[0].setting, seq_len=length, recompute="all")).fits

    of_this_size = [f.setting.seq_len for f in found
                    if f.fits and f.setting.micro_batch == found[0].setting.micro_batch]
    low, high = max(of_this_size, default=0), LONGEST
    if low >= high or fits(high):
        return max(low, high)
    while high - low > step:
        middle = (low + high) // 2 // step * step
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def ledger(shown: dict[str, OnCard]):
    """What is alive at the peak, by kind, and what torch does not see; a column a card."""
    table = harness.table("GiB by kind at the peak", ["kind", *(
        f"{card.split('-')[0]}, {f.setting.micro_batch} x {f.setting.seq_len}"
        for card, f in shown.items())], caption=(
        "rounding, fragmentation: torch's allocator, imitated; pages: the optimizer's moments, in "
        "managed memory, which torch does not count; context: measured on an H200, smaller cards "
        "take less; matmul workspace: what torch takes for cuBLAS"))
    rows = [f.row() for f in shown.values()]

    def line(name: str, values) -> None:
        values = list(values)
        if any(abs(v) >= 0.0005 for v in values):
            table.add_row(name, *(f"{v:.3f}" for v in values))

    for kind in KINDS:
        line(kind, (row["kinds_gib"].get(kind, 0) for row in rows))
    line("allocated", (row["allocated_gib"] for row in rows))
    line("fragmentation", (row["reserved_gib"] - row["allocated_gib"] for row in rows))
    line("optimizer's pages", (row["pages_gib"] for row in rows))
    line("CUDA context", (row["context_gib"] for row in rows))
    line("on the card", (row["device_gib"] for row in rows))
    line("of", (f.card.memory_gib for f in shown.values()))
    return table


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    options = commandline.parse(commandline.parser(__doc__), arguments)
    (measure if options.measured else simulate)(options)


if __name__ == "__main__":
    main()
