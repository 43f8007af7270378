"""Defaults, presets and flags. Every mistake on the command line is refused in one line."""

import dataclasses
import doctest
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from phogpt_raw import command_line
from phogpt_raw import config as configuration
from phogpt_raw.command_line import PRESETS, from_command_line, parser, preset_names
from phogpt_raw.config import ABOVE_ZERO, RANGES, Config
from phogpt_raw.refusal import Refusal

ROOT = Path(__file__).parents[1]

FLAGS = [
    "--adapter", "--alpha", "--answer-tokens", "--batch-size", "--batch-tokens",
    "--capture", "--card", "--clip",
    "--data", "--data-cache", "--dropout", "--dry-run", "--dtype", "--epochs",
    "--eval-answers", "--eval-every", "--help", "--hold-out", "--inspect", "--json",
    "--keep", "--loss-mib",
    "--lr", "--lr-floor", "--map", "--max-len", "--max-minutes",
    "--max-skipped", "--micro-batch", "--model",
    "--nf4", "--nf4-cache", "--no-capture", "--no-dry-run", "--no-json", "--no-nf4",
    "--no-packing", "--no-strict", "--no-tensorboard",
    "--optimizer", "--out",
    "--pack-len", "--packing", "--patience",
    "--preset", "--rank", "--recompute", "--revision", "--save-every",
    "--seed", "--steps", "--strict", "--targets", "--template", "--tensorboard",
    "--too-long", "--val",
    "--warmup", "--weight-decay",
]


def read(*arguments: str) -> Config:
    return from_command_line(list(arguments), "")


def preset(tmp_path: Path, text: str | bytes) -> str:
    file = tmp_path / "mine.toml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(file)


def test_a_flag_beats_the_preset_and_the_preset_beats_the_default(tmp_path):
    file = preset(tmp_path, "lr = 3e-3\nrank = 5\n")
    assert (read("--model", "x/y").lr, read("--model", "x/y").rank) == (Config.lr, Config.rank)
    config = read("--model", "x/y", "--preset", file, "--rank", "7")
    assert (config.lr, config.rank, config.clip) == (3e-3, 7, Config.clip)


def test_a_flag_that_repeats_the_default_still_beats_the_preset():
    assert read("--preset", "nano").batch_size != Config.batch_size
    flags = ["--preset", "nano", "--batch-size", str(Config.batch_size)]
    assert read(*flags).batch_size == Config.batch_size


def test_nano_brings_its_own_preset_and_another_model_none():
    values = tomllib.loads((PRESETS / "nano.toml").read_text("utf-8"))
    assert read().lr == read("--model", "nano").lr == values["lr"]
    assert read("--model", "x/y") == Config(model="x/y")
    assert read("--preset", "t4").lr == Config.lr  # the preset t4 replaces nano's own preset


def test_a_flag_takes_the_place_of_its_other_in_a_preset(tmp_path):
    both = preset(tmp_path, "batch_tokens = 4096\nepochs = 3.0\nhold_out = 5\n")
    read_one = read("--preset", both, "--batch-size", "4", "--steps", "7", "--val", "v.jsonl")
    assert (read_one.batch_size, read_one.batch_tokens) == (4, None)
    assert (read_one.steps, read_one.epochs) == (7, None)
    assert (read_one.val, read_one.hold_out) == ("v.jsonl", None)
    assert read("--preset", "t4", "--batch-tokens", "512").batch_tokens == 512


def test_a_step_is_counted_in_examples_or_in_tokens(tmp_path):
    with pytest.raises(Refusal, match="--batch-size and --batch-tokens: give one of them"):
        read("--batch-size", "8", "--batch-tokens", "512")
    with pytest.raises(Refusal, match="--batch-size and --batch-tokens: give one of them"):
        read("--preset", preset(tmp_path, "batch_size = 8\nbatch_tokens = 512\n"))


def test_doctest():
    assert doctest.testmod(command_line).failed == doctest.testmod(configuration).failed == 0


def test_a_share_may_be_written_as_a_percentage():
    assert read("--hold-out", "5%").hold_out == read("--hold_out", "0.05").hold_out == 0.05


def test_pack_len_without_packing_is_refused():
    with pytest.raises(Refusal, match=r"--pack-len 512: has no effect with --no-packing"):
        read("--no-packing", "--pack-len", "512")


