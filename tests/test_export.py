"""python -m phogpt_raw.export: the files that it writes, its output and its refusals."""

import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from phogpt_raw.export.__main__ import main
from phogpt_raw.export.merge import Merger
from phogpt_raw.files import UNFINISHED
from phogpt_raw.model.checkpoint_format import parameter_shapes

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
    assert "The merged checkpoint (bf16) compared with the adapter on its NF4 base" in said
    assert f"llama-quantize {tmp_path}/out/model.gguf {tmp_path}/out/model-q4_k_m.gguf Q4_K_M" in (
        said)
    assert f"--lora {tmp_path}/out/adapter.gguf" in said and "ollama create phogpt" in said


def test_the_merged_folder_answers(first_command, tmp_path, capsys):
    """The merged model gives the same answer as the adapter on a base without NF4."""
    import generate

    export(first_command, tmp_path / "out", "--merged", "--dtype", "fp32")
    capsys.readouterr()
    for how in (["--model", str(tmp_path / "out")], ["--adapter", str(first_command)]):
        generate.main([*how, "--no-nf4", "Mèo thích ăn gì?"])
    one, other = capsys.readouterr().out.splitlines()
    assert one == other and "Dạ" in one
    with pytest.raises(SystemExit):
        generate.main(["--adapter", str(first_command), "--model", str(tmp_path / "out"), "?"])
    assert f"{first_command} is already merged into it" in capsys.readouterr().err


def test_the_printed_command_asks_the_checkpoint_that_was_compared(first_command, tmp_path, capsys,
                                                                   monkeypatch):
    """The exported folder may have the name of the built-in base, or look like rich's markup."""
    import shlex

    import generate

    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr("phogpt_raw.inference.loading.load_base", lambda base, **how: asked.append(
        (Path(base).resolve(), how["nf4"])) or sys.exit(0))
    for out in ("nano", "[bold]"):
        export(first_command, out, "--merged")
        said = capsys.readouterr().out
        assert f"written to {out}" in said
        command = next(line for line in said.splitlines() if "generate.py" in line)
        with pytest.raises(SystemExit):
            generate.main(shlex.split(command)[2:])
        assert asked.pop() == (tmp_path / out, False)
        card = (tmp_path / out / "README.md").read_text("utf-8")
        assert "generate.py --model FOLDER --no-nf4" in card


def test_a_merged_checkpoint_names_no_path_of_the_machine_that_made_its_base(tmp_path):
    base = shutil.copytree(ROOT / "phogpt_raw" / "nano" / "base", tmp_path / "base")
    write_json(base / "config.json", _name_or_path="/home/lan/secret")
    export(base, tmp_path / "out", "--merged")
    assert "secret" not in (tmp_path / "out" / "config.json").read_text()


def test_a_base_in_nf4_has_the_runs_dtype(first_command, tmp_path, capsys):
    run = shutil.copytree(first_command, tmp_path / "run")
    write_json(run / "config.json", dtype="bf16")
    export(run, tmp_path / "out", "--nf4")
    assert "--model nano --dtype bf16 --nf4-cache" in " ".join(capsys.readouterr().out.split())
    from phogpt_raw.model.weights import load_base

    load_base("nano", device="cpu", dtype=torch.bfloat16, nf4_cache=tmp_path / "out" / "nf4")
    assert "base read from NF4 cache" in capsys.readouterr().err


def test_a_base_is_exported_without_an_adapter(tiny, tmp_path, capsys):
    export(tiny, tmp_path / "out", "--gguf", "q4_0")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "model.gguf", "Modelfile", "README.md"}
    # llama-quantize is only suggested for files in f16 or f32
    assert "llama-quantize" not in capsys.readouterr().out


