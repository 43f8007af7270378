"""bench/epoch.py: real lengths, train.py's own loop, padding, and the simulation for a GPU."""

import json
import re
import statistics
import sys
import time
from dataclasses import replace

import pytest
import torch
from conftest import ragged_examples
from rich.console import Console

from bench import compare, epoch, epoch_sides, report, results, sides, simulated, turns, windows
from bench.sides import write_random_checkpoint
from phogpt_raw.cards import Card
from phogpt_raw.config import Config
from phogpt_raw.data.prompt import IGNORED
from phogpt_raw.model.phogpt import ModelConfig
from phogpt_raw.simulate.rates import KNOWN
from phogpt_raw.simulate.roofline import step_seconds

SHAPE = ModelConfig(64, 4, 2, vocab_size=4096, max_seq_len=512)


@pytest.fixture
def folder(tmp_path):
    write_random_checkpoint(tmp_path / "model", SHAPE)
    return tmp_path / "model"


def config(folder, **more):
    return Config(**{"model": str(folder), "out": str(folder.parent / "run"), "rank": 4,
                     "batch_size": 4, "epochs": 2, **more})


# -- the rows


def test_the_lengths_are_of_256_short_pairs():
    content = json.loads(epoch.LENGTHS.read_text("utf-8"))
    totals = [prompt + answer for prompt, answer in content["lengths"]]
    assert len(totals) == 256 and all(prompt and answer for prompt, answer in content["lengths"])
    assert round(statistics.mean(totals), 1) == 134.0
    assert statistics.median(totals) == 124 and max(totals) == 380


def test_rows_have_these_lengths_and_the_loss_is_on_the_answer_and_its_end():
    examples = epoch.random_examples(96)
    for e, (prompt, answer) in zip(examples, json.loads(epoch.LENGTHS.read_text())["lengths"],
                                   strict=True):
        assert (len(e.ids), e.supervised) == (prompt + answer, answer)
        assert e.targets[prompt - 1 : -1] == e.ids[prompt:] and e.ids[-1] == 2
        assert min(e.ids[:-1]) >= 4 and max(e.ids) < 96
    assert [e.ids for e in examples] == [e.ids for e in epoch.random_examples(96)]


def test_examples_survive_the_way_to_a_side(tmp_path):
    examples = ragged_examples(3)
    epoch_sides.write_examples(tmp_path / "examples.json", examples)
    assert epoch_sides.read_examples(tmp_path / "examples.json") == examples


# -- ours


def test_ours_is_train_py_and_says_what_went_through_the_model(folder):
    """With ten examples and four per step, two epochs are five steps.

    Only the last three steps are measured, because they cover the second epoch.
    """
    examples = ragged_examples(10, longest=40)
    ours = epoch_sides.Ours(config(folder), examples)
    found = ours.run(memory_gib=0)
    rows = [json.loads(line) for line in
            (folder.parent / "run" / "metrics.jsonl").read_text().splitlines()]
    assert (found["steps"], found["examples"], len(found["seconds"])) == (3, 12, 5)
    assert found["step_examples"] == [4] * 5 and len(rows) == 5
    assert found["rows"] == sum(row["rows"] for row in rows[2:])
    assert found["examples_a_row"] == 12 / found["rows"] > 1  # rows are packed
    windows_ = [ours.job.stream.window(step) for step in (2, 3, 4)]
    padded = sum(batch.ids_BL.numel() for window in windows_ for batch in window.micro_batches(1))
    assert found["fill"] == sum(w.tokens for w in windows_) / padded > 0.5
    assert found["row_lengths"] == sorted(found["row_lengths"])
    assert (folder / "adapters" / "adapter_model.safetensors").is_file()  # for the Trainer
    # a step's time begins at the end of the previous step, so it covers the whole loop
    for step, (took, row) in enumerate(zip(found["seconds"], rows, strict=True)):
        assert took >= 0.999 * ours.job.stream.window(step).tokens / row["tokens_per_s"]


def test_without_packing_each_example_is_a_row(folder):
    found = epoch_sides.Ours(config(folder, packing=False, epochs=1),
                             ragged_examples(8)).run(memory_gib=0)
    assert (found["rows"], found["examples_a_row"], found["steps"]) == (8, 1.0, 2)


def test_the_cap_is_what_the_choice_is_made_for(folder, monkeypatch):
    seen = []

    def choose(job):
        seen.append(job.card.memory_gib)
        raise KeyboardInterrupt

    monkeypatch.setattr(epoch_sides, "choose", choose)
    ours = epoch_sides.Ours(config(folder), ragged_examples(8))
    for gib in (14.56, 0):
        ours.job.card = Card("large", "cpu", memory_gib=80.0)
        with pytest.raises(KeyboardInterrupt):
            ours.run(memory_gib=gib)
    assert seen == [14.56, 80.0]


