"""DIR/metrics.jsonl: one row for each step and each evaluation, and what a step cost."""

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from phogpt_raw.data.batches import Window
from phogpt_raw.files import write_text
from phogpt_raw.refusal import Refusal
from phogpt_raw.training.evaluate import Score
from phogpt_raw.training.graphs import GraphedModel
from phogpt_raw.training.run import RunState
from phogpt_raw.training.step import StepStats, Training


@dataclass(frozen=True)
class StepRow:
    """A step's row: `tokens` carry loss, `tokens_per_s` counts all; `peak_gib` is None on a CPU;
    `skipped` counts the run's skipped steps so far; `rows` went through the model, `fill` is the
    share of them that is not padding."""

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    tokens_per_s: float
    peak_gib: float | None
    scale: float
    skipped: int
    rows: int
    fill: float


class Metrics:
    """The file of a run; rows after `step` are dropped (a resumed run writes them again).
    `tensorboard`: the same values for TensorBoard, in folder/tensorboard."""

    def __init__(self, folder: Path, step: int, training: Training, tensorboard: bool = False):
        self.file, self.training = folder / "metrics.jsonl", training
        self.started = self.seconds = 0.0  # of the step: its beginning, its duration
        kept = whole_rows(self.file) if step else []  # a torn row is of a later step
        kept = [row for row in kept if json.loads(row)["step"] <= step]
        write_text(self.file, "".join(row + "\n" for row in kept))
        self.board = tensorboard and summary_writer()(folder / "tensorboard", purge_step=step + 1)

    def begin(self) -> None:
        """A step begins: its time and its peak memory count from here."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.started = time.perf_counter()

    def step(self, state: RunState, stats: StepStats, window: Window, lr: float) -> StepRow:
        """Write a finished step; reading its loss waits for the GPU."""
        loss, grad_norm, scale = torch.stack((stats.loss, stats.grad_norm, stats.scale)).tolist()
        self.seconds = time.perf_counter() - self.started
        peak = peak_bytes(self.training.forward)
        shapes = window.shapes(self.training.limits.micro_batch)
        row = StepRow(
            step=state.step, loss=loss, lr=lr, grad_norm=grad_norm, tokens=window.supervised,
            tokens_per_s=round(window.tokens / self.seconds, 1),
            peak_gib=peak and round(peak / 2**30, 3), scale=scale, skipped=state.skipped,
            rows=sum(rows for rows, _ in shapes),
            fill=round(window.tokens / sum(rows * length for rows, length in shapes), 4))
        self.write(asdict(row))
        return row

    def evaluation(self, step: int, score: Score | None) -> None:
        if score:
            self.write(dict(step=step, val_loss=score.val_loss, val_ppl=score.val_ppl,
                            stops=score.stops))

    def write(self, row: dict) -> None:
        """Append a row; JSON has no NaN and no Infinity, so those become null."""
        row = {name: None if isinstance(value, float) and not math.isfinite(value) else value
               for name, value in row.items()}
        with self.file.open("a") as metrics:
            metrics.write(json.dumps(row) + "\n")
        if self.board:
            for name in row.keys() - {"step"}:
                if row[name] is not None:
                    self.board.add_scalar(name, row[name], row["step"])
            self.board.flush()


def summary_writer():
    """torch's SummaryWriter; Refusal where the package that it needs is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise Refusal("--tensorboard: needs the package tensorboard: pip install -c "
                      "constraints.txt -e '.[tensorboard]'") from None
    return SummaryWriter


def read_metrics(folder: Path) -> tuple[list[dict], list[dict]]:
    """(rows of steps, rows of evaluations) of a run's metrics.jsonl, none where there is no file.

    null stands for a value that was not finite.
    """
    rows = [json.loads(row) for row in whole_rows(folder / "metrics.jsonl")]
    return [row for row in rows if "loss" in row], [row for row in rows if "val_loss" in row]


def whole_rows(file: Path) -> list[str]:
    """The lines of a metrics.jsonl but one torn by a power cut; none where there is no file."""
    lines = file.read_text("utf-8").splitlines() if file.is_file() else []
    return [line for line in lines if line.endswith("}")]


def peak_bytes(forward) -> int | None:
    """The most GPU memory in use since the step began; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    if isinstance(forward, GraphedModel):
        return forward.peak_bytes()
    return torch.cuda.max_memory_allocated()