def test_a_base_in_nf4_is_what_later_starts_read(tiny, tmp_path, capsys, monkeypatch):
    from phogpt_raw.model.weights import load_base

    export(tiny, tmp_path / "out", "--nf4")
    said = " ".join(capsys.readouterr().out.split())
    assert f"--model {tiny} --dtype fp32 --nf4-cache {tmp_path}/out/nf4 --data rows.jsonl" in said
    [file] = (tmp_path / "out" / "nf4").glob("*.safetensors")
    assert list((tmp_path / "out").iterdir()) == [file.parent]
    monkeypatch.setattr("phogpt_raw.model.weights.nf4_linear", None)  # loading must not quantise
    load_base(str(tiny), device="cpu", nf4_cache=file.parent)
    assert f"base read from NF4 cache {file}" in capsys.readouterr().err


def test_the_runs_template_is_the_exports(first_command, tmp_path):
    run = shutil.copytree(first_command, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"template": "7b5-instruct"}))
    export(run, tmp_path / "out", "--gguf", "q8_0")
    template = (tmp_path / "out" / "Modelfile").read_text("utf-8")
    assert "### Câu hỏi:\n{{ if .System }}" in template


def test_of_a_checkpoint_the_template_is_its_runs(first_command, tmp_path, capsys):
    run = shutil.copytree(first_command, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"template": "7b5-instruct"}))
    checkpoint = oldest(run)
    export(checkpoint, tmp_path / "out", "--gguf", "q8_0")
    template = (tmp_path / "out" / "Modelfile").read_text("utf-8")
    assert "### Câu hỏi:\n{{ if .System }}" in template
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert f"# nano + run {checkpoint.name}" in card


def oldest(run):
    """The oldest remaining checkpoint of a run."""
    return min(run.glob("checkpoint-*"), key=lambda folder: int(folder.name.rpartition("-")[2]))


def test_a_merged_folder_knows_its_template(first_command, tmp_path):
    """The base has another chat template, in a separate file."""
    from phogpt_raw.data.chat_template import choose_template
    from phogpt_raw.model.weights import read_config, read_tokenizer

    base = shutil.copytree(ROOT / "phogpt_raw" / "nano" / "base", tmp_path / "base")
    (base / "chat_template.jinja").write_text("{{ messages[0].content }}")
    export(first_command, tmp_path / "out", "--merged", "--template", "7b5-instruct",
           "--model", base)
    assert not (tmp_path / "out" / "chat_template.jinja").exists()
    tokenizer = read_tokenizer(tmp_path / "out", read_config(tmp_path / "out"))
    assert choose_template(tokenizer) == ("7b5-instruct", "the tokenizer's chat template")


def test_a_run_over_plain_weights_is_compared_with_those(first_command, tmp_path, capsys):
    run = shutil.copytree(first_command, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"nf4": False}))
    export(run, tmp_path / "out", "--merged", "--dtype", "fp32")
    said = " ".join(capsys.readouterr().out.split())
    assert "compared with the adapter on its base" in said and "the same in 100.0%" in said
    assert "weights are rounded to 4 bits;" not in said


def test_a_merge_far_from_the_adapter_is_warned_of(first_command, tmp_path, capsys, monkeypatch):
    from phogpt_raw.export.distance import Distance

    for same, warned in ((0.81, False), (0.79, True)):
        monkeypatch.setattr("phogpt_raw.export.report.distance",
                            lambda *_, same=same: Distance(100, same, 1.0, 9.0))
        export(first_command, tmp_path / f"out-{same}", "--merged")
        said = capsys.readouterr().out
        assert ("Ask both the same questions before" in " ".join(said.split())) == warned


def test_a_revision_is_for_the_hub_alone(tiny, tmp_path, capsys):
    with pytest.raises(SystemExit):
        export(tiny, tmp_path / "out", "--gguf", "f16", "--revision", "v1")
    assert "--revision v1: is for a repository of the hub" in capsys.readouterr().err


