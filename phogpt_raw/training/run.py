"""A run's folder: its name, its configuration, the state of the run and its best adapter.

The folder contains config.json, row_hashes.json, metrics.jsonl and the folders checkpoint-N. The
result is adapter_model.safetensors with adapter_config.json. It is the adapter with the lowest
validation loss, or the last adapter if no rows are held out. The model card README.md is written
last. A run that has done all its steps but has no model card was killed before its end. When the
user starts it again, it does only the work that is left.
"""

import dataclasses
import math
import re
import shlex
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from phogpt_raw.config import Config
from phogpt_raw.data.examples import Examples
from phogpt_raw.files import LOCK, expanded, flush, in_words, locked, script, whole_file
from phogpt_raw.messages import _, plural
from phogpt_raw.refusal import Refusal, RunFailed
from phogpt_raw.training import checkpoint, resume
from phogpt_raw.training.evaluate import Score
from phogpt_raw.training.step import Training

CARD = "README.md"
METRICS = "metrics.jsonl"
MARK = "<!-- written by phogpt-raw, which writes it anew; delete this line to keep your changes -->"


@dataclass
class RunState:
    """The state of a run: number of steps, number of skipped steps, best score and first score."""

    step: int = 0
    evaluated: int = -1  # the last step after which the run was evaluated
    skipped: int = 0
    skipped_in_row: int = 0
    best_loss: float = math.inf
    best_step: int = 0
    not_better: int = 0  # number of evaluations since the lowest validation loss
    first: dict = field(default_factory=dict)  # score before training: val_loss, stops, answers
    best: dict = field(default_factory=dict)  # val_loss, stops, answers of the best adapter
    planned: int = 0  # steps of the whole run; 0 in checkpoints of older versions
    run: str = ""  # the run's identity, to detect checkpoints of other runs

    @property
    def applied(self) -> int:
        return self.step - self.skipped

    def count(self, *, skipped: bool) -> None:
        self.step += 1
        self.skipped += skipped
        self.skipped_in_row = self.skipped_in_row + 1 if skipped else 0


