"""A run's folder: its name, its configuration, the state of the run and its best adapter.

DIR/config.json, row_hashes.json, metrics.jsonl, checkpoint-N/, and the result,
adapter_model.safetensors with adapter_config.json: the adapter of the lowest validation loss, the
last where nothing is held out.
"""

import dataclasses
import json
import math
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from phogpt_raw import config as configuration
from phogpt_raw.config import Config
from phogpt_raw.data.examples import Examples, fingerprint
from phogpt_raw.data.prompt import Example
from phogpt_raw.files import write_text
from phogpt_raw.messages import _
from phogpt_raw.model.adapter_config import is_run
from phogpt_raw.model.adapters import Adapters
from phogpt_raw.refusal import Refusal, RunFailed
from phogpt_raw.training import checkpoint
from phogpt_raw.training.evaluate import Score
from phogpt_raw.training.step import Training

# May differ when a run goes on: everything else would make it another run. Where the rows come from
# may differ too: the rows themselves are compared.
FREE = {"preset", "data", "val", "hold_out", "out", "dry_run", "steps", "epochs", "eval_every",
        "eval_answers", "answer_tokens", "patience", "save_every", "tensorboard", "max_skipped",
        "micro_batch", "packing", "pack_len", "recompute", "capture", "loss_mib", "nf4_cache"}

ROWS = "row_hashes.json"  # fingerprints of the rows with which the run began


@dataclass
class RunState:
    """Where a run stands: steps taken, those of them skipped, the best and the first score."""

    step: int = 0
    skipped: int = 0
    skipped_in_row: int = 0
    best_loss: float = math.inf
    best_step: int = 0
    not_better: int = 0  # evaluations since the best one
    first: dict = field(default_factory=dict)  # score before training: val_loss, stops, answers
    best: dict = field(default_factory=dict)  # the same of the adapter that was kept

    @property
    def applied(self) -> int:
        return self.step - self.skipped

    def count(self, *, skipped: bool) -> None:
        self.step += 1
        self.skipped += skipped
        self.skipped_in_row = self.skipped_in_row + 1 if skipped else 0