def test_commands_that_are_printed_name_revision_and_dtype(tiny, tmp_path, capsys, monkeypatch):
    """The revision comes from the adapter's config. `tiny` stands for a base on the hub."""
    from phogpt_raw.export import __main__, source

    asked = []
    for module in (source, __main__):  # these modules find the config and the weights
        monkeypatch.setattr(module, "find_folder", lambda base, revision, *_:
                            asked.append((base, revision)) or tiny)
    (tmp_path / "run").mkdir()
    save = json.dumps(dict(peft_type="LORA", base_model_name_or_path="vinai/PhoGPT-4B", r=4,
                           lora_alpha=8, target_modules=["Wqkv"], revision="v7"))
    (tmp_path / "run" / "adapter_config.json").write_text(save)
    monkeypatch.setattr(source, "Merger", lambda folder, adapter: Merger(folder))
    export(tmp_path / "run", tmp_path / "out", "--nf4", "--dtype", "fp32")
    assert set(asked) == {("vinai/PhoGPT-4B", "v7")}
    said = " ".join(capsys.readouterr().out.split())
    assert (f"python train.py --model vinai/PhoGPT-4B --revision v7 --dtype fp32 --nf4-cache "
            f"{tmp_path}/out/nf4") in said


def test_the_home_folder_may_be_written_as_a_tilde(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    export(tiny, "~/out", "--gguf", "f16")
    assert (tmp_path / "out" / "model.gguf").is_file()


def test_a_link_that_leads_nowhere_is_in_the_way(tiny, tmp_path, capsys):
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(SystemExit):
        export(tiny, tmp_path / "out", "--gguf", "f16")
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize("signal_", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_leaves_nothing(tiny, tmp_path, signal_):
    script = ("import sys, time\nfrom phogpt_raw.export import gguf, __main__\n"
              "gguf.write_model = lambda *a, **k: (print('half', flush=True), time.sleep(60))\n"
              "__main__.main(sys.argv[1:])\n")
    command = [sys.executable, "-c", script, tiny, tmp_path / "out", "--gguf", "f16"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          cwd=ROOT) as process:
        assert process.stdout.readline() == "half\n"
        process.send_signal(signal_)
        said = process.communicate()[1]
    assert process.returncode == 128 + signal_ and list(tmp_path.iterdir()) == []
    assert said == ("stopped by hand\n" if signal_ == signal.SIGINT else "")


@pytest.mark.parametrize("spoil, line", [
    (lambda base: write_json(base / "tokenizer_config.json", chat_template="{% if %}"),
     "the tokenizer's chat template cannot be used"),
    (lambda base: (base / "tokenizer.json").unlink(), "tokenizer.json: missing"),
    (lambda base: (base / "tokenizer.json").write_text("{}"),
     "its tokenizer.json, or another tokenizer file, cannot be read"),
    (lambda base: write_json(base / "tokenizer.json", normalizer={"type": "NFC"}),
     "is not byte-level BPE with BLOOM's pattern")])
def test_what_needs_no_weights_is_refused_before_they_are_read(tmp_path, capsys, spoil, line):
    base = shutil.copytree(ROOT / "phogpt_raw" / "nano" / "base", tmp_path / "base")
    (base / "pytorch_model.bin").write_bytes(b"damaged")
    spoil(base)
    with pytest.raises(SystemExit) as stopped:
        export(base, tmp_path / "out", "--gguf", "f16")
    assert stopped.value.code == 2 and line in capsys.readouterr().err


def write_json(file, **changed):
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | changed), "utf-8")


@pytest.mark.parametrize("flags, relation", [
    (["--merged", "--gguf", "f16"], "merge"), (["--gguf", "f16"], "quantized"),
    (["--lora-gguf"], "adapter"), (["--lora-gguf", "--gguf", "f16"], "quantized")])
def test_the_card_says_what_it_is_to_its_base(flags, relation, first_command, tmp_path,
                                              monkeypatch):
    monkeypatch.setattr("phogpt_raw.export.__main__.hub_id", lambda base: "vinai/PhoGPT-4B")
    export(first_command, tmp_path / "out", *flags)
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert f"base_model_relation: {relation}\n" in card
    assert "A PhoGPT, fine-tuned from vinai/PhoGPT-4B, exported" in " ".join(card.split())


@pytest.mark.parametrize("flags", [["--merged"], ["--merged", "--dtype", "fp32"],
                                   ["--gguf", "f32"], ["--gguf", "q4_0"], ["--nf4"],
                                   ["--merged", "--gguf", "f16", "--nf4"]])
