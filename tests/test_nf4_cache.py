"""The NF4 cache gives the same model as a load of the checkpoint, bit for bit.

The cache is never half-written and never used for another base.
"""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from checkpoints import SHAPES, random_tensors, vinai_config, write_checkpoint
from conftest import SMALL, ragged_examples
from oracle import random_ids
from safetensors import safe_open

import generate
from phogpt_raw import load_base
from phogpt_raw.data.batches import Window
from phogpt_raw.model import nf4, nf4_cache, nf4_file, weights
from phogpt_raw.model.adapters import new_adapters
from phogpt_raw.model.nf4 import dequantise
from phogpt_raw.private_apis import nf4_fields, nf4_state
from phogpt_raw.refusal import Refusal
from phogpt_raw.training.setup import wire
from phogpt_raw.training.step import train_step

ROOT = Path(__file__).parents[1]
TINY = vinai_config(**SHAPES["tiny"])
WEIGHT = "transformer.blocks.0.ffn.up_proj.weight"
BIAS = "transformer.blocks.1.attn.Wqkv.bias"
DEVICES = pytest.mark.parametrize(("device", "dtype"), [
    ("cpu", torch.float32), ("cpu", torch.bfloat16),
    pytest.param("cuda", torch.float16, marks=pytest.mark.gpu)])


@pytest.fixture
def base(tmp_path, tiny) -> Path:
    """A copy of tiny that a test may change."""
    return Path(shutil.copytree(tiny, tmp_path / "PhoGPT-tiny"))


@pytest.fixture
def load(base, tmp_path, capsys):
    """A function that loads the base with the cache and returns (model, stderr)."""

    def run(folder=base, caches=tmp_path / "caches", device="cpu", dtype=None):
        model, _ = load_base(str(folder), nf4_cache=caches, device=device, dtype=dtype)
        said = capsys.readouterr()
        assert said.out == ""
        return model, said.err

    return run


@pytest.fixture
def caches(tmp_path):
    return tmp_path / "caches"


def only(folder: Path) -> Path:
    """The only file in `folder`."""
    [file] = folder.iterdir()
    return file


def bits(model) -> dict[str, torch.Tensor]:
    """Every frozen tensor by name, with the parts and the dequantised values of NF4 weights."""
    found = {"slopes": model.slopes_H}
    for name, parameter in model.named_parameters():
        found[name] = parameter.data
        if (state := nf4_state(parameter)) is not None:
            fields = nf4_fields(state)
            for part in ("scales", "code", "offset", "scale_scales", "scale_code"):
                found[f"{name}.{part}"] = getattr(fields, part)
            found[f"{name} dequantised"] = dequantise(parameter)
            found[f"{name} offset on host"] = torch.tensor(state.offset_on_host)
    return found


def assert_equal(model, fresh) -> None:
    mine, wanted = bits(model), bits(fresh)
    assert mine.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert mine[name].dtype == tensor.dtype and mine[name].device == tensor.device, name
        assert torch.equal(mine[name], tensor), name


def never(*_, **__):
    raise AssertionError("quantised again")


# -- equal to a fresh load


@DEVICES
def test_a_cached_base_is_a_fresh_one_to_the_bit(load, base, device, dtype, monkeypatch):
    fresh, _ = load_base(str(base), device=device, dtype=dtype)
    first, said = load(device=device, dtype=dtype)
    assert "NF4 cache written to" in said
    monkeypatch.setattr(nf4, "quantise", never)  # `quantise` and `iterate` must not run
    monkeypatch.setattr(weights, "iterate", never)
    model, said = load(device=device, dtype=dtype)
    assert said.startswith("base read from NF4 cache ") and said.count("\n") == 1
    assert_equal(first, fresh)
    assert_equal(model, fresh)
    for (name, a), (other, b) in zip(model.named_modules(), fresh.named_modules(), strict=True):
        assert (name, type(a), a.training) == (other, type(b), b.training)
    for a, b in zip(model.parameters(), fresh.parameters(), strict=True):
        assert (type(a), a.shape, a.requires_grad) == (type(b), b.shape, b.requires_grad)
    ids_BL = random_ids(TINY, 2, 12).to(device)
    assert torch.equal(model.logits(model(ids_BL)), fresh.logits(fresh(ids_BL)))
    assert model.is_loaded_in_4bit is True


