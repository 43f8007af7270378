"""Write and read checkpoints. A checkpoint is written completely or not at all.

On a CPU, a run that resumes from a checkpoint gives the same result as a run without a stop, bit
for bit. The folder `checkpoint-N` contains the adapter in PEFT's format, the optimizer state, the
loss scale, the states of the random generators, the counters and the best validation loss. The
order of the data is not stored, because it follows from the seed and the step.

A checkpoint is written under a temporary name and renamed at the end. It contains hashes of its
files. A damaged checkpoint is detected by these hashes and is not used.

`take` copies this state to the host's memory, in a fraction of a step's time. `write` writes the
copy to the disk. This takes seconds, and the next steps are computed at the same time.
"""

import ast
import hashlib
import json
import math
import random
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from phogpt_raw.files import LOCK, UNFINISHED, remove, whole_folder
from phogpt_raw.model.adapters import Adapters
from phogpt_raw.model.flat import on_host
from phogpt_raw.refusal import Refusal
from phogpt_raw.training.optim import load_state
from phogpt_raw.training.step import Training

ADAPTER = ("adapter_model.safetensors", "adapter_config.json")
STATE, PROGRESS = "training_state.pt", "progress.json"
HASHES = "sha256.json"  # the hashes of the checkpoint's other files
REPLACED = ".replaced"  # suffix of an old checkpoint while a new checkpoint gets its name


@dataclass(frozen=True)
class Snapshot:
    """The content of a checkpoint, in the host's memory.

    adapter: the adapter's tensors by their PEFT names. training: the states of the optimizer, the
    loss scale and the random generators. state: the run's state, as `read_state` returns it.
    """

    adapters: Adapters  # only their configuration is used
    adapter: dict[str, torch.Tensor]
    training: dict
    state: dict


def take(training: Training, state: dict) -> Snapshot:
    """Copy a checkpoint's content to the host. When `take` returns, the next step may start."""
    adapter = training.adapters.on_host()
    rest = on_host({"optimizer": training.optimizer.state_dict(),
                    "scaler": training.scaler.state_dict(), "random": random_state()})
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return Snapshot(training.adapters, adapter, rest, state)


def write(run: Path, snapshot: Snapshot) -> Path:
    """Write the folder run/checkpoint-<step>, and return its path."""
    final = run / f"checkpoint-{snapshot.state['step']}"
    replaced = final.with_name(final.name + REPLACED)
    with whole_folder(final, ours=True) as folder:
        with ThreadPoolExecutor() as beside:  # hashes a file while the next file is written
            snapshot.adapters.save(folder, snapshot.adapter)
            hashed = {name: beside.submit(hash_of, folder / name) for name in ADAPTER}
            save_state(folder / STATE, snapshot.training)
            text = json.dumps(snapshot.state, indent=2, ensure_ascii=False)
            (folder / PROGRESS).write_text(text + "\n", "utf-8")
            hashed |= {name: beside.submit(hash_of, folder / name) for name in (STATE, PROGRESS)}
        hashes = {name: found.result() for name, found in hashed.items()}
        (folder / HASHES).write_text(json.dumps(hashes, indent=2) + "\n", "utf-8")
        if final.exists():
            final.rename(replaced)
    if replaced.exists():
        remove(replaced)
    return final


def save_state(file: Path, state: dict) -> None:
    """Like torch.save, but a full disk raises the system's OSError. torch.save itself continues
    after this error, and then raises another error about a wrong position in the file."""
    with file.open("wb") as opened:
        written = Written(opened)
        torch.save(state, written)
    if written.error:
        raise written.error


class Written:
    """A file with the methods that torch.save needs. It keeps the first error of a write, and
    writes nothing after this error."""

    def __init__(self, file: BinaryIO):
        self.file, self.error = file, None

    def write(self, data: bytes) -> int:
        if self.error is None:
            try:
                return self.file.write(data)
            except OSError as error:
                self.error = error
        return len(data)

    def flush(self) -> None:
        pass


def tidy(run: Path) -> None:
    """Remove the unfinished files of a killed process from a run's folder.

    The process may have been killed while it replaced a checkpoint. If the new checkpoint does not
    exist, the old checkpoint gets its name back.
    """
    for left in run.glob(f"*{UNFINISHED}"):
        name = left.name.removesuffix(UNFINISHED)
        if name in ADAPTER or re.fullmatch(r"checkpoint-\d+", name):  # other files stay
            remove(left)
    for replaced in run.glob(f"checkpoint-*{REPLACED}"):
        final = replaced.with_name(replaced.name.removesuffix(REPLACED))
        remove(replaced) if final.exists() else replaced.rename(final)
    for lock in run.glob(f"checkpoint-*/{LOCK}"):
        lock.unlink()


