"""An interrupted and resumed run gives the same files as an uninterrupted run, bit for bit."""

import errno
import io
import json
import resource
import shutil
import time
from pathlib import Path

import pytest
import torch

from phogpt_raw.refusal import Refusal
from phogpt_raw.training import checkpoint
from phogpt_raw.training.metrics import Metrics
from phogpt_raw.training.setup import make_scaler, wire

STOPPED = KeyboardInterrupt()


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def adapter_bytes(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


def without_speed(rows):
    return [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in rows]


def same(mine, reference):
    """Whether two nested dicts or lists with tensors are equal bit for bit."""
    if isinstance(reference, torch.Tensor):
        return torch.equal(mine, reference)
    if isinstance(reference, dict):
        return mine.keys() == reference.keys() and all(same(mine[k], reference[k]) for k in mine)
    if isinstance(reference, list | tuple):
        return len(mine) == len(reference) and all(map(same, mine, reference))
    return mine == reference


def assert_same_run(mine, reference):
    """Assert that two run folders are equal, apart from times and speeds.

    The folders must have the same name, because the model card and the curves show it as a title.
    """
    assert without_speed(metrics(mine)) == without_speed(metrics(reference))
    names = sorted(p.relative_to(reference) for p in reference.rglob("*") if p.is_file())
    assert sorted(p.relative_to(mine) for p in mine.rglob("*") if p.is_file()) == names
    for name in names:
        if name.name == "training_state.pt":
            state = [torch.load(run / name, weights_only=True) for run in (mine, reference)]
            assert same(*state), name
        elif name.name not in ("metrics.jsonl", "config.json", "sha256.json"):
            assert (mine / name).read_bytes() == (reference / name).read_bytes(), name
    configs = [json.loads((run / "config.json").read_text()) for run in (mine, reference)]
    assert {k for k in configs[1] if configs[0][k] != configs[1][k]} == {"out"}


@pytest.mark.parametrize("how", [
    ["--no-nf4"],
    ["--dropout", 0.3],  # an NF4 base, and new random values in every step
    ["--dropout", 0.3, "--optimizer", "adamw", "--recompute", "none", "--micro-batch", 4],
], ids=["plain", "nf4-dropout", "adamw-dropout"])
def test_an_interrupted_and_resumed_run_is_the_uninterrupted_one_to_the_bit(train, tmp_path, how):
    straight, broken = tmp_path / "straight" / "run", tmp_path / "broken" / "run"
    assert train("--out", straight, *how)[0] == 0
    status, _, said = train("--out", broken, *how, at=(5, STOPPED))
    assert status == 130
    assert said == (f"stopped by hand after step 5; with --out {broken} it resumes from "
                    f"checkpoint-4\n")
    assert [row["step"] for row in metrics(broken) if "loss" in row] == [1, 2, 3, 4, 5]
    assert not (broken / "checkpoint-7").exists()
    torch.manual_seed(12345)  # changes the generator between the two parts
    status, out, _ = train("--out", broken, *how)
    assert status == 0
    assert "step 5/7" in out  # resumed from the checkpoint after step 4
    assert "step 4/7" not in out
    assert_same_run(broken, straight)


def test_a_run_may_be_interrupted_several_times(train, tmp_path):
    straight, broken = tmp_path / "straight" / "run", tmp_path / "broken" / "run"
    flags = ["--dropout", 0.3, "--save-every", 1]
    train("--out", straight, *flags)
    for _ in range(3):
        assert train("--out", broken, *flags, at=(2, STOPPED))[0] == 130
    assert train("--out", broken, *flags)[0] == 0
    assert_same_run(broken, straight)


def test_dropout_differs_without_the_saved_generators(train, tmp_path, monkeypatch):
    """Here the random generators are not restored. So the comparison of the test above must fail.
    """
    straight, broken = tmp_path / "straight" / "run", tmp_path / "broken" / "run"
    train("--out", straight, "--dropout", 0.3)
    train("--out", broken, "--dropout", 0.3, at=(5, STOPPED))
    monkeypatch.setattr(checkpoint, "restore_random_state", lambda state: None)
    train("--out", broken, "--dropout", 0.3)
    assert without_speed(metrics(broken)) != without_speed(metrics(straight))


def test_a_checkpoint_that_was_not_finished_is_not_there(train, tmp_path):
    straight, broken = tmp_path / "straight" / "run", tmp_path / "broken" / "run"
    train("--out", straight)
    train("--out", broken, at=(5, STOPPED))
    shutil.copytree(broken / "checkpoint-4", broken / "checkpoint-6.unfinished")
    (broken / "checkpoint-6.unfinished" / "training_state.pt").write_bytes(b"half")
    (broken / "checkpoint-6.unfinished" / "left-over").write_bytes(b"")
    assert checkpoint.newest(broken) == broken / "checkpoint-4"
    assert train("--out", broken)[0] == 0
    assert_same_run(broken, straight)  # the unfinished folder is deleted


@pytest.mark.parametrize("size", [0, 100, 600, 1_100, 10_000, 30_000, 34_500])
def test_a_disk_that_is_full_at_any_file_is_one_line_and_loses_nothing(train, tmp_path, size):
    """A limit of `size` bytes for every file makes a longer write fail, as on a full disk."""
    straight, broken = tmp_path / "straight" / "run", tmp_path / "broken" / "run"
    assert train("--out", straight)[0] == 0
    assert train("--out", broken, at=(4, STOPPED))[0] == 130  # checkpoint-3 is the newest
    before = whole_files(broken)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        status, _, said = train("--out", broken)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 2 and said.splitlines()[-1].startswith(f"error: {broken}: the disk is full")
    assert not list(broken.rglob("*.unfinished"))
    assert {name: whole_files(broken)[name] for name in before} == before
    assert train("--out", broken)[0] == 0
    assert_same_run(broken, straight)


def whole_files(run):
    """The bytes of the files in a run's checkpoints. No failure may damage these files."""
    return {file.relative_to(run): file.read_bytes() for file in run.rglob("*")
            if file.is_file() and file.parent != run}


class AlmostFull(io.BytesIO):
    """A file. Write number `call` fails as on a full disk; later writes succeed."""

    def __init__(self, call):
        super().__init__()
        self.left = call

    def write(self, data):
        self.left -= 1
        if self.left == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


@pytest.mark.parametrize("call", [1, 3, 8])
def test_torch_save_on_a_full_disk_raises_what_the_system_says(monkeypatch, call):
    monkeypatch.setattr(Path, "open", lambda *_: AlmostFull(call))
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save_state(Path("state.pt"), {"a": torch.zeros(100_000), "b": torch.ones(9)})


def test_a_torn_last_line_of_the_metrics_is_dropped(train, tmp_path):
    straight, broken = tmp_path / "straight" / "run", tmp_path / "broken" / "run"
    train("--out", straight)
    train("--out", broken, at=(5, STOPPED))
    with (broken / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "loss": 7.')
    assert train("--out", broken)[0] == 0
    assert_same_run(broken, straight)


@pytest.mark.parametrize("name, damage", [
    ("training_state.pt", lambda data: data[: len(data) // 2]),
    ("training_state.pt", lambda data: b""),
    ("training_state.pt", lambda data: b"not a checkpoint at all"),
    ("training_state.pt", None),
    ("progress.json", lambda data: data[:20]),
    ("progress.json", None),
    ("adapter_model.safetensors", lambda data: data[: len(data) // 2]),
    ("adapter_model.safetensors", None),
])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(train, tmp_path, name, damage):
    """The resumed run then gives the same files as the uninterrupted run."""
    straight, out = tmp_path / "straight" / "run", tmp_path / "broken" / "run"
    assert train("--out", straight)[0] == 0
    assert train("--out", out, at=(6, STOPPED))[0] == 130
    file = out / "checkpoint-6" / name
    if damage:
        file.write_bytes(damage(file.read_bytes()))
    else:
        file.unlink()
    status, said, _ = train("--out", out)
    assert status == 0
    assert f"not used: {out / 'checkpoint-6'}" in said and "resumed after step 4" in said
    assert_same_run(out, straight)


def flipped(data):
    return data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "training_state.pt",
                                  "progress.json", "adapter_config.json"])
def test_one_bit_is_noticed(adapted, tmp_path, name):
    folder = checkpoint.write(tmp_path, checkpoint.take(trained_in_fp16(adapted), {"step": 4}))
    assert checkpoint.newest_whole(tmp_path) == (folder, [])
    (folder / name).write_bytes(flipped((folder / name).read_bytes()))
    assert checkpoint.newest_whole(tmp_path) == (None, [f"{folder}: {name} is damaged"])


def test_a_checkpoint_of_another_step_than_its_folders_is_not_used(adapted, tmp_path):
    folder = checkpoint.write(tmp_path, checkpoint.take(trained_in_fp16(adapted), {"step": 4}))
    moved = folder.rename(tmp_path / "checkpoint-9")
    assert checkpoint.newest_whole(tmp_path) == (
        None, [f"{moved}: its progress.json belongs to another step"])


def test_a_checkpoint_of_another_run_is_named_and_the_runs_own_is_used(train, tmp_path):
    """The other run has the same model, rows and settings, but another seed.

    The hashes in its checkpoint are correct.
    """
    straight, out, other = (tmp_path / name / "run" for name in ("straight", "broken", "other"))
    assert train("--out", straight)[0] == 0
    assert train("--out", other, "--seed", 1)[0] == 0
    assert train("--out", out, at=(4, STOPPED))[0] == 130
    foreign = shutil.copytree(other / "checkpoint-7", out / "checkpoint-7")
    status, said, _ = train("--out", out, at=(0, STOPPED))
    assert status == 130 and f"not used: {foreign}: belongs to another run" in said
    assert "resumed after step 4" in said
    assert train("--out", out)[0] == 0  # replaces `foreign` with this run's checkpoint-7
    assert_same_run(out, straight)


def test_where_every_checkpoint_is_another_runs_the_run_is_refused(train, tmp_path):
    out, other = tmp_path / "run", tmp_path / "other"
    train("--out", other, "--lr", 0.02, at=(4, STOPPED))
    train("--out", out, at=(4, STOPPED))
    for folder in out.glob("checkpoint-*"):
        shutil.rmtree(folder)
        shutil.copytree(other / folder.name, folder)
    status, _, said = train("--out", out)
    assert status == 2 and "no checkpoint can be used" in said and "belongs to another run" in said


def test_where_none_is_whole_the_run_is_refused(train, tmp_path):
    out = tmp_path / "run"
    train("--out", out, at=(3, STOPPED))
    for folder in out.glob("checkpoint-*"):
        (folder / "progress.json").unlink()
    status, _, said = train("--out", out)
    assert status == 2 and "no checkpoint can be used" in said and said.count("\n") == 1


@pytest.mark.parametrize("keep, best, kept", [(1, 0, [9]), (2, 0, [5, 9]), (1, 3, [3, 9]),
                                              (9, 0, [2, 3, 5, 9])])
def test_the_newest_and_the_best_checkpoints_stay(tmp_path, keep, best, kept):
    for step in (2, 3, 5, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
    checkpoint.remove_older(tmp_path, keep, best, newest=9)
    assert sorted(int(f.name.rpartition("-")[2]) for f in tmp_path.iterdir()) == kept


def test_damaged_checkpoints_of_later_steps_do_not_count_as_the_newest(tmp_path):
    for step in (2, 3, 5, 9, 500):
        (tmp_path / f"checkpoint-{step}").mkdir()
    checkpoint.remove_older(tmp_path, keep=1, best=2, newest=5)
    kept = sorted(int(f.name.rpartition("-")[2]) for f in tmp_path.iterdir())
    assert kept == [2, 5, 9, 500]


def test_a_run_that_goes_on_below_a_damaged_checkpoint_keeps_what_it_saves(train, tmp_path):
    out = tmp_path / "run"
    train("--out", out, "--keep", 1, at=(3, STOPPED))
    (out / "checkpoint-500").mkdir()  # a folder of another program
    _, _, said = train("--out", out, "--keep", 1, "--save-every", 1, at=(2, STOPPED))
    assert "resumes from checkpoint-5" in said
    assert checkpoint.newest_whole(out)[0] == out / "checkpoint-5"


def test_the_newest_is_the_highest_number_not_the_last_name(tmp_path):
    assert checkpoint.newest(tmp_path) is None
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-11.unfinished", "checkpoint-x"):
        (tmp_path / name).mkdir()
    assert checkpoint.newest(tmp_path) == tmp_path / "checkpoint-10"


def test_a_checkpoint_is_there_while_another_of_its_step_takes_its_place(adapted, tmp_path,
                                                                         monkeypatch):
    training = trained_in_fp16(adapted)
    checkpoint.write(tmp_path, checkpoint.take(training, {"step": 4, "first": {}}))
    rename = Path.rename

    def killed(path, new):
        if new == tmp_path / "checkpoint-4":
            raise KeyboardInterrupt
        rename(path, new)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", killed)
        checkpoint.write(tmp_path, checkpoint.take(training, {"step": 4}))
    whole, damaged = checkpoint.newest_whole(tmp_path)
    assert checkpoint.read_state(whole) == {"step": 4, "first": {}} and not damaged
    checkpoint.tidy(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]
    checkpoint.write(tmp_path, checkpoint.take(training, {"step": 4, "first": {"val_loss": 1.0}}))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]
    assert checkpoint.read_state(tmp_path / "checkpoint-4")["first"] == {"val_loss": 1.0}


def test_a_run_that_goes_on_does_not_write_its_checkpoint_again(train, tmp_path):
    out = tmp_path / "run"
    train("--out", out, "--steps", 3)
    made = (out / "checkpoint-3").stat().st_ino
    assert train("--out", out, "--steps", 4)[0] == 0
    assert (out / "checkpoint-3").stat().st_ino == made


def test_what_is_saved_is_what_is_loaded(adapted, tmp_path):
    """Saves and loads adapter, optimizer, loss scale and random generators without a whole run."""
    training = trained_in_fp16(adapted)
    training.scaler.scale(torch.ones(()))  # GradScaler creates its tensors at the first use
    training.adapters.flat.grad.normal_()
    training.optimizer.step()
    training.scaler.update(512.0)
    folder = checkpoint.write(tmp_path, checkpoint.take(training, {"step": 4, "first": {}}))
    saved = training.adapters.flat.detach().clone(), torch.rand(3)
    state = training.optimizer.state_dict()

    other = trained_in_fp16(adapted, seed=5)
    other.adapters.flat.data.add_(1)
    checkpoint.load(folder, other)
    assert torch.equal(torch.rand(3), saved[1])
    views = zip(other.adapters.views, training.adapters.views, strict=True)
    for (name, mine), (_, was) in views:
        assert torch.equal(mine, was), name
        assert mine.data_ptr() != was.data_ptr()
    assert same(other.optimizer.state_dict(), state)
    assert other.scaler.get_scale() == 512.0
    assert checkpoint.read_state(folder) == {"step": 4, "first": {}}
    # the model's adapters are still views of the buffer that the optimizer updates
    start = other.adapters.flat.untyped_storage().data_ptr()
    assert all(view.untyped_storage().data_ptr() == start for _, view in other.adapters.views)


def trained_in_fp16(adapted, **lora):
    """The parts of a training step of tiny, with the loss scaling of fp16."""
    training = wire(*adapted(**lora), lr=1e-2)
    training.scaler = make_scaler(torch.float16, "cpu")
    return training


def test_the_newest_good_checkpoint_is_the_newest_up_to_a_step(tmp_path):
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-12"):
        (tmp_path / name).mkdir()
    assert checkpoint.newest(tmp_path, 11) == tmp_path / "checkpoint-10"
    assert checkpoint.newest(tmp_path, 8) is None


def test_a_checkpoint_of_several_gpus_opens_where_there_is_one(monkeypatch):
    """Only the state of this run's GPU is restored. Older checkpoints have all GPUs' states."""
    state = checkpoint.random_state()
    restored = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_rng_state", restored.append)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", lambda _: pytest.fail("of all GPUs"))
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: "mine")
    checkpoint.restore_random_state(state | {"cuda": ["first", "second"]})
    checkpoint.restore_random_state(state | {"cuda": []})  # as in a checkpoint of a CPU run
    assert restored == ["first"]
    assert checkpoint.random_state()["cuda"] == ["mine"]


def test_a_run_broken_off_before_its_first_checkpoint_begins_again(train, tmp_path):
    straight, broken = tmp_path / "straight" / "run", tmp_path / "broken" / "run"
    train("--out", straight)
    status, _, said = train("--out", broken, at=(1, STOPPED))
    assert status == 130 and not list(broken.glob("checkpoint-*"))
    assert said == "stopped by hand after step 1; no checkpoint was saved yet\n"
    assert train("--out", broken)[0] == 0
    assert_same_run(broken, straight)


def test_a_snapshot_is_of_its_step_whatever_the_next_steps_do(adapted, tmp_path):
    training = trained_in_fp16(adapted)
    training.scaler.scale(torch.ones(()))
    training.adapters.flat.grad.normal_()
    training.optimizer.step()
    straight = checkpoint.write(tmp_path / "a", checkpoint.take(training, {"step": 4}))
    snapshot = checkpoint.take(training, {"step": 4})
    training.optimizer.step()
    training.scaler.update(2.0)
    torch.rand(3)
    later = checkpoint.write(tmp_path / "b", snapshot)
    assert (later / "sha256.json").read_bytes() == (straight / "sha256.json").read_bytes()
    assert not torch.equal(snapshot.adapter[next(iter(snapshot.adapter))],
                           next(iter(training.adapters.tensors().values())))


def test_a_step_does_not_wait_for_the_checkpoint_and_the_end_does(train, tmp_path, monkeypatch):
    real, order = checkpoint.write, []

    def slow(run, snapshot):
        time.sleep(0.3)
        order.append(f"written {snapshot.state['step']}")
        return real(run, snapshot)

    class Row(Metrics):
        def step(self, state, *others):
            order.append(f"step {state.step}")
            return super().step(state, *others)

    monkeypatch.setattr(checkpoint, "write", slow)
    monkeypatch.setattr("train.Metrics", Row)
    assert train("--out", tmp_path / "run", "--save-every", 6, "--eval-every", 0,
                 "--hold-out", 0)[0] == 0
    assert order == [f"step {n}" for n in range(1, 8)] + ["written 6", "written 7"]
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "run" / "checkpoint-7")


def test_a_checkpoint_that_cannot_be_written_ends_the_run_after_the_next_step(train, tmp_path,
                                                                              monkeypatch):
    def full(run, snapshot):
        raise Refusal("the disk is full")

    monkeypatch.setattr(checkpoint, "write", full)
    status, _, said = train("--out", tmp_path / "run", "--steps", 200, "--save-every", 2,
                            "--eval-every", 0)
    assert status == 2 and "the disk is full. The run stopped after step" in said
    assert int(said.split("after step ")[1].split(";")[0]) < 10