@DEVICES
def test_training_over_a_cached_base_gives_the_same_adapter(load, base, caches, device, dtype):
    def trained(model) -> torch.Tensor:
        adapters = new_adapters(model.train(), rank=4, alpha=8)
        training = wire(model, adapters, lr=1e-2, micro_batch=2)
        for _step in range(3):
            train_step(training, Window(ragged_examples(4), 3))
        return adapters.flat.detach().clone()

    fresh = trained(load_base(str(base), device=device, dtype=dtype)[0])
    load(device=device, dtype=dtype)
    before = only(caches).read_bytes()
    model, said = load(device=device, dtype=dtype)
    start = new_adapters(load_base(str(base), device=device, dtype=dtype)[0], rank=4, alpha=8)
    found = trained(model)
    assert "read from" in said and torch.equal(found, fresh)
    assert not torch.equal(found, start.flat)
    assert only(caches).read_bytes() == before  # nothing was written through the memory map


def test_a_model_without_biases_is_cached_too(load, tmp_path):
    write_checkpoint(tmp_path / "b", TINY | dict(no_bias=True))
    load(tmp_path / "b")
    model, said = load(tmp_path / "b")
    assert "read from" in said and not any("bias" in name for name, _ in model.named_parameters())


def test_what_happens_to_the_file_later_does_not_reach_the_model(load, caches, base):
    load()
    model, _ = load()
    with open(only(caches), "r+b") as file:
        file.seek(20_000)
        file.write(b"\xff" * 300_000)
    assert_equal(model, load_base(str(base), device="cpu")[0])