def test_the_space_needed_is_that_of_the_files(flags, first_command, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("phogpt_raw.export.__main__.check_space",
                        lambda folder, size: asked.append(size))
    export(first_command, tmp_path / "out", *flags)
    written = sum(file.stat().st_size for file in (tmp_path / "out").rglob("*") if file.is_file())
    assert 0 < asked[0] - written < 2**24 + 2**21


def test_the_space_of_the_nf4_file_is_counted():
    """The test uses 7B5, because nano's NF4 file is smaller than the space added for small files.
    """
    from phogpt_raw.export.__main__ import bytes_needed
    from phogpt_raw.model.phogpt import PUBLISHED

    merger = SimpleNamespace(config=PUBLISHED["7b5"])
    options = SimpleNamespace(merged=False, gguf=None, nf4=True)
    assert 5.4e9 < bytes_needed(options, merger, torch.float32) < 8e9
    shapes = parameter_shapes(merger.config)
    merger.tensors = {n: torch.empty(shape, device="meta") for n, shape in shapes.items()}
    options = SimpleNamespace(merged=True, gguf=None, nf4=False)
    for dtype, size in ((torch.float32, 31.2e9), (torch.bfloat16, 15.6e9)):
        assert bytes_needed(options, merger, dtype) == pytest.approx(size, rel=0.06)


def test_a_base_alone_is_the_base_itself(tmp_path, monkeypatch):
    monkeypatch.setattr("phogpt_raw.export.__main__.hub_id", lambda base: "vinai/PhoGPT-4B")
    export("nano", tmp_path / "out", "--merged")
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "base_model_relation" not in card and "A PhoGPT, vinai/PhoGPT-4B, exported" in card


def test_a_base_in_a_folder_of_nanos_name_is_that_folder(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny, tmp_path / "nano")
    export("./nano", tmp_path / "out", "--merged")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["n_layers"] == json.loads((tiny / "config.json").read_text())["n_layers"]


def test_what_was_merged_stays_known_over_a_second_merge(first_command, tmp_path, capsys):
    export(oldest(first_command), tmp_path / "one", "--merged")
    export(first_command, tmp_path / "two", "--merged", "--model", tmp_path / "one")
    capsys.readouterr()
    for again in (first_command, oldest(first_command)):
        with pytest.raises(SystemExit):
            export(again, tmp_path / "three", "--merged", "--model", tmp_path / "two")
        assert "is already merged into it" in capsys.readouterr().err


def test_an_adapter_alone_needs_no_weights(tiny, first_command, tmp_path):
    """If the base is on the hub, only its config and tokenizer are downloaded."""
    base = tmp_path / "base"
    shutil.copytree(ROOT / "phogpt_raw" / "nano" / "base", base)
    (base / "pytorch_model.bin").unlink()
    export(first_command, tmp_path / "out", "--lora-gguf", "--model", base)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"adapter.gguf", "README.md"}


@pytest.mark.parametrize("flags, line", [
    (["--merged", "--nf4", "--dtype", "fp16"], "--dtype asks for fp16, but this computer has no"),
    (["--lora-gguf", "--no-nf4"], "--no-nf4: has no effect without --merged; leave it out"),
    (["--gguf", "f16", "--dtype", "fp32"], "--dtype fp32: has no effect on what is written"),
    (["--nf4", "--template", "4b-chat"], "--template 4b-chat: has no effect"),
    ([], "out: nothing to write there; give one or more of --merged"),
    (["--push", "me/it"], "out: nothing to write there; give one or more of --merged"),
    (["--nf4", "--push", "me/it"], "which is not uploaded; add --merged"),
    (["--merged", "--push", "me/a--b"], "--push me/a--b: not a name the hub allows"),
    (["--gguf", "q4_k_m"], "argument --gguf: invalid choice"),
    (["--merged", "--model", "/not/there"], "--model /not/there: no such folder")])