def test_a_preset_may_be_written_in_capitals():
    assert read("--preset", "T4") == read("--preset", "t4")
    assert read("--preset", "None").preset == "none"


def test_a_run_does_not_write_over_the_adapter_that_it_starts_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for adapter in ("runs/a", "./runs/a/", "runs/a/checkpoint-5"):
        with pytest.raises(Refusal, match="would overwrite the adapter"):
            read("--adapter", adapter, "--out", "runs/a")
    read("--adapter", "runs/a", "--out", "runs/b")


def test_it_is_said_whether_a_flag_or_the_preset_asks():
    assert command_line.asked_by(read("--preset", "t4"), "dtype") == "--preset t4"
    assert command_line.asked_by(read("--preset", "t4", "--dtype", "bf16"), "dtype") == "--dtype"
    assert command_line.asked_by(read("--dtype", "fp32"), "dtype") == "--dtype"


def test_without_packing_the_row_length_of_a_preset_is_no_matter():
    assert read("--no-packing").packing is False and read().pack_len


def test_hyphens_and_underscores_are_the_same_flag():
    hyphens = ["--micro-batch", "2", "--lr-floor", "0.5", "--no-nf4", "--dry-run", "--hold-out=3"]
    underscores = [h.replace("-", "_").replace("__", "--", 1) for h in hyphens]
    assert underscores[4:6] == ["--no_nf4", "--dry_run"]
    config = read(*hyphens)
    assert read(*underscores) == config
    assert (config.micro_batch, config.nf4, config.dry_run, config.hold_out) == (2, False, True, 3)
    assert read("--dry-run", "--no-dry-run") == read("--dry_run", "--no_dry_run") == read()


def test_the_flags_are_these_and_no_others():
    made = {name.replace("_", "-") for name in parser("")._option_string_actions}
    assert sorted(made - {"-h"}) == FLAGS


def test_every_field_has_help_and_a_flag():
    names = [field.name for field in dataclasses.fields(Config)]
    assert sorted(command_line.comments()) == sorted(names)
    assert all(len(text) > 5 for text in command_line.comments().values())
    assert {f"--{configuration.flag(name)}" for name in names} < set(FLAGS)
    text = parser("what it does").format_help()
    assert "LoRA rank (default 16)" in text
    assert "what it does" in text


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_loads_and_gives_a_reason_for_every_line(name):
    read("--preset", name)
    for line in (PRESETS / f"{name}.toml").read_text("utf-8").splitlines():
        assert re.search(r"#\s*\S.{5,}", line), f"{name}.toml: no reason in {line!r}"


def test_there_are_presets_for_nano_and_both_cards():
    assert preset_names() == ["nano", "t4", "v100"]


@pytest.mark.parametrize("arguments, said", [
    (["--learning-rate", "1"], "--learning-rate"),
    (["--micro", "2"], "--micro"),  # an abbreviation could name another flag in a later version
    (["--epoch", "3"], "--epoch: no such flag; did you mean --epochs?"),
    (["rows.jsonl"], "rows.jsonl; write each value after its flag, and several words in quotes"),
    (["--data", "a.csv", "b.csv"], "b.csv; write each value after its flag"),
    (["--batchsize=3"], "did you mean --batch-size?"),
    (["--no_pack"], "did you mean --no-packing?"),
    (["--zzz"], "--zzz; see --help"),
    (["--hold-out", "100%"], "100% is neither a count (32) nor a share (0.05 or 5%)"),
    (["--hold-out", "some"], "some is neither a count (32) nor a share (0.05 or 5%)"),
    (["--steps"], "--steps"),
    (["--steps", "many"], "many"),
    (["--rank", "1.5"], "1.5"),
    (["--preset", "a100"], "nano, t4, v100"),
    (["--preset", "nowhere.toml"], "nowhere.toml"),
    (["--steps", "3", "--epochs", "1"], "--steps and --epochs"),
    (["--val", "v.jsonl", "--hold-out", "3"], "--val and --hold-out"),
    (["--steps", "0"], "--steps 0"),
    (["--batch-size", "0"], "--batch-size 0"),
    (["--micro_batch", "-1"], "--micro-batch -1"),
    (["--rank", "0"], "--rank 0"),
    (["--max-len", "2"], "--max-len 2"),
    (["--warmup", "-1"], "--warmup -1"),
    (["--lr", "0"], "--lr 0"),
    (["--lr", "nan"], "--lr nan"),
    (["--lr", "inf"], "--lr inf"),
    (["--clip", "0"], "--clip 0"),
    (["--alpha", "-2"], "--alpha -2"),
    (["--weight-decay", "-0.1"], "--weight-decay -0.1"),
    (["--weight-decay", "nan"], "--weight-decay nan"),
    (["--weight-decay", "inf"], "--weight-decay inf"),
    (["--lr-floor", "1.5"], "--lr-floor 1.5"),
    (["--lr-floor", "nan"], "--lr-floor nan"),
    (["--dropout", "1"], "--dropout 1"),
    (["--epochs", "0"], "--epochs 0"),
    (["--epochs", "inf"], "--epochs inf"),
    (["--recompute", "some"], "--recompute some"),
    (["--recompute", "-1"], "--recompute -1"),
    (["--dtype", "int8"], "fp16, bf16, fp32"),
    (["--template", "llama"], "7b5-instruct"),
    (["--optimizer", "sgd"], "adamw"),
])
def test_a_command_line_that_cannot_be_is_refused_by_name(arguments, said):
    with pytest.raises(Refusal, match=re.escape(said)):
        read(*arguments)