def hash_of(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def by_step(run: Path) -> dict[int, Path]:
    """The checkpoints of a run by their step, from the highest step to the lowest."""
    found = {}
    # checkpoint-N.replaced comes before checkpoint-N, so checkpoint-N overrides it.
    for folder in sorted(run.glob("checkpoint-*"), reverse=True):
        name = folder.name.removeprefix("checkpoint-").removesuffix(REPLACED)
        if name.isdecimal():
            found[int(name)] = folder
    return dict(sorted(found.items(), reverse=True))


def newest(run: Path, up_to: float = math.inf) -> Path | None:
    """The checkpoint of the highest step that is not above `up_to`; None if there is none."""
    return next((folder for step, folder in by_step(run).items() if step <= up_to), None)


def newest_whole(run: Path, identity: str = "") -> tuple[Path | None, list[str]]:
    """Return (newest undamaged checkpoint or None, a message for each damaged checkpoint that is
    newer).

    identity: the identity of the run. A checkpoint of a run with another identity counts as
    damaged. With "" the identity is not checked.
    """
    damaged = []
    for step, folder in by_step(run).items():
        fault = damage(folder, step, identity)
        if fault is None:
            return folder, damaged
        damaged.append(fault)
    return None, damaged


def damage(folder: Path, step: int, identity: str) -> str | None:
    """A message that says why a checkpoint cannot be used; None if the checkpoint can be used.

    A file may be missing or damaged, or the checkpoint may belong to another step or another run.
    """
    try:
        hashes = json.loads((folder / HASHES).read_text("utf-8"))
        for name in (*ADAPTER, STATE, PROGRESS):
            if hash_of(folder / name) != hashes[name]:
                return f"{folder}: {name} is damaged"
        state = read_state(folder)
        if state["step"] != step:
            return f"{folder}: its {PROGRESS} belongs to another step"
        if identity and state.get("run") != identity:
            return f"{folder}: belongs to another run"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{folder}: cannot be read ({' '.join(str(error).split())})"
    return None


def remove_older(run: Path, keep: int, best: int, newest: int) -> None:
    """Remove all checkpoints up to step `newest`, except the newest `keep` of these checkpoints and
    the checkpoint of step `best`.

    Checkpoints above step `newest` are damaged. They do not count among the newest `keep`, and stay
    until the run writes them again. A checkpoint is renamed before its files are removed. If the
    process is killed during the removal, the remaining files do not look like a checkpoint.
    """
    up_to = [(step, folder) for step, folder in by_step(run).items() if step <= newest]
    for step, folder in up_to[keep:]:
        if step != best:
            unfinished = folder.with_name(folder.name + UNFINISHED)
            folder.rename(unfinished)
            remove(unfinished)


def read_state(folder: Path) -> dict:
    return readable(folder, lambda: json.loads((folder / PROGRESS).read_text("utf-8")))


def load(folder: Path, training: Training) -> None:
    """Restore adapters, optimizer, loss scale and random generators from a checkpoint."""
    file = folder / STATE
    state = readable(folder, lambda: torch.load(file, map_location="cpu", weights_only=True))
    readable(folder, lambda: training.adapters.load(folder))
    load_state(training.optimizer, state["optimizer"])
    training.scaler.load_state_dict(state["scaler"])
    restore_random_state(state["random"])


def readable(folder: Path, read):
    try:
        return read()
    except Exception as error:  # each reader has its own errors for a damaged file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Refusal(f"{folder}: cannot be read ({reason}); delete it to resume from the "
                      f"checkpoint before it") from None


def random_state() -> dict:
    """The states of the random generators of torch, of Python and of the run's GPU.

    The states of other GPUs are left out, so a checkpoint does not depend on the number of GPUs in
    the computer.
    """
    return {"torch": torch.get_rng_state(), "python": repr(random.getstate()),
            "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []}


def restore_random_state(state: dict) -> None:
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and state["cuda"]:
        torch.cuda.set_rng_state(state["cuda"][0])  # older checkpoints list all GPUs
    random.setstate(ast.literal_eval(state["python"]))
