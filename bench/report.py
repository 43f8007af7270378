"""The tables that the benches print."""

from statistics import median

from rich import box
from rich.table import Table

from bench.dataset_time import span
from bench.gpu_kernels import FAMILIES
from bench.measure import Bench
from bench.simulated import OnCard
from phogpt_raw.cards import dtype_name
from phogpt_raw.simulate.ledger import KINDS
from phogpt_raw.simulate.rates import Rates


def table(title: str, columns: list[str], caption: str | None = None) -> Table:
    """A right-aligned table that fits 80 columns."""
    made = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, show_edge=False,
                 padding=(0, 0), title_justify="left", caption_justify="left")
    for column in columns:
        made.add_column(column, justify="right", no_wrap=True)
    return made


def work(row: dict) -> str:
    return f"{row['micro_batch']} x {row['seq_len']}"


def remark(bench: Bench) -> str:
    """The text above a table. It names the GPU, the model and the limit of memory."""
    line = f"measured on {bench.card.name}, {bench.options.model}, " \
           f"{dtype_name(bench.dtype)}, rank {bench.options.rank}"
    if bench.cap_for_torch:
        line += f"\nunder {bench.options.cap:g} GiB: {bench.cap_for_torch:.2f} for torch, the " \
                "rest for CUDA's context and the optimizer's pages, which torch does not count"
    if bench.card.device == "cpu":
        line += "\nno GPU here: these values are for a test of the bench, not for a card"
    return line


# -- memory


def measured_memory(rows: list[dict], gpu: bool) -> Table:
    columns = ["work", "recomp.", "allocated", "simul.", "apart", "reserved", "simul.", "apart",
               "device", "graphs", "at most"] if gpu else ["work", "recomp.", "resident"]
    made = table("peak GiB of a step", columns, caption=(
        "device: with CUDA's context and the optimizer's pages; graphs: reserved when the step "
        "runs as CUDA graphs; at most: the peak while they are captured" if gpu else None))
    for row in rows:
        cells = ["out of", "memory"]
        if row["fits"]:
            top = {kind: max(phase[kind] for phase in row["peak_gib"].values())
                   for kind in (("allocated", "reserved", "device") if gpu else ("resident",))}
            cells = [f"{gib:.2f}" for gib in top.values()]
        if gpu and row["fits"]:
            cells = []
            for kind in ("allocated", "reserved"):
                seen, simulated = top[kind], row["simulated"][f"{kind}_gib"]
                cells += [f"{seen:.2f}", f"{simulated:.2f}", f"{simulated / seen - 1:+.1%}"]
            cells.append(f"{top['device']:.2f}")
            graphs = [row.get(f"graphs_reserved{part}_gib") for part in ("", "_peak")]
            cells += ["-" if gib is None else f"{gib:.2f}" for gib in graphs]
        made.add_row(work(row), row["recompute"], *cells)
    return made


def simulated_memory(rows: list[dict]) -> Table:
    made = table("peak GiB of a step", [
        "work", "recomp.", "fits", "allocated", "reserved", "on the card", "most of it"])
    for row in rows:
        kind, gib = max(row["kinds_gib"].items(), key=lambda item: item[1])
        made.add_row(work(row), str(row["blocks_recomputed"]), "yes" if row["fits"] else "no",
                     f"{row['allocated_gib']:.2f}", f"{row['reserved_gib']:.2f}",
                     f"{row['device_gib']:.2f}", f"{kind} {gib:.2f}")
    return made


# {row of the ledger: its note under the table}
LEDGER_NOTES = {
    "rounding": "of the simulated allocator",
    "matmul workspace": "memory that torch allocates for cuBLAS",
    "fragmentation": "of the simulated allocator",
    "optimizer's pages": "the optimizer's moments, in managed memory, which torch does not count",
    "CUDA context": "measured on an H200, smaller on smaller cards",
}


