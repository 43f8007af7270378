"""Write and read metrics.jsonl in a run's folder. It has one row for each step and each evaluation.

The row of a step also contains the speed and the peak memory of the step.
"""

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from phogpt_raw.data.batches import Window
from phogpt_raw.files import in_words, write_text
from phogpt_raw.refusal import Refusal
from phogpt_raw.training.evaluate import Score
from phogpt_raw.training.graphs import GraphedModel
from phogpt_raw.training.run import METRICS, RunState
from phogpt_raw.training.step import StepStats, Training


@dataclass(frozen=True)
class StepRow:
    """The row of metrics.jsonl for one step.

    loss: nats per supervised token. grad_norm: the gradient's norm before clipping. tokens: number
    of supervised tokens. tokens_per_s: all tokens of the examples per second, without padding.
    peak_gib: peak GPU memory in GiB, None on a CPU. scale: the loss scale. skipped: number of
    skipped steps in the run so far. rows: number of token rows, packed or not, that went through
    the model in this step. fill: the fraction of the positions in these rows that are not padding.
    """

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
    """The metrics file of a run.

    A resumed run first removes the rows that were written after its checkpoint, because it writes
    them again. tensorboard: also write the values to folder/tensorboard. last_loss: the loss in the
    newest row, of a step or of an evaluation; NaN if there is no row.
    """

    def __init__(self, folder: Path, state: RunState, training: Training,
                 tensorboard: bool = False):
        self.file, self.training = folder / METRICS, training
        self.started = self.seconds = 0.0  # start time and duration of the step
        # whole_rows omits an incomplete row. Such a row was written after the checkpoint.
        rows = whole_rows(self.file) if state.step else []
        kept = [row for row in rows if is_before(state, row)]
        self.last_loss = loss_of(kept[-1]) if kept else math.nan
        write_text(self.file, "".join(json.dumps(row) + "\n" for row in kept))
        self.board = tensorboard and summary_writer()(folder / "tensorboard",
                                                      purge_step=state.step + 1)

    def begin(self) -> None:
        """Start measuring a step's time and peak memory."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.started = time.perf_counter()

    def step(self, state: RunState, stats: StepStats, window: Window, lr: float) -> StepRow:
        """Write the row of a finished step. Reading its loss waits for the GPU."""
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
        """Append a row. NaN and infinity are written as null, because JSON has neither."""
        row = {name: None if isinstance(value, float) and not math.isfinite(value) else value
               for name, value in row.items()}
        self.last_loss = loss_of(row)
        with in_words(self.file), self.file.open("a") as metrics:
            metrics.write(json.dumps(row) + "\n")
        if self.board:
            for name in row.keys() - {"step"}:
                if row[name] is not None:
                    self.board.add_scalar(name, row[name], row["step"])
            self.board.flush()


def loss_of(row: dict) -> float:
    """The loss in a row: val_loss of an evaluation, or loss of a step. null becomes NaN."""
    loss = row["val_loss"] if "val_loss" in row else row["loss"]
    return math.nan if loss is None else loss


def is_before(state: RunState, row: dict) -> bool:
    """Whether a row was written before the checkpoint that contains `state`."""
    return row["step"] <= (state.evaluated if "val_loss" in row else state.step)


def summary_writer():
    """Return torch's SummaryWriter. Raises Refusal if the package tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise Refusal("--tensorboard: needs the package tensorboard: pip install -c "
                      "constraints.txt -e '.[tensorboard]'") from None
    return SummaryWriter


def read_metrics(folder: Path) -> tuple[list[dict], list[dict]]:
    """Return (rows of steps, rows of evaluations) from a run's metrics.jsonl.

    Both lists are empty if there is no file. A value that was not finite is None.
    """
    rows = whole_rows(folder / METRICS)
    return [row for row in rows if "loss" in row], [row for row in rows if "val_loss" in row]


def whole_rows(file: Path) -> list[dict]:
    """The valid rows of a metrics.jsonl file; an empty list if there is no file. Damaged rows are
    omitted, for example a row that a power failure has cut off."""
    lines = file.read_text("utf-8", errors="replace").splitlines() if file.is_file() else []
    return [row for line in lines if is_row(row := parsed(line))]


def parsed(line: str):
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def is_row(row) -> bool:
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return False
    losses = [row[name] for name in ("loss", "val_loss") if name in row]
    return bool(losses) and all(isinstance(loss, float | int | None) for loss in losses)


def peak_bytes(forward) -> int | None:
    """Peak GPU memory since the start of the step, in bytes; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    if isinstance(forward, GraphedModel):
        return forward.peak_bytes()
    return torch.cuda.max_memory_allocated()
