"""train.py, from its arguments to the files of a run."""

import json
import math
import re
import shutil
from contextlib import nullcontext

import pytest
import torch
from checkpoints import NANO, write_checkpoint
from conftest import QUESTIONS, write_rows
from safetensors.torch import load_file

from phogpt_raw import files
from phogpt_raw.cards import Card
from phogpt_raw.config import Config
from phogpt_raw.model import phogpt
from phogpt_raw.model.weights import read_config
from phogpt_raw.training import checkpoint, evaluate, resume, setup
from phogpt_raw.training import step as step_module
from phogpt_raw.training.metrics import Metrics
from phogpt_raw.training.run import RunState

STEP_KEYS = ["step", "loss", "lr", "grad_norm", "tokens", "tokens_per_s", "peak_gib", "scale",
             "skipped", "rows", "fill"]
SCORE_KEYS = ["step", "val_loss", "val_ppl", "stops"]


def strict(line):
    """Parse a line as standard JSON; NaN and Infinity are errors."""
    def refuse(name):
        raise AssertionError(f"{name} is not JSON: {line}")

    return json.loads(line, parse_constant=refuse)


def metrics(folder):
    rows = [strict(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [r for r in rows if "loss" in r], [r for r in rows if "val_loss" in r]


def adapter_bytes(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


# -- the files of a run


def test_a_run_leaves_metrics_config_checkpoints_and_its_adapter(train, tmp_path, tiny, rows):
    out = tmp_path / "run"
    status, said, _ = train("--out", out, "--keep", 9, "--warmup", 2)
    assert status == 0
    steps, scores = metrics(out)
    assert [list(row) for row in steps] == [STEP_KEYS] * 7
    assert [row["step"] for row in steps] == list(range(1, 8))
    assert [list(row) for row in scores] == [SCORE_KEYS] * 5
    assert [row["step"] for row in scores] == [0, 2, 4, 6, 7]
    assert [p.name for p in sorted(out.glob("checkpoint-*"))] == [
        f"checkpoint-{n}" for n in (2, 3, 4, 6, 7)]
    config = strict((out / "config.json").read_text())
    assert (config["model"], config["data"], config["rank"], config["steps"]) == (
        str(tiny), str(rows), 4, 7)
    # an untrained model gives each of its 4,096 tokens about the same probability
    assert steps[0]["loss"] == pytest.approx(math.log(4096), abs=0.5)
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert [row["lr"] for row in steps[:3]] == pytest.approx([0.005, 0.01, 0.01])
    assert all(row["tokens"] > 0 and row["tokens_per_s"] > 0 for row in steps)
    assert all((row["scale"], row["skipped"]) == (1.0, 0) for row in steps)
    assert all((row["peak_gib"] is None) != torch.cuda.is_available() for row in steps)
    for row in scores:
        assert row["val_ppl"] == pytest.approx(math.exp(row["val_loss"]))
        assert 0 <= row["stops"] <= 1
    assert f"python generate.py --adapter {out}" in said


@pytest.mark.parametrize("losses, best", [
    ([9, 5, 4, 3, 4, 5, 6], 3),
    ([1, 5, 4, 4, 4, 5, 6], 2),  # step 0 does not count; the first of equal losses wins
    ([9, math.nan, 5, math.inf, math.nan, 4, 6], 5),  # NaN and inf are never the best
])
def test_the_result_is_the_adapter_of_the_lowest_validation_loss(train, tmp_path, monkeypatch,
                                                                 losses, best):
    scores = iter(map(float, losses))
    monkeypatch.setattr(evaluate, "held_out_loss", lambda *_, **__: next(scores))
    out = tmp_path / "run"
    status, said, _ = train("--out", out, "--steps", 6, "--eval-every", 1, "--save-every", 1,
                            "--eval-answers", 0)
    assert status == 0 and f"(step {best}, the " in said
    assert adapter_bytes(out) == adapter_bytes(out / f"checkpoint-{best}")
    assert adapter_bytes(out) != adapter_bytes(out / "checkpoint-6")


def test_without_held_out_rows_the_result_is_the_last_adapter(train, tmp_path):
    out = tmp_path / "run"
    status, said, _ = train("--out", out, "--hold-out", 0)
    assert status == 0
    steps, scores = metrics(out)
    assert (len(steps), scores) == (7, [])
    assert adapter_bytes(out) == adapter_bytes(out / "checkpoint-7")
    assert adapter_bytes(out) != adapter_bytes(out / "checkpoint-6")
    assert "the last" in said


def test_a_validation_file_is_read_and_nothing_of_it_trained_on(train, tmp_path):
    val = write_rows(tmp_path / "val.jsonl", QUESTIONS[:2])
    train("--out", tmp_path / "a", "--val", val, "--hold-out", 0)
    train("--out", tmp_path / "b", "--hold-out", 0)
    steps = [metrics(tmp_path / name)[0] for name in "ab"]
    assert [row["loss"] for row in steps[0]] == [row["loss"] for row in steps[1]]
    assert len(metrics(tmp_path / "a")[1]) == 5


def test_epochs_are_passes_over_the_rows(train, tmp_path):
    out = tmp_path / "run"
    _, said, _ = train("--out", out, "--epochs", 2)  # 12 rows, 3 of them held out; 4 per step
    assert len(metrics(out)[0]) == 5
    assert "(2 epochs, rounded up to whole steps: 2.2)" in said
    assert "(2.2 epochs)" in train("--dry-run", "--steps", 5)[1]


def test_the_steps_of_a_resumed_run_are_remarked_on_only_where_they_changed(train, tmp_path):
    out = tmp_path / "run"
    train("--out", out, "--eval-answers", 0, "--steps", 4)
    shutil.rmtree(out / "checkpoint-4")
    (out / "adapter_model.safetensors").unlink()
    assert "planned before" not in train("--out", out, "--steps", 4, "--dry-run")[1]
    assert "planned before: 4 steps" in train("--out", out, "--steps", 5, "--dry-run")[1]


def test_not_a_number_is_written_as_null(tmp_path):
    file = Metrics(tmp_path, RunState(), None)
    file.write(dict(step=1, loss=math.nan, grad_norm=math.inf, lr=0.1))
    file.write(dict(step=2, val_loss=-math.inf, stops=None))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [strict(line) for line in lines] == [
        {"step": 1, "loss": None, "grad_norm": None, "lr": 0.1},
        {"step": 2, "val_loss": None, "stops": None}]


# -- folders


def test_without_out_every_run_gets_the_next_number(train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "tiny-007").mkdir(parents=True)
    (tmp_path / "runs" / "tiny-x").mkdir()
    (tmp_path / "runs" / "other-100").mkdir()
    for _ in range(2):
        assert train("--steps", 1, "--eval-answers", 0)[0] == 0
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == [
        "other-100", "tiny-007", "tiny-008", "tiny-009", "tiny-x"]
    assert (tmp_path / "runs/tiny-009/adapter_config.json").is_file()


def test_a_complete_run_says_so_and_what_to_do(train, tmp_path):
    out = tmp_path / "lần chạy"
    train("--out", out, "--steps", 3)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    status, _, said = train("--out", out, "--steps", 3)
    assert status == 2
    [line] = said.splitlines()
    assert "this run is complete (3 steps)" in line
    for way_on in (f"generate.py --adapter '{out}'", "larger --steps", "another --out"):
        assert way_on in line
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_more_steps_go_on_with_a_complete_run(train, tmp_path):
    out = tmp_path / "run"
    train("--out", out, "--steps", 3, "--eval-answers", 0)
    status, said, _ = train("--out", out, "--steps", 5, "--eval-answers", 2)
    assert status == 0
    assert "planned before: 3 steps; the learning rate now falls until step 5" in said
    assert [row["step"] for row in metrics(out)[0]] == [1, 2, 3, 4, 5]
    assert "held-out questions" not in said  # there are no answers from before training


def test_doctest_of_resume():
    import doctest

    from phogpt_raw.training import resume

    assert doctest.testmod(resume).failed == 0


@pytest.mark.parametrize("flags, said", [
    (["--lr", 0.5], "with --lr"),
    (["--seed", 1], "with --seed"),
    (["--batch-size", 2], "with --batch-size"),
    (["--rank", 8], "with --rank"),
    (["--no-nf4"], "without --no-nf4"),
    (["--optimizer", "adamw"], "with --optimizer"),
])
def test_going_on_with_another_setting_is_refused_by_its_flag(train, tmp_path, flags, said):
    out = tmp_path / "run"
    train("--out", out, "--steps", 1, "--eval-answers", 0)
    status, _, line = train("--out", out, *flags)
    assert status == 2
    assert re.search(f"this run started {said}[ ,]", line)
    assert line.count("\n") == 1
    assert len(metrics(out)[0]) == 1


@pytest.mark.parametrize("change, said", [
    (lambda lines: lines.append(lines[0].replace("?", "!")), "1 new or edited"),
    (lambda lines: lines.extend(lines[4:6]), "2 more copies of the same rows"),
    (lambda lines: lines.__delitem__(5), "1 missing"),
    (lambda lines: lines.reverse(), "in another order"),
    (lambda lines: lines.__setitem__(5, lines[5].replace('"}', ' nữa"}')), "1 new or edited")])
def test_going_on_with_other_rows_is_refused_and_says_which(train, tmp_path, rows, change, said):
    out, lines = tmp_path / "run", rows.read_text("utf-8").splitlines()
    train("--out", out, "--steps", 1, "--eval-answers", 0, "--hold-out", 0)
    change(lines)
    rows.write_text("\n".join(lines) + "\n", "utf-8")
    status, _, line = train("--out", out, "--steps", 2, "--hold-out", 0)
    assert status == 2 and line.count("\n") == 1
    assert "its training rows have changed since it started" in line and said in line
    assert ("rows.jsonl:" in line) == ("edited" in said)


def test_another_division_of_the_rows_is_refused(train, tmp_path):
    train("--out", tmp_path / "run", "--steps", 1, "--eval-answers", 0)
    status, _, line = train("--out", tmp_path / "run", "--steps", 2, "--hold-out", 2)
    assert status == 2
    assert "this run started with --hold-out 3; with --hold-out 2 other rows" in line


def test_the_same_rows_may_come_from_another_place(train, tmp_path, rows, monkeypatch):
    out = tmp_path / "run"
    train("--out", out, "--steps", 1, "--eval-answers", 0)
    other = shutil.copy(rows, tmp_path / "moved.jsonl")
    assert train("--out", out, "--steps", 2, "--data", other)[0] == 0
    monkeypatch.chdir(tmp_path)
    assert train("--out", "run", "--steps", 3, "--data", "./moved.jsonl")[0] == 0


def test_the_base_may_be_spelled_otherwise(train, tmp_path, tiny, monkeypatch):
    train("--out", tmp_path / "run", "--steps", 1, "--eval-answers", 0)
    monkeypatch.chdir(tiny.parent)
    assert train("--out", tmp_path / "run", "--steps", 2, "--model", tiny.name)[0] == 0


def test_a_folder_with_an_adapter_and_no_checkpoint_is_not_written_over(train, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "adapter_model.safetensors").write_bytes(b"precious")
    status, _, line = train("--out", out)
    assert status == 2
    assert "no checkpoint" in line
    assert (out / "adapter_model.safetensors").read_bytes() == b"precious"


def test_an_adapter_is_gone_on_from_with_its_own_rank(train, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    train("--out", first)
    status, said, _ = train("--out", second, "--adapter", first)
    assert status == 0
    recorded = json.loads((second / "config.json").read_text())
    assert (recorded["rank"], recorded["alpha"]) == (4, 32)
    for flag, value in (("--rank", 16), ("--alpha", 8), ("--targets", "Wqkv"), ("--dropout", 0.1)):
        status, _, line = train("--out", tmp_path / "third", "--adapter", first, flag, value)
        assert status == 2 and f"{flag}: the adapter of --adapter has its own value" in line
    assert f"rank 4, alpha 32, on Wqkv, down_proj, out_proj, up_proj, starting from {first}" in (
        " ".join(said.split()))
    best = min(row["val_loss"] for row in metrics(first)[1])
    assert metrics(second)[1][0]["val_loss"] == best  # starts from the best adapter of `first`
    assert json.loads((second / "adapter_config.json").read_text())["r"] == 4
    shapes = [{n: t.shape for n, t in load_file(run / "adapter_model.safetensors").items()}
              for run in (first, second)]
    assert shapes[0] == shapes[1]


# -- the plan


def test_dry_run_shows_the_plan_and_an_example_and_trains_nothing(train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    status, said, _ = train("--dry-run")
    assert status == 0
    assert set(tmp_path.iterdir()) == before
    plan = " ".join(said.split())
    card = "CPU" if not torch.cuda.is_available() else torch.cuda.get_device_name()
    for part in (
        f"card {card}", "model ", "2 blocks of width 64, vocabulary 4,096",
        "0.1 M parameters in NF4, 0.3 M in",
        "0.0 M parameters in fp32: LoRA rank 4, alpha 32, on Wqkv, down_proj, out_proj, up_proj",
        "ALiBi as a bias", "9 training rows of rows.jsonl", "3 held out",
        "4b-chat: the tokenizer's chat template", "7 of 4 examples (3.1 epochs)",
        "examples a row", "% full; rows of", "2 at a time",
        "AdamW, 8-bit state", "0 of 2 blocks in backward", "CUDA graphs o",
    ):
        assert part in plan, part
    if not torch.cuda.is_available():
        assert "dtype fp32: the fastest type on a CPU" in plan
        assert "attention flash attention, ALiBi as a bias of" in plan
        assert "CUDA graphs off: there is no GPU" in plan


def test_the_plan_says_what_is_held_out_and_why(train, tmp_path):
    few = " ".join(train("--dry-run", "--hold-out", 0)[1].split())
    assert "; none held out" in few
    one = write_rows(tmp_path / "one.jsonl", QUESTIONS[:1])
    val = write_rows(tmp_path / "val.jsonl", QUESTIONS[:2])
    said = " ".join(train("--dry-run", "--data", one, "--val", val, "--hold-out", 0)[1].split())
    assert "1 training row of one.jsonl" in said and "2 held out, of val.jsonl" in said
    assert f"also training rows: 1 of 2 (the first: {val}:1)" in said
    share = " ".join(train("--dry-run", "--hold-out", 0.3)[1].split())
    assert "(--hold-out 0.3: about that share)" in share


def test_dry_run_says_why_nothing_is_captured(train):
    _, said, _ = train("--dry-run", "--no-capture")
    assert "CUDA graphs off: --no-capture" in " ".join(said.split())


def test_dry_run_shows_where_the_loss_is(train, rows):
    _, said, _ = train("--dry-run", "--hold-out", 0)
    marked = said[said.index("one training example") :]
    [[question, answer]] = [qa for qa in QUESTIONS if qa[0] in marked]
    assert f"### Câu hỏi: {question}\n### Trả lời:⟦ {answer}</s>⟧" in marked
    line = QUESTIONS.index((question, answer)) + 1
    assert f"{rows}:{line}" in marked


def test_a_window_that_is_too_short_for_an_example_is_refused(train, monkeypatch):
    monkeypatch.setattr("phogpt_raw.training.setup.read_model", None)  # weights are not read
    status, _, error = train("--batch-tokens", 20)
    assert status == 2 and "more than --batch-tokens 20" in error
    assert len(error.splitlines()) == 1


def test_an_example_longer_than_pack_len_has_a_row_of_its_own(train, tmp_path):
    data = write_rows(tmp_path / "l.jsonl", [("Đếm đi", "một hai ba " * 200), ("A?", "B")] * 4)
    status, said, _ = train("--dry-run", "--data", data, "--max-len", 600, "--pack-len",
                            320, "--hold-out", 0)
    assert status == 0 and "608 tokens" in " ".join(said.split())


def test_brackets_in_an_answer_are_shown_as_they_are(train, tmp_path):
    data = write_rows(tmp_path / "b.jsonl", [("Thẻ?", "Viết [/b] hay [red]đỏ[/red] [1]")] * 4)
    status, said, _ = train("--dry-run", "--data", data, "--hold-out", 0)
    assert status == 0
    assert "⟦ Viết [/b] hay [red]đỏ[/red] [1]</s>⟧" in said


def test_rows_that_are_cut_are_reported(train, tmp_path):
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"text": "một hai ba " * 20}) + "\n", "utf-8")
    for flags in ([], ["--data", texts, "--too-long", "cut", "--hold-out", 0]):
        status, said, _ = train("--dry-run", "--max-len", 24, *flags)
        assert status == 0
        assert re.search(r"rows longer than --max-len 24: \d+ \(the first: .*:\d+\); their ends "
                         r"are cut off, so they have no </s>", " ".join(said.split()))


def test_the_plan_counts_no_parameters_in_nf4_without_nf4(train):
    said = " ".join(train("--dry-run", "--no-nf4")[1].split())
    assert "vocabulary 4,096; 0.4 M parameters in fp32" in said and "in NF4" not in said


def test_a_question_too_long_is_refused_with_its_line(train, rows):
    status, _, line = train("--max-len", 10)
    assert status == 2
    assert f"{rows}:" in line
    assert "--max-len is 10" in line


@pytest.mark.parametrize("flags, said", [
    (["--data", "nowhere.jsonl"], "nowhere.jsonl: no such data file"),
    (["--hold-out", 12], "has only 12 different rows"),
    (["--model", "/nowhere"], "--model /nowhere: no such folder"),
    (["--adapter", "/nowhere"], "/nowhere/adapter_config.json: missing"),
    (["--targets", "q_proj,v_proj"], "no linear layer q_proj"),
    (["--recompute", 3], "the model has 2 blocks"),
])
def test_what_is_not_possible_is_refused_before_any_weight_is_read(train, tmp_path, monkeypatch,
                                                                   flags, said):
    monkeypatch.setattr(setup, "read_model", lambda *_, **__: pytest.fail("read the weights"))
    status, _, line = train("--out", tmp_path / "run", *flags)
    assert status == 2
    assert said in line
    assert line.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_another_model_than_nano_needs_data(tiny, capsys):
    import train as script

    with pytest.raises(SystemExit) as left:
        script.main(["--model", str(tiny)])
    assert left.value.code == 2
    assert "--data: name a file of rows" in capsys.readouterr().err


def test_nano_brings_its_own_rows(capsys):
    import train as script

    script.main(["--dry-run"])
    said = " ".join(capsys.readouterr().out.split())
    assert "rows of train.jsonl" in said
    assert not said.endswith("; 0 held out")
    assert f"{len((NANO.parent / 'pairs/heldout.jsonl').read_text().splitlines())} held out" in said


# -- skipped steps


def overflowing_at(monkeypatch, steps):
    """Put inf into a gradient in these steps (1, 2, …) of a run of train.py."""
    import train as script

    whole, calls = script.train_step, iter(range(1, 10_000))

    def step(job, window):
        if next(calls) not in steps:
            return whole(job, window)
        with monkeypatch.context() as patch:
            loss = step_module.summed_loss

            def overflowing(*args):
                job.adapters.flat.grad[0] = math.inf
                return loss(*args)

            patch.setattr(step_module, "summed_loss", overflowing)
            return whole(job, window)

    monkeypatch.setattr(script, "train_step", step)


def test_an_overflow_is_left_out_counted_and_takes_no_learning_rate(train, tmp_path, monkeypatch):
    overflowing_at(monkeypatch, {3})
    out = tmp_path / "run"
    status, said, _ = train("--out", out, "--save-every", 1, "--warmup", 5, "--keep", 9)
    assert status == 0
    steps, _ = metrics(out)
    assert [row["skipped"] for row in steps] == [0, 0, 1, 1, 1, 1, 1]
    assert [row["scale"] for row in steps] == [1.0] * 7  # with fp32 the scale stays 1
    assert steps[2]["grad_norm"] is None
    assert [row["lr"] for row in steps[:5]] == pytest.approx([0.002, 0.004, 0.006, 0.006, 0.008])
    assert adapter_bytes(out / "checkpoint-3") == adapter_bytes(out / "checkpoint-2")
    assert adapter_bytes(out / "checkpoint-4") != adapter_bytes(out / "checkpoint-3")
    assert "1 skipped" in said


def test_fewer_steps_than_are_done_are_refused_and_the_run_stays_good(train, tmp_path):
    """Here the run stops before its first evaluation, so it has no best adapter yet."""
    out = tmp_path / "run"
    flags = ["--out", out, "--eval-every", 0, "--save-every", 3, "--warmup", 1]
    assert train(*flags, at=(4, KeyboardInterrupt()))[0] == 130
    status, said, error = train(*flags, "--steps", 2)
    assert status == 2 and "done" not in said
    assert error == (f"error: {out}: this run is already at step 3, and this command ends at step "
                     "2; give a larger --steps or --epochs\n")
    assert train(*flags)[0] == 0


# -- a run without a usable adapter fails


@pytest.mark.parametrize("hold_out, good", [(3, 3), (0, 2)])
def test_too_many_skipped_steps_in_a_row_end_the_run_and_name_the_last_good_checkpoint(
        train, tmp_path, monkeypatch, hold_out, good):
    """With held-out rows the last good checkpoint is that with the lowest held-out loss.

    Without held-out rows it is the newest checkpoint from before the last update. The last update
    in this test is step 3.
    """
    overflowing_at(monkeypatch, {2, *range(4, 100)})
    out = tmp_path / "run"
    status, said, error = train("--out", out, "--steps", 30, "--save-every", 1, "--max-skipped", 4,
                                "--eval-every", 3, "--hold-out", hold_out)
    assert status == 1 and "python generate.py" not in said
    assert error.startswith(f"error: {out}: steps 4 to 7 were skipped") and error.count("\n") == 1
    assert (f"the last good checkpoint is {out}/checkpoint-{good}; continue from it with --adapter "
            f"{out}/checkpoint-{good}, a lower --lr") in error
    assert [row["skipped"] for row in metrics(out)[0]] == [0, 1, 1, 2, 3, 4, 5]


def test_skipped_steps_in_a_row_are_counted_across_a_resume(train, tmp_path, monkeypatch):
    overflowing_at(monkeypatch, set(range(1, 100)))
    out = tmp_path / "run"
    flags = ["--out", out, "--save-every", 1, "--max-skipped", 4]
    assert train(*flags, "--steps", 2)[0] == 1  # both steps were skipped
    status, _, error = train(*flags, "--steps", 9)
    assert status == 1 and "steps 1 to 4 were skipped" in error
    assert "no good checkpoint was saved" in error


def test_the_advice_after_skipped_steps_names_no_dtype_that_is_used_already(train, tmp_path,
                                                                            monkeypatch):
    overflowing_at(monkeypatch, set(range(1, 100)))
    _, _, error = train("--out", tmp_path / "a", "--dtype", "fp32", "--max-skipped", 1)
    assert "step 1 was skipped" in error and error.endswith("and a lower --lr\n")
    _, _, error = train("--out", tmp_path / "b", "--dtype", "bf16", "--max-skipped", 1)
    assert error.endswith("and a lower --lr or --dtype fp32\n")


@pytest.mark.parametrize("hold_out", [0, 3])
def test_a_run_of_skipped_steps_alone_ends_as_a_failure(train, tmp_path, monkeypatch, hold_out):
    overflowing_at(monkeypatch, set(range(1, 100)))
    status, said, error = train("--out", tmp_path / "run", "--hold-out", hold_out)
    assert status == 1 and "generate.py" not in said
    assert "7 of 7 steps were skipped because their gradients are not finite" in error


def test_a_run_that_skips_most_of_its_steps_is_no_success(train, tmp_path, monkeypatch):
    """The loss of such a run may still be finite."""
    overflowing_at(monkeypatch, {2, 4, 5, 7})
    status, said, error = train("--out", tmp_path / "run")
    assert status == 1 and "generate.py" not in said and "4 of 7 steps were skipped" in error


def test_a_base_that_gives_nan_before_the_first_step_is_to_blame(train, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "held_out_loss", lambda *_, **__: math.nan)
    status, _, error = train("--out", tmp_path / "run")
    assert status == 1 and "not finite before the first step" in error
    assert "does not work in fp32" in error and not metrics(tmp_path / "run")[0]


@pytest.mark.parametrize("hold_out", [0, 3])
def test_a_diverging_run_ends_as_a_failure_that_says_so(train, tmp_path, hold_out):
    """The message names only existing adapters, and no checkpoint with diverged weights.

    The same command, given again, fails with the same reason.
    """
    out = tmp_path / "run"
    flags = ["--out", out, "--lr", 1e25, "--hold-out", hold_out, "--save-every", 1]
    status, said, error = train(*flags)
    assert status == 1 and "generate.py" not in said
    assert "6 of 7 steps were skipped" in error and error.count("\n") == 1
    assert "no good checkpoint was saved" in error
    if hold_out:
        assert not (out / "adapter_model.safetensors").exists()
        status, _, again = train(*flags)
        assert status == 1 and "this run has ended, after step 7, without a usable adapter" in again
        assert "no good checkpoint was saved" in again


def test_a_base_that_holds_inf_is_refused_when_it_is_loaded(train, tmp_path):
    base = tmp_path / "base"
    tensors = write_checkpoint(base)
    tensors["transformer.blocks.1.ffn.down_proj.bias"][3] = math.inf
    write_checkpoint(base, tensors=tensors)
    status, _, error = train("--model", base, "--out", tmp_path / "run")
    assert status == 2 and error.count("\n") == 1
    assert "transformer.blocks.1.ffn.down_proj.bias holds NaN" in error


def test_a_full_gpu_is_one_line_that_says_what_to_turn(train, tmp_path):
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
    status, _, said = train("--out", tmp_path / "run", at=(3, full))
    assert status == 2 and said.count("\n") == 1
    assert "memory is full" in said and "--micro-batch" in said


class FullAtTheThird:
    """A stand-in for CUDA graphs. The third call of the model in `mode` runs out of memory.

    mode: "training" or "evaluating".
    """

    def __init__(self, mode, model, limits):
        self.mode, self.model, self.limits, self.head = mode, model, limits, model.head
        self.calls, self.forward = 0, model.forward
        model.forward = self.counted

    def counted(self, *args, **kwargs):
        self.calls += ("training" if self.model.training else "evaluating") == self.mode
        if self.limits.graphs and self.calls == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.forward(*args, **kwargs)

    def __call__(self, *args, **kwargs):
        return self.model(*args, **kwargs)

    def memory(self):
        return nullcontext()

    def release(self):
        self.released = True


@pytest.mark.parametrize("mode", ["training", "evaluating"])
def test_memory_too_full_for_graphs_trains_the_same_without_them(train, tmp_path, monkeypatch,
                                                                 mode):
    """Memory runs out in the middle of a step or of an evaluation.

    The step or the evaluation is then repeated.
    """
    train("--out", tmp_path / "plain")
    monkeypatch.setattr(setup, "why_not", lambda *_: None)
    made = []
    monkeypatch.setattr(
        setup, "GraphedModel",
        lambda model, _, limits: made.append(FullAtTheThird(mode, model, limits)) or made[0])
    status, said, _ = train("--out", tmp_path / "full")
    assert status == 0 and made[0].released and not made[0].limits.graphs
    assert made[0].model.training
    assert said.count("too full for CUDA graphs: continuing without") == 1
    seen, wanted = ([{k: v for k, v in row.items() if k != "tokens_per_s"}
                     for part in metrics(tmp_path / run) for row in part]
                    for run in ("full", "plain"))
    assert len(seen) == 12 and seen == wanted
    assert adapter_bytes(tmp_path / "full") == adapter_bytes(tmp_path / "plain")


@pytest.mark.parametrize("recompute, blocks", [("none", 0), ("1", 1), ("all", 2), ("auto", 0)])
def test_as_many_blocks_are_recomputed_as_asked_for(train, tmp_path, monkeypatch, recompute,
                                                    blocks):
    recomputed, run = [], phogpt.checkpoint
    monkeypatch.setattr(phogpt, "checkpoint",
                        lambda block, *a, **k: recomputed.append(block) or run(block, *a, **k))
    status, said, _ = train("--out", tmp_path / "run", "--recompute", recompute, "--steps", 1,
                            "--batch-size", 2, "--micro-batch", 2)
    assert status == 0 and len(recomputed) == blocks
    assert f"{blocks} of 2 blocks" in said


def test_micro_batch_and_recompute_may_change_when_a_run_goes_on(train, tmp_path):
    """The advice for full GPU memory is to use smaller micro-batches. So a resumed run allows them.
    """
    out = tmp_path / "run"
    train("--out", out, "--steps", 3)
    status, _, said = train("--out", out, "--micro-batch", 1, "--recompute", 1)
    assert (status, said) == (0, "")


def test_a_run_goes_on_packed_or_not_and_in_rows_of_another_length(train, tmp_path):
    """The losses equal those of the uninterrupted run, except for fp32 rounding."""
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert train("--out", straight, "--steps", 6, "--optimizer", "adamw")[0] == 0
    for steps, how in ((2, ["--no-packing"]), (4, ["--pack-len", 100]), (6, [])):
        assert train("--out", broken, "--steps", steps, "--optimizer", "adamw", *how)[0] == 0
    one, other = (metrics(out)[0] for out in (straight, broken))
    assert [row["rows"] for row in one[:2]] != [row["rows"] for row in other[:2]] == [4, 4]
    # --steps changes the learning rates, so only the first two steps have the same rates
    assert [row["loss"] for row in other[:2]] == pytest.approx([r["loss"] for r in one[:2]], 1e-5)
    assert all(row["fill"] <= 1 for row in one + other)


def test_a_run_by_tokens_is_resumed_to_the_bit(train, tmp_path):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    how = ["--batch-tokens", 120, "--steps", 6]
    assert train("--out", straight, *how)[0] == 0
    assert train("--out", broken, *how, at=(4, KeyboardInterrupt()))[0] not in (0, 2)
    assert train("--out", broken, *how)[0] == 0
    one, other = ([(row["loss"], row["tokens"], row["rows"]) for row in metrics(out)[0]]
                  for out in (straight, broken))
    assert one == other
    assert (straight / "adapter_model.safetensors").read_bytes() == (
        broken / "adapter_model.safetensors").read_bytes()


def test_a_run_of_before_a_setting_existed_has_its_default(train, tmp_path):
    out = tmp_path / "run"
    assert train("--out", out, "--steps", 2, "--batch-size", 8)[0] == 0
    file = out / "config.json"
    config = {k: v for k, v in strict(file.read_text()).items() if k != "batch_tokens"}
    file.write_text(json.dumps(config))
    status, _, error = train("--out", out, "--steps", 4, "--batch-tokens", 200)
    assert status == 2
    assert "this run started without --batch-tokens, not with --batch-tokens 200;" in error
    assert train("--out", out, "--steps", 4, "--batch-size", 8)[0] == 0


def test_the_changed_setting_that_is_named_is_the_one_that_was_typed(train, tmp_path):
    """--batch-tokens also sets --batch-size back to its default."""
    out = tmp_path / "run"
    train("--out", out, "--steps", 3)
    status, _, error = train("--out", out, "--batch-tokens", 200)
    assert status == 2
    assert "this run started without --batch-tokens, not with --batch-tokens 200;" in error


@pytest.mark.parametrize("different, preset, named", [
    (["lr", "batch_tokens"], "nano", "batch_tokens"), (["model", "batch_tokens"], "t4", "model"),
    (["lr", "batch_size"], "none", "preset"), (["lr", "batch_size"], "nano", "batch_size")])
def test_a_message_names_the_model_or_a_typed_setting_or_the_preset(different, preset, named):
    before = vars(Config(preset="nano", lr=1.0, batch_size=3))
    now = vars(Config(preset=preset, batch_tokens=300))
    assert resume.most_likely_typed(different, before, now) == named


def test_a_run_goes_on_with_or_without_capturing(train, tmp_path):
    out = tmp_path / "run"
    train("--out", out, "--steps", 3)
    status, _, said = train("--out", out, "--no-capture")
    assert (status, said) == (0, "")


def test_a_run_does_not_go_on_in_another_dtype(train, tmp_path):
    """On another GPU `auto` may choose another dtype, which needs another loss scale."""
    out = tmp_path / "run"
    train("--out", out, "--steps", 3)
    assert json.loads((out / "config.json").read_text())["dtype"] == "fp32"
    status, _, said = train("--out", out, "--dtype", "bf16")
    assert status == 2
    assert "this run started with --dtype fp32, not with --dtype bf16;" in said


def test_going_on_from_an_adapter_names_the_base_it_was_put_on(train, tmp_path, tiny):
    other = tmp_path / "other-base"
    other.symlink_to(tiny)
    train("--out", tmp_path / "first")
    train("--out", tmp_path / "second", "--adapter", tmp_path / "first", "--model", other)
    config = json.loads((tmp_path / "second" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(other)


# -- the summary, and an early end


def scores_of(monkeypatch, *losses):
    """Replace the evaluations: they give these losses, and answers that contain the losses."""
    left = list(losses)

    def next_score(*_, **__):
        loss = left.pop(0)
        return evaluate.Score(loss, loss / 10, [f"answer at {loss}"] * 2)

    monkeypatch.setattr(setup, "evaluate", next_score)


def test_the_summary_is_of_the_adapter_that_was_kept(train, tmp_path, monkeypatch):
    scores_of(monkeypatch, 5.0, 3.0, 4.0, 4.5, 4.75)
    _, said, _ = train("--out", tmp_path / "run")
    done = said.split("\ndone")[1]
    assert "5.000 before, 3.000 after\n" in done and "50% before, 30% after" in done
    assert "(step 2, the" in done and "answer at 3.0" in done and "answer at 4.75" not in done
    assert "no better" not in done


def test_a_run_whose_loss_only_rose_says_so(train, tmp_path, monkeypatch):
    scores_of(monkeypatch, 3.0, 4.0, 5.0, 6.0, 7.0)
    status, said, _ = train("--out", tmp_path / "run")
    assert status == 0 and "The training did not improve the model" in said


def test_patience_ends_a_run_that_gets_no_better(train, tmp_path, monkeypatch):
    out = tmp_path / "run"
    scores_of(monkeypatch, 9.0, 3.0, 4.0, 4.0, 1.0)
    status, said, _ = train("--out", out, "--steps", 20, "--patience", 2)
    assert status == 0 and "ended early: the validation loss was no lower in 2 evaluations" in said
    assert [row["step"] for row in metrics(out)[0]][-1] == 6
    assert (out / "checkpoint-6").is_dir() and "(step 2, the lowest validation loss)" in said
    assert "no lower than" not in (out / "README.md").read_text("utf-8")
    status, _, line = train("--out", out, "--steps", 20, "--patience", 2)
    assert status == 2 and "this run ended early, after step 6 of 20" in line
    assert "no lower in 2 evaluations (--patience 2)" in line and "--patience above 2" in line
    scores_of(monkeypatch, 2.0, 1.0)
    status, said, _ = train("--out", out, "--steps", 10, "--patience", 3)
    assert status == 0 and "\ndone" in said


def test_the_score_before_training_counts_for_patience(train, tmp_path, monkeypatch):
    scores_of(monkeypatch, 3.0, 4.0, 3.5, 1.0)
    status, said, _ = train("--out", tmp_path / "run", "--steps", 20, "--patience", 2)
    assert status == 0 and "ended early: the validation loss was no lower in 2 evaluations" in said
    assert metrics(tmp_path / "run")[0][-1]["step"] == 4
    assert "(step 4, the best after training began)" in said  # the loss was lowest before training
    card = (tmp_path / "run" / "README.md").read_text("utf-8")
    assert "| steps | 4 of 20 planned (1.8 epochs), 0 skipped |" in card
    assert "the adapter of step 4 of 4." in card and "no lower than before training" in card


def test_patience_without_held_out_rows_is_refused_before_the_weights(train, tmp_path,
                                                                      monkeypatch):
    monkeypatch.setattr(setup, "read_model", lambda *_, **__: pytest.fail("read the weights"))
    status, _, line = train("--out", tmp_path / "run", "--patience", 2, "--hold-out", 0)
    assert status == 2 and "--patience 2: needs held-out rows" in line


def test_patience_is_forgotten_at_each_better_score(train, tmp_path, monkeypatch):
    scores_of(monkeypatch, 9.0, 3.0, 4.0, 2.0, 4.0, 1.0)
    status, said, _ = train("--out", tmp_path / "run", "--steps", 10, "--patience", 2)
    assert status == 0 and "\ndone" in said


def test_a_resumed_run_remembers_what_it_kept(train, tmp_path, monkeypatch):
    out = tmp_path / "run"
    scores_of(monkeypatch, 5.0, 3.0, 4.0, 4.0, 4.5)
    train("--out", out, "--steps", 4)
    _, said, _ = train("--out", out, "--steps", 6)
    assert "5.000 before, 3.000 after" in said and "answer at 3.0" in said


def test_a_plan_for_a_card_that_is_not_here_needs_no_weights(train, tmp_path, tiny):
    shape = shutil.copytree(tiny, tmp_path / "shape")
    (shape / "pytorch_model.bin").unlink()
    status, said, error = train("--dry-run", "--card", "t4", "--model", shape)
    assert status == 0, error
    said = " ".join(said.split())
    for part in ("preset t4", "card Tesla T4, 14.6 GiB, compute capability 7.5",
                 "dtype fp16: set by --preset t4", "attention efficient attention",
                 "of 14.6 GiB with margins", "optimizer AdamW, 8-bit state, paged"):
        assert part in said, part
    assert "attention flash attention" in " ".join(
        train("--dry-run", "--card", "a100", "--model", shape)[1].split())
    status, _, line = train("--out", tmp_path / "run", "--card", "t4")
    assert status == 2 and "--card t4: needs --dry-run" in line
    assert "choose from t4, v100" in train("--dry-run", "--card", "t5")[2]


def test_a_plan_for_a_cpu_reads_no_weights_either(train, tmp_path, tiny, monkeypatch):
    out = tmp_path / "run"
    trained = train("--out", out, "--eval-answers", 0)[1]
    shutil.rmtree(out)
    monkeypatch.setattr(setup, "read_model", lambda *_, **__: pytest.fail("read the weights"))
    status, said, _ = train("--out", out, "--eval-answers", 0, "--dry-run")
    assert status == 0
    settings = said.split("\n\none training example")[0]
    assert len(settings.splitlines()) > 12 and trained.startswith(settings)


@pytest.fixture
def tiny_published(tiny, monkeypatch):
    """Let --model 7b5 mean the shape of the test model tiny."""
    shape = read_config(tiny)
    monkeypatch.setitem(phogpt.PUBLISHED, "7b5", shape)
    return shape


def test_a_built_in_shape_is_planned_without_any_file(train, tmp_path, tiny_published, rows):
    plan = ("--dry-run", "--card", "t4", "--model", "7b5", "--max-len", 64)
    status, said, error = train(*plan, "--epochs", 2)
    said = " ".join(said.split())
    assert status == 0, error
    assert "9 training rows of rows.jsonl, counted but not tokenised" in said
    assert "each is assumed to have 64" in said
    assert "steps 5 of 4 examples" in said and "GiB with margins" in said
    assert re.search(r"time simulated: \S+ to \S+ s a step, .* for all steps", said)
    assert "one training example" not in said
    rows.write_text('{"prompt": "x"}', "utf-8")
    assert "rows.jsonl:1" in train(*plan)[2]


def test_a_built_in_shape_without_rows_is_planned_by_the_step(tiny_published, capsys):
    import train as script

    script.main(["--model", "7b5", "--card", "v100", "--dry-run", "--max-len", "32"])
    said = " ".join(capsys.readouterr().out.split())
    assert "no rows are read: each is assumed to have 32 tokens" in said
    assert "steps 8 examples each; --data FILE or --steps N gives the number of steps" in said
    assert re.search(r"time simulated: \S+ to \S+ s a step packing", said)


def test_a_built_in_shape_is_not_planned_for_a_cpu(train, tiny_published, monkeypatch):
    monkeypatch.setattr(setup, "this_card", lambda: Card("CPU", "cpu"))
    status, _, line = train("--model", "7b5", "--dry-run")
    assert status == 2 and "name one, such as --card t4" in line


def test_a_built_in_shape_is_not_trained(train, tmp_path, tiny_published):
    status, _, line = train("--model", "7b5", "--out", tmp_path / "run")
    assert status == 2 and "--model 7b5: is a shape without weights, for --dry-run" in line


def test_more_tokens_take_longer_and_a_faster_card_less(train, tiny_published):
    def step_s(*flags):
        said = train("--dry-run", "--model", "7b5", *flags)[1]
        return float(re.search(r"simulated: \S+ to (\S+) s a step", said)[1])

    long = step_s("--card", "t4", "--max-len", 128)
    assert step_s("--card", "t4", "--max-len", 32) < long > step_s("--card", "v100",
                                                                   "--max-len", 128)


@pytest.mark.parametrize("name", ["config.json", "row_hashes.json", "metrics.jsonl"])
def test_a_resumed_run_that_is_killed_while_it_writes_keeps_its_old_files(train, tmp_path,
                                                                          monkeypatch, name):
    out = tmp_path / "run"
    train("--out", out, "--steps", 2)
    before = {file: file.read_bytes() for file in out.iterdir() if file.is_file()}
    replace = files.os.replace

    def killed(old, new):
        if new.name == name:
            raise KeyboardInterrupt
        replace(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", killed)
        assert train("--out", out, "--steps", 4)[0] == 130
    assert (out / name).read_bytes() == before[out / name]
    assert train("--out", out, "--steps", 4)[0] == 0
    assert [row["step"] for row in metrics(out)[0]] == [1, 2, 3, 4]


@pytest.mark.parametrize("name", ["config.json", "row_hashes.json", "metrics.jsonl",
                                  "adapter_config.json", "loss.svg", "loss.png", ".lock"])
def test_a_new_run_writes_over_no_file_of_somebody_else(train, tmp_path, name):
    out = tmp_path / "mine"
    out.mkdir()
    (out / name).write_text('{"model_type": "mpt"}')
    status, _, line = train("--out", out)
    assert status == 2 and f"contains a {name} that does not belong to a run" in line
    assert line.count("\n") == 1 and (out / name).read_text() == '{"model_type": "mpt"}'
    assert [file.name for file in out.iterdir()] == [name]


def test_a_run_removes_no_unfinished_file_of_somebody_else(train, tmp_path):
    out = tmp_path / "run"
    mine = [out / "film.unfinished", out / "checkpoint-x.unfinished", out / "data.unfinished" / "x"]
    left = [out / "checkpoint-3.unfinished" / "x", out / "adapter_config.json.unfinished"]
    for file in (*mine, *left):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("half")
    assert train("--out", out, "--steps", 1)[0] == 0
    assert all(file.read_text() == "half" for file in mine)
    assert not any(file.exists() for file in left)


def test_the_rows_of_a_checkpoint_are_on_the_disk_before_it(train, tmp_path, monkeypatch):
    """A power failure loses metrics that are not flushed to the disk.

    A resumed run does not write the metrics from before its checkpoint again.
    """
    flushed, write = [], checkpoint.write

    def written(*args):
        assert flushed == [tmp_path / "run" / "metrics.jsonl"]
        flushed.clear()
        return write(*args)

    monkeypatch.setattr("phogpt_raw.training.run.flush", flushed.append)
    monkeypatch.setattr(checkpoint, "write", written)
    assert train("--out", tmp_path / "run")[0] == 0


def test_a_folder_that_is_moved_while_the_run_writes_is_one_line(train, tmp_path, monkeypatch):
    out = tmp_path / "run"

    def moved(*args):
        if out.exists():
            out.rename(tmp_path / "moved")
        return 0.01

    with monkeypatch.context() as patch:
        patch.setattr("train.lr_at", moved)
        status, _, said = train("--out", out)
    assert status == 2 and f"error: {out}: this folder is missing" in said and said.count("\n") == 1
    assert train("--out", tmp_path / "moved")[0] == 0


@pytest.mark.parametrize("hold_out", [3, 0])
def test_a_run_killed_after_its_last_checkpoint_is_finished_by_the_same_command(train, tmp_path,
                                                                                hold_out):
    out = tmp_path / "run"
    train("--out", out, "--hold-out", hold_out)
    card = (out / "README.md").read_bytes()
    for name in ("README.md", "adapter_model.safetensors", "adapter_config.json"):
        (out / name).unlink()
    status, said, _ = train("--out", out, "--hold-out", hold_out)
    assert status == 0 and (out / "README.md").read_bytes() == card
    assert adapter_bytes(out) == adapter_bytes(out / "checkpoint-7")
    assert ("the lowest validation loss" if hold_out else "the last") in said
    assert " s each" not in said  # this command ran no step
    assert train("--out", out, "--hold-out", hold_out)[0] == 2  # the run is complete


def test_the_card_of_an_earlier_end_goes_when_the_run_goes_on(train, tmp_path):
    out = tmp_path / "run"
    train("--out", out, "--steps", 3)
    assert train("--out", out, at=(1, KeyboardInterrupt()))[0] == 130
    assert not (out / "README.md").exists()
    (out / "README.md").write_text("mine")
    assert train("--out", out)[0] == 0 and (out / "README.md").read_text() == "mine"


def test_data_that_lies_in_the_runs_folder_stays_what_it_is(train, tmp_path, rows):
    out = tmp_path / "mine"
    out.mkdir()
    records = [json.loads(line) for line in rows.read_text("utf-8").splitlines()]
    (out / "rows.json").write_text(json.dumps(records, ensure_ascii=False), "utf-8")
    before = (out / "rows.json").read_bytes()
    assert train("--out", out, "--data", out / "rows.json", "--steps", 2)[0] == 0
    assert train("--out", out, "--data", out / "rows.json", "--steps", 3)[0] == 0
    assert (out / "rows.json").read_bytes() == before


@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
def test_an_out_that_is_a_file_is_refused_before_the_weights(train, rows, monkeypatch, flags):
    monkeypatch.setattr(setup, "read_model", lambda *_, **__: pytest.fail("read the weights"))
    status, _, line = train("--out", rows, *flags)
    assert status == 2 and "is a file; name a folder" in line and line.count("\n") == 1


def test_a_plan_for_an_adapter_needs_no_weights(train, tmp_path, monkeypatch):
    train("--out", tmp_path / "run", "--steps", 2)
    monkeypatch.setattr(setup, "read_model", lambda *_, **__: pytest.fail("read the weights"))
    status, said, _ = train("--adapter", tmp_path / "run", "--dry-run")
    assert status == 0 and "rank 4" in said


@pytest.mark.parametrize("flags, said", [
    (["--rank", 1000], "--rank 1000: the model's matrices have 64 columns"),
    (["--warmup", 7], "--warmup 7: must be below the run's number of steps, which is 7; lower"),
    (["--epochs", 1, "--warmup", 3], "--warmup 3: must be below the run's number of steps, which"),
])
def test_what_the_model_is_too_small_for_is_refused_before_its_weights(train, monkeypatch, flags,
                                                                      said):
    monkeypatch.setattr(setup, "read_model", lambda *_, **__: pytest.fail("read the weights"))
    status, _, line = train(*flags)
    assert status == 2 and said in line and line.count("\n") == 1


def test_a_plan_for_a_shape_may_have_longer_rows_than_the_model_was_trained_for(train):
    status, said, _ = train("--model", "7b5", "--card", "t4", "--dry-run", "--max-len", 4096,
                            "--steps", 1)
    said = " ".join(said.split())
    assert status == 0 and "rows of 4,096 tokens" in said
    assert "the longest row is longer than the 2,048 tokens that the model was trained for" in said
