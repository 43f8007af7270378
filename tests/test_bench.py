"""The benchmarks run the real training step, report measured values, and survive full GPU memory.
"""

import doctest
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend

from bench import (
    command_line,
    compare,
    dataset_time,
    gpu_kernels,
    measure,
    memory,
    report,
    results,
    simulated,
    step_time,
)
from bench.command_line import Setting
from bench.meter import MemoryMeter, Stopwatch
from phogpt_raw.simulate.trace import Kernels

HERE = ["--measured", "--model", "nano"]
SMALL = [*HERE, "--seq-len", "32,64", "--recompute", "all,none"]


@pytest.mark.parametrize("bench, what", [(memory, "memory"), (step_time, "step_time")])
def test_a_bench_prints_a_table_and_saves_only_when_asked(bench, what, tmp_path, monkeypatch,
                                                          capsys):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    more = ["--steps", "2", "--warmup", "1"] if bench is step_time else []
    bench.main([*SMALL, *more])
    said = capsys.readouterr().out
    assert said.count("1 x 32") == 2 and said.count("1 x 64") == 2
    if not torch.cuda.is_available():
        assert "not for a card" in said
    assert not list(tmp_path.iterdir())

    monkeypatch.setattr(sys, "argv", [f"{what}.py", "--save"])
    bench.main([*HERE, "--seq-len", "32", *more, "--save"])
    [file] = tmp_path.iterdir()
    result = json.loads(file.read_text())
    described = [key for key in result if key not in (
        "label", "model", "dtype", "rank", "optimizer", "attention", "loss_mib", "cap_gib",
        "cap_for_torch_gib", "matmul_flops_per_s")]
    assert described == ["what", "source", "card", "versions", "commit", "date", "command", "rows"]
    assert result["model"] == "nano"
    assert result["what"] == what and result["source"] == "measured"
    assert list(result["versions"]) == ["torch", "transformers", "peft", "bitsandbytes"]
    assert result["command"] == f"python bench/{what}.py --save"
    assert result["attention"] == "auto" and result["cap_gib"] is None
    [row] = result["rows"]
    assert row["fits"] and row["seq_len"] == 32
    if bench is step_time:
        phases = row["phases_s"]
        assert 0 < sum(phases.values()) <= 1.5 * row["step_s"]
        assert row["tokens_per_s"] == pytest.approx(32 / row["step_s"])


@pytest.mark.parametrize("bench", [memory, step_time])
def test_out_of_memory_is_a_row_and_the_next_one_is_measured(bench, monkeypatch, capsys):
    run = measure.Bench.run

    def too_small(self, window, *args, **kwargs):
        if len(window.examples[0].ids) == 64:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(self, window, *args, **kwargs)

    monkeypatch.setattr(measure.Bench, "run", too_small)
    more = ["--steps", "1", "--warmup", "0"] if bench is step_time else []
    bench.main([*HERE, "--seq-len", "64,32", *more])
    first, second = (line for line in capsys.readouterr().out.splitlines() if "1 x " in line)
    assert "1 x 64" in first and "out of" in first and "memory" in first
    assert "1 x 32" in second and "out of" not in second


def test_the_bench_changes_the_adapters_as_training_does():
    bench = measure.Bench(command_line.parse(command_line.parser(""), HERE))
    before = bench.adapters.flat.detach().clone()
    setting = Setting(seq_len=32, micro_batch=2, accumulate=2, recompute="none")
    window = bench.window(setting)
    assert (window.tokens, len(list(window.micro_batches(2)))) == (setting.tokens, 2)
    assert window.supervised == 4 * 31
    bench.begin(setting, capture=True)
    bench.run(window)
    assert not torch.equal(bench.adapters.flat.detach(), before)


@pytest.mark.gpu
def test_each_kind_of_kernel_is_found_in_a_step():
    """The benchmark finds the kind of a kernel by its name.

    The benchmark would count a renamed kernel as "other".
    """
    bench = measure.Bench(command_line.parse(command_line.parser(""), [*HERE, "--dtype", "fp16"]))
    setting = Setting(seq_len=512, micro_batch=1, accumulate=1, recompute="none")
    bench.begin(setting, capture=False)
    window = bench.window(setting)
    bench.run(window)  # the first run compiles kernels and initialises cuBLAS
    seconds, count = gpu_kernels.kernels(bench, window)
    assert set(gpu_kernels.FAMILIES) <= set(seconds), seconds
    assert seconds.get("other", 0.0) < 0.05 * sum(seconds.values()), seconds
    assert count > 100


