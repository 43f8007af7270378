"""A checkpoint is written completely or not at all; a run that resumes from it continues bit for
bit.

`checkpoint-N` holds the adapter in PEFT's format, the optimizer, and what else the next step
depends on: loss scale, random generators, counters, the best validation loss. The order of the data
needs no state, because it follows from the step's number. It is written under a temporary name and
renamed at the end. It contains the hashes of its files, so a damaged checkpoint is noticed and not
used.

`take` copies all of it to the host's memory, in a fraction of a step's time. `write` writes that
copy, in seconds, while the next steps are computed.
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
HASHES = "sha256.json"  # of the other files
REPLACED = ".replaced"  # a checkpoint of the same step, until the new one has its name


@dataclass(frozen=True)
class Snapshot:
    """A run after a step, in the host's memory. adapter: its tensors under PEFT's names; training:
    optimizer, loss scale, random generators; state: of the run, what `read_state` returns."""

    adapters: Adapters  # for their configuration
    adapter: dict[str, torch.Tensor]
    training: dict
    state: dict


def take(training: Training, state: dict) -> Snapshot:
    """Copy what a checkpoint holds; the next step may begin when this returns."""
    adapter = training.adapters.on_host()
    rest = on_host({"optimizer": training.optimizer.state_dict(),
                    "scaler": training.scaler.state_dict(), "random": random_state()})
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return Snapshot(training.adapters, adapter, rest, state)


def write(run: Path, snapshot: Snapshot) -> Path:
    """Write run/checkpoint-<step>."""
    final = run / f"checkpoint-{snapshot.state['step']}"
    replaced = final.with_name(final.name + REPLACED)
    with whole_folder(final, ours=True) as folder:
        with ThreadPoolExecutor() as beside:  # hashes a file while the next one is written
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
    """torch.save, but a full disk raises the system's error. torch itself continues after that
    error and then reports a wrong position."""
    with file.open("wb") as opened:
        written = Written(opened)
        torch.save(state, written)
    if written.error:
        raise written.error


class Written:
    """The methods of a file that torch.save needs. The first error is kept, and nothing is written
    after it."""

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
    """Remove what a killed process leaves behind in a run's folder; a checkpoint that was about to
    be replaced gets its name back if the new one does not exist."""
    for left in run.glob(f"*{UNFINISHED}"):
        name = left.name.removesuffix(UNFINISHED)
        if name in ADAPTER or re.fullmatch(r"checkpoint-\d+", name):  # others are not a run's
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
    """The checkpoints of a run, from the highest step down."""
    found = {}
    for folder in sorted(run.glob("checkpoint-*"), reverse=True):  # N.replaced before N
        name = folder.name.removeprefix("checkpoint-").removesuffix(REPLACED)
        if name.isdecimal():
            found[int(name)] = folder
    return dict(sorted(found.items(), reverse=True))


def newest(run: Path, up_to: float = math.inf) -> Path | None:
    """The checkpoint of the highest step, at most `up_to`; None where there is none."""
    return next((folder for step, folder in by_step(run).items() if step <= up_to), None)


def newest_whole(run: Path, identity: str = "") -> tuple[Path | None, list[str]]:
    """(the whole checkpoint of the highest step or None, what is wrong with those above it).
    identity: of the run, which its checkpoints record; "" if it is not known."""
    damaged = []
    for step, folder in by_step(run).items():
        fault = damage(folder, step, identity)
        if fault is None:
            return folder, damaged
        damaged.append(fault)
    return None, damaged


def damage(folder: Path, step: int, identity: str) -> str | None:
    """What is wrong with a checkpoint: a file that is missing or has other bytes than were written,
    or a state of another step or of another run."""
    try:
        hashes = json.loads((folder / HASHES).read_text("utf-8"))
        for name in (*ADAPTER, STATE, PROGRESS):
            if hash_of(folder / name) != hashes[name]:
                return f"{folder}: {name} is damaged"
        state = read_state(folder)
        if state["step"] != step:
            return f"{folder}: its {PROGRESS} is of another step"
        if identity and state.get("run") != identity:
            return f"{folder}: is of another run"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{folder}: cannot be read ({' '.join(str(error).split())})"
    return None


def remove_older(run: Path, keep: int, best: int, newest: int) -> None:
    """Remove the checkpoints before step `newest` but `keep` - 1 of them and the one of step
    `best`. Those above it are damaged: they count for nothing and stay until they are written anew.
    The name goes first: killed here, half a folder is not taken for a checkpoint."""
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
    except Exception as error:  # each reader raises other errors for a damaged file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Refusal(f"{folder}: cannot be read ({reason}); delete it to go on from the one "
                      f"before") from None


def random_state() -> dict:
    """The states of the random generators that this run uses: that of the host, and that of its own
    GPU only, so that a checkpoint does not depend on the number of GPUs in the computer."""
    return {"torch": torch.get_rng_state(), "python": repr(random.getstate()),
            "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []}


def restore_random_state(state: dict) -> None:
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and state["cuda"]:
        torch.cuda.set_rng_state(state["cuda"][0])  # older checkpoints list all GPUs of the machine
    random.setstate(ast.literal_eval(state["python"]))