class Run:
    """The folder of a run, new or resumed. `examples` are those that the run trains on and holds
    out; a run that goes on must have the same."""

    def __init__(self, config: Config, steps: int, examples: Examples):
        self.folder = (Path(config.out).expanduser() if config.out
                       else next_number(config.model))
        self.config, self.steps, self.examples = config, steps, examples
        self.state = RunState()
        self.checkpoint = checkpoint.newest(self.folder)
        if self.checkpoint:
            self.check_same()
            self.state = RunState(**checkpoint.read_state(self.checkpoint))
            if self.ended:
                self.check_adapter()
                raise Refusal(
                    f"{self.folder}: this run is complete ({self.state.step} steps). Ask it: "
                    f'python generate.py --adapter {self.folder} "…" ; more of the same: a larger '
                    f"--steps; from its adapter with other data: --adapter {self.folder} and "
                    f"another --out"
                )
        elif (self.folder / "adapter_model.safetensors").is_file():
            raise Refusal(f"{self.folder}: holds an adapter but no checkpoint to go on from; name "
                          f"another --out, or start from it with --adapter {self.folder}")
        else:
            self.check_place()

    def check_place(self) -> None:
        """Raise Refusal where a new run would write over files that are not a run's."""
        if self.folder.exists() and not self.folder.is_dir():
            raise Refusal(f"--out {self.folder}: is a file; name a folder")
        if is_run(self.folder / "config.json"):  # one that was killed before its first checkpoint
            return
        for name in ("config.json", ROWS, "metrics.jsonl"):
            if os.path.lexists(self.folder / name):
                raise Refusal(f"--out {self.folder}: holds a {name} that is not a run's, and the "
                              f"run would write over it; name another --out")

    def check_same(self) -> None:
        file = self.folder / "config.json"
        if not file.is_file():
            raise Refusal(f"{file}: missing, so this run cannot go on; name another --out")
        # A run of before a setting existed has its default.
        before = dataclasses.asdict(Config()) | json.loads(file.read_text("utf-8"))
        now = dataclasses.asdict(self.config)
        for name in sorted(now.keys() - FREE):
            if place(name, before[name]) != place(name, now[name]):
                raise Refusal(
                    f"--out {self.folder}: this run has --{configuration.flag(name)} "
                    f"{before[name]}, not {now[name]}; go on with the same, or name another --out"
                )

        self.check_rows()

    def check_rows(self) -> None:
        """Raise Refusal where the rows are not those with which the run began, and say which."""
        file = self.folder / ROWS
        if not file.is_file():  # a run of before the rows were recorded
            return
        began = json.loads(file.read_text("utf-8"))
        for part, name in (("train", "training"), ("held_out", "held-out")):
            examples = getattr(self.examples, part)
            change = changes(began[part], examples)
            if change:
                raise Refusal(f"--out {self.folder}: its {name} rows have changed since it began: "
                              f"{change}; go on with the same rows, or name another --out")

    @property
    def ended(self) -> bool:
        """Whether all steps are taken, or --patience evaluations brought nothing better."""
        state, patience = self.state, self.config.patience
        return state.step >= self.steps or 0 < patience <= state.not_better

    def begin(self, training: Training) -> None:
        """Make the folder, or restore the newest checkpoint."""
        self.folder.mkdir(parents=True, exist_ok=True)
        configuration.save(self.config, self.folder / "config.json")
        rows = {part: [fingerprint(example) for example in getattr(self.examples, part)]
                for part in ("train", "held_out")}
        write_text(self.folder / ROWS, json.dumps(rows, indent=0) + "\n")
        if self.checkpoint:
            checkpoint.load(self.checkpoint, training)

    def keep_if_best(self, adapters: Adapters, score: Score | None) -> None:
        """Keep the adapter as the result if its score is the best, or if nothing is held out.

        Before the first update the score is only remembered: it is of an adapter not yet trained.
        A loss that is not finite is never the best.
        """
        state = self.state
        if state.step == 0:
            if score and not math.isfinite(score.val_loss):
                raise RunFailed(_("{folder}: the validation loss is not finite before the first "
                                  "step: the base does not compute in {dtype}; use another "
                                  "--dtype, or fetch the base again", folder=self.folder,
                                  dtype=self.config.dtype))
            if score:
                state.first = record(score)
        elif state.applied and (score is None or score.val_loss < state.best_loss):
            state.best_loss = score.val_loss if score else math.inf
            state.best_step, state.best = state.step, record(score)
            state.not_better = 0
            adapters.save(self.folder)
        else:
            state.not_better += 1

    def save(self, training: Training) -> None:
        checkpoint.save(self.folder, self.state.step, training, dataclasses.asdict(self.state))

    def due(self, every: int) -> bool:
        """Whether something is due after this step: every so often, and at the last."""
        step = self.state.step
        return step == self.steps or (every > 0 and step % every == 0)

    def still_due(self, every: int) -> int:
        """How often something is due from this step on, this one included."""
        return 1 if every <= 0 else -(-self.steps // every) - (self.state.step - 1) // every

    def stop_if_stuck(self) -> None:
        """Raise RunFailed after --max-skipped skipped steps in a row: nothing is learned."""
        state = self.state
        if state.skipped_in_row >= self.config.max_skipped:
            raise RunFailed(_(
                "{folder}: steps {first} to {last} were skipped, their gradients are not finite; "
                "{advice}", folder=self.folder, first=state.step - state.skipped_in_row + 1,
                last=state.step, advice=self.advice()))

    def check_result(self, loss: float, score: Score | None) -> None:
        """Raise RunFailed where the run has ended with nothing to show: most steps were skipped, or
        its last loss (the validation loss, where there is one) is not finite."""
        state = self.state
        if 2 * state.skipped > state.step:
            fault = _("{n} of {steps} steps were skipped, their gradients are not finite",
                      n=state.skipped, steps=state.step)
        elif score and not math.isfinite(score.val_loss):
            fault = _("the last validation loss is not finite")
        elif not score and not math.isfinite(loss):
            fault = _("the last loss is not finite")
        else:
            return
        raise RunFailed(_("{folder}: {fault}; {advice}", folder=self.folder, fault=fault,
                          advice=self.advice()))

    def check_adapter(self) -> None:
        """Raise RunFailed where a run that took all its steps has left no adapter."""
        if not (self.folder / "adapter_model.safetensors").is_file():
            raise RunFailed(_("{folder}: this run took its {n} steps and found no usable adapter; "
                              "{advice}", folder=self.folder, n=self.state.step,
                              advice=self.advice()))

    def advice(self) -> str:
        """From where a failed run can go on: the best checkpoint; where nothing is held out, the
        newest before the last update, which may be what did the harm."""
        state = self.state
        last_applied = state.step - state.skipped_in_row
        good = checkpoint.newest(self.folder, state.best_step if state.first else last_applied - 1)
        if good is None or not state.applied:
            return _("no good checkpoint was saved; begin anew with a lower --lr, or --dtype bf16 "
                     "or fp32, and another --out")
        return _("the last good checkpoint is {good}; go on from it with --adapter {good}, a "
                 "lower --lr and another --out", good=good)


def record(score: Score | None) -> dict:
    """What a checkpoint keeps of a score; nothing where nothing is held out."""
    if score is None:
        return {}
    return dict(val_loss=score.val_loss, stops=score.stops, answers=score.answers)


def place(name: str, value):
    """A setting as it is compared: of a folder its whole path, however it was written."""
    if name in ("model", "adapter") and value and Path(value).expanduser().is_dir():
        return str(Path(value).expanduser().resolve())
    return value


def changes(began: list[str], examples: list[Example]) -> str:
    """What is another than the fingerprints with which a run began; nothing where all are there."""
    now = [fingerprint(example) for example in examples]
    if now == began:
        return ""
    added, removed = Counter(now) - Counter(began), Counter(began) - Counter(now)
    if not added and not removed:
        return f"the same {len(now):,} rows in another order"
    parts = []
    if added:
        first = next(e for e, known in zip(examples, now, strict=True) if known in added)
        parts.append(f"{added.total():,} new or edited (the first: {first.where})")
    if removed:
        parts.append(f"{removed.total():,} gone")
    return f"{', '.join(parts)} ({len(began):,} rows then, {len(now):,} now)"


def next_number(model: str) -> Path:
    """runs/<model>-NNN with the first number not yet taken."""
    name = re.sub(r"[^\w.-]+", "-", Path(model).name).strip("-") or "run"
    taken = [int(m[1]) for d in Path("runs").glob(f"{name}-*")
             if (m := re.fullmatch(re.escape(name) + r"-(\d+)", d.name))]
    return Path("runs") / f"{name}-{max(taken, default=0) + 1:03}"
