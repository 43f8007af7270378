"""A run's folder: its name, its configuration, the state of the run and its best adapter.

DIR/config.json, row_hashes.json, metrics.jsonl, checkpoint-N/, and the result,
adapter_model.safetensors with adapter_config.json: the adapter of the lowest validation loss, the
last where nothing is held out. The model card, README.md, is written last: a run that has taken all
its steps but has no card was killed in between, and is finished when it is started again.
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
    """The state of a run: steps taken, how many of them were skipped, the best and the first
    score."""

    step: int = 0
    evaluated: int = -1  # the last step after which the run was evaluated
    skipped: int = 0
    skipped_in_row: int = 0
    best_loss: float = math.inf
    best_step: int = 0
    not_better: int = 0  # evaluations since the lowest validation loss, that before training too
    first: dict = field(default_factory=dict)  # score before training: val_loss, stops, answers
    best: dict = field(default_factory=dict)  # the same of the adapter that was kept
    planned: int = 0  # steps that the run should take; 0 in checkpoints of before this was kept
    run: str = ""  # its identity, by which a checkpoint of another run is noticed

    @property
    def applied(self) -> int:
        return self.step - self.skipped

    def count(self, *, skipped: bool) -> None:
        self.step += 1
        self.skipped += skipped
        self.skipped_in_row = self.skipped_in_row + 1 if skipped else 0


class Run:
    """The folder of a run, new or resumed. `examples`: the training and the held-out ones; a
    resumed run must have the same."""

    def __init__(self, config: Config, steps: int, examples: Examples):
        self.folder = (expanded(config.out) if config.out
                       else next_number(config.model))
        self.config, self.steps, self.examples = config, steps, examples
        self.planned = steps  # when its newest checkpoint was saved
        self.state = RunState(planned=steps)
        self.base_weights = None
        self.saved = None  # the step and the last evaluation that the newest checkpoint holds
        self.writer = ThreadPoolExecutor(1)
        self.writing: Future | None = None  # of the newest checkpoint
        self.checkpoint, self.damaged = checkpoint.newest_whole(
            self.folder, resume.recorded_identity(self.folder))
        if self.checkpoint:
            resume.check_same(self.folder, config, examples)
            self.state = restored(self.checkpoint)
            self.planned, self.state.planned = self.state.planned, steps
            self.saved = self.state.step, self.state.evaluated
            if self.ended:
                self.check_adapter()
                if (self.folder / CARD).is_file():
                    raise Refusal(self.nothing_left())
        elif self.damaged:
            raise Refusal(f"{self.folder}: no checkpoint can be used ({'; '.join(self.damaged)}); "
                          f"name another --out")
        elif (self.folder / "adapter_model.safetensors").is_file():
            raise Refusal(f"{self.folder}: holds an adapter but no checkpoint to go on from; name "
                          f"another --out, or start from it with --adapter "
                          f"{shlex.quote(str(self.folder))}")
        else:
            resume.check_place(self.folder)

    def over(self, base_weights: str) -> None:
        """Record the base that the run trains over. Raises Refusal if a resumed run began over
        another base."""
        if self.checkpoint:
            resume.check_base(self.folder, self.config, base_weights)
        else:
            self.state.run = resume.identity(self.config, self.examples, base_weights)
        self.base_weights = base_weights

    @property
    def ended(self) -> bool:
        """Whether all steps are taken and evaluated, or the last --patience evaluations were not
        better."""
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
            why = (f"this run ended early, after step {state.step} of {self.steps}: the validation "
                   f"loss was no lower in {times} (--patience {patience})")
            more = f"a --patience above {state.not_better}, or none"
        folder = shlex.quote(str(self.folder))
        return (f'{self.folder}: {why}. To train it further, give {more}. To train its adapter on '
                f"other rows, give --adapter {folder} and another --out. To ask it: python "
                f'{script("generate.py")} --adapter {folder} "Câu hỏi của bạn"')

    @contextmanager
    def begun(self, training: Training) -> Iterator[None]:
        """Lock the run's folder, which is created if it does not exist, and restore the newest
        checkpoint.

        Raises Refusal if another process has locked it.
        """
        with in_words(self.folder / LOCK):
            if not self.config.out:
                self.folder = make_next(self.config.model)
            self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder / LOCK, f"--out {self.folder}: another process trains there; wait "
                                        f"for its end, or name another --out"):
            if checkpoint.newest_whole(self.folder, self.state.run)[0] != self.checkpoint:
                raise Refusal(f"--out {self.folder}: another process has trained there meanwhile; "
                              f"give the same command again")
            try:
                checkpoint.tidy(self.folder)
                if has_our_card(self.folder):  # it describes a result that is out of date
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
        """Whether the run must be evaluated now: before the first step, every --eval-every steps,
        and at the end; once each."""
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
        """Remember the score, and whether this adapter is the best so far: the one of the lowest
        validation loss; the newest where nothing is held out.

        Before the first update the score is only remembered, because the adapter is not trained
        yet. A loss that is not finite is never the best. --patience also counts evaluations that
        are not better than the untrained adapter.
        """
        state = self.state
        state.evaluated = state.step
        if score and state.step:
            lowest = min(state.best_loss, state.first.get("val_loss", math.inf))
            state.not_better = 0 if score.val_loss < lowest else state.not_better + 1
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

    def save(self, training: Training) -> None:
        """Write a checkpoint, unless nothing has changed since the last. It is written while the
        next steps are computed; `settle` waits for it."""
        state = self.state
        if state.step == 0 or self.saved == (state.step, state.evaluated):
            return
        self.settle()
        snapshot = checkpoint.take(training, dataclasses.asdict(state))
        self.saved = state.step, state.evaluated
        self.writing = self.writer.submit(self.write, snapshot, dataclasses.replace(state))

    def write(self, snapshot: checkpoint.Snapshot, state: RunState) -> None:
        flush(self.folder / METRICS)  # else a power failure may take rows that are not written anew
        self.checkpoint = checkpoint.write(self.folder, snapshot)
        self.follow_up(state)

    def settle(self) -> None:
        """Wait until the newest checkpoint is written. Raises Refusal where it could not be."""
        writing, self.writing = self.writing, None
        if writing:
            writing.result()

    def follow_up(self, state: RunState) -> None:
        """Finish a checkpoint of that state: copy its adapter to the run's folder if it is the best
        one; remove older checkpoints except the newest --keep and the best one. This is repeated
        when a run is resumed, because the run may have been killed before it."""
        if state.best_step == state.step > 0:
            for name in checkpoint.ADAPTER:
                with whole_file(self.folder / name) as file:
                    shutil.copyfile(self.checkpoint / name, file)
        if not state.skipped_in_row:  # else an older one may be the only good one
            checkpoint.remove_older(self.folder, self.config.keep, state.best_step, state.step)

    def still_due(self, every: int) -> int:
        """How often something is due from this step on, this one included."""
        return 1 if every <= 0 else -(-self.steps // every) - (self.state.step - 1) // every

    def check(self) -> None:
        """Raise RunFailed after --max-skipped skipped steps in a row, since nothing is learned;
        Refusal where the newest checkpoint could not be written."""
        if self.writing and self.writing.done():
            self.settle()
        state = self.state
        if state.skipped_in_row >= self.config.max_skipped:
            raise RunFailed(_(
                "{folder}: steps {first} to {last} were skipped, their gradients are not finite; "
                "{advice}", folder=self.folder, first=state.step - state.skipped_in_row + 1,
                last=state.step, advice=self.advice()))

    def check_result(self, loss: float) -> None:
        """Raise RunFailed if the run has no usable result: most steps were skipped, or its last
        loss (the validation loss, if there is one) is not finite."""
        state = self.state
        if 2 * state.skipped > state.step:
            fault = _("{n} of {steps} steps were skipped, their gradients are not finite",
                      n=state.skipped, steps=state.step)
        elif not math.isfinite(loss):
            fault = (_("the last validation loss is not finite") if state.first
                     else _("the last loss is not finite"))
        else:
            return
        raise RunFailed(_("{folder}: {fault}; {advice}", folder=self.folder, fault=fault,
                          advice=self.advice()))

    def check_adapter(self) -> None:
        """Raise RunFailed if a run has ended and no step gave an adapter that can be used."""
        if not self.state.best_step:
            raise RunFailed(_("{folder}: this run has ended, after step {n}, without a usable "
                              "adapter; {advice}", folder=self.folder, n=self.state.step,
                              advice=self.advice()))

    def advice(self) -> str:
        """Advice on the checkpoint from which a failed run can continue: the best one. Without
        held-out rows, the newest before the last update, because that update may have caused the
        failure."""
        self.settle()
        state = self.state
        last_applied = state.step - state.skipped_in_row
        good = checkpoint.newest(self.folder, state.best_step if state.first else last_applied - 1)
        if good is None or not state.applied:
            return _("no good checkpoint was saved; start a new run with a lower --lr, or --dtype "
                     "bf16 or fp32, and another --out")
        return _("the last good checkpoint is {good}; go on from it with --adapter {good}, a "
                 "lower --lr and another --out", good=shlex.quote(str(good)))


def has_our_card(folder: Path) -> bool:
    """Whether a folder has a model card that this program has written and nobody has changed."""
    card = folder / CARD
    return card.is_file() and MARK in card.read_text("utf-8", errors="replace")


def restored(folder: Path) -> RunState:
    """The state in a checkpoint. A checkpoint that does not record the field `evaluated` was
    evaluated."""
    state = checkpoint.read_state(folder)
    return RunState(**{"evaluated": state.get("step", 0), **state})


def make_next(model: str) -> Path:
    """Make the folder of next_number, which another run may take at the same time."""
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
    """runs/<model>-NNN with the first number not yet taken."""
    name = re.sub(r"[^\w.-]+", "-", Path(model).name).strip("-") or "run"
    taken = [int(m[1]) for d in Path("runs").glob(f"{name}-*")
             if (m := re.fullmatch(re.escape(name) + r"-(\d+)", d.name))]
    return Path("runs") / f"{name}-{max(taken, default=0) + 1:03}"
