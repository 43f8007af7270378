"""A run's folder: its name, its configuration, where it stands and which adapter is its best.

DIR/config.json, metrics.jsonl, checkpoint-N/, and the result, adapter_model.safetensors with
adapter_config.json: the adapter of the lowest validation loss, the last where nothing is held out.
"""

import dataclasses
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from phogpt_raw import config as configuration
from phogpt_raw.config import Config
from phogpt_raw.model.adapters import Adapters
from phogpt_raw.refusal import Refusal
from phogpt_raw.training import checkpoint
from phogpt_raw.training.evaluate import Score

# May differ when a run goes on: everything else would make it another run.
FREE = {"out", "dry_run", "steps", "epochs", "eval_every", "eval_answers", "answer_tokens",
        "save_every", "micro_batch", "recompute", "capture", "loss_mib"}


@dataclass
class Progress:
    """Where a run stands: windows taken, those of them skipped, the best and the first score."""

    step: int = 0
    skipped: int = 0
    best_loss: float = math.inf
    best_step: int = 0
    first: dict = field(default_factory=dict)

    @property
    def applied(self) -> int:
        return self.step - self.skipped

    def count(self, *, skipped: bool) -> None:
        self.step += 1
        self.skipped += skipped


class Run:
    """The folder of a run, new or gone on with."""

    def __init__(self, config: Config, steps: int):
        self.folder = Path(config.out) if config.out else next_number(config.model)
        self.config, self.steps = config, steps
        self.progress = Progress()
        self.checkpoint = checkpoint.newest(self.folder)
        if self.checkpoint:
            self.check_same()
            self.progress = Progress(**checkpoint.read_progress(self.checkpoint))
            if self.progress.step >= steps:
                raise Refusal(
                    f"{self.folder}: this run is complete ({self.progress.step} steps). Ask it: "
                    f'python generate.py --adapter {self.folder} "…" ; more of the same: a larger '
                    f"--steps; from its adapter with other data: --adapter {self.folder} and "
                    f"another --out"
                )
        elif (self.folder / "adapter_model.safetensors").is_file():
            raise Refusal(f"{self.folder}: holds an adapter but no checkpoint to go on from; name "
                          f"another --out, or start from it with --adapter {self.folder}")

    def check_same(self) -> None:
        file = self.folder / "config.json"
        if not file.is_file():
            raise Refusal(f"{file}: missing, so this run cannot go on; name another --out")
        before, now = json.loads(file.read_text("utf-8")), dataclasses.asdict(self.config)
        for name in sorted(before.keys() - FREE):
            if name in now and before[name] != now[name]:
                raise Refusal(
                    f"--out {self.folder}: this run has --{configuration.flag(name)} "
                    f"{before[name]}, not {now[name]}; go on with the same, or name another --out"
                )

    def begin(self, adapters: Adapters, optimizer, scaler) -> Progress:
        """Make the folder, or restore the newest checkpoint; returns where the run stands."""
        self.folder.mkdir(parents=True, exist_ok=True)
        configuration.save(self.config, self.folder / "config.json")
        if self.checkpoint:
            checkpoint.load(self.checkpoint, adapters, optimizer, scaler)
        return self.progress

    def judge(self, adapters: Adapters, score: Score | None) -> None:
        """Keep the adapter as the result if its score is the best, or if nothing is held out.

        The score before the first step is only remembered: it is of an adapter not yet trained.
        """
        progress = self.progress
        if progress.step == 0:
            progress.first = dataclasses.asdict(score) if score else {}
        elif score is None or score.val_loss < progress.best_loss:
            progress.best_loss = score.val_loss if score else math.inf
            progress.best_step = progress.step
            adapters.save(self.folder)

    def save(self, adapters: Adapters, optimizer, scaler) -> None:
        checkpoint.save(self.folder, self.progress.step, adapters, optimizer, scaler,
                        dataclasses.asdict(self.progress))

    def due(self, every: int) -> bool:
        """Whether something is due after this step: every so often, and at the end."""
        step = self.progress.step
        return step == self.steps or (every > 0 and step % every == 0)


def next_number(model: str) -> Path:
    """runs/<model>-NNN with the first number not yet taken."""
    name = re.sub(r"[^\w.-]+", "-", Path(model).name).strip("-") or "run"
    taken = [int(m[1]) for d in Path("runs").glob(f"{name}-*")
             if (m := re.fullmatch(re.escape(name) + r"-(\d+)", d.name))]
    return Path("runs") / f"{name}-{max(taken, default=0) + 1:03}"