def test_what_is_not_possible_is_refused_in_one_line(first_command, tmp_path, flags, line, capsys):
    with pytest.raises(SystemExit) as stopped:
        export(first_command, tmp_path / "out", *flags)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and line in said and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("run, flags, line", [
    ("nano", ["--lora-gguf"], "nano: holds no adapter (adapter_config.json), and --lora-gguf"),
    ("runs/typo", ["--merged", "--model", "nano"], "runs/typo: holds no adapter"),
    ("runs/not-there", ["--gguf", "f16"], "error: runs/not-there: no such folder"),
    ("~nobody-of-that-name", ["--gguf", "f16"], "no user of that name"),
    ("x" * 300, ["--gguf", "f16"], "File name too long")])
def test_a_run_that_is_none_is_one_line(run, flags, line, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        export(run, tmp_path / "out", *flags)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and line in said and said.count("\n") == 1


def test_a_run_that_has_no_adapter_yet_is_said(first_command, tmp_path, capsys):
    run = shutil.copytree(first_command, tmp_path / "run")
    (run / "adapter_config.json").unlink()
    with pytest.raises(SystemExit):
        export(run, tmp_path / "out", "--gguf", "f16")
    assert "this run has not ended; name one of its checkpoint-N" in capsys.readouterr().err
    for checkpoint in run.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    with pytest.raises(SystemExit):
        export(run, tmp_path / "out", "--gguf", "f16")
    assert "this run has saved no checkpoint; give its command again" in capsys.readouterr().err


@pytest.mark.parametrize("flags, said", [
    (["--merged"], "OUT: is missing; name the folder to write after RUN"),
    (["--nf4", "--push", "me/it"], "OUT: is missing"),
    ([], "nothing to write: name a folder OUT and one or more of --merged")])
def test_a_missing_out_is_said(capsys, flags, said):
    with pytest.raises(SystemExit) as stopped:
        main(["nano", *flags])
    assert stopped.value.code == 2 and f"error: {said}" in capsys.readouterr().err


def test_help_fits_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    said = capsys.readouterr().out.splitlines()
    assert stopped.value.code == 0 and len(said) > 30
    assert [line for line in said if len(line) > 80] == []


def test_an_adapters_base_that_is_not_there_is_not_blamed_on_a_flag(first_command, tmp_path,
                                                                    capsys):
    run = shutil.copytree(first_command, tmp_path / "run")
    write_json(run / "adapter_config.json", base_model_name_or_path="models/PhoGPT-4B")
    with pytest.raises(SystemExit):
        export(run, tmp_path / "out", "--gguf", "f16")
    assert f"error: {run}: its base models/PhoGPT-4B: no such folder" in capsys.readouterr().err


@pytest.mark.parametrize("name, line", [("x/..", "exists already"), ("y" * 300, "too long"),
                                        ("~nobody-of-that-name/x", "no user of that name")])
def test_a_folder_that_cannot_be_is_one_line(tiny, name, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        export(tiny, name, "--gguf", "f16")
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and line in said and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_refused_and_left_alone(tiny, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    with pytest.raises(SystemExit):
        export(tiny, tmp_path / "out", "--gguf", "f16")
    assert "exists already; give another name" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_an_adapter_of_another_base_is_one_line_before_anything_is_written(
        first_command, tiny, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        export(first_command, tmp_path / "out", "--merged", "--model", tiny)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1 and "made for another model" in said
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line_and_leaves_nothing(tiny, tmp_path):
    """A limit on the size of a file makes a real write fail."""
    def limit(size):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    export(tiny, tmp_path / "whole", "--gguf", "f16")
    whole = (tmp_path / "whole" / "model.gguf").stat().st_size
    shutil.rmtree(tmp_path / "whole")
    # the GGUF file fails in its header at 100,000 bytes, and in a tensor at whole - 10,000 bytes
    for flags, size in ((["--merged"], 100_000), (["--gguf", "f16"], 100_000),
                        (["--gguf", "f16"], whole - 10_000)):
        ended = subprocess.run(
            [sys.executable, "-m", "phogpt_raw.export", tiny, tmp_path / "out", *flags], cwd=ROOT,
            capture_output=True, text=True, preexec_fn=partial(limit, size))
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
    """A wrong flag must be refused before a large base is read."""
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
