"""The hash of a base: another base in the same folder has another hash, a copy has the same hash.
"""

import json
import shutil

import pytest
from checkpoints import write_checkpoint

import generate
from phogpt_raw.model.base_identity import SAMPLE, base_hash, say_if_another
from phogpt_raw.training import setup


def test_a_copy_is_the_same_base_whenever_it_was_made(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "copy", copy_function=shutil.copyfile)
    assert base_hash(tmp_path / "copy") == base_hash(tiny)


@pytest.mark.parametrize("place", [0, 0.5, 1])
def test_other_bytes_are_another_base(tiny, tmp_path, place):
    shutil.copytree(tiny, tmp_path / "copy")
    [file] = [f for f in (tmp_path / "copy").iterdir() if f.suffix in (".bin", ".safetensors")]
    size = file.stat().st_size
    assert size < 64 * SAMPLE  # a base this small is hashed completely
    with file.open("r+b") as opened:
        opened.seek(int(place * (size - 1)))
        [byte] = opened.read(1)
        opened.seek(-1, 1)
        opened.write(bytes([byte ^ 1]))
    assert base_hash(tmp_path / "copy") != base_hash(tiny)


@pytest.mark.parametrize("change, another", [({"softmax_scale": 0.5}, True),
                                             ({"layer_norm_epsilon": 0.1}, True),
                                             ({"transformers_version": "9"}, False)])
def test_another_value_that_decides_results_is_another_base(tiny, tmp_path, change, another):
    base = shutil.copytree(tiny, tmp_path / "copy")
    config = json.loads((base / "config.json").read_text())
    config["attn_config"] |= {k: v for k, v in change.items() if k == "softmax_scale"}
    (base / "config.json").write_text(json.dumps(config | change, indent=7))
    assert (base_hash(base) != base_hash(tiny)) == another


def test_an_adapter_over_another_base_is_said(tiny, tmp_path, capsys):
    say_if_another(tiny, base_hash(tiny), tmp_path)
    say_if_another(tiny, None, tmp_path)  # None: an adapter without a hash of its base
    assert capsys.readouterr().err == ""
    say_if_another(tiny, "0" * 32, tmp_path)
    assert "its weights or config.json differ from the base that" in capsys.readouterr().err


def test_a_run_does_not_go_on_over_another_base_and_its_adapter_says_so(train, tmp_path, tiny,
                                                                       capsys, monkeypatch):
    base, out = tmp_path / "base", tmp_path / "run"
    tensors = write_checkpoint(base)
    assert train("--model", base, "--out", out, "--steps", 3)[0] == 0
    shutil.rmtree(base)
    write_checkpoint(base, tensors={name: tensor + 0.01 for name, tensor in tensors.items()})
    generate.main(["--adapter", str(out), "--max-new-tokens", "1", "Phở?"])
    assert f"{base}: its weights or config.json differ from the base that {out} was trained" in (
        capsys.readouterr().err)
    monkeypatch.setattr(setup, "read_model", lambda *_, **__: pytest.fail("read the weights"))
    status, _, line = train("--model", base, "--out", out, "--steps", 5)
    assert status == 2 and "have changed since this run started" in line and line.count("\n") == 1

