"""A checkpoint is whole or it is not there; a run that resumes from it continues bit for bit.

`checkpoint-N` holds the adapter in PEFT's format, the optimizer, and what else the next step
depends on: loss scale, random generators, counters, the best validation loss. The data order needs
no state, it follows from the step. It is written under another name and renamed at the end, with
the hashes of its files: a damaged one is not used.
"""

import ast
import hashlib
import json
import math
import random
import shutil
from pathlib import Path

import torch

from phogpt_raw.files import UNFINISHED, whole_folder
from phogpt_raw.refusal import Refusal
from phogpt_raw.training.optim import load_state
from phogpt_raw.training.step import Training

ADAPTER = ("adapter_model.safetensors", "adapter_config.json")
STATE, PROGRESS = "training_state.pt", "progress.json"
HASHES = "sha256.json"  # of the other files


def save(run: Path, step: int, training: Training, state: dict) -> Path:
    """Write run/checkpoint-<step>; `state` (of the run) is what `read_state` returns."""
    final = run / f"checkpoint-{step}"
    with whole_folder(final, ours=True) as folder:
        training.adapters.save(folder)
        tensors = {"optimizer": training.optimizer.state_dict(),
                   "scaler": training.scaler.state_dict(), "random": random_state()}
        with (folder / STATE).open("wb") as file:  # by Python, whose errors say that a disk is full
            torch.save(tensors, file)
        text = json.dumps(state, indent=2, ensure_ascii=False)
        (folder / PROGRESS).write_text(text + "\n", "utf-8")
        hashes = {name: hash_of(folder / name) for name in (*ADAPTER, STATE, PROGRESS)}
        (folder / HASHES).write_text(json.dumps(hashes, indent=2) + "\n", "utf-8")
        shutil.rmtree(final, ignore_errors=True)
    return final


def hash_of(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def by_step(run: Path) -> dict[int, Path]:
    """The checkpoints of a run, from the highest step down."""
    found = {int(name): folder for folder in run.glob("checkpoint-*")
             if (name := folder.name.removeprefix("checkpoint-")).isdecimal()}
    return dict(sorted(found.items(), reverse=True))


def newest(run: Path, up_to: float = math.inf) -> Path | None:
    """The checkpoint of the highest step, at most `up_to`; None where there is none."""
    return next((folder for step, folder in by_step(run).items() if step <= up_to), None)


def newest_whole(run: Path) -> tuple[Path | None, list[str]]:
    """(the whole checkpoint of the highest step or None, what is wrong with those above it)."""
    damaged = []
    for step, folder in by_step(run).items():
        fault = damage(folder, step)
        if fault is None:
            return folder, damaged
        damaged.append(fault)
    return None, damaged


def damage(folder: Path, step: int) -> str | None:
    """What is wrong with a checkpoint: a file that is missing or has other bytes than were written,
    or a state of another step. A checkpoint of before the hashes were written is only read."""
    try:
        hashes = {}
        if (folder / HASHES).is_file():
            hashes = json.loads((folder / HASHES).read_text("utf-8"))
        for name in (*ADAPTER, STATE, PROGRESS):
            if hashes and hash_of(folder / name) != hashes[name]:
                return f"{folder}: {name} is damaged"
        if read_state(folder)["step"] != step:
            return f"{folder}: its {PROGRESS} is of another step"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{folder}: cannot be read ({' '.join(str(error).split())})"
    return None


def remove_older(run: Path, keep: int, best: int) -> None:
    """Remove all checkpoints but the `keep` newest ones and the one of step `best`. The name goes
    first: killed here, half a folder is not taken for a checkpoint."""
    for step, folder in list(by_step(run).items())[keep:]:
        if step != best:
            unfinished = folder.with_name(folder.name + UNFINISHED)
            folder.rename(unfinished)
            shutil.rmtree(unfinished)


def read_state(folder: Path) -> dict:
    return readable(folder, lambda: json.loads((folder / PROGRESS).read_text("utf-8")))


def load(folder: Path, training: Training) -> None:
    """Restore adapters, optimizer, loss scale and random generators from a checkpoint."""
    file = folder / STATE
    state = readable(folder, lambda: torch.load(file, map_location="cpu", weights_only=True))
    training.adapters.load(folder)
    load_state(training.optimizer, state["optimizer"])
    training.scaler.load_state_dict(state["scaler"])
    restore_random_state(state["random"])


def readable(folder: Path, read):
    try:
        return read()
    except Exception as error:  # each reader has its own kinds for a damaged file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Refusal(f"{folder}: cannot be read ({reason}); delete it to go on from the one "
                      f"before") from None


def random_state() -> dict:
    """Of the generators that this run draws from: the host's, and its own GPU's alone, so that a
    checkpoint does not depend on how many GPUs the machine has."""
    return {"torch": torch.get_rng_state(), "python": repr(random.getstate()),
            "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []}


def restore_random_state(state: dict) -> None:
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and state["cuda"]:
        torch.cuda.set_rng_state(state["cuda"][0])  # older checkpoints list all GPUs of the machine
    random.setstate(ast.literal_eval(state["python"]))
