"""The benchmarks for GPUs that this computer does not have: their output and their files."""

import argparse
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import example

from bench import (
    command_line,
    dataset_time,
    figures,
    memory,
    results,
    simulated,
    step_time,
    windows,
)
from bench.command_line import Setting
from bench.report import LEDGER_NOTES
from bench.simulated import Traces, cards
from phogpt_raw import cards as known
from phogpt_raw.config import Config
from phogpt_raw.refusal import Refusal
from phogpt_raw.simulate import rates as known_rates
from phogpt_raw.simulate.ledger import KINDS

NANO = ["--model", "nano", "--seq-len", "64,512"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Let a benchmark write its results and figures into a temporary folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(figures, "FIGURES", tmp_path / "figures")


def options(*flags):
    return command_line.parse(command_line.parser(""), [*NANO, *flags])


def a_4b_on_a_t4():
    """(card, traces) of PhoGPT-4B on a T4. Long rows fill the memory of a T4."""
    asked = command_line.parse(command_line.parser(""), ["--model", "4b", "--card", "t4"])
    [(card, _, traces)] = cards(asked)
    return card, traces


def small_t4(monkeypatch, gib: float):
    card = replace(known_rates.KNOWN["t4"].card, memory_gib=gib)
    monkeypatch.setitem(known_rates.KNOWN, "t4", replace(known_rates.KNOWN["t4"], card=card))


@pytest.mark.parametrize("bench", [memory, step_time])
def test_each_card_has_its_table_and_says_that_it_is_simulated(bench, capsys, tmp_path):
    bench.main([*NANO, "--card", "t4,v100"])
    said = capsys.readouterr().out
    for card in ("simulated for Tesla T4", "simulated for Tesla V100-SXM2-16GB"):
        assert card in said
    assert said.count("1 x 64 ") == 2 and said.count("1 x 512 ") >= 2
    assert not (tmp_path / "results").exists() and not (tmp_path / "figures").exists()


def test_the_kinds_are_what_is_allocated_and_the_card_holds_more():
    [(card, _, traces)] = cards(options("--card", "t4"))
    row = traces.on(card, Setting(512, 1, 1, "all")).memory_row()
    assert sum(row["kinds_gib"].values()) == pytest.approx(row["allocated_gib"])
    assert sum(row["blocks_gib"].values()) == pytest.approx(row["kinds_gib"]["saved activations"])
    assert row["allocated_gib"] <= row["reserved_gib"]
    beside = known_rates.CONTEXT / known.GIB + row["pages_gib"]
    assert row["device_gib"] == pytest.approx(row["reserved_gib"] + beside)
    assert {"forward", "backward"} <= row["peak_gib"].keys()
    assert max(p["allocated"] for p in row["peak_gib"].values()) == row["allocated_gib"]


def test_auto_recomputes_as_much_as_the_card_forces_for_a_grid_and_for_a_file():
    card, traces = a_4b_on_a_t4()
    setting = Setting(8192, 1, 1, "auto")
    found = traces.on(card, setting)
    assert 0 < found.recompute < 32 and found.fits
    assert not traces.on(card, replace(setting, recompute="none")).fits
    rows = [example(list(range(4, 4 + n)), n - 1, "x") for n in (30, 8192, 60)]
    assert chosen(rows, card, traces, packing=False).recompute == found.recompute
    assert chosen(rows[::2], card, traces, packing=False).recompute == 0


def test_what_does_not_fit_says_so_and_the_longest_row_is_found(monkeypatch, capsys):
    small_t4(monkeypatch, 0.9)  # of 0.9 GiB, CUDA's context leaves 0.09
    memory.main(["--model", "nano", "--seq-len", "64,8192", "--card", "t4", "--recompute", "all"])
    said = capsys.readouterr().out
    rows = {line.split()[2]: line.split()[4] for line in said.splitlines() if " x " in line[:12]}
    assert rows == {"64": "yes", "8192": "no"}
    longest = int(re.search(r"every block recomputed: ([\d,]+) tokens", said)[1].replace(",", ""))
    assert 0 < longest < 8192
    [(card, _, traces)] = cards(options("--card", "t4"))
    fits = [traces.on(card, Setting(n, 1, 1, "all")).fits for n in (longest, longest + 512)]
    assert fits == [True, False]


def test_the_longest_row_is_looked_for_with_every_block_recomputed():
    card, traces = a_4b_on_a_t4()
    small = replace(card, memory_gib=4.6)
    found = [traces.on(small, Setting(1024, 1, 1, "none"))]
    longest = memory.longest_row(traces, small, found)
    assert traces.on(small, Setting(longest, 1, 1, "all")).fits
    assert not traces.on(small, Setting(longest, 1, 1, "none")).fits


def test_the_longest_row_is_no_shorter_than_one_that_fits():
    card, traces = a_4b_on_a_t4()
    small = replace(card, memory_gib=3.6)
    found = [traces.on(small, Setting(256, 1, 1, "all"))]
    assert found[0].fits and memory.longest_row(traces, small, found, step=4096) == 256


def test_a_step_fits_to_the_last_byte_with_what_torch_takes_for_its_products(monkeypatch):
    monkeypatch.setattr(simulated, "matmul_workspace", lambda _: 2**26)  # 64 MiB: its own segment
    [(card, _, traces)] = cards(options("--card", "t4"))
    found = traces.on(card, Setting(64, 1, 1, "none"))
    reserved = found.trace.replay(workspace=2**26).peak_reserved
    for spare, fits in ((0, True), (-1, False)):
        gib = (reserved + found.beside + spare) / known.GIB
        assert replace(found, card=replace(card, memory_gib=gib)).fits is fits


@pytest.mark.parametrize("flags", [["--rank", "64"], ["--optimizer", "adamw"], ["--loss-mib", "1"],
                                   ["--attention", "efficient"]], ids="=".join)
def test_each_flag_is_simulated(flags):
    setting = Setting(512, 1, 1, "none")

    def step(*more):
        [(card, _, traces)] = cards(options("--card", "h200", *more))
        trace = traces.on(card, setting).trace
        return [op.name for op in trace.ops], trace.replay().peak_allocated, trace.pages

    assert step() != step(*flags)


def test_micro_batches_that_are_accumulated_are_so_many_times_the_work():
    [(card, _, traces)] = cards(options("--card", "t4"))
    one, three = (sum(op.flops for op in traces.on(card, Setting(64, 2, n, "none")).trace.ops)
                  for n in (1, 3))
    assert three == 3 * one


def test_each_card_is_simulated_in_the_dtype_that_it_trains_in():
    found = {card.name: traces.dtype for card, _, traces in cards(options("--card", "t4, l4"))}
    assert found == {"Tesla T4": known.DTYPES["fp16"], "NVIDIA L4": known.DTYPES["bf16"]}


def test_a_file_is_fitted_with_as_many_rows_at_once_as_asked_for():
    card, traces = a_4b_on_a_t4()
    rows = [example(list(range(4, 4 + 4096)), 9, "x")] * 2
    single, double = (chosen(rows, card, traces, micro_batch=n).recompute for n in (1, 2))
    assert single < double


def chosen(examples, card, traces, **more):
    """The settings that a run with these examples chooses on the GPU `card`."""
    config = Config(**{"batch_size": len(examples), "epochs": 1, "max_len": 16_384, **more})
    return windows.plan(examples, config, card, traces.shape.n_layers, traces).choice


def test_the_ledger_adds_up_to_what_is_on_the_card(capsys):
    memory.main(["--model", "4b", "--seq-len", "512", "--card", "t4"])
    said = capsys.readouterr().out.split("GiB by kind at the peak")[1]
    gib = {line[:20].strip(): float(line.split()[-1]) for line in said.splitlines()[2:]
           if re.search(r"\d\.\d{3} *$", line)}
    kinds = sum(v for k, v in gib.items() if k in KINDS)
    assert gib["allocated"] == pytest.approx(kinds, abs=0.006)
    beside = gib["fragmentation"] + gib["optimizer's pages"] + gib["CUDA context"]
    assert gib["on the card"] == pytest.approx(gib["allocated"] + beside, abs=0.003)
    assert gib["fragmentation"] < 0.2


def test_a_note_under_the_ledger_explains_a_row_of_the_ledger(capsys):
    for model in ("7b5", "4b"):
        memory.main(["--model", model, "--seq-len", "256", "--card", "t4"])
        lines = capsys.readouterr().out.split("GiB by kind at the peak")[1].splitlines()
        rows = {m[1] for line in lines if (m := re.match(r" *(.*?) +\d+\.\d{3} *$", line))}
        notes = " ".join(" ".join(line.split()) for line in lines)
        explained = {name for name in LEDGER_NOTES if f"{name}: " in notes}
        assert explained == rows & LEDGER_NOTES.keys() and "CUDA context" in explained


@pytest.mark.parametrize("bench, what", [(memory, "memory"), (step_time, "step_time")])
def test_a_saved_simulation_is_named_and_marked_as_one(bench, what, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{what}.py", "--save"])
    bench.main([*NANO, "--card", "v100", "--save"])
    [file] = (tmp_path / "results").iterdir()
    assert file.name.startswith(f"{what}-simulated-Tesla-V100-SXM2-16GB-nano-fp16-")
    result = json.loads(file.read_text())
    assert (result["what"], result["source"], result["model"]) == (what, "simulated", "nano")
    assert result["card"]["name"] == "Tesla V100-SXM2-16GB" and "assumed" in result["sources"]
    assert [row["seq_len"] for row in result["rows"]] == [64, 512]


def test_times_are_a_range_and_grow_with_the_row():
    [(card, rates, traces)] = cards(options("--card", "t4"))
    short, long = (traces.on(card, Setting(n, 2, 2, "none")).time_row(rates)
                   for n in (64, 512))
    for row, tokens in ((short, 4 * 64), (long, 4 * 512)):
        low, high = row["step_s"]
        assert 0 < low < high
        assert row["example_s"] == [low / 4, high / 4]
        assert row["tokens_per_s"] == [tokens / high, tokens / low]
        assert sum(s[0] for s in row["phases_s"].values()) == pytest.approx(low)
    assert short["step_s"][1] < long["step_s"][1]
    assert short["flops"] < long["flops"]


def test_the_figure_shows_the_cards_limit_and_every_kind(tmp_path):
    [(card, rates, traces)] = cards(asked := options("--card", "t4", "--save"))
    found = traces.on(card, Setting(512, 1, 1, "none"))
    assert figures.memory(found, rates, asked) == f"figure {tmp_path}/figures/" \
        "memory-nano-Tesla-T4.svg"
    svg = (tmp_path / "figures" / "memory-nano-Tesla-T4.svg").read_text()
    for text in ("Tesla T4: 14.56 GiB", "saved activations", "base in NF4", "forward", "simulated"):
        assert text in svg
    times, areas, phases = figures.over_time(found, rates)
    assert times == sorted(times) and len(times) <= figures.BINS + 1
    assert phases["forward"] < phases["backward"] < times[-1]
    top = max(map(sum, zip(*areas.values(), strict=True)))
    assert top == pytest.approx(
        found.trace.peak(known_rates.matmul_workspace(card)).allocated / known.GIB)


def test_the_areas_of_the_figure_are_all_the_kinds():
    assert sorted(k for kinds in figures.AREAS.values() for k in kinds) == sorted(KINDS)


# -- the examples of a file


@pytest.mark.parametrize("packing", [True, False])
def test_the_estimate_uses_an_even_choice_of_the_runs_packed_windows(packing):
    examples = [example(list(range(n)), n // 2, "x") for n in range(10, 410)]
    asked = argparse.Namespace(data="x.jsonl", epochs=3)
    config = Config(epochs=3, batch_size=8, packing=packing)
    epoch = windows.plan(examples, config, known.Card("CPU", "cpu"), 8, None)
    seen = []

    def seconds(window):
        seen.append((window.packing, len(window.examples)))
        return window.tokens / 1000, window.tokens / 500

    found = dataset_time.estimate(
        asked, dataset_time.Dataset(examples, "nano", config), epoch, 8, seconds)
    assert seen == [(epoch.choice.packing, 8)] * 8 and (epoch.choice.packing is None) != packing
    mean = sum(len(e.ids) for e in examples) / len(examples)
    assert found["example_s"] == pytest.approx([mean / 1000, mean / 500], rel=0.03)
    assert found["hours"] == pytest.approx([s * 400 * 3 / 3600 for s in found["example_s"]])
    assert (found["examples"], found["tokens_longest"]) == (400, 409)
    assert found["layout"]["steps"] == 50
    assert (found["layout"]["rows"] == 400) != packing


def test_a_file_gives_seconds_per_example_and_hours(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": "Xin chào " * n, "response": "Dạ."}) + "\n"
                            for n in range(1, 12)))
    step_time.main([*NANO, "--card", "t4", "--data", str(file), "--epochs", "5"])
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(r"rows.jsonl: 11 examples, median \d+ tokens, longest \d+ "
                     r"\(nano's tokenizer\), examples per step 8, rows per step 1: "
                     r"[\d.]+ to [\d.]+ s per example, \d s( to \d s)? for 5 epochs", said)


@pytest.mark.parametrize("flags, line", [
    (["--epochs", "nan"],
     "argument --epochs: 'nan': must be a number from 0.001 to 1,000,000; see --help"),
    (["--epochs", "0"],
     "argument --epochs: '0': must be a number from 0.001 to 1,000,000; see --help"),
    (["--micro-batch", "1,2"], "--data needs one value of --micro-batch and one of --recompute"),
    (["--recompute", "all,none"], "--data needs one value of --micro-batch and one of --recompute"),
])
def test_a_file_is_estimated_for_one_run_that_can_be(flags, line, tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "Xin chào", "response": "Dạ."}\n')
    with pytest.raises(SystemExit) as stopped:
        step_time.main([*NANO, "--card", "t4", "--data", str(file), *flags])
    said = capsys.readouterr()
    assert stopped.value.code == 2 and said.err == f"error: {line}\n" and not said.out


def test_a_tokenizer_that_names_no_end_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text(
        (Path(known.__file__).parent / "nano" / "base" / "tokenizer.json").read_text())
    with pytest.raises(Refusal, match="names no token that ends an answer"):
        dataset_time.tokenizer(str(tmp_path))


# -- refusals


@pytest.mark.parametrize("flags, line", [
    (["--card", "k80"], "error: --card k80: choose from t4, v100, l4, a100, h200\n"),
    (["--card", "t4", "--dtype", "bf16"], "error: --dtype asks for bf16, which Tesla T4 "
     "(compute capability 7.5) only emulates; give --dtype auto\n"),
    (["--card", "t4", "--recompute", "9"], "error: --recompute 9: the model has 8 blocks\n"),
    (["--card", "t4", "--recompute", "much"],
     "error: --recompute much: auto, all, none or a number of blocks\n"),
    (["--card", "t4", "--cap", "8"], "error: --cap 8 is for measuring on a GPU (--measured); a "
     "simulated card always has its own memory\n"),
    (["--card", "t4", "--micro-batch", "0"], "error: argument --micro-batch: '0': must be "
     "a whole number from 1 to 100,000; see --help\n"),
    (["--card", "t4", "--documents", "33"], "error: --documents 33: each has at least 2 tokens, "
     "but a row of --seq-len has 64\n"),
    (["--card", "t4", "--micro-batch", "100000"], "error: --seq-len, --micro-batch and "
     "--accumulate: 51,200,000 tokens in one step; at most 262,144 are allowed\n"),
])
def test_what_is_not_possible_is_refused_in_one_line(flags, line, capsys):
    with pytest.raises(SystemExit) as stopped:
        memory.main([*NANO, *flags])
    assert stopped.value.code == 2
    assert " ".join(capsys.readouterr().err.split()) == line.strip()


def test_seconds_in_fp32_are_not_made_of_16_bit_rates(capsys):
    with pytest.raises(SystemExit) as stopped:
        step_time.main([*NANO, "--card", "t4", "--dtype", "fp32"])
    assert stopped.value.code == 2 and "only 16-bit types" in capsys.readouterr().err


def test_a_trace_is_made_once():
    traces = Traces(options("--card", "t4"), known.DTYPES["fp16"])
    setting = Setting(64, 1, 1, "none")
    t4, v100 = (known_rates.KNOWN[name].card for name in ("t4", "v100"))
    assert traces.on(t4, setting).trace is traces.on(v100, setting).trace