# -- the Trainer


def test_the_trainer_has_the_same_loss_positions_padded_behind():
    short, long = ragged_examples(2, seed=3)
    short, long = sorted((short, long), key=lambda e: len(e.ids))
    pad = epoch_sides.Padding()
    batch = pad([epoch_sides.trainer_row(e) for e in (short, long)])
    assert pad.tokens == 2 * len(long.ids) and pad.lengths == {len(long.ids)}
    for row, e in enumerate((short, long)):
        n = len(e.ids)
        assert batch["input_ids"][row].tolist() == e.ids + [3] * (len(long.ids) - n)
        assert batch["attention_mask"][row].sum() == n
        # the model predicts labels[i + 1] from position i
        assert batch["labels"][row, 1:n].tolist() == e.targets[:-1]
        assert (batch["labels"][row, n:] == IGNORED).all() and batch["labels"][row, 0] == IGNORED


EPOCHS = pytest.mark.parametrize("micro_batch, steps, sizes",
                                 [(1, 3, [4, 4, 2]), (8, 2, [8, 2])])


@EPOCHS
def test_the_trainers_steps_are_so_many_examples_grouped_by_length(folder, micro_batch, steps,
                                                                   sizes, monkeypatch):
    """The test runs on the CPU in fp32. The paged optimizer needs a GPU, so the test uses
    another optimizer."""
    pytest.importorskip("accelerate")
    from peft import LoraConfig, get_peft_model
    from transformers import MptForCausalLM

    def init(self, path, dtype):
        model = MptForCausalLM.from_pretrained(path, dtype=torch.float32)
        model.enable_input_require_grads()
        self.model = get_peft_model(model, LoraConfig(r=4, target_modules=["Wqkv"]))
        self.dtype, self.first = torch.float32, {}

    train, batches = sides.Peer.train, []

    def watched(self, kind, rows, clock, collator, **arguments):
        def seen(found):
            batches.append([len(row["input_ids"]) for row in found])
            return collator(found)

        train(self, kind, rows, clock, seen, optim="adamw_torch", use_cpu=True, **arguments)

    monkeypatch.setattr(sides.Peer, "__init__", init)
    monkeypatch.setattr(sides.Peer, "train", watched)
    monkeypatch.setattr(epoch_sides, "now", time.perf_counter)
    examples = ragged_examples(10)
    found = epoch_sides.TrainersEpoch(config(folder, dtype="fp32"), examples).run(micro_batch)
    assert (found["steps"], found["step_examples"]) == (steps, sizes)
    assert sorted(n for batch in batches for n in batch) == sorted(len(e.ids) for e in examples)
    assert all(len(batch) <= micro_batch for batch in batches)
    if micro_batch > 1:
        assert all(batch == sorted(batch, reverse=True) for batch in batches)
    padded = sum(max(batch) * len(batch) for batch in batches)
    assert found["fill"] == sum(len(e.ids) for e in examples) / padded


@pytest.mark.gpu
@EPOCHS
def test_the_trainer_takes_an_epoch(folder, micro_batch, steps, sizes):
    examples = ragged_examples(10)
    asked = config(folder, dtype="fp16")
    epoch_sides.Ours(asked, examples)  # writes the adapters at the start
    side = epoch_sides.TrainersEpoch(asked, examples)
    found = side.run(micro_batch)
    assert (found["steps"], found["examples"], found["rows"]) == (steps, 10, 10)
    assert found["step_examples"] == sizes and all(s > 0 for s in found["seconds"])
    assert found["fill"] == 1.0 if micro_batch == 1 else 0.5 < found["fill"] < 1


# -- the two sides run in turn


