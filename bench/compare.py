"""Write the tables of README*.md and docs/*.md from the saved results in bench/results/*.json.

    python bench/compare.py             write the tables between their markers
    python bench/compare.py --simulate  simulate a T4 and a V100 first
    python bench/compare.py --check     exit with 2 if a table differs

A result that was measured on a GPU and saved, for example by `python bench/memory.py --save`, gets
a column of its own.
"""

import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench import dataset_time, report, results
from phogpt_raw.cards import Card
from phogpt_raw.command_line import Parser
from phogpt_raw.config import Config
from phogpt_raw.refusal import Refusal, exits_cleanly
from phogpt_raw.show.console import out
from phogpt_raw.simulate.rates import KNOWN

ROOT = Path(__file__).parents[1]
LARGE = 48  # GiB; a GPU with more memory is rarely rented for this work, so it gets no column
NAMES = {"7b5": "7B5", "4b": "4B"}
SIMULATED = ("t4", "v100")


def columns(what: str) -> dict[tuple[str, str], dict[int, dict]]:
    """{(model, heading): {tokens in a row: row of the result}}, from the newest files.

    A heading names the GPU and the source of the result, for example "T4, simulated". Results of
    steps with more than one row of tokens are left out.
    """
    table: dict[tuple[str, str], dict[int, dict]] = {}
    for result in results.load(what):
        card = Card(**result["card"])
        if (result.get("label") or result.get("cap_gib") or card.memory_gib > LARGE
                or result["model"] not in NAMES or result.get("attention", "auto") != "auto"
                or result.get("optimizer", Config.optimizer) != Config.optimizer
                or any(row.get("rank", Config.rank) != Config.rank for row in result["rows"])):
            continue
        rows = {row["seq_len"]: row for row in reversed(result["rows"])
                if row["micro_batch"] == row["accumulate"] == 1}
        heading = short(card) + ("" if result["dtype"] == "fp16" else f" {result['dtype']}")
        table[result["model"], f"{heading}, {result['source']}"] = rows
    order = list(NAMES)
    return dict(sorted(table.items(), key=lambda entry: (order.index(entry[0][0]), entry[0][1])))


def short(card: Card) -> str:
    """A GPU's name without its maker, its product line and its connector.

    >>> short(Card("Tesla V100-SXM2-16GB", "cuda")), short(Card("Tesla T4", "cuda"))
    ('V100 16GB', 'T4')
    """
    name, *more = card.name.removeprefix("Tesla ").removeprefix("NVIDIA ").split("-")
    return " ".join([name, *(part for part in more if part.endswith("GB"))])


def across(what: str, cell) -> list[str]:
    """The lines of a table with a row for each number of tokens, and a column for each model and
    GPU. cell(record): the text of the cell for one record of a saved result."""
    table = columns(what)
    lengths = sorted({length for rows in table.values() for length in rows})
    return [
        "| tokens | " + " | ".join(f"{NAMES[m]}, {card}" for m, card in table) + " |",
        "|---" * (len(table) + 1) + "|",
        *("| " + " | ".join([f"{length:,}", *(
            cell(rows[length]) if length in rows else "" for rows in table.values())]) + " |"
          for length in lengths),
    ]


def memory_cell(row: dict) -> str:
    """The text of a cell: GiB used on the GPU and, in brackets, the number of recomputed blocks."""
    if not row["fits"]:
        return "does not fit"
    blocks = row.get("blocks_recomputed", row["recompute"])
    device = row.get("device_gib") or max(p["device"] for p in row["peak_gib"].values())
    return f"{device:.1f}" + (f" ({blocks})" if str(blocks) not in ("0", "none") else "")


def time_cell(row: dict) -> str:
    """The text of a cell: seconds per example."""
    if not row["fits"]:
        return "does not fit"
    return dataset_time.span(row["example_s"] if "example_s" in row else [row["step_s"]])