def test_the_file_is_a_safetensors_file_smaller_than_a_16_bit_base(load, caches, base):
    load(dtype=torch.bfloat16)
    file = only(caches)
    assert re.fullmatch(r"PhoGPT-tiny-bf16-cpu-[0-9a-f]{8}\.safetensors", file.name)
    assert file.stat().st_size < 0.85 * (base / "pytorch_model.bin").stat().st_size
    with safe_open(file, "pt") as tensors:
        assert tensors.get_slice(BIAS).get_dtype() == "BF16"
        assert tensors.get_slice(f"{WEIGHT}.packed").get_shape() == [64 * 256 // 2, 1]
        assert len(tensors.keys()) == 27 - 8 + 8 * 6  # of 27 parameters 8 are in NF4
        assert json.loads(tensors.metadata()["key"])["dtype"] == "bf16"
    raw = file.read_bytes()
    assert (8 + int.from_bytes(raw[:8], "little")) % 64 == 0


def test_caches_of_several_bases_and_dtypes_share_a_folder(load, base, caches, tmp_path):
    """Two bases have the same name. The cache of one base is never treated as an outdated cache of
    the other base."""
    other = tmp_path / "elsewhere" / base.name
    write_checkpoint(other, tensors=random_tensors(TINY, seed=1))
    asked = [(base, torch.float32), (base, torch.bfloat16), (other, torch.float32)]
    for folder, dtype in asked:
        assert "written to" in load(folder, dtype=dtype)[1]
    assert len(list(caches.iterdir())) == 3
    for folder, dtype in asked:
        model, said = load(folder, dtype=dtype)
        assert said.startswith("base read from") and said.count("\n") == 1
        assert_equal(model, load_base(str(folder), device="cpu", dtype=dtype)[0])


def test_a_base_that_was_moved_keeps_its_cache(load, base, tmp_path):
    load()
    base.rename(tmp_path / "moved").rename(base)
    assert "read from" in load()[1]


# -- the key


def test_what_the_bits_depend_on_is_in_the_key(base):
    files = [base / "pytorch_model.bin", base / "config.json"]
    key = nf4_cache.make_key(files, torch.float16, torch.device("cuda", 0))
    assert (key["dtype"], key["device"]) == ("fp16", "cuda") and key["bitsandbytes"][0].isdigit()
    assert [entry[0] for entry in key["source"]] == ["config.json", "pytorch_model.bin"]
    assert key == json.loads(json.dumps(key))


def test_a_file_of_the_hub_is_known_by_its_blob(tmp_path):
    """In the hub's cache a file is a link, and the name of its target identifies the content.

    So neither the time nor the content of the file is read.
    """
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0a1b"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / "5eed").write_bytes(b"x")
    (snapshot / "model.safetensors").symlink_to("../../blobs/5eed")
    assert nf4_cache.identity(snapshot / "model.safetensors") == ["model.safetensors", "5eed"]
    (tmp_path / "link").symlink_to(blobs.parent / "snapshots" / "0a1b" / "model.safetensors")
    assert len(nf4_cache.identity(tmp_path / "link")) == 4  # other links are treated as files


def test_an_identity_reads_no_more_than_the_head(tmp_path):
    large = tmp_path / "large.bin"
    large.write_bytes(b"head")
    os.truncate(large, 2**40)  # a sparse file of a terabyte
    assert nf4_cache.identity(large)[1] == 2**40


def test_the_cache_of_a_hub_model_has_its_name(tiny, tmp_path):
    snapshot = tmp_path / "models--vinai--PhoGPT-4B-Chat" / "snapshots" / "0a1b"
    shutil.copytree(tiny, snapshot)
    cache = weights.find_cache(snapshot, tmp_path, dtype=torch.float16, device=torch.device("cuda"))
    assert cache.file.name.startswith("PhoGPT-4B-Chat-fp16-cuda-")
    assert cache.base.endswith("models--vinai--PhoGPT-4B-Chat")
    nano = weights.find_cache(weights.NANO, "~/c", dtype=torch.float32, device=torch.device("cpu"))
    assert nano.file.name.startswith("nano-fp32-cpu-") and nano.folder == Path.home() / "c"


# -- outdated caches: each case changes a base or its cache and returns a part of the right message


def touched(base, monkeypatch):
    os.utime(base / "pytorch_model.bin", ns=(1, 1))
    return "pytorch_model.bin of the base changed"


def other_weights(base, monkeypatch):
    write_checkpoint(base, tensors=random_tensors(TINY, seed=1))
    return "of the base changed"


def changed_config(base, monkeypatch):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | dict(layer_norm_epsilon=1e-3)))
    return "config.json of the base changed"


def more_shards(base, monkeypatch):
    shutil.rmtree(base)
    write_checkpoint(base, TINY | dict(n_layers=16), shards=2)
    return "pytorch_model-00001-of-00002.bin, pytorch_model-00002-of-00002.bin of the base changed"


def another_bitsandbytes(base, monkeypatch):
    monkeypatch.setattr(nf4_cache, "version", lambda name: "0.50.9")
    return f"bitsandbytes {version('bitsandbytes')}, now 0.50.9"


def another_format(base, monkeypatch):
    monkeypatch.setattr(nf4_cache, "FORMAT", 2)
    return "format 1, now 2"


@pytest.mark.parametrize("change", [touched, other_weights, changed_config, more_shards,
                                    another_bitsandbytes, another_format], ids=lambda f: f.__name__)
def test_a_stale_cache_is_reported_and_rebuilt(load, base, caches, monkeypatch, change):
    load()
    old = only(caches)
    part = change(base, monkeypatch)
    model, said = load()
    first, second = said.splitlines()
    assert first.startswith(f"NF4 cache {old}: stale: ") and part in first
    assert second.startswith("NF4 cache written to ")
    assert only(caches) != old
    assert_equal(model, load_base(str(base), device="cpu")[0])
    model, said = load()
    assert said.startswith("base read from") and said.count("\n") == 1
    assert_equal(model, load_base(str(base), device="cpu")[0])