class Run:
    """The folder of a new or resumed run.

    examples: the training and held-out examples. A resumed run must have the same examples as at
    its start.
    """

    def __init__(self, config: Config, steps: int, examples: Examples):
        self.folder = (expanded(config.out) if config.out
                       else next_number(config.model))
        self.config, self.steps, self.examples = config, steps, examples
        self.planned = steps  # planned steps when the newest checkpoint was saved
        self.state = RunState(planned=steps)
        self.base_weights = None
        self.saved = None  # (step, last evaluated step) in the newest checkpoint
        self.writer = ThreadPoolExecutor(1)
        self.writing: Future | None = None  # the write of the newest checkpoint
        self.checkpoint, self.damaged = checkpoint.newest_whole(
            self.folder, resume.recorded_identity(self.folder))
        if self.checkpoint:
            resume.check_same(self.folder, config, examples)
            self.state = restored(self.checkpoint)
            self.planned, self.state.planned = self.state.planned, steps
            self.saved = self.state.step, self.state.evaluated
            if self.state.step > steps:
                raise Refusal(f"{self.folder}: this run is already at step {self.state.step:,}, "
                              f"and this command ends at step {steps:,}; give a larger --steps or "
                              f"--epochs")
            if self.ended:
                self.check_adapter()
                if (self.folder / CARD).is_file():
                    raise Refusal(self.nothing_left())
        elif self.damaged:
            raise Refusal(f"{self.folder}: no checkpoint can be used ({'; '.join(self.damaged)}); "
                          f"name another --out")
        elif (self.folder / "adapter_model.safetensors").is_file():
            raise Refusal(f"{self.folder}: contains an adapter but no checkpoint to resume from; "
                          f"name another --out; to start from this adapter, add --adapter "
                          f"{shlex.quote(str(self.folder))}")
        else:
            resume.check_place(self.folder)

    def over(self, base_weights: str) -> None:
        """Record the hash of the base that the run trains on. Raises Refusal if a resumed run was
        started with another base."""
        if self.checkpoint:
            resume.check_base(self.folder, self.config, base_weights)
        else:
            self.state.run = resume.identity(self.config, self.examples, base_weights)
        self.base_weights = base_weights

    @property
    def ended(self) -> bool:
        """Whether the run has ended. It ends after its last step and that step's evaluation, or
        after --patience evaluations in a row without a new lowest validation loss."""
        state, patience = self.state, self.config.patience
        if state.step >= self.steps:
            return not self.evaluation_due()
        return 0 < patience <= state.not_better

    def nothing_left(self) -> str:
        """The reason why a run that has ended cannot be resumed, and what to do instead."""
        state, patience = self.state, self.config.patience
        if state.step >= self.steps:
            done = plural(state.step, "1 step", f"{state.step} steps")
            why, more = f"this run is complete ({done})", "a larger --steps or --epochs"
        else:
            times = plural(state.not_better, "1 evaluation", f"{state.not_better} evaluations")
            why = (f"this run ended early, after step {state.step} of {self.planned}: the "
                   f"validation loss was no lower in {times} (--patience {patience})")
            more = f"a --patience above {state.not_better}, or no --patience"
        folder = shlex.quote(str(self.folder))
        return (f'{self.folder}: {why}. To train it further, give {more}. To train its adapter on '
                f"other rows, give --adapter {folder} and another --out. To ask it a question: "
                f'python {script("generate.py")} --adapter {folder} "Câu hỏi của bạn"')

    @contextmanager
    def begun(self, training: Training) -> Iterator[None]:
        """A context in which the run's folder is locked. It creates the folder if necessary, and
        restores the newest checkpoint.

        Raises Refusal if another process has locked the folder.
        """
        with in_words(self.folder / LOCK):
            if not self.config.out:
                self.folder = make_next(self.config.model)
            self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder / LOCK, f"--out {self.folder}: another process trains there; wait "
                                        f"until it ends, or name another --out"):
            if checkpoint.newest_whole(self.folder, self.state.run)[0] != self.checkpoint:
                raise Refusal(f"--out {self.folder}: another process has trained there in between; "
                              f"give the same command again")
            try:
                checkpoint.tidy(self.folder)
                if has_our_card(self.folder):  # the model card describes an older result
                    (self.folder / CARD).unlink()
                resume.record_run(self.folder, self.config, self.examples,
                                  base_weights=self.base_weights, run=self.state.run)
                if self.checkpoint:
                    self.checkpoint = self.folder / f"checkpoint-{self.state.step}"
                    checkpoint.load(self.checkpoint, training)
                    self.follow_up(self.state)
                yield
                self.settle()
            finally:
                if self.writing:
                    wait([self.writing])
                (self.folder / LOCK).unlink(missing_ok=True)  # the folder may have been moved

    def evaluation_due(self) -> bool:
        """Whether the run must be evaluated now. It is evaluated before the first step, every
        --eval-every steps and after the last step, but only once at each of these steps."""
        state, every = self.state, self.config.eval_every
        return state.evaluated < state.step and (
            state.step in (0, self.steps) or (every > 0 and state.step % every == 0))

    def save_due(self) -> bool:
        """Whether a checkpoint must be written now: after an evaluation, and every --save-every
        steps."""
        state, every = self.state, self.config.save_every
        return state.step > 0 and (state.evaluated == state.step
                                   or (every > 0 and state.step % every == 0))

    def rate(self, score: Score | None) -> None:
        """Record a score, and whether the current adapter is the best so far.

        The best adapter has the lowest validation loss. Without held-out rows it is the newest
        adapter. Before the first update the adapter is untrained, so it does not count as the best.
        A loss that is not finite is never the lowest. --patience compares each evaluation also
        with the evaluation of the untrained adapter.
        """
        state = self.state
        state.evaluated = state.step
        if score and state.step:
            lowest = min(state.best_loss, state.first.get("val_loss", math.inf))
            state.not_better = 0 if score.val_loss < lowest else state.not_better + 1
        if state.step == 0:
            if score and not math.isfinite(score.val_loss):
                raise RunFailed(_("{folder}: the validation loss is not finite before the first "
                                  "step: the base does not work in {dtype}; use another "
                                  "--dtype, or download the base again", folder=self.folder,
                                  dtype=self.config.dtype))
            if score:
                state.first = record(score)
        elif state.applied and (score is None or score.val_loss < state.best_loss):
            state.best_loss = score.val_loss if score else math.inf
            state.best_step, state.best = state.step, record(score)

    def save(self, training: Training) -> None:
        """Write a checkpoint, unless nothing has changed since the last checkpoint. Another thread
        writes it while the next steps are computed. `settle` waits until it is written."""
        state = self.state
        if state.step == 0 or self.saved == (state.step, state.evaluated):
            return
        self.settle()
        snapshot = checkpoint.take(training, dataclasses.asdict(state))
        self.saved = state.step, state.evaluated
        self.writing = self.writer.submit(self.write, snapshot, dataclasses.replace(state))

    def write(self, snapshot: checkpoint.Snapshot, state: RunState) -> None:
        # A run that resumes from this checkpoint does not write the earlier rows of metrics.jsonl
        # again. So these rows must be on the disk, to survive a power failure.
        flush(self.folder / METRICS)
        self.checkpoint = checkpoint.write(self.folder, snapshot)
        self.follow_up(state)

    def settle(self) -> None:
        """Wait until the newest checkpoint is written. Raises Refusal if the write failed."""
        writing, self.writing = self.writing, None
        if writing:
            writing.result()

    def follow_up(self, state: RunState) -> None:
        """Do the work that follows a new checkpoint with this state.

        If the checkpoint's adapter is the best so far, it is copied to the run's folder. Then all
        checkpoints are removed except the newest --keep and the best one. A resumed run repeats
        this work, because it may have been killed before the work was done.
        """
        if state.best_step == state.step > 0:
            for name in checkpoint.ADAPTER:
                with whole_file(self.folder / name) as file:
                    shutil.copyfile(self.checkpoint / name, file)
        if not state.skipped_in_row:  # after a skipped step, the only good checkpoint may be older
            checkpoint.remove_older(self.folder, self.config.keep, state.best_step, state.step)

    def still_due(self, every: int) -> int:
        """Some work is due at step 0, every `every` steps and after the last step. Return how many
        times it is still due, the current step included."""
        return 1 if every <= 0 else -(-self.steps // every) - (self.state.step - 1) // every

    def check(self) -> None:
        """Raise RunFailed after --max-skipped skipped steps in a row, because these steps train
        nothing. Raise Refusal if the newest checkpoint could not be written."""
        if self.writing and self.writing.done():
            self.settle()
        state = self.state
        if state.skipped_in_row >= self.config.max_skipped:
            first, last = state.step - state.skipped_in_row + 1, state.step
            skipped = plural(state.skipped_in_row, _("step {n} was", n=last),
                             _("steps {first} to {last} were", first=first, last=last))
            raise RunFailed(_("{folder}: {skipped} skipped because the gradients are not finite; "
                              "{advice}", folder=self.folder, skipped=skipped,
                              advice=self.advice()))

    def check_result(self, loss: float) -> None:
        """Raise RunFailed if the run has no usable result, because more than half of its steps were
        skipped, or because `loss` is not finite.

        loss: the last validation loss, or the last training loss if no rows are held out.
        """
        state = self.state
        if 2 * state.skipped > state.step:
            fault = _("{n} of {steps} steps were skipped because their gradients are not finite",
                      n=state.skipped, steps=state.step)
        elif not math.isfinite(loss):
            fault = (_("the last validation loss is not finite") if state.first
                     else _("the last loss is not finite"))
        else:
            return
        raise RunFailed(_("{folder}: {fault}; {advice}", folder=self.folder, fault=fault,
                          advice=self.advice()))

    def check_adapter(self) -> None:
        """Raise RunFailed if a run that has ended has no usable adapter."""
        if not self.state.best_step:
            raise RunFailed(_("{folder}: this run has ended, after step {n}, without a usable "
                              "adapter; {advice}", folder=self.folder, n=self.state.step,
                              advice=self.advice()))

    def advice(self) -> str:
        """A text for the user of a failed run: which checkpoint to continue from.

        The text names the best checkpoint. Without held-out rows, it names the newest checkpoint
        before the last update, because this update may have caused the failure.
        """
        self.settle()
        state = self.state
        last_applied = state.step - state.skipped_in_row
        good = checkpoint.newest(self.folder, state.best_step if state.first else last_applied - 1)
        if good is None or not state.applied:
            wider = {"fp16": _(" or --dtype bf16 or fp32"), "bf16": _(" or --dtype fp32")}
            return _("no good checkpoint was saved; start a new run with another --out and a lower "
                     "--lr{wider}", wider=wider.get(self.config.dtype, ""))
        return _("the last good checkpoint is {good}; continue from it with --adapter {good}, a "
                 "lower --lr and another --out", good=shlex.quote(str(good)))


def has_our_card(folder: Path) -> bool:
    """Whether a folder has a model card with the line MARK. Such a card may be overwritten."""
    card = folder / CARD
    return card.is_file() and MARK in card.read_text("utf-8", errors="replace")


def restored(folder: Path) -> RunState:
    """Read the run's state from a checkpoint. Older checkpoints have no field `evaluated`; the run
    was evaluated at their step."""
    state = checkpoint.read_state(folder)
    return RunState(**{"evaluated": state.get("step", 0), **state})


def make_next(model: str) -> Path:
    """Create the folder of next_number. If another run creates it first, try the next number."""
    while True:
        folder = next_number(model)
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue


def record(score: Score | None) -> dict:
    """The values of a score that a checkpoint stores; empty without held-out rows."""
    if score is None:
        return {}
    return dict(val_loss=score.val_loss, stops=score.stops, answers=score.answers)


def next_number(model: str) -> Path:
    """runs/<model>-NNN, where NNN is one more than the highest number in runs/."""
    name = re.sub(r"[^\w.-]+", "-", Path(model).name).strip("-") or "run"
    taken = [int(m[1]) for d in Path("runs").glob(f"{name}-*")
             if (m := re.fullmatch(re.escape(name) + r"-(\d+)", d.name))]
    return Path("runs") / f"{name}-{max(taken, default=0) + 1:03}"