def held_memory() -> list[str]:
    """The lines of a table. The table has, for each file of results, the largest difference
    between simulated and measured memory."""
    lines = ["| card | model | dtype | rank | settings | allocated, worst | reserved, worst | "
             "graphs reserve above the eager step's peak |", "|---" * 8 + "|"]
    for result in results.load("memory"):
        rows = [r for r in result["rows"] if r["fits"] and "simulated" in r]
        if not rows:
            continue
        worst = {kind: max((r["simulated"][f"{kind}_gib"] / peak(r, kind) - 1 for r in rows),
                           key=abs) for kind in ("allocated", "reserved")}
        graphs = [r["graphs_reserved_gib"] - peak(r, "allocated") for r in rows
                  if r["graphs_reserved_gib"]]
        more = f"{min(graphs):.2f} to {max(graphs):.2f} GiB" if graphs else ""
        kernel = "" if result["attention"] == "auto" else f", {result['attention']} attention"
        model = NAMES.get(result["model"], result["model"]) + kernel
        lines.append(f"| {card_of(result)} | {model} | {result['dtype']} | "
                     f"{rows[0]['rank']} | {len(rows)} | {worst['allocated']:+.1%} | "
                     f"{worst['reserved']:+.1%} | {more} |")
    return lines


def peak(row: dict, kind: str) -> float:
    return max(phase[kind] for phase in row["peak_gib"].values())


def held_time() -> list[str]:
    """The lines of a table. The table has, for each file of results, the largest difference
    between simulated and measured seconds of a step."""
    lines = ["| card | model | dtype | work | settings | for | worst |", "|---" * 7 + "|"]
    for result in results.load("step_time"):
        rows = [r for r in result["rows"] if r["fits"] and "simulated_s" in r]
        if not rows:
            continue
        worst = max((r["simulated_s"] / r["step_s"] - 1 for r in rows), key=abs)
        work = [f"{r['micro_batch']} x {r['seq_len']:,}" for r in rows]
        model = NAMES.get(result["model"], result["model"])
        lines.append(f"| {card_of(result)} | {model} | {result['dtype']} | "
                     f"{', '.join(dict.fromkeys(work))} | {len(rows)} | "
                     f"{purpose(result['label'] or '')} | {worst:+.1%} |")
    return lines


def newest(what: str, wanted) -> list[dict]:
    """The newest result for each card, source, model, dtype and label, in the order of a table.

    wanted(result) says whether to include a result. Only results with the default rank are
    included.
    """
    found = {}
    for result in results.load(what):
        if result["rank"] == Config.rank and result["model"] in NAMES and wanted(result):
            kind = tuple(result[key] for key in ("model", "source", "dtype", "label"))
            found[kind, result["card"]["name"]] = result
    order = list(NAMES)
    return sorted(found.values(), key=lambda r: (
        order.index(r["model"]), r["source"], card_of(r), r["dtype"], r["label"] or ""))


def whose(result: dict) -> list[str]:
    """The cells with the card and the model of a result."""
    dtype = "" if result["dtype"] == "fp16" else f", {result['dtype']}"
    return [f"{card_of(result)}, {result['source']}", NAMES[result["model"]] + dtype]


def epochs() -> list[str]:
    """The table for one epoch of the 256 pairs in lengths.json, trained by this loop and by the
    Trainer.

    The table has the newest results of each GPU.
    """
    found = newest("epoch", lambda result: result["data"] is None)
    return ["| card | model | who | rows | s per example, steady | whole run | GiB allocated | "
            "times faster |", "|---" * 8 + "|",
            *("| " + " | ".join([
                *whose(result), *epoch_cells(row, result.get("cap_gib"))]) + " |"
              for result in found for row in result["rows"])]


def epoch_cells(row: dict, cap: float | None) -> list[str]:
    """The cells with the results of one side, which is this loop or the Trainer."""
    if "steady_s" not in row:
        return [report.who(row), *["out of memory"] * 2, *[""] * 3]
    return [report.who(row) + ("" if row["fits"] or not cap else f", over {cap:g} GiB"),
            f"{row['rows']:,}", report.seconds_of(row["steady_s"]),
            report.seconds_of(row["whole_s"]) if "whole_s" in row else "",
            f"{row['allocated_gib']:.2f}",
            f"{row['times_faster']:.1f}" if "times_faster" in row else ""]


