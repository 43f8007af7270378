"""A checkpoint is whole or it is not there; a run that resumes from it continues bit for bit.

`checkpoint-N` holds the adapter in PEFT's format, the optimizer, and what else the next step
depends on: loss scale, random generators, counters, the best validation loss. The data order needs
no state, it follows from the step. It is written under another name and renamed at the end.
"""

import ast
import json
import math
import random
import shutil
from pathlib import Path

import torch

from phogpt_raw.files import whole_folder
from phogpt_raw.refusal import Refusal
from phogpt_raw.training.optim import load_state
from phogpt_raw.training.step import Training


def save(run: Path, step: int, training: Training, state: dict) -> Path:
    """Write run/checkpoint-<step>; `state` (of the run) is what `read_state` returns."""
    final = run / f"checkpoint-{step}"
    with whole_folder(final, ours=True) as folder:
        training.adapters.save(folder)
        tensors = {"optimizer": training.optimizer.state_dict(),
                   "scaler": training.scaler.state_dict(), "random": random_state()}
        torch.save(tensors, folder / "training_state.pt")
        text = json.dumps(state, indent=2, ensure_ascii=False)
        (folder / "progress.json").write_text(text + "\n", "utf-8")
        shutil.rmtree(final, ignore_errors=True)
    return final


def newest(run: Path, up_to: float = math.inf) -> Path | None:
    """The whole checkpoint of the highest step, at most `up_to`; None where there is none."""
    found = {int(name): folder for folder in run.glob("checkpoint-*")
             if (name := folder.name.removeprefix("checkpoint-")).isdigit()}
    steps = [step for step in found if step <= up_to]
    return found[max(steps)] if steps else None


def read_state(folder: Path) -> dict:
    return readable(folder, lambda: json.loads((folder / "progress.json").read_text("utf-8")))


def load(folder: Path, training: Training) -> None:
    """Restore adapters, optimizer, loss scale and random generators from a checkpoint."""
    file = folder / "training_state.pt"
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
