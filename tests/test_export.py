"""python -m phogpt_raw.export: what it writes, what it says, what it refuses."""

import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from phogpt_raw.export.__main__ import main
from phogpt_raw.files import UNFINISHED

pytest.importorskip("gguf")
ROOT = Path(__file__).parents[1]


def export(*arguments):
    main([str(argument) for argument in arguments])


def test_all_kinds_in_one_folder(first_command, tmp_path, capsys):
    export(first_command, tmp_path / "out", "--merged", "--gguf", "f16", "--lora-gguf")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "model.gguf", "Modelfile", "adapter.gguf", "README.md"}
    said = " ".join(capsys.readouterr().out.split())
    assert "have the same likeliest token as the adapter on NF4" in said
    assert f"llama-quantize {tmp_path}/out/model.gguf {tmp_path}/out/model-q4_k_m.gguf Q4_K_M" in (
        said)
    assert f"--lora {tmp_path}/out/adapter.gguf" in said and "ollama create phogpt" in said


def test_the_merged_folder_answers(first_command, tmp_path, capsys):
    """As the adapter over the base's plain weights does."""
    import generate

    export(first_command, tmp_path / "out", "--merged", "--dtype", "fp32")
    capsys.readouterr()
    for how in (["--model", str(tmp_path / "out")], ["--adapter", str(first_command)]):
        generate.main([*how, "--no-nf4", "Mèo thích ăn gì?"])
    one, other = capsys.readouterr().out.splitlines()
    assert one == other and "Dạ" in one


def test_a_base_is_exported_without_an_adapter(tiny, tmp_path, capsys):
    export(tiny, tmp_path / "out", "--gguf", "q4_0")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "model.gguf", "Modelfile", "README.md"}
    assert "llama-quantize" not in capsys.readouterr().out  # not from 4 bits


def test_a_base_in_nf4_is_what_later_starts_read(tiny, tmp_path, capsys, monkeypatch):
    from phogpt_raw.model.weights import load_base

    export(tiny, tmp_path / "out", "--nf4")
    assert f"--model {tiny} --nf4-cache {tmp_path}/out" in " ".join(capsys.readouterr().out.split())
    [file] = (tmp_path / "out").glob("*.safetensors")
    monkeypatch.setattr("phogpt_raw.model.weights.nf4_linear", None)  # nothing is quantised
    load_base(str(tiny), device="cpu", nf4_cache=tmp_path / "out")
    assert f"base read from NF4 cache {file}" in capsys.readouterr().err


def test_the_runs_template_is_the_exports(first_command, tmp_path):
    run = shutil.copytree(first_command, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"template": "7b5-instruct"}))
    export(run, tmp_path / "out", "--gguf", "q8_0")
    assert "### Câu hỏi:\n{{ .Prompt }}" in (tmp_path / "out" / "Modelfile").read_text("utf-8")


def test_an_adapter_alone_needs_no_weights(tiny, first_command, tmp_path):
    """Of a hub's base only the config and the tokenizer are fetched for it."""
    base = tmp_path / "base"
    shutil.copytree(ROOT / "phogpt_raw" / "nano" / "base", base)
    (base / "pytorch_model.bin").unlink()
    export(first_command, tmp_path / "out", "--lora-gguf", "--model", base)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"adapter.gguf", "README.md"}


@pytest.mark.parametrize("flags, line", [
    ([], "what to write, and where? name a folder OUT and one or more of --merged"),
    (["--push", "me/it"], "what to write, and where?"),
    (["--gguf", "q4_k_m"], "argument --gguf: invalid choice"),
    (["--merged", "--model", "/not/there"], "--model /not/there: no such folder")])
def test_what_cannot_be_is_one_line(first_command, tmp_path, flags, line, capsys):
    with pytest.raises(SystemExit) as stopped:
        export(first_command, tmp_path / "out", *flags)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and line in said and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("run, flags, line", [
    ("nano", ["--lora-gguf"], "nano holds no adapter (adapter_config.json)"),
    ("runs/not-there", ["--gguf", "f16"], "--model runs/not-there: no such folder")])
def test_a_run_that_is_none_is_one_line(run, flags, line, tmp_path, capsys):
    with pytest.raises(SystemExit):
        export(run, tmp_path / "out", *flags)
    assert line in capsys.readouterr().err


def test_an_existing_folder_is_refused_and_left_alone(tiny, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    with pytest.raises(SystemExit):
        export(tiny, tmp_path / "out", "--gguf", "f16")
    assert "exists already; name a folder that does not" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_an_adapter_of_another_base_is_one_line_before_anything_is_written(
        first_command, tiny, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        export(first_command, tmp_path / "out", "--merged", "--model", tiny)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1 and "made for another model" in said
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line_and_leaves_nothing(tiny, tmp_path):
    """The real error, from a limit on the size of a file."""
    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    for flags in (["--merged"], ["--gguf", "f16"]):
        ended = subprocess.run(
            [sys.executable, "-m", "phogpt_raw.export", tiny, tmp_path / "out", *flags], cwd=ROOT,
            capture_output=True, text=True, preexec_fn=limit)
        assert ended.returncode == 2, ended.stderr
        assert ended.stderr.count("\n") == 1 and "the disk is full" in ended.stderr
        assert list(tmp_path.iterdir()) == []


def test_too_little_space_is_said_before(tiny, tmp_path, capsys, monkeypatch):
    from collections import namedtuple

    monkeypatch.setattr("shutil.disk_usage", lambda _: namedtuple("Usage", "free")(1000))
    with pytest.raises(SystemExit):
        export(tiny, tmp_path / "out", "--merged")
    assert "GB are needed and 0.00 GB are free" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_killed_in_the_middle_nothing_stands_under_the_final_name(tiny, tmp_path):
    script = ("import sys, time\nfrom phogpt_raw.export import gguf, __main__\n"
              "gguf.write_model = lambda *a, **k: (print('half', flush=True), time.sleep(60))\n"
              "__main__.main(sys.argv[1:])\n")
    command = [sys.executable, "-c", script, tiny, tmp_path / "out", "--merged", "--gguf", "f16"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout.readline() == "half\n"
        process.kill()
    assert [file.name for file in tmp_path.iterdir()] == ["out" + UNFINISHED]
    export(tiny, tmp_path / "out", "--gguf", "f16")
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "model.gguf", "Modelfile", "README.md"}


def test_refusals_come_before_the_weights_are_read(first_command, tmp_path):
    """A wrong flag on a large base must not wait for it."""
    begun = time.monotonic()
    ended = subprocess.run([sys.executable, "-m", "phogpt_raw.export", first_command,
                            tmp_path / "out"], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2 and time.monotonic() - begun < 30


def test_without_the_gguf_package_the_command_says_how_to_get_it(tiny, tmp_path, capsys,
                                                                 monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(SystemExit):
        export(tiny, tmp_path / "out", "--gguf", "f16")
    assert "pip install -c constraints.txt -e '.[gguf]'" in capsys.readouterr().err