def test_a_stale_cache_stays_until_the_new_one_is_whole(load, base, caches, monkeypatch):
    load()
    old = only(caches)
    touched(base, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(nf4_cache.os, "fsync", no_space)
        _, said = load()
    assert only(caches) == old and "stale" in said and "cannot be written" in said


# -- damaged


def flipped_byte(file):
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    return "its checksum does not match"


def flipped_last_byte(file):
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 0x80
    file.write_bytes(raw)
    return "its checksum does not match"


def swapped_names(file):
    """Swap the names of two biases of one shape in the header, without changing the data."""
    one, other, between = (BIAS.replace("1", n).encode() for n in "10#")
    raw = file.read_bytes().replace(one, between).replace(other, one).replace(between, other)
    file.write_bytes(raw)
    return "its checksum does not match"


def checksum_of_zeros(file):
    file.write_bytes(re.sub(rb'"checksum": "[0-9a-f]{32}"', b'"checksum": "' + 32 * b"0" + b'"',
                            file.read_bytes(), count=1))
    return "its checksum does not match"


def truncated(file):
    os.truncate(file, file.stat().st_size - 1000)
    return "damaged: "


def truncated_header(file):
    os.truncate(file, 1000)
    return "its header is cut off"


def emptied(file):
    os.truncate(file, 0)
    return "its header is cut off"


def not_json(file):
    raw = bytearray(file.read_bytes())
    raw[10] ^= 0xFF
    file.write_bytes(raw)
    return "its header cannot be read"


def someone_elses(file):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(3)}, file)
    return "its header cannot be read"


def missing_tensor(file):
    rewrite(file, lambda tensors: tensors.pop(f"{WEIGHT}.offset"))
    return f"tensor {WEIGHT}.offset is missing"


def wrong_shape(file):
    rewrite(file, lambda tensors: tensors.update({BIAS: tensors[BIAS][:-1]}))
    return f"tensor {BIAS} has another shape or dtype"


def wrong_dtype(file):
    rewrite(file, lambda tensors: tensors.update({BIAS: tensors[BIAS].half()}))
    return f"tensor {BIAS} has another shape or dtype"


def of_another_dtype(file):
    rewrite(file, lambda tensors: None, lambda key: key.update(dtype="bf16"))
    return "stale: dtype bf16, now fp32"


def rewrite(file, change, change_key=lambda key: None):
    """Change tensors of the file and correct its checksum."""
    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name).clone() for name in opened.offset_keys()}
        metadata = opened.metadata()
    change(tensors)
    key = json.loads(metadata["key"])
    change_key(key)
    tensors = dict(sorted(tensors.items(), key=lambda pair: -pair[1].element_size()))
    metadata = {"checksum": 32 * "0", "key": json.dumps(key), "base": metadata["base"]}
    head = nf4_file.header(tensors, metadata)
    data = b"".join(t.contiguous().flatten().view(torch.uint8).numpy().tobytes()
                    for t in tensors.values())
    digest = nf4_file.xxhash.xxh3_128_hexdigest(head + data)
    file.write_bytes(head.replace(32 * b"0", digest.encode(), 1) + data)


DAMAGES = pytest.mark.parametrize("damage", [
    flipped_byte, flipped_last_byte, swapped_names, checksum_of_zeros, truncated, truncated_header,
    emptied, not_json, someone_elses, missing_tensor, wrong_shape, wrong_dtype, of_another_dtype,
], ids=lambda f: f.__name__)


def test_the_file_as_the_tests_rewrite_it_is_a_good_one(load, caches):
    load()
    before = only(caches).read_bytes()
    rewrite(only(caches), lambda tensors: None)
    assert only(caches).read_bytes() == before


@DAMAGES
def test_a_damaged_cache_is_reported_and_rebuilt(load, base, caches, damage):
    load()
    file, whole = only(caches), only(caches).read_bytes()
    part = damage(file)
    assert file.read_bytes() != whole
    model, said = load()
    first, second = said.splitlines()
    assert first.startswith(f"NF4 cache {file}: ") and part in first
    assert first.endswith("; it is rebuilt from the checkpoint")
    assert second.startswith(f"NF4 cache written to {file} (")
    assert only(caches).read_bytes() == whole
    assert_equal(model, load_base(str(base), device="cpu")[0])