@pytest.mark.parametrize("text, said", [
    ("learning_rate = 1.0", "unknown key learning_rate"),
    ("micro-batch = 2", "unknown key micro-batch"),
    ("[training]\nlr = 1.0", "unknown key training"),
    ('lr = "fast"', "lr = 'fast' should be float"),
    ("rank = 4.0", "rank = 4.0 should be int"),
    ("rank = true", "rank = True should be int"),
    ("nf4 = 1", "nf4 = 1 should be bool"),
    ("recompute = 4", "recompute = 4 should be str"),
    ("rank = 0", "--rank 0"),
    ("weight_decay = nan", "--weight-decay nan"),
    ("lr = = 2", "not TOML"),
    (b'data = "\xff"', "not TOML"),
])
def test_a_preset_file_that_cannot_be_is_refused(tmp_path, text, said):
    with pytest.raises(Refusal, match=re.escape(said)):
        read("--preset", preset(tmp_path, text))


def test_whole_numbers_will_do_for_fractions_in_a_preset(tmp_path):
    assert read("--preset", preset(tmp_path, "lr = 1\nepochs = 2")).epochs == 2.0


def test_graphs_are_captured_unless_a_flag_says_no():
    assert read().capture is True and read("--no-capture").capture is False
    assert read("--no_capture", "--capture").capture is True


def test_recompute_becomes_a_number_of_blocks():
    blocks = [Config(recompute=r).blocks_to_recompute(6) for r in ("all", "none", "0", "4")]
    assert blocks == [6, 0, 0, 4]
    with pytest.raises(Refusal, match="the model has 6 blocks"):
        Config(recompute="7").blocks_to_recompute(6)


def test_a_refusal_reaches_the_shell_as_one_line_and_status_2():
    done = subprocess.run([sys.executable, "train.py", "--step", "5"], cwd=ROOT, text=True,
                          capture_output=True, timeout=120)
    assert done.returncode == 2
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "--step: no such flag; did you mean --steps?" in line


@pytest.mark.parametrize("name, preset", [
    ("Tesla T4", "t4"), ("Tesla V100-SXM2-16GB", "v100"), ("NVIDIA H100 80GB HBM3", None),
    ("CPU", None)])
def test_a_card_brings_its_preset(monkeypatch, name, preset):
    from types import SimpleNamespace

    monkeypatch.setattr(command_line, "this_card", lambda: SimpleNamespace(name=name))
    assert read("--model", "x/y").preset == preset
    assert read("--model", "x/y") == Config(**(
        command_line.read_preset(preset) if preset else {}), model="x/y", preset=preset)
    assert read("--model", "x/y", "--preset", "none").dtype == "auto"
    assert read().preset == "nano"
    assert read("--model", "x/y", "--steps", "9", "--dtype", "bf16").dtype == "bf16"


