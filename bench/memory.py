"""Peak memory of a training step, by phase, on the machine at hand.

    python bench/memory.py                                            nano
    python bench/memory.py --model 7b5 --seq-len 512,1024 --save      PhoGPT-7B5's shape, on a GPU

The step is train.py's own. A setting that does not fit is a row that says so.
"""

from dataclasses import asdict

import harness
import torch

from phogpt_raw.console import out
from phogpt_raw.meter import Scale
from phogpt_raw.refusal import exits_cleanly


def peaks(bench, setting, window):
    """{phase: {kind: GiB}} of the second eager step: the first makes the optimizer's state; and,
    where the step can be captured, GiB reserved with its graphs."""
    bench.begin(setting, capture=False)
    bench.run(window)
    scale = Scale()
    bench.run(window, mark=scale)
    return scale.read(), captured(bench, setting, window)


def captured(bench, setting, window) -> float | None:
    """Reserved GiB once the step runs as graphs; None where it does not, or does not fit."""
    bench.begin(setting, capture=bench.options.capture)
    if bench.forward is bench.model:
        return None
    torch.cuda.empty_cache()
    try:
        for _ in range(3):
            bench.run(window)
    except torch.OutOfMemoryError:
        return None
    return torch.cuda.memory_reserved() / 2**30


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    options = harness.parser(__doc__).parse_args(arguments)
    bench = harness.Bench(options)
    out.print(harness.remark(bench))
    phases = ("forward", "backward", "clip", "optimizer")
    kinds = ("allocated", "reserved", "device") if bench.card.device == "cuda" else ("resident",)
    main_kind = kinds[0]
    table = harness.table(
        f"peak GiB {main_kind}, by phase; last the whole step's",
        ["work", "recomp.", "forward", "backward", "clip", "optim.", *kinds, "graphs"],
        caption="graphs: GiB reserved once the step runs as CUDA graphs",
    )
    rows = []
    for setting, found in bench.rows(harness.settings(options), peaks):
        label = f"{setting.micro_batch} x {setting.seq_len}"
        row = asdict(setting) | {"fits": found is not None}
        if found is None:
            table.add_row(label, setting.recompute, "out of", "memory")
        else:
            found, graphs = found
            by_phase = [f"{found[phase][main_kind]:.2f}" for phase in phases]
            top = [f"{max(f[kind] for f in found.values()):.2f}" for kind in kinds]
            told = "-" if graphs is None else f"{graphs:.2f}"
            table.add_row(label, setting.recompute, *by_phase, *top, told)
            row |= {"peak_gib": found, "graphs_reserved_gib": graphs}
        rows.append(row)
    out.print(table)
    if options.save:
        out.print(f"saved {harness.save('memory', bench.card, options, rows, **bench.told())}")


if __name__ == "__main__":
    main()