@pytest.mark.parametrize("recompute, blocks", [("none", 0), ("3", 3), ("all", 8)])
def test_the_bench_recomputes_as_the_setting_says_and_counts_it(recompute, blocks):
    """The benchmark's formula gives the FLOPs of the recorded operations within 7 %.

    The formula leaves out adapters and attention, which need few FLOPs in such a short row.
    """
    options = command_line.parse(command_line.parser(""), [*HERE, "--rank", "1"])
    bench = measure.Bench(options)
    setting = Setting(seq_len=32, micro_batch=2, accumulate=1, recompute=recompute)
    bench.begin(setting, capture=False)
    assert bench.training.limits.recompute == blocks
    trace = simulated.Traces(options, torch.float32).trace(
        setting, blocks, Kernels(SDPBackend.EFFICIENT_ATTENTION, SDPBackend.EFFICIENT_ATTENTION))
    counted = measure.flops(bench, setting, bench.window(setting))
    assert counted == pytest.approx(sum(op.flops for op in trace.ops), rel=0.07)


@pytest.mark.parametrize("module", [compare, dataset_time, gpu_kernels, report],
                         ids=lambda m: m.__name__)
def test_doctest(module):
    found = doctest.testmod(module)
    assert found.attempted and not found.failed


def test_a_bad_grid_is_one_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        memory.main(["--seq-len", "12,x"])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said == ("error: argument --seq-len: 'x': must be a whole number from 2 to 262,144; see "
                    "--help\n")


def test_a_stopwatch_gives_seconds_to_each_phase_and_begins_anew():
    watch = Stopwatch()
    for phase in ("forward", "backward", "forward"):
        watch(phase)
    seconds = watch.read()
    assert list(seconds) == ["forward", "backward"]
    assert all(value >= 0 for value in seconds.values())
    watch("clip")
    assert list(watch.read()) == ["clip"]


def test_a_memory_meter_sees_what_a_phase_holds():
    meter = MemoryMeter()
    meter("small")
    meter("large")
    held = torch.ones(64 * 2**20, device="cuda" if torch.cuda.is_available() else "cpu")
    peaks = meter.read()
    del held
    kind = "allocated" if torch.cuda.is_available() else "resident"
    assert peaks["large"][kind] - peaks["small"][kind] == pytest.approx(0.25, abs=0.05)


@pytest.mark.parametrize("flags", [["--rank", "0"], ["--accumulate", "0"], ["--optimizer", "sgd"]])
def test_an_impossible_flag_of_a_bench_is_one_line(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        memory.main(flags)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("flags, line", [
    (["--measured", "--card", "t4"], "--card simulates, --measured measures this computer"),
    (["--card", "t4", "--cap", "14.56"], "--cap 14.56 is for measuring on a GPU"),
    (["--card", "t4,k80"], "--card k80: choose from"), (["--card", "t4,"], "--card : choose from"),
])
def test_flags_that_would_be_ignored_are_refused_before_anything_is_done(flags, line, capsys):
    with pytest.raises(SystemExit) as stopped:
        memory.main(["--model", "nano", *flags])
    said = capsys.readouterr()
    assert stopped.value.code == 2 and said.err.startswith(f"error: {line}") and not said.out


def test_a_bad_file_is_found_before_anything_is_measured(capsys):
    with pytest.raises(SystemExit):
        step_time.main([*HERE, "--data", "nowhere.jsonl"])
    said = capsys.readouterr()
    assert said.err == "error: nowhere.jsonl: no such data file\n" and not said.out


def test_a_file_whose_rows_do_not_fit_is_reported_and_what_was_measured_is_saved(
        monkeypatch, tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "Xin chào " * 60, "response": "Dạ."}) + "\n")
    run = measure.Bench.run

    def too_small(self, window, *args, **kwargs):
        if len(window.examples[-1].ids) > 32:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(self, window, *args, **kwargs)

    monkeypatch.setattr(measure.Bench, "run", too_small)
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    step_time.main([*HERE, "--seq-len", "32", "--steps", "1", "--warmup", "0", "--data", str(file),
                    "--save"])
    assert "out of memory; a shorter --max-len" in " ".join(capsys.readouterr().out.split())
    [saved] = (tmp_path / "results").iterdir()
    result = json.loads(saved.read_text())
    assert result["dataset"]["example_s"] is None and result["rows"][0]["fits"]


@pytest.mark.parametrize("graphs, captured", [({}, False), ({"a": object()}, True),
                                              ({"a": object(), "b": None}, False)])
def test_a_step_is_called_captured_only_where_every_shape_was(graphs, captured):
    class Forward:
        pass

    bench = object.__new__(measure.Bench)
    bench.training = SimpleNamespace(forward=Forward())
    assert bench.captured is False  # this forward has no attribute `graphs`
    bench.training.forward.graphs = graphs
    assert bench.captured is captured
