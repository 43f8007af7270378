"""The curves of a run: their content for any metrics. A failure to draw does not stop a run."""

import doctest
import json
import math
import re
import subprocess
import sys
import unicodedata
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from phogpt_raw.show import plots


def row(step, loss=2.0, skipped=0, lr=1e-3):
    return dict(step=step, loss=loss, lr=lr, skipped=skipped)


def score(step, loss):
    return dict(step=step, val_loss=loss, val_ppl=None, stops=None)


def rows(n):
    return [row(s, 2 + 3 * math.exp(-s / n * 5) + 0.1 * (s % 3)) for s in range(1, n + 1)]


def run_of(tmp_path, metrics, name="run"):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in metrics))
    return folder


def axes_of(metrics):
    """(upper panel, lower panel, curves of the upper panel by label)."""
    losses, rates = Figure().subplots(2, 1, sharex=True)
    steps = [r for r in metrics if "loss" in r]
    plots.training_loss(losses, steps)
    plots.held_out_loss(losses, [r for r in metrics if "val_loss" in r])
    plots.skipped_steps(losses, steps)
    plots.learning_rate(rates, steps)
    return losses, rates, {line.get_label(): line for line in losses.lines}


def test_doctest():
    assert doctest.testmod(plots).failed == 0


# -- the curves


def test_the_curves_are_the_metrics(tmp_path):
    metrics = [score(0, 5.0), row(1, 4.0, lr=1.0), row(2, None, skipped=1, lr=1.0),
               row(3, 3.0, skipped=1, lr=2.0), score(2, 2.5), score(3, 2.75)]
    _, rates, curves = axes_of(metrics)
    each = curves["training loss, each step"]
    assert each.get_xdata().tolist() == [1, 2, 3]
    np.testing.assert_array_equal(each.get_ydata(), [4.0, np.nan, 3.0])
    held_out = curves["held-out loss, lowest 2.500 at step 2"]
    assert held_out.get_xdata().tolist() == [0, 2, 3]
    assert held_out.get_ydata().tolist() == [5.0, 2.5, 2.75]
    assert list(curves["skipped steps: 1"].get_xdata()) == [2]
    assert rates.lines[0].get_ydata().tolist() == [1.0, 1.0, 2.0]


def test_steps_skipped_at_the_very_beginning_count():
    _, _, curves = axes_of([row(1, skipped=1), row(2, skipped=2), row(3, skipped=2)])
    assert list(curves["skipped steps: 2"].get_xdata()) == [1, 2]


def test_the_legend_names_only_curves_that_exist():
    _, _, curves = axes_of([row(1), row(2)])
    assert list(curves) == ["training loss, each step"]


def test_the_loss_before_training_is_never_the_lowest():
    _, _, curves = axes_of([score(0, 1.0), row(1), score(1, 2.0)])
    assert "held-out loss, lowest 2.000 at step 1" in curves


def test_a_long_run_is_drawn_by_its_extremes_and_its_mean():
    metrics = rows(10_000)
    metrics[4321]["loss"] = 9.0  # must stay visible among 10,000 steps
    axes, _, curves = axes_of(metrics)
    [band] = axes.collections
    assert band.get_paths()[0].vertices[:, 1].max() == 9.0
    mean = curves["its mean over 250 steps"]
    assert len(mean.get_xdata()) <= plots.MOST
    at = int(mean.get_xdata()[500]) - 1
    expected = np.mean([r["loss"] for r in metrics[at - 125 : at + 126]])
    assert mean.get_ydata()[500] == pytest.approx(expected)


@pytest.mark.parametrize("losses, scale", [([2.0, 5.0], "linear"), ([2.0, 9e3], "log"),
                                           ([0.0, 9e3], "linear")])
def test_one_huge_loss_does_not_flatten_the_others(losses, scale):
    axes = Figure().subplots()
    plots.scale(axes, np.array(losses))
    assert axes.get_yscale() == scale


# -- the files


@pytest.mark.parametrize("metrics", [
    [row(1)],
    [score(0, 5.0), row(1), score(1, 4.0)],
    [score(0, 5.0)],
    rows(40),
    [*rows(40), score(40, None)],
    [row(s, None, skipped=s) for s in range(1, 41)],
    [row(1, None), score(0, None)],
    [*rows(60)[:30], *(row(s, 9e9) for s in range(31, 61))],
], ids=["one-step", "one-evaluated", "none-taken", "no-evaluation", "nan-evaluation", "nan-alone",
        "all-nan", "exploded"])
def test_any_run_gives_both_pictures(tmp_path, metrics, recwarn):
    folder = run_of(tmp_path, metrics)
    plots.draw(folder, "nano")
    assert sorted(p.name for p in folder.iterdir()) == ["loss.png", "loss.svg", "metrics.jsonl"]
    ElementTree.parse(folder / "loss.svg")
    with Image.open(folder / "loss.png") as picture:
        assert picture.size == (1200, 750)
        assert picture.convert("RGBA").getextrema()[3] == (255, 255)  # the background is opaque
    assert not recwarn.list


def test_a_run_without_metrics_leaves_no_picture(tmp_path):
    plots.draw(tmp_path, "nano")
    plots.draw(run_of(tmp_path, []), "nano")
    assert not list(tmp_path.rglob("loss.*"))