def test_a_stale_cache_that_is_damaged_too_goes_as_well(load, base, caches, monkeypatch):
    load()
    old = only(caches)
    not_json(old)
    touched(base, monkeypatch)
    _, said = load()
    assert f"NF4 cache {old}: damaged: its header cannot be read" in said
    assert only(caches) != old


# -- a file is complete or absent


def no_space(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_leaves_nothing_and_the_run_goes_on(load, base, caches, monkeypatch):
    monkeypatch.setattr(nf4_cache.os, "fsync", no_space)
    model, said = load()
    assert said.startswith(f"NF4 cache {caches}/PhoGPT-tiny-fp32-cpu-") and said.count("\n") == 1
    assert "the disk is full" in said and "the run continues without it" in said
    assert list(caches.iterdir()) == []
    assert_equal(model, load_base(str(base), device="cpu")[0])


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
from phogpt_raw import load_base
load_base(sys.argv[1], device="cpu", nf4_cache=sys.argv[2])
"""


def test_a_write_that_the_system_breaks_off_leaves_nothing(base, caches):
    """A limit on the file size makes a real write fail after 300,000 bytes of a million."""
    run = subprocess.run([sys.executable, "-c", LIMITED, base, caches], cwd=ROOT, text=True,
                         capture_output=True, check=True)
    assert "the disk is full" in run.stderr and "the run continues without it" in run.stderr
    assert list(caches.iterdir()) == []


@pytest.mark.parametrize("place", ["a file", "under a file"])
def test_a_folder_that_cannot_be_made_is_one_line(load, tmp_path, place):
    (tmp_path / "taken").write_text("x")
    caches = tmp_path / "taken" / ("deeper" if place == "under a file" else "")
    _, said = load(caches=caches)
    assert said.count("\n") == 1 and "cannot be written (" in said


def test_a_write_broken_off_by_hand_leaves_nothing(load, caches, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(nf4_cache.os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load()
    assert list(caches.iterdir()) == []


SLOW = """
import sys, time
from phogpt_raw import load_base
from phogpt_raw.model import nf4_cache
nf4_cache.os.fsync = lambda file: (print("all written", flush=True), time.sleep(600))
load_base(sys.argv[1], device="cpu", nf4_cache=sys.argv[2])
"""


def test_a_killed_write_leaves_no_cache_and_the_next_one_clears_up(load, base, caches):
    with subprocess.Popen([sys.executable, "-c", SLOW, base, caches], cwd=ROOT, text=True,
                          stdout=subprocess.PIPE) as run:
        assert run.stdout.readline() == "all written\n"
        run.send_signal(signal.SIGKILL)
    left = only(caches)
    assert left.name.endswith(".unfinished") and left.stat().st_size > 900_000
    stranger = caches / "PhoGPT-other-fp32-cpu-00000000.safetensors.unfinished"
    stranger.write_text("another run may be at it")
    _, said = load()
    assert said.startswith("NF4 cache written to ") and said.count("\n") == 1
    assert sorted(file.suffix for file in caches.iterdir()) == [".safetensors", ".unfinished"]
    assert stranger.exists() and not left.exists()


def test_a_refused_base_leaves_no_cache(base, caches):
    tensors = random_tensors(TINY)
    tensors.pop(BIAS)
    torch.save(tensors, base / "pytorch_model.bin")
    with pytest.raises(Refusal, match="1 tensors are missing"):
        load_base(str(base), device="cpu", nf4_cache=caches)
    assert not caches.exists()


def test_a_cache_can_be_written_for_someone_else(base, caches, load):
    """An export writes the cache file into another folder under the same name."""
    model, _ = load_base(str(base), device="cpu")
    cache = weights.find_cache(base, caches, dtype=torch.float32, device=torch.device("cpu"))
    size = nf4_file.write(model, cache.file, cache.key, cache.base)
    assert only(caches).stat().st_size == size
    assert "read from" in load()[1]


# -- the commands


def test_a_run_over_the_cache_is_the_same_run(train, base, caches, tmp_path):
    """A run can be resumed with or without the cache."""
    outs = [tmp_path / name for name in ("plain", "first", "second")]
    said = [train("--model", base, "--out", out, *flags) for out, flags in zip(
        outs, ([], *[["--nf4-cache", caches]] * 2), strict=True)]
    assert [status for status, _, _ in said] == [0, 0, 0]
    assert "NF4 cache" not in said[0][2]
    assert "NF4 cache written to" in said[1][2] and "base read from NF4 cache" in said[2][2]
    assert len({(out / "adapter_model.safetensors").read_bytes() for out in outs}) == 1
    for out, flags in ((outs[0], ["--nf4-cache", caches]), (outs[2], [])):
        status, _, err = train("--model", base, "--out", out, "--steps", SMALL["--steps"] + 1,
                               *flags)
        assert status == 0, err


def test_a_dry_run_reads_no_weights_and_makes_no_cache(train, base, caches, tmp_path):
    status, out, err = train("--model", base, "--out", tmp_path / "run", "--nf4-cache", caches,
                             "--dry-run")
    assert status == 0 and "NF4 cache" not in out + err
    assert not caches.is_dir() or not list(caches.iterdir())


def test_an_answer_over_the_cache_is_the_same_answer(base, caches, capsys):
    said = []
    for flags in ([], *[["--nf4-cache", str(caches)]] * 2):
        generate.main(["--model", str(base), "--max-new-tokens", "6", *flags, "Phở bò là gì?"])
        said.append(capsys.readouterr())
    assert len({answer.out for answer in said}) == 1 and len(said[0].out) > 6
    assert "written to" in said[1].err and "read from" in said[2].err


def test_a_cache_without_nf4_is_refused_at_once(train, base, caches, capsys, monkeypatch):
    monkeypatch.setattr("phogpt_raw.inference.loading.find_folder", never)
    with pytest.raises(SystemExit) as left:
        generate.main(["--nf4_cache", str(caches), "--no-nf4", "Phở bò là gì?"])
    said = capsys.readouterr()
    monkeypatch.setattr("phogpt_raw.training.setup.find_folder", never)
    status, out, err = train("--no-nf4", "--nf4-cache", caches)
    line = f"error: --nf4-cache {caches}: stores NF4 weights; leave out this flag or --no-nf4\n"
    assert (left.value.code, said.out, said.err) == (status, out, err) == (2, "", line)
    with pytest.raises(Refusal, match="leave out this flag or --no-nf4"):
        load_base(str(base), nf4=False, nf4_cache=caches, device="cpu")


# -- memory

MEASURE = """
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, "tests")
from anonymous_memory import growth
from phogpt_raw import load_base

