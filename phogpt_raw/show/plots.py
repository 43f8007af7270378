"""Draw loss.svg and loss.png of a run: losses, learning rate and skipped steps, from metrics.jsonl.

The picture has its own light background, so that it looks the same in a light and a dark viewer.
The SVG contains text as outlines, so a viewer needs no font with Vietnamese characters. The same
metrics give the same files, byte for byte. matplotlib is imported only when a picture is drawn,
because the import takes a second and would delay the start of a run.
"""

import logging
import unicodedata
import warnings
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path

import numpy as np

from phogpt_raw.files import whole_file
from phogpt_raw.messages import _
from phogpt_raw.show.console import say
from phogpt_raw.training.metrics import read_metrics
from phogpt_raw.training.run import Run

# Most points of a curve. If there are more steps, they are grouped into bins, and the area between
# the lowest and the highest loss of each bin is drawn.
MOST = 1000
SMOOTHED_FROM = 30  # with fewer steps no running mean is drawn
LOG_FROM = 20  # log scale if the highest loss is more than LOG_FROM times the lowest
BACKGROUND, INK, GRID = "#fcfcfa", "#24292f", "#dddfe3"
TRAINING, HELD_OUT, SKIPPED = "#1f6fb2", "#c2410c", "#a21caf"
STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib and has all Vietnamese characters
    "font.size": 9, "svg.fonttype": "path", "svg.hashsalt": "phogpt",
    "figure.facecolor": BACKGROUND, "axes.facecolor": BACKGROUND, "savefig.facecolor": BACKGROUND,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK,
    "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": GRID, "grid.linewidth": 0.6, "axes.axisbelow": True, "legend.frameon": False,
}


@contextmanager
def drawn(run: Run):
    """A context that draws a run's curves at its end, also after an error. The curves of a failed
    run are needed most. If they cannot be drawn, one line is printed and nothing is raised."""
    try:
        yield
    finally:
        try:
            draw(run.folder, run.config.base_name())
        except Exception as error:  # a full disk or a damaged font cache must not stop the run
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            with suppress(OSError):  # the output may be closed
                say(_("{folder}: loss.svg and loss.png were not drawn ({reason})",
                      folder=run.folder, reason=reason))


