"""The upload to a local hub: the right files arrive, and nothing else is sent."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_hub import fake_hub

from phogpt_raw.export import push as module
from phogpt_raw.export.push import files_to_push
from phogpt_raw.refusal import Refusal

ROOT = Path(__file__).parents[1]
TOKEN = "hf_" + "q" * 34
HOME = "/home/lan"


@pytest.fixture
def hub():
    with fake_hub() as served:
        yield served


@pytest.fixture
def run_folder(tmp_path):
    """A run's folder with every kind of file that it can have."""
    folder = tmp_path / "thơ-001"
    (folder / "checkpoint-7").mkdir(parents=True)
    for name, content in {
        "adapter_model.safetensors": bytes(range(256)) * 10_000, "README.md": "---\n---\n# thơ\n",
        "adapter_config.json": json.dumps({
            "peft_type": "LORA", "base_model_name_or_path": f"{HOME}/models/PhoGPT-4B"}),
        "loss.png": b"\x89PNG", "loss.svg": "<svg/>", "metrics.jsonl": "{}",
        "config.json": f'{{"data": "{HOME}/r.jsonl"}}', ".hidden": "x", "notes.txt": "mine",
        "loss.png.unfinished": "x",
        "checkpoint-7/adapter_model.safetensors": b"7", "checkpoint-7/training_state.pt": b"7",
    }.items():
        data = content if isinstance(content, bytes) else content.encode("utf-8")
        (folder / name).write_bytes(data)
    return folder


PUSH = "print(push(Path(sys.argv[1]), sys.argv[2]))"
KEPT = ("PATH", "HOME", "LD_LIBRARY_PATH", "TMPDIR", "OMP_NUM_THREADS")


def push(hub, folder, repo="lan/tho", token=TOKEN, code=PUSH, **environment):
    """Run push(folder, repo) in another process with this hub; return (status, stdout, stderr)."""
    script = ("import sys; from pathlib import Path\n"
              "from phogpt_raw.export.push import push\n"
              "from phogpt_raw.refusal import exits_cleanly\n"
              f"@exits_cleanly\ndef main():\n    {code}\nmain()")
    kept = {name: os.environ[name] for name in KEPT if name in os.environ}
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder.parent / "hf"),
                "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
                "NO_PROXY": "127.0.0.1", "PYTHONPATH": str(ROOT), **environment}
    if token:
        settings["HF_TOKEN"] = token
    done = subprocess.run([sys.executable, "-c", script, str(folder), repo], capture_output=True,
                          text=True, env={**kept, **settings})
    return done.returncode, done.stdout, done.stderr


# -- the uploaded files


def test_of_a_run_the_adapter_its_card_and_curves_arrive_to_the_byte(hub, run_folder):
    status, out, error = push(hub, run_folder, "lan/tho")
    assert (status, out) == (0, f"{hub.url}/lan/tho\n"), error
    assert sorted(hub.files) == ["README.md", "adapter_config.json", "adapter_model.safetensors",
                                 "loss.png", "loss.svg"]
    for name in hub.files.keys() - {"adapter_config.json"}:
        assert hub.files[name] == (run_folder / name).read_bytes(), name
    assert len(hub.stored) == 1  # the adapter, as a large file
    [asked] = hub.bodies("/api/repos/create")
    assert (asked["organization"], asked["name"], asked["visibility"]) == ("lan", "tho", "private")


def test_an_adapter_of_another_format_is_not_taken_for_an_exported_folder(tmp_path):
    """The folder of such an adapter may contain rows and a config.json with private paths."""
    for name in ("adapter_model.bin", "adapter_config.json", "config.json", "rows.jsonl"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(Refusal, match="holds no adapter and no exported model"):
        files_to_push(tmp_path)


def test_the_path_of_a_base_in_a_folder_stays_at_home(hub, run_folder):
    push(hub, run_folder, "lan/tho")
    config = json.loads(hub.files["adapter_config.json"])
    assert config == {"peft_type": "LORA", "base_model_name_or_path": "PhoGPT-4B"}
    assert not any(HOME.encode() in body for _, _, _, body in hub.requests)
    assert HOME in (run_folder / "adapter_config.json").read_text()  # the local file keeps the path


@pytest.mark.parametrize("base, told", [
    ("vinai/PhoGPT-4B-Chat", "vinai/PhoGPT-4B-Chat"), ("nano", "nano"), ("~/m/PhoGPT", "PhoGPT"),
    ("../m/PhoGPT", "PhoGPT"), ("C:\\Users\\Lan\\PhoGPT", "PhoGPT"), ("/data/PhoGPT/", "PhoGPT"),
    ("a/b/PhoGPT", "PhoGPT"), (None, None)])
def test_a_base_of_the_hub_keeps_its_name(tmp_path, base, told):
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({"base_model_name_or_path": base}), "utf-8")
    assert json.loads(module.content(file))["base_model_name_or_path"] == told


def test_the_token_is_in_the_header_alone(hub, run_folder):
    before = {p: p.read_bytes() for p in run_folder.rglob("*") if p.is_file()}
    status, out, error = push(hub, run_folder, "lan/tho")
    assert status == 0 and TOKEN not in out + error
    for method, path, headers, body in hub.requests:
        elsewhere = {name: value for name, value in headers.items()
                     if name.lower() != "authorization"}
        assert TOKEN not in path and TOKEN.encode() not in body, path
        assert TOKEN not in str(elsewhere), path
        known = headers.get("authorization", headers.get("Authorization"))
        assert known in (None, f"Bearer {TOKEN}"), path
        if path.startswith(("/api/repos", "/api/models", "/lan")):  # file uploads need no token
            assert known, (method, path)
    assert {p: p.read_bytes() for p in run_folder.rglob("*") if p.is_file()} == before
    written = [p for p in run_folder.parent.rglob("*") if p.is_file()]
    assert not any(TOKEN.encode() in p.read_bytes() for p in written)