def decoding(all_settings: bool = False) -> list[str]:
    """The table of tokens per second, with the newest results of each GPU and model.

    all_settings: also include results whose number of new tokens is not the bench's default.
    """
    found = newest("decode", lambda result: all_settings or not result["label"])
    lines = ["| card | model | prompt | rows | who | tokens/s | first token | GiB | of the bound | "
             "times faster |", "|---" * 10 + "|"]
    for result in found:
        lines += ["| " + " | ".join([*whose(result), *decode_cells(row)]) + " |"
                  for row in result["rows"]]
    return lines


def decode_cells(row: dict) -> list[str]:
    """The cells for a row of the result: a measurement, or the computed bound of a GPU."""
    cells = [f"{row['prompt']:,}", str(row["rows"]), row["who"]]
    if row["who"] == "bound":
        return [*cells, dataset_time.span(row["tokens_per_s"]), "", f"{row['gib']:.2f}", "", ""]
    if "step_s" not in row:
        return [*cells, "out of memory", *[""] * 4]
    return [*cells, f"{row['tokens_per_s']:,.0f}", f"{row['first_s']:.3f} s",
            f"{row['allocated_gib']:.2f}",
            f"{row['share_of_bound']:.0%}" if "share_of_bound" in row else "",
            f"{row['ours_times_faster']:.1f}" if "ours_times_faster" in row else ""]


def purpose(label: str) -> str:
    return next((what for part, what in (
        ("tuned", "tuning"), ("judged", "judging"), ("eager", "bound by the host, eager"),
        ("launch", "bound by launches")) if part in label), "a user's")


def card_of(result: dict) -> str:
    return short(Card(**result["card"]))


TABLES = {
    "memory": lambda: across("memory", memory_cell),
    "time": lambda: across("step_time", time_cell),
    "epoch": epochs,
    "decode": decoding,
    "decode-all": lambda: decoding(all_settings=True),
    "held-memory": held_memory,
    "held-time": held_time,
}


def simulate() -> None:
    """Simulate both models on a T4 and a V100 again, with two benches at a time, and save the
    results."""
    def run(command: list[str]) -> None:
        line = " ".join(["python", *command])
        if subprocess.run([sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode:
            raise Refusal(f"{line} failed; see its error above")
        out.print(line)

    commands = [[f"bench/{bench}.py", "--card", ",".join(SIMULATED), "--model", model, "--save"]
                for model in NAMES for bench in ("memory", "step_time", "epoch")]
    begun = time.time()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, commands))
    for name in SIMULATED:  # delete the older results
        card = KNOWN[name].card.name.replace(" ", "-")
        for file in results.RESULTS.glob(f"*-simulated-{card}-*.json"):
            if file.stat().st_mtime < begun:
                file.unlink()


def rewritten(text: str, where: str) -> str:
    """The text of a document with new tables.

    Raises Refusal if a marker names an unknown table, or if no end marker follows it.
    """
    for name in re.findall(r"<!-- table: (\S+) -->", text):
        if name not in TABLES:
            raise Refusal(f"{where}: no table {name}; the tables are {', '.join(TABLES)}")
        pattern = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not pattern.search(text):
            raise Refusal(f"{where}: the marker of table {name} has no <!-- end --> after it")
        text = pattern.sub(lambda m, n=name: m[1] + "\n".join(TABLES[n]()) + "\n" + m[2], text)
    return text


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--check", action="store_true",
                        help="write nothing; exit with status 2 if a table is out of date")
    parser.add_argument("--simulate", action="store_true",
                        help="first simulate both models on a T4 and a V100 again")
    options = parser.parse_args(arguments)
    if options.simulate:
        simulate()
    for file in sorted([*ROOT.glob("README*.md"), *ROOT.glob("docs/*.md")]):
        text = file.read_text("utf-8")
        made = rewritten(text, file.name)
        if made == text:
            out.print(f"{file.name}: agrees with bench/results")
        elif options.check:
            raise Refusal(f"{file.name}: a table differs from bench/results; run "
                          f"python bench/compare.py")
        else:
            file.write_text(made, "utf-8")
            out.print(f"{file.name}: tables written")


if __name__ == "__main__":
    main()