def ledger(shown: dict[str, OnCard]) -> Table:
    """A table of the memory at the peak, by kind, with a column for each GPU.

    It includes memory that torch does not count.
    """
    made = table("GiB by kind at the peak", ["kind", *(
        f"{card.split('-')[0]}, {f.setting.micro_batch} x {f.setting.seq_len}"
        for card, f in shown.items())])
    rows = [f.memory_row() for f in shown.values()]

    notes = []

    def line(name: str, values) -> None:
        values = list(values)
        if any(abs(v) >= 0.0005 for v in values):
            made.add_row(name, *(f"{v:.3f}" for v in values))
            if name in LEDGER_NOTES:
                notes.append(f"{name}: {LEDGER_NOTES[name]}")

    for kind in KINDS:
        line(kind, (row["kinds_gib"].get(kind, 0) for row in rows))
    line("allocated", (row["allocated_gib"] for row in rows))
    line("fragmentation", (row["reserved_gib"] - row["allocated_gib"] for row in rows))
    line("optimizer's pages", (row["pages_gib"] for row in rows))
    line("CUDA context", (row["context_gib"] for row in rows))
    line("on the card", (row["device_gib"] for row in rows))
    line("of", (f.card.memory_gib for f in shown.values()))
    made.caption = "; ".join(notes)
    return made


# -- time


def measured_time(rows: list[dict], steps: int, limit: dict | None) -> list[Table]:
    """The table of measured times. On a GPU a table of kernels follows.

    limit: the GPU's matmul FLOP/s, or None on a CPU.
    """
    known = any("simulated_s" in row for row in rows)
    made = table(
        f"milliseconds, medians of {steps} steps",
        ["work", "recomp.", "forward", "backward", "clip", "optim.", "step", "20 %", "80 %",
         "tokens/s", *(["of matmul"] if limit else []), *(["simul.", "apart"] if known else [])],
        caption="20 % and 80 %: quantiles of the step" + (
            f"; of matmul: the step's matmul FLOP/s as a share of {limit['sustained'] / 1e12:.0f} "
            f"TFLOP/s, which this card sustains ({limit['short'] / 1e12:.0f} for a short time)"
            if limit else ""),
    )
    split = table("milliseconds of kernels in one step, by kind",
                  ["work", "recomp.", *FAMILIES, "other", "kernels"])
    for row in rows:
        if not row["fits"]:
            made.add_row(work(row), row["recompute"], "out of", "memory")
            continue
        cells = [f"{1e3 * s:.1f}" for s in (*row["phases_s"].values(), row["step_s"],
                                            row["step_s_20"], row["step_s_80"])]
        cells.append(f"{row['tokens_per_s']:,.0f}")
        if limit:
            cells.append(f"{row['share_of_matmul']['sustained']:.0%}")
            split.add_row(work(row), row["recompute"], *(
                f"{1e3 * row['kernels_s'].get(name, 0):.1f}" for name in (*FAMILIES, "other")),
                str(row["kernels"]))
        if "simulated_s" in row:
            cells += [f"{1e3 * row['simulated_s']:.1f}",
                      f"{row['simulated_s'] / row['step_s'] - 1:+.1%}"]
        made.add_row(work(row), row["recompute"], *cells)
    return [made, split] if limit else [made]


def simulated_time(rows: list[dict], rates: Rates) -> Table:
    made = table("seconds of a step", [
        "work", "recomp.", "fits", "TFLOP", "GB", "seconds", "tokens/s", "s/example"],
        caption=f"GB: read and written. *: without CUDA graphs (--no-capture), Python is slower "
                f"than this card. Rates: {rates.source}")
    for row in rows:
        made.add_row(
            work(row), str(row["blocks_recomputed"]), "yes" if row["fits"] else "no",
            span([row["flops"] / 1e12]), f"{row['bytes_moved'] / 1e9:,.0f}",
            span(row["step_s"]) + "*" * row["host_bound_eager"], span(row["tokens_per_s"]),
            span(row["example_s"]))
    return made


# -- an epoch


def who(row: dict) -> str:
    """The name of a side, with its settings.

    >>> who({"who": "ours", "packing": False}), who({"who": "trainer", "micro_batch": 8})
    ('this loop, not packed', 'Trainer, 8 at once')
    """
    if row["who"] == "trainer":
        return f"Trainer, {row['micro_batch']} at once"
    return "this loop" + ("" if row["packing"] else ", not packed") + (
        f", {row['batch_tokens']:,} tokens a step" if row.get("batch_tokens") else "")


def seconds_of(value) -> str:
    """The text of a time. A measured time has three digits; a simulated time is a range."""
    return span(value) if isinstance(value, list) else f"{value:.3g}"