class Sides:
    """A stand-in for both sides, this program and the Trainer. It records the order of their runs.
    """

    def __init__(self):
        self.order = []

    def ours(self):
        self.order.append("ours")
        return {"fits": True, "whole_s": 0.2, "steady_s": [0.1, 0.3, 0.125][len(self.order) // 2],
                "allocated_gib": float(len(self.order)), "reserved_gib": 5.0, "rows": 32}

    def trainer(self, micro_batch):
        self.order.append(micro_batch)
        if micro_batch == 16:
            return {"fits": False}
        return {"fits": micro_batch == 1, "whole_s": 0.6, "steady_s": 1 / (1 + micro_batch),
                "allocated_gib": 9.0, "reserved_gib": 9.5, "rows": 256}


def test_sides_take_turns_and_a_row_is_the_median_of_its_runs():
    sides = Sides()
    ours, one, eight, sixteen = turns.summary(turns.take(sides, [1, 8, 16], pairs=1))
    assert sides.order == ["ours", 1, "ours", 8, "ours", 16]
    assert (ours["steady_s"], ours["allocated_gib"], len(ours["runs"])) == (0.125, 5.0, 3)
    assert ours["times_faster"] == 4.0 and one["times_faster"] == 1.0
    assert one["fits"] and not eight["fits"]
    assert "steady_s" not in sixteen and not sixteen["fits"]
    assert [report.who(row | {"packing": True}) for row in (ours, eight)] == [
        "this loop", "Trainer, 8 at once"]


def test_ours_alone_has_nothing_to_be_faster_than():
    [ours] = turns.summary(turns.take(Sides(), [], pairs=2))
    assert len(ours["runs"]) == 2 and "times_faster" not in ours


def test_steady_leaves_out_what_comes_first():
    run = {"seconds": [9.0, 1.0, 1.0, 2.0], "step_examples": [8, 8, 8, 4]}
    assert turns.example_seconds(run) == 13 / 28 and turns.example_seconds(run, after=2) == 3 / 12


def test_the_table_fits_80_columns(capsys):
    row = {"who": "ours", "packing": False, "batch_tokens": 4096, "rows": 12345, "fits": True,
           "examples_a_row": 12.34, "fill": 1.0, "steady_s": [0.861, 1.031], "allocated_gib": 14.56}
    Console(width=80).print(report.epoch([row], "title"))
    said = capsys.readouterr().out
    assert "…" not in said and max(map(len, said.splitlines())) <= 80
    for part in ("not packed", "tokens a step", "12,345", "0.86 to 1.03", "14.56"):
        assert part in said


# -- simulated


@pytest.fixture
def nano_traces():
    options = epoch.parse(["--model", "nano", "--card", "t4"])
    [(card, rates, traces)] = simulated.cards(options)
    return card, rates, traces


def test_an_epoch_is_the_sum_of_its_steps(nano_traces):
    """The simulation records the operations of each micro-batch shape once and adds up the times.

    The sum agrees with the time of all recorded operations of a whole accumulation window.
    """
    card, rates, traces = nano_traces
    asked = Config(batch_size=4, epochs=1, recompute="none")
    planned = windows.plan(ragged_examples(8, longest=40), asked, card, 8, traces)
    simulation = windows.Simulation(traces, planned, card, rates)
    for window in planned.windows:
        trace = traces.trace_window(window, 1, 0, traces.kernel(card))
        whole = simulated.both_ends(step_seconds(trace.ops, rates))
        # the simulation counts the move of a micro-batch to the GPU only once per window
        assert simulation.seconds(window) == pytest.approx(whole, rel=0.01)
    shapes = {shape for window in planned.windows for shape in window.shapes(1)}
    assert {key[:2] for key in simulation.shapes} == shapes


def test_packing_takes_fewer_rows_and_less_time(nano_traces):
    card, rates, traces = nano_traces
    examples, took = ragged_examples(16, longest=40), {}
    for packing in (True, False):
        asked = Config(batch_size=8, epochs=1, packing=packing)
        planned = windows.plan(examples, asked, card, 8, traces)
        assert (planned.choice.packing is None) != packing
        simulation = windows.Simulation(traces, planned, card, rates)
        low, high = (sum(column) for column in zip(
            *map(simulation.seconds, planned.windows), strict=True))
        assert 0 < low < high
        took[packing] = high, windows.layout(planned.windows, 1)["rows"]
        row = simulation.memory_row()
        assert row["fits"] and 0 < row["allocated_gib"] < row["device_gib"] < card.memory_gib
    assert took[True][0] < took[False][0] and took[True][1] < took[False][1] == 16


def test_a_small_card_packs_shorter_rows_or_recomputes(nano_traces):
    card, _, traces = nano_traces
    examples = ragged_examples(32, longest=512)
    asked = Config(batch_size=8, epochs=1)
    wide = windows.plan(examples, asked, card, 8, traces).choice
    small = windows.plan(examples, asked, replace(card, memory_gib=wide.gib - 0.02), 8,
                         traces).choice
    assert small.packing.lengths[-1] < wide.packing.lengths[-1] or small.recompute > wide.recompute


def test_each_card_has_a_row_and_is_saved_as_simulated(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["epoch.py", "--save"])
    monkeypatch.setattr(epoch, "random_examples", lambda _: ragged_examples(16, longest=40))
    epoch.main(["--model", "nano", "--card", "t4,v100", "--save"])
    said = capsys.readouterr().out
    assert "simulated for Tesla T4" in said and "simulated for Tesla V100-SXM2-16GB" in said
    assert len(re.findall(r"^this loop +\d+ +[\d.]+ +\d+% +\S+ to \S+ ", said, re.MULTILINE)) == 2
    t4, _ = sorted(tmp_path.iterdir())
    result = json.loads(t4.read_text())
    assert (result["what"], result["source"], result["data"]) == ("epoch", "simulated", None)
    [row] = result["rows"]
    assert row["packing"] and row["examples"] == 16 and row["steps"] == 2
    low, high = row["steady_s"]
    assert 0 < low < high and row["fits"] and "whole_s" not in row


def test_a_file_takes_the_place_of_the_random_rows(rows, capsys):
    epoch.main(["--model", "nano", "--card", "t4", "--data", str(rows), "--no-packing"])
    assert re.search(r"^this loop, not packed +16 +1\.00 ", capsys.readouterr().out, re.MULTILINE)


# -- the README's table


def test_the_table_has_measured_and_simulated_rows(monkeypatch):
    ours = {"who": "ours", "micro_batch": 1, "packing": True, "rows": 32, "steady_s": 0.02,
            "whole_s": 0.0512, "allocated_gib": 9.5, "times_faster": 20.0, "fits": True}
    trainer = {"who": "trainer", "micro_batch": 8, "rows": 256, "steady_s": 0.1, "whole_s": 0.11,
               "allocated_gib": 16.0, "times_faster": 4.0, "fits": False}
    full = {"who": "trainer", "micro_batch": 16, "fits": False}
    common = {"what": "epoch", "model": "7b5", "dtype": "fp16", "rank": 16, "label": None,
              "data": None}
    monkeypatch.setattr(compare.results, "load", lambda _: [
        common | {"source": "simulated", "card": {"name": "Tesla T4", "device": "cuda"},
                  "rows": [{k: v for k, v in ours.items() if k not in ("whole_s", "times_faster")}
                           | {"steady_s": [0.24, 0.31]}]},
        common | {"source": "measured", "card": {"name": "NVIDIA H100", "device": "cuda"},
                  "cap_gib": 14.56, "rows": [ours, trainer, full]},
        common | {"source": "measured", "card": {"name": "NVIDIA H100", "device": "cuda"},
                  "data": "rows.jsonl", "rows": [ours]}])
    assert compare.epochs()[2:] == [
        "| H100, measured | 7B5 | this loop | 32 | 0.02 | 0.0512 | 9.50 | 20.0 |",
        "| H100, measured | 7B5 | Trainer, 8 at once, over 14.56 GiB | 256 | 0.1 | 0.11 | 16.00 | "
        "4.0 |",
        "| H100, measured | 7B5 | Trainer, 16 at once | out of memory | out of memory |  |  |  |",
        "| T4, simulated | 7B5 | this loop | 32 | 0.24 to 0.31 |  | 9.50 |  |"]


# -- refusals


@pytest.mark.parametrize("flags, line", [
    (["--batch-tokens", "379"],
     r"pair \d+: 380 tokens are more than --batch-tokens 379; raise --batch-tokens or lower"),
    (["--data", "nowhere.jsonl"], "nowhere.jsonl: no such data file"),
    (["--card", "k80"], "--card k80: choose from"),
    (["--epochs", "0"], r"argument --epochs: '0': must be a number from 0.001 to 1,000,000"),
    (["--trainer", "1,x"], "argument --trainer: 'x': must be a whole number from 1 to 1,000"),
    (["--pairs", "0"], "argument --pairs: '0': must be a whole number from 1 to 1,000"),
    (["--model", "nowhere"], "--model nowhere: no such folder"),
])
def test_what_is_not_possible_is_refused_before_anything_slow(flags, line, capsys):
    with pytest.raises(SystemExit) as stopped:
        epoch.main(["--card", "t4", *flags])
    said = capsys.readouterr()
    assert stopped.value.code == 2 and said.err.count("\n") == 1 and not said.out
    assert re.match(f"error: {line}", said.err)


def test_a_tokenizer_of_another_model_is_refused(rows, monkeypatch, capsys):
    monkeypatch.setattr(epoch, "shape_of", lambda _: SHAPE.__class__(64, 4, 2, vocab_size=96,
                                                                     max_seq_len=64))
    with pytest.raises(SystemExit) as stopped:
        epoch.main(["--card", "t4", "--data", str(rows)])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1
    assert re.match(r"error: --tokenizer nano: gives token \d+, but 7b5 has only 96", said)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
@pytest.mark.parametrize("model, line", [("7b5", "needs a GPU"), ("nano", "only 7b5 and 4b")])
def test_measuring_needs_a_gpu_and_a_published_shape(model, line, monkeypatch, capsys):
    options = epoch.parse(["--model", model, "--card", "t4"])
    with pytest.raises(epoch.Refusal, match=line):
        epoch.measure(options, epoch.config_of(options), [])


def test_the_cap_is_a_t4s_by_default():
    assert epoch.parse(["--card", "t4"]).cap == KNOWN["t4"].card.memory_gib