def test_a_row_torn_by_a_power_cut_is_left_out(tmp_path):
    folder = run_of(tmp_path, rows(5))
    with (folder / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 6, "lo')
    plots.draw(folder, "nano")
    assert (folder / "loss.svg").is_file()


def test_the_same_metrics_give_the_same_bytes(tmp_path):
    """Another process gives the same bytes too, although Python's hashes differ there."""
    metrics = [score(0, 5.0), *rows(40), score(40, 2.0)]
    one, two = (run_of(tmp_path / n, metrics) for n in ("a", "b") if not (tmp_path / n).mkdir())
    plots.draw(one, "nano")
    command = f"from pathlib import Path; from phogpt_raw.show import plots; " \
              f"plots.draw(Path({str(two)!r}), 'nano')"
    subprocess.run([sys.executable, "-c", command], check=True)
    for name in ("loss.svg", "loss.png"):
        assert (one / name).read_bytes() == (two / name).read_bytes()


def test_a_hundred_thousand_steps_make_a_small_file(tmp_path):
    dice = np.random.default_rng(0)
    metrics = []
    for step, noise in enumerate(dice.normal(size=100_000), 1):
        metrics.append(row(step, 3 + 0.2 * noise, skipped=step // 3))
        if step % 20 == 0:
            metrics.append(score(step, 3.1 + 0.01 * noise))
    folder = run_of(tmp_path, metrics)
    plots.draw(folder, "vinai/PhoGPT-7B5-Instruct")
    assert (folder / "loss.svg").stat().st_size < 300_000


def test_vietnamese_letters_are_outlines_composed_or_not(tmp_path):
    """A name in NFD, as on a Mac, gives the same picture as the name in NFC."""
    name = "thơ-lục-bát-ễỡửậặ"
    composed = run_of(tmp_path, rows(3), name)
    plots.draw(composed, "nano")
    (tmp_path / "mac").mkdir()
    decomposed = run_of(tmp_path / "mac", rows(3), unicodedata.normalize("NFD", name))
    plots.draw(decomposed, "nano")
    svg = (composed / "loss.svg").read_text()
    assert svg == (decomposed / "loss.svg").read_text()
    assert "<text" not in svg  # a viewer needs no font
    glyphs = set(re.findall(r'id="DejaVuSans-Bold-(\w+)"', svg))  # only the title is bold
    assert len(glyphs) == len(set(name))


@pytest.mark.parametrize("name", ["$x_1$ $", "trăm 100$ \\frac", "a" * 200, "chữ 中文 🐟", "{x}"])
def test_any_name_can_be_a_title(tmp_path, name, recwarn):
    folder = run_of(tmp_path, rows(3), name)
    plots.draw(folder, name)
    assert (folder / "loss.png").is_file() and not recwarn.list


def test_a_long_name_is_cut_in_its_middle():
    cut = plots.one_line("đầu " + "x" * 200 + " cuối")
    assert len(cut) <= 60 and cut.startswith("đầu") and cut.endswith("cuối")


def test_the_readers_own_matplotlib_settings_change_nothing(tmp_path, monkeypatch):
    import matplotlib

    one, two = run_of(tmp_path, rows(3)), tmp_path / "two" / "run"
    plots.draw(one, "nano")
    two.parent.mkdir()
    run_of(two.parent, rows(3))
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "red", "svg.fonttype": "none"}):
        plots.draw(two, "nano")
    assert (one / "loss.svg").read_bytes() == (two / "loss.svg").read_bytes()


# -- in a run


def test_starting_a_run_does_not_wait_for_matplotlib():
    command = "import sys, train; print('matplotlib' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True,
                          check=True)
    assert said.stdout.strip() == "False"


def test_a_run_leaves_its_curves(train_and_draw, tmp_path):
    status, said, _ = train_and_draw("--out", tmp_path / "thơ")
    assert status == 0 and "README.md, loss.png, loss.svg" in said
    assert (tmp_path / "thơ" / "loss.png").is_file()


def test_a_run_that_fails_leaves_its_curves(train_and_draw, tmp_path):
    out = tmp_path / "run"
    assert train_and_draw("--out", out, "--lr", 1e25)[0] == 1
    assert (out / "loss.svg").is_file() and (out / "loss.png").is_file()


def test_curves_of_a_resumed_run_are_of_all_its_steps(train_and_draw, tmp_path, monkeypatch):
    out = tmp_path / "run"
    train_and_draw("--out", out, at=(5, KeyboardInterrupt()))
    before = (out / "loss.svg").read_bytes()
    seen = []
    monkeypatch.setattr(plots, "training_loss",
                        lambda _axes, steps: seen.extend(r["step"] for r in steps))
    assert train_and_draw("--out", out)[0] == 0
    assert seen == list(range(1, 8)) and (out / "loss.svg").read_bytes() != before


def test_a_full_disk_costs_the_picture_and_not_the_run(train, tmp_path, monkeypatch):
    out = tmp_path / "run"

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(plots, "pictures", full)
    status, said, _ = train("--out", out)
    assert status == 0 and (out / "adapter_model.safetensors").is_file()
    [line] = [line for line in said.splitlines() if "not drawn" in line]
    assert str(out) in line and "No space left on device" in line