def test_of_an_exported_folder_every_file_arrives(hub, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    names = ["config.json", "model-00001-of-00001.safetensors", "tokenizer.json", "Modelfile"]
    for name in names:
        (folder / name).write_text(name)
    (folder / ".cache").write_text("x")
    assert push(hub, folder, "lan/out")[0] == 0
    assert hub.files == {name: name.encode() for name in names}


def test_a_public_repository_is_asked_for(hub, run_folder):
    push(hub, run_folder, "lan/tho", code="push(Path(sys.argv[1]), sys.argv[2], private=False)")
    assert hub.bodies("/api/repos/create")[0]["visibility"] == "public"


def test_importing_and_listing_connects_to_nothing(hub, run_folder):
    status, out, _ = push(hub, run_folder, code="from phogpt_raw.export.push import files_to_push;"
                          "print([f.name for f in files_to_push(Path(sys.argv[1]))])")
    assert status == 0 and "adapter_config.json" in out and hub.requests == []


def test_a_training_run_connects_to_nothing(hub, run_folder, tiny, rows, tmp_path):
    flags = ["--model", tiny, "--data", rows, "--out", tmp_path / "run", "--steps", 1,
             "--hold-out", 2, "--eval-answers", 0]
    code = f"import train; train.main({[str(flag) for flag in flags]})"
    status, _, error = push(hub, run_folder, code=code)
    assert status == 0, error
    assert (tmp_path / "run" / "README.md").is_file() and hub.requests == []


# -- refusals, in one line


@pytest.fixture
def here(hub, monkeypatch):
    """Let this process use the hub. This is faster than a new process."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return hub


def refused(folder, repo, *said):
    with pytest.raises(Refusal) as refusal:
        module.push(folder, repo)
    line = str(refusal.value)
    assert line.startswith(f"--push {repo}: ") and line.count("\n") == 0 and TOKEN not in line, line
    for part in said:
        assert part in line


def test_without_a_token_nothing_connects(hub, run_folder):
    status, out, error = push(hub, run_folder, token=None)
    assert (status, out, error.count("\n")) == (2, "", 1)
    for part in ("error: --push lan/tho: no token", "set HF_TOKEN", "hf auth login"):
        assert part in error
    assert hub.requests == []


@pytest.mark.parametrize("repo", ["tho", "a/b/c", "lan/thơ", "lan/a b", "lan/--x", "/x", "lan/"])
def test_a_wrong_name_is_refused_before_anything_connects(here, run_folder, repo):
    refused(run_folder, repo)
    assert here.requests == []


@pytest.mark.parametrize("path, status, said", [
    ("/api/repos/create", 401, "the token is not valid"),
    ("/api/repos/create", 403, "the token may not write there"),
    ("/api/models/lan/tho/preupload", 403, "the token may not write there"),
    ("/api/models/lan/tho/commit", 404, "no such repository"),
    ("/api/models/lan/tho/commit", 422, "the hub answers 422"),
])
def test_what_the_hub_refuses_is_said_in_one_line(here, run_folder, path, status, said):
    here.answers[path] = (status, {"error": "not today"})
    refused(run_folder, "lan/tho", said, "not today")
    assert here.files == {}


def test_a_card_that_the_hub_finds_wrong_is_said_in_one_line(here, run_folder):
    here.answers["/api/validate-yaml"] = (400, {"errors": [{"message": "license is unknown"}]})
    refused(run_folder, "lan/tho", "license is unknown")
    assert here.files == {}


def test_offline_is_said_in_one_line(here, run_folder, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    refused(run_folder, "lan/tho", "the hub does not answer")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(run_folder, "lan/tho", "HF_HUB_OFFLINE is set")


def test_a_damaged_adapter_config_is_refused(here, run_folder):
    (run_folder / "adapter_config.json").write_text("{")
    with pytest.raises(Refusal, match=r"adapter_config\.json: not JSON"):
        module.push(run_folder, "lan/tho")
    assert here.requests == []


@pytest.mark.parametrize("files", [[], ["metrics.jsonl", "config.json"], ["holiday.jpg"],
                                   ["metrics.jsonl", "model.safetensors"]])
def test_a_folder_without_a_model_is_refused(tmp_path, files):
    for name in files:
        (tmp_path / name).write_text("x")
    with pytest.raises(Refusal, match="holds no adapter and no exported model"):
        files_to_push(tmp_path)
    with pytest.raises(Refusal, match="no such folder"):
        files_to_push(tmp_path / "nowhere")


def test_what_would_be_uploaded_can_be_said_before(run_folder):
    assert module.in_words(run_folder, "lan/tho") == (
        "to lan/tho: adapter_model.safetensors, adapter_config.json, README.md, loss.png, loss.svg "
        "(2.6 MB)")


def test_of_a_checkpoint_its_adapter_alone_would_go(run_folder):
    assert [file.name for file in files_to_push(run_folder / "checkpoint-7")] == [
        "adapter_model.safetensors"]