warm_up, folder, caches = sys.argv[1:]
how = dict(device="cpu", dtype=torch.bfloat16, nf4_cache=caches)
for _ in range(2):
    load_base(warm_up, **how)
model, bytes = growth(lambda: load_base(folder, **how))
print(bytes)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="RssAnon is Linux'")
def test_a_start_from_the_cache_holds_the_model_and_no_more(tmp_path, tiny, caches):
    """Anonymous memory may grow only by the size of the model and 8 MB.

    The model has 105 million parameters, which take 60 MB on a CPU. A second copy would need 60 MB
    more. The 8 MB are for threads, buffers and Python.
    """
    config = vinai_config(d_model=512, n_heads=8, n_layers=32, vocab_size=4096, max_seq_len=128)
    write_checkpoint(tmp_path / "large", config)
    load_base(str(tmp_path / "large"), device="cpu", dtype=torch.bfloat16, nf4_cache=caches)
    size = only(caches).stat().st_size
    run = subprocess.run([sys.executable, "-c", MEASURE, tiny, tmp_path / "large", caches],
                         text=True, check=True, capture_output=True, cwd=ROOT,
                         env=os.environ | {"MALLOC_MMAP_THRESHOLD_": str(128 * 1024)})
    shutil.rmtree(tmp_path / "large")
    assert run.stderr.count("base read from NF4 cache") == 2
    assert 55e6 < size < 65e6
    assert 0.9 * size < int(run.stdout) < size + 8e6