def epoch(rows: list[dict], title: str, cap: float = 0) -> Table:
    """A table with a row for each side. cap: limit of memory in GiB; 0: no limit."""
    made = table(title, ["", "rows", "examples", "fill", "steady", "whole", "GiB", "times"],
                 caption="rows: in an epoch; examples: in a row; fill: share of tokens that are "
                 "not padding; steady, whole: seconds per example; GiB: allocated; times: how many "
                 "times faster than the Trainer with 1 at once"
                 + (f". *: needs more than {cap:g} GiB" if cap else ""))
    made.columns[0].no_wrap = False  # names can be long
    for row in rows:
        name = who(row) + ("" if row["fits"] else "*")
        if "steady_s" not in row:
            made.add_row(name, *["-"] * 3, "out of", "memory")
            continue
        made.add_row(name, f"{row['rows']:,}", f"{row['examples_a_row']:.2f}", f"{row['fill']:.0%}",
                     seconds_of(row["steady_s"]),
                     seconds_of(row["whole_s"]) if "whole_s" in row else "",
                     f"{row['allocated_gib']:.2f}",
                     f"{row['times_faster']:.2f}" if "times_faster" in row else "")
    return made


# -- decoding


def decode(rows: list[dict], title: str) -> Table:
    """The table of measured decoding. It has a row for each side, prompt length and batch size."""
    made = table(title, ["", "prompt", "rows", "tokens/s", "first s", "GiB", "of bound", "times"],
                 caption="tokens/s: of all rows, after the first token; first s: until the first "
                 "token; GiB: allocated; of bound: the shortest possible time of a step, divided "
                 "by the measured one; times: how many times faster ours is")
    made.columns[0].no_wrap = False
    for row in rows:
        cells = [row["who"], f"{row['prompt']:,}", str(row["rows"])]
        if "step_s" not in row:
            made.add_row(*cells, "out of", "memory")
            continue
        made.add_row(*cells, f"{row['tokens_per_s']:,.1f}", f"{row['first_s']:.3f}",
                     f"{row['allocated_gib']:.2f}",
                     f"{row['share_of_bound']:.0%}" if "share_of_bound" in row else "",
                     f"{row['ours_times_faster']:.1f}" if "ours_times_faster" in row else "")
    return made


def decode_bounds(rows: list[dict], title: str) -> Table:
    """The table of a GPU's computed bounds: the most tokens per second that its memory rate allows.
    """
    made = table(title, ["prompt", "rows", "GB a step", "tokens/s", "GiB"],
                 caption="tokens/s: if reading takes all of a step's time, at the card's lower and "
                 "higher memory rate; GiB: weights, cache and CUDA's context")
    for row in rows:
        made.add_row(f"{row['prompt']:,}", str(row["rows"]), f"{row['bytes'] / 1e9:.2f}",
                     span(row["tokens_per_s"]), f"{row['gib']:.2f}")
    return made


def products(rows: list[dict], title: str) -> Table:
    made = table(title, ["out x in", "rows", "bitsandbytes us", "ours us", "TB/s", "times"],
                 caption="us, TB/s: of one product, as a CUDA graph; times: how many times faster "
                 "ours is")
    for row in rows:
        made.add_row(f"{row['out']} x {row['in']}", str(row["rows"]),
                     f"{1e6 * row['bitsandbytes_s']:.1f}", f"{1e6 * row['ours_s']:.1f}",
                     f"{row['bytes_per_s'] / 1e12:.2f}", f"{row['times_faster']:.2f}")
    return made


# -- the server


def serve(rows: list[dict], title: str) -> Table:
    made = table(title, ["who", "tokens/s", "of engine", "first token", "of prefill",
                         "beside others"])
    for row in rows:
        cells = [row["who"], f"{row['tokens_per_s']:,.0f}", "", f"{row['first_s']:.3f} s", "", ""]
        if "share_of_engine" in row:
            cells[2], cells[4] = f"{row['share_of_engine']:.0%}", f"{row['first_of_prefill']:.2f} x"
            cells[5] = f"{row['first_beside_others_s']:.3f} s"
        made.add_row(*cells)
    return made


# -- saving


def saving(rows: list[dict], title: str) -> Table:
    made = table(title, ["checkpoint", "loop waits", "the first time", "with saves", "without",
                         "share", "at the end"])
    for row in rows:
        waits = [wait for run in row["with"] for wait in run["saves_s"]]
        whole = {kind: median(run["whole_s"] for run in row[kind]) for kind in ("with", "without")}
        made.add_row(f"{row['with'][0]['checkpoint_bytes'] / 2**20:,.0f} MiB",
                     f"{median(waits):.3f} s", f"{row['first_save_s']:.3f} s",
                     f"{whole['with']:.2f} s", f"{whole['without']:.2f} s", f"{row['share']:.2%}",
                     f"{row['end_share']:.2%}")
    return made
