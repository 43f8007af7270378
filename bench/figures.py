"""Draw memory.py's figure as SVG: the GPU memory in use during a simulated step, by kind."""

from pathlib import Path

from phogpt_raw.cards import GIB
from phogpt_raw.simulate.rates import Rates, matmul_workspace
from phogpt_raw.simulate.roofline import op_seconds

FIGURES = Path(__file__).parent / "figures"
BINS = 120  # number of bins into which the time axis is divided
# The areas of the figure, from the bottom up. Each area is the sum of several kinds of memory.
AREAS = {
    "base in NF4": ("NF4 weights", "NF4 constants", "plain weights", "norms and biases"),
    "embedding and head": ("embedding",),
    "adapters, gradients, optimizer": ("adapters", "adapters' copy", "adapters' gradients",
                                       "optimizer state"),
    "saved activations": ("saved activations",),
    "attention bias": ("attention bias",),
    "loss": ("loss",),
    "recomputed": ("recomputed",),
    "temporaries": ("temporaries", "rounding", "matmul workspace"),
}


def memory(found, rates: Rates, options) -> str:
    """Draw a step's memory over its simulated time, as stacked areas, and write the figure to a
    file. Returns the text "figure", followed by the path of this file."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    # Letters are written as text. With a fixed salt, equal values always give equal files.
    matplotlib.rcParams.update({"svg.hashsalt": "phogpt", "svg.fonttype": "none"})
    times, areas, phases = over_time(found, rates)
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    beside = found.beside / GIB
    axes.stackplot(times, [[beside] * len(times), *areas.values()],
                   labels=["CUDA context, optimizer's pages", *areas], linewidth=0)
    axes.axhline(found.card.memory_gib, color="black", linewidth=1)
    axes.text(0, found.card.memory_gib, f" {found.card.name}: {found.card.memory_gib:g} GiB",
              va="bottom", fontsize=8)
    for phase, start in phases.items():
        axes.axvline(start, color="white", linewidth=0.5)
        axes.text(start, 0.1, f" {phase}", fontsize=8, color="white", va="bottom")
    axes.set(xlabel="seconds of the step (simulated)", ylabel="GiB", xlim=(0, times[-1]),
             ylim=(0, found.card.memory_gib * 1.12))
    setting = found.setting
    axes.set_title(f"{options.model}, rank {options.rank}, {setting.micro_batch} x "
                   f"{setting.seq_len:,} tokens, {found.recompute} blocks recomputed: simulated",
                   fontsize=10)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], fontsize=7, loc="upper left",
                bbox_to_anchor=(1.0, 1.0), frameon=False)
    folder = FIGURES if options.save else Path("runs") / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"memory-{Path(options.model).name}-{found.card.name.replace(' ', '-')}.svg"
    figure.savefig(file, metadata={"Date": None, "Creator": None})
    plt.close(figure)
    return f"figure {file}"


def over_time(found, rates: Rates) -> tuple[list[float], dict[str, list[float]], dict[str, float]]:
    """Return (times in seconds, {area: its GiB at each of these times}, {phase: its start}).

    The step's time is divided into BINS bins. The values of a bin are those of the moment at which
    the most memory is allocated in this bin.
    """
    ends, now = [], 0.0
    for op in found.trace.ops:
        now += (op_seconds(op, rates, 0) + op_seconds(op, rates, 1)) / 2
        ends.append(now)
    phases = {}
    for op, end in zip(found.trace.ops, ends, strict=True):
        if op.phase in ("forward", "backward") and op.phase not in phases:
            phases[op.phase] = end
    peaks = {}
    for moment in found.trace.moments(matmul_workspace(found.card)):
        at = ends[min(moment.op, len(ends) - 1)]
        place = int(BINS * at / ends[-1])
        if place not in peaks or moment.allocated > peaks[place].allocated:
            peaks[place] = moment
    times = [place * ends[-1] / BINS for place in sorted(peaks)]
    areas = {name: [sum(peaks[place].kinds.get(kind, 0) for kind in kinds) / GIB
                    for place in sorted(peaks)] for name, kinds in AREAS.items()}
    return times, areas, phases