@pytest.mark.parametrize("steps, warmup", [(3, 0), (10, 1), (49, 4), (60, 5), (5000, 5)])
def test_warm_up_is_at_most_a_tenth_of_the_steps(steps, warmup):
    assert Config().warmup_of(steps) == warmup
    assert Config(warmup=7).warmup_of(steps) == 7


@pytest.mark.parametrize("script", ["train.py", "generate.py"])
def test_help_fits_80_columns(script):
    done = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, text=True, timeout=120,
                          capture_output=True, env={**os.environ, "COLUMNS": "80",
                                                    "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0 and len(done.stdout.splitlines()) > 30
    assert [line for line in done.stdout.splitlines() if len(line) > 80] == []


def test_help_lists_each_flag_once_in_groups_with_nanos_defaults():
    text = parser("").format_help()
    assert "one optimizer step:" in text and text.count("--micro-batch") == 1
    assert "--micro_batch" not in text and "--no_nf4" not in text
    assert "(default 0.0002, 0.003 for nano)" in " ".join(text.split())


def test_data_may_be_named_once_or_several_times(tmp_path):
    assert read("--data", "a.jsonl").data == "a.jsonl"
    assert read("--data", "a.jsonl", "--data", "b.csv=2").data == ("a.jsonl", "b.csv=2")
    assert read("--preset", preset(tmp_path, 'data = ["a", "b"]')).data == ("a", "b")
    assert read("--preset", preset(tmp_path, 'data = "a"'), "--data", "b").data == "b"
    for wrong in ("data = 5", "data = [5]"):
        with pytest.raises(Refusal, match=r"data = .* should be tuple"):
            read("--preset", preset(tmp_path, wrong))


@pytest.mark.parametrize("flags, said", [
    (["--json"], "--json: needs --inspect N"), (["--inspect", "0"], "must be from 1 to"),
    (["--too-long", "chop"], "choose from cut, split, drop"),
    (["--data-cache", ""], "--data-cache: is empty")])
def test_a_flag_of_the_rows_that_cannot_be_is_refused(flags, said):
    with pytest.raises(Refusal, match=said):
        read(*flags)


@pytest.mark.parametrize("name", [*RANGES, *ABOVE_ZERO])
@pytest.mark.parametrize("text", ["1" + 40 * "0", "-1", "nan"])
def test_no_value_is_too_large_or_small_for_what_follows(name, text):
    flag = f"--{name.replace('_', '-')}"
    with pytest.raises(Refusal, match=f"{flag}"):
        read(f"{flag}={text}")


@pytest.mark.parametrize("arguments", [["--lr", "0"], ["--hold-out", "-3"], ["--epochs", "-1"],
                                       ["--max-minutes", "-1"], ["--weight-decay", "-0.5"]])
def test_a_value_that_is_refused_is_shown_as_it_was_typed(arguments):
    with pytest.raises(Refusal, match=f"^{' '.join(arguments)}: must be"):
        read(*arguments)


@pytest.mark.parametrize("name, said", [
    ("pack_len", "a longer example raises it"), ("save_every", "0: only these"),
    ("eval_every", "0: evaluate only at the start and the end"), ("eval_answers", "0: none"),
    ("dry_run", "none for 7b5 and 4b")])
def test_help_says_what_is_not_obvious_of_a_value(name, said):
    assert said in command_line.comments()[name]


def test_every_command_refuses_an_empty_value(monkeypatch):
    """In a shell, `--out "$NAME"` gives an empty value if NAME is not set."""
    parser = command_line.Parser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--chat", action="store_true")
    parser.add_argument("--system", default="")
    parser.add_argument("words", nargs="*")
    for empty in (["--out", ""], ["--out="], ["--chat", "--out", "", "a"]):
        with pytest.raises(Refusal, match="--out: is empty; give a value, or leave it out"):
            parser.parse_args(empty)
    given = parser.parse_args(["--system", "", "--chat", "", "--", "--out", ""])
    assert (given.system, given.words, given.out) == ("", ["", "--out", ""], None)


@pytest.mark.parametrize("flag", ["--data", "--val", "--model", "--adapter", "--out", "--preset",
                                  "--card", "--map", "--targets", "--template", "--revision"])
def test_an_empty_value_is_refused(flag):
    with pytest.raises(Refusal, match=f"{flag}: is empty"):
        read(flag, "")