def draw(folder: Path, base: str) -> None:
    """Write loss.svg and loss.png from folder/metrics.jsonl, if it has rows.

    base: the name of the base model, for the title.
    """
    steps, evaluations = read_metrics(folder)
    if not steps and not evaluations:
        return
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # no messages about the font cache
    from matplotlib import style

    title = folder.resolve().name
    with style.context(["default", STYLE]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a character missing in the font is drawn as a box
        svg, png = pictures(steps, evaluations, title, base)
    for name, content in (("loss.svg", svg), ("loss.png", png)):
        with whole_file(folder / name) as file:
            file.write_bytes(content)


def pictures(steps: list[dict], evaluations: list[dict], title: str, base: str):
    """Draw the curves, and return (SVG, PNG) as bytes."""
    from matplotlib.figure import Figure  # not pyplot, which keeps figures in memory

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    training_loss(losses, steps)
    held_out_loss(losses, evaluations)
    skipped_steps(losses, steps)
    learning_rate(rates, steps)
    values = np.concatenate([column(steps, "loss"), column(evaluations, "val_loss")])
    scale(losses, values[np.isfinite(values)])
    dress(figure, losses, rates, max(row["step"] for row in steps + evaluations), title, base)
    svg, png = BytesIO(), BytesIO()
    figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    figure.savefig(png, format="png", metadata={"Software": None})
    return svg.getvalue(), png.getvalue()


def training_loss(axes, steps: list[dict]) -> None:
    """Draw the loss of each step. If there are enough steps, this curve is faint and a running mean
    is drawn over it. A loss that is not finite leaves a gap."""
    if not steps:
        return
    step, loss = column(steps, "step"), column(steps, "loss")
    many = len(steps) >= SMOOTHED_FROM
    label = _("training loss, each step")
    if len(steps) > MOST:
        at, low, high = extremes(step, loss)
        axes.fill_between(at, low, high, color=TRAINING, alpha=0.25, linewidth=0, label=label)
    else:
        axes.plot(step, loss, color=TRAINING, alpha=0.4 if many else 1, linewidth=1, label=label,
                  marker="o", markersize=2.5 if many else 5, markeredgewidth=0, clip_on=False)
    if many:
        window = max(5, len(steps) // 40)
        smooth, thin = running_mean(loss, window), slice(None, None, -(-len(steps) // MOST))
        axes.plot(step[thin], smooth[thin], color=TRAINING, linewidth=1.8,
                  label=_("its mean over {n:,} steps", n=window))


def held_out_loss(axes, evaluations: list[dict]) -> None:
    """Draw the held-out loss. The lowest value after step 0 is circled and named in the legend."""
    if not evaluations:
        return
    step, loss = column(evaluations, "step"), column(evaluations, "val_loss")
    label, trained = _("held-out loss"), np.isfinite(loss) & (step > 0)
    if trained.any():
        best = np.flatnonzero(trained)[loss[trained].argmin()]
        label = _("held-out loss, lowest {loss:.3f} at step {step:,}", loss=loss[best],
                  step=int(step[best]))
        axes.plot(step[best], loss[best], "o", markersize=10, markerfacecolor="none",
                  markeredgecolor=HELD_OUT, markeredgewidth=1.2, clip_on=False, zorder=4)
    thin = slice(None, None, -(-len(step) // MOST))
    axes.plot(step[thin], loss[thin], color=HELD_OUT, linewidth=1.8, label=label, zorder=3,
              marker="o", markersize=5 if len(step) <= 100 else 0, clip_on=False)


def skipped_steps(axes, steps: list[dict]) -> None:
    """Draw a mark at the bottom for each skipped step. The field `skipped` is the number of
    steps skipped so far."""
    count = [row["skipped"] for row in steps]
    at = [row["step"] for row, before, now in zip(steps, [0, *count], count, strict=False)
          if now > before]
    if at:
        shown = at[:: -(-len(at) // MOST)]
        axes.plot(shown, [0.02] * len(shown), "|", color=SKIPPED, markersize=9, markeredgewidth=1.5,
                  transform=axes.get_xaxis_transform(), zorder=5, clip_on=False,
                  label=_("skipped steps: {n:,}", n=len(at)))


def learning_rate(axes, steps: list[dict]) -> None:
    thin = steps[:: -(-len(steps) // MOST) or 1]
    axes.plot(column(thin, "step"), column(thin, "lr"), color=INK, linewidth=1.2,
              marker="o" if len(thin) == 1 else None, markersize=5, clip_on=False)


def scale(axes, finite: np.ndarray) -> None:
    """Use a logarithmic scale if high losses would flatten the rest of a linear curve."""
    if not len(finite):
        axes.set_yticks([])
        axes.text(0.5, 0.5, _("no loss was finite"), transform=axes.transAxes, ha="center")
    elif finite.min() > 0 and finite.max() > LOG_FROM * finite.min():
        axes.set_yscale("log")


def dress(figure, losses, rates, last: int, title: str, base: str) -> None:
    """Add title, legend and labels; `last` is the last step."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, StrMethodFormatter

    rates.set_xlim(-0.01 * last, 1.01 * max(1, last))
    rates.set_ylim(bottom=0)
    rates.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    rates.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    rates.yaxis.set_major_locator(MaxNLocator(2, steps=[1, 2, 5, 10]))
    rates.yaxis.set_major_formatter(FuncFormatter(lambda rate, _place: f"{rate:g}"))
    losses.set_ylabel(_("loss, nats per token"))
    rates.set_ylabel(_("learning rate"))
    rates.set_xlabel(_("optimizer step"))
    figure.align_ylabels()
    legend = losses.legend(loc="lower left", bbox_to_anchor=(0, 1.01), ncols=2, borderaxespad=0,
                           handlelength=1.6, borderpad=0)
    over = 12 + 14 * -(-len(legend.get_texts()) // 2)  # height of the legend in points
    # parse_math=False: a $ in a name is a plain $.
    losses.set_title(one_line(title), loc="left", fontsize=13, fontweight="bold", pad=over + 14,
                     parse_math=False)
    losses.annotate(one_line(_("LoRA on {base}", base=base)), (0, 1), (0, over),
                    xycoords="axes fraction", textcoords="offset points", parse_math=False)


def one_line(name: str, width: int = 60) -> str:
    """A name on one line, in the Unicode form NFC. A long name is shortened to about `width`
    characters, and its middle is left out."""
    name = " ".join(unicodedata.normalize("NFC", name).split())
    return name if len(name) <= width else f"{name[: width // 2]} … {name[-width // 2 + 3 :]}"


def column(rows: list[dict], name: str) -> np.ndarray:
    """The values of the field `name` in all rows, as an fp64 array [rows]. None becomes NaN."""
    return np.array([row[name] for row in rows], dtype=float)


def extremes(step: np.ndarray, loss: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Divide the steps into at most MOST bins. Return (first step, lowest loss, highest loss) of
    each bin. The losses are NaN if the bin has no finite loss."""
    starts = np.arange(0, len(step), -(-len(step) // MOST))
    return (step[starts], np.fmin.reduceat(loss, starts), np.fmax.reduceat(loss, starts))


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """The running mean of `values`, as an array [n].

    Each mean is over the finite values that are at most window // 2 positions away. It is NaN if no
    value in this range is finite.

    >>> running_mean(np.array([1.0, 2.0, np.nan, 6.0]), 3).tolist()
    [1.5, 1.5, 4.0, 6.0]
    """
    half, finite = window // 2, np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    place = np.arange(len(values))
    first, end = np.maximum(place - half, 0), np.minimum(place + half + 1, len(values))
    count = counts[end] - counts[first]
    return np.where(count > 0, (sums[end] - sums[first]) / np.maximum(count, 1), np.nan)
