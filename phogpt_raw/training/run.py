"""A run's folder: its name, its configuration, the state of the run and its best adapter.

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
from phogpt_raw.refusal import Refusal, RunFailed
from phogpt_raw.training import checkpoint
from phogpt_raw.training.evaluate import Score
from phogpt_raw.training.step import Training

# May differ when a run goes on: everything else would make it another run.
FREE = {"out", "dry_run", "steps", "epochs", "eval_every", "eval_answers", "answer_tokens",
        "save_every", "max_skipped", "micro_batch", "recompute", "capture", "loss_mib"}


@dataclass
class RunState:
    """Where a run stands: steps taken, those of them skipped, the best and the first score."""

    step: int = 0
    skipped: int = 0
    skipped_in_row: int = 0
    best_loss: float = math.inf
    best_step: int = 0
    first: dict = field(default_factory=dict)

    @property
    def applied(self) -> int:
        return self.step - self.skipped

    def count(self, *, applied: bool) -> None:
        self.step += 1
        self.skipped += not applied
        self.skipped_in_row = 0 if applied else self.skipped_in_row + 1


class Run:
    """The folder of a run, new or resumed."""

    def __init__(self, config: Config, steps: int):
        self.folder = Path(config.out) if config.out else next_number(config.model)
        self.config, self.steps = config, steps
        self.state = RunState()
        self.checkpoint = checkpoint.newest(self.folder)
        if self.checkpoint:
            self.check_same()
            self.state = RunState(**checkpoint.read_progress(self.checkpoint))
            if self.state.step >= steps:
                raise Refusal(
                    f"{self.folder}: this run is complete ({self.state.step} steps). Ask it: "
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

    def begin(self, training: Training) -> RunState:
        """Make the folder, or restore the newest checkpoint; returns where the run stands."""
        self.folder.mkdir(parents=True, exist_ok=True)
        configuration.save(self.config, self.folder / "config.json")
        if self.checkpoint:
            checkpoint.load(self.checkpoint, training)
        return self.state

    def keep_if_best(self, adapters: Adapters, score: Score | None) -> None:
        """Keep the adapter as the result if its score is the best, or if nothing is held out.

        The score before the first step is only remembered: it is of an adapter not yet trained. A
        loss that is not finite is never the best.
        """
        state = self.state
        if state.step == 0:
            if score:
                state.first = dict(val_loss=score.val_loss, stops=score.stops,
                                   answers=score.answers)
        elif score is None or score.val_loss < state.best_loss:
            state.best_loss = score.val_loss if score else math.inf
            state.best_step = state.step
            adapters.save(self.folder)

    def save(self, training: Training) -> None:
        checkpoint.save(self.folder, self.state.step, training, dataclasses.asdict(self.state))

    def due(self, every: int) -> bool:
        """Whether something is due after this step: every so often, and at the end."""
        step = self.state.step
        return step == self.steps or (every > 0 and step % every == 0)

    def still_due(self, every: int) -> int:
        """How often something is due in the steps that are left."""
        if self.state.step == self.steps:
            return 0
        if every <= 0:
            return 1
        return -(-self.steps // every) - self.state.step // every

    def stop_if_stuck(self) -> None:
        """Raise RunFailed after --max-skipped skipped steps in a row: nothing is learned."""
        state = self.state
        if state.skipped_in_row >= self.config.max_skipped:
            raise RunFailed(f"{self.folder}: steps {state.step - state.skipped_in_row + 1} to "
                            f"{state.step} were skipped, their gradients are not finite; "
                            f"{self.way_on(state.step - state.skipped_in_row)}")

    def check_result(self, loss: float, score: Score | None) -> None:
        """Raise RunFailed where the run has ended and has nothing to show: no step was applied, or
        its last losses are not finite."""
        state, faults = self.state, []
        if not state.applied:
            faults.append("every step was skipped, no gradient was finite")
        if not math.isfinite(loss):
            faults.append("the last loss is not finite")
        if score and not math.isfinite(score.val_loss):
            faults.append("the last validation loss is not finite")
        if faults:
            if (self.folder / "adapter_model.safetensors").is_file():
                faults.append(f"{self.folder} holds the adapter of step {state.best_step}")
            good = state.best_step if score else state.step - state.skipped_in_row
            raise RunFailed(f"{self.folder}: {'; '.join(faults)}; {self.way_on(good)}")

    def way_on(self, last_good_step: int) -> str:
        good = checkpoint.newest(self.folder, last_good_step)
        if good is None:
            return ("no good checkpoint was saved; begin anew with a lower --lr, or --dtype bf16 "
                    "or fp32, and another --out")
        return (f"the last good checkpoint is {good}; go on from it with --adapter {good}, a "
                f"lower --lr and another --out")


def next_number(model: str) -> Path:
    """runs/<model>-NNN with the first number not yet taken."""
    name = re.sub(r"[^\w.-]+", "-", Path(model).name).strip("-") or "run"
    taken = [int(m[1]) for d in Path("runs").glob(f"{name}-*")
             if (m := re.fullmatch(re.escape(name) + r"-(\d+)", d.name))]
    return Path("runs") / f"{name}-{max(taken, default=0) + 1:03}"
