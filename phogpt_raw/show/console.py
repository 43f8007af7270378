"""Print the progress of a run: a progress line, the evaluations and a summary.

On a terminal the progress line is updated in place. In a file or a pipe, about ten lines are
printed over the whole run.
"""

import shlex
import sys
import textwrap
from itertools import islice

from rich.console import Console as Rich
from rich.text import Text
from tqdm import tqdm

from phogpt_raw.files import script
from phogpt_raw.messages import _, plural
from phogpt_raw.refusal import Refusal
from phogpt_raw.training.checkpoint import newest
from phogpt_raw.training.evaluate import Score
from phogpt_raw.training.metrics import StepRow
from phogpt_raw.training.run import Run
from phogpt_raw.training.shutdown import GracefulShutdown

out = Rich(highlight=False, soft_wrap=True)


def listing(title: str, lines: dict[str, str]) -> None:
    """Print a title, and a line for each name and value. On a terminal a long value is wrapped, and
    its later lines are indented to the start of the value."""
    heading(title)
    indent = max(map(len, lines)) + 2
    for name, value in lines.items():
        text = wrapped(str(value), indent)
        out.print(Text(name, "bold") + Text(" " * (indent - len(name)) + text))


def paragraph(text: str, style: str = "") -> None:
    """Print text. On a terminal it is wrapped between words."""
    out.print(Text(wrapped(text), style))


def wrapped(text: str, indent: int = 0) -> str:
    """Text for a terminal, wrapped between words, with later lines indented by `indent` columns. If
    the output is not a terminal, the text is unchanged."""
    if not out.is_terminal:
        return text
    return textwrap.fill(text, max(20, out.width - indent), break_long_words=False,
                         break_on_hyphens=False).replace("\n", "\n" + " " * indent)


def heading(title: str) -> None:
    out.print(Text(f"\n{title}", "bold cyan"))


def say(text: str) -> None:
    """Print a line above the progress line. On a terminal it is wrapped between words."""
    tqdm.write(wrapped(text), file=sys.stdout)


class Display:
    """The progress line of a run, with the remaining time. If the line cannot be written,
    `shutdown` stops the run."""

    def __init__(self, run: Run, shutdown: GracefulShutdown):
        self.run, self.shutdown = run, shutdown
        self.live = sys.stderr.isatty()
        self.bar = tqdm(total=run.steps, initial=run.state.step, disable=not self.live,
                        dynamic_ncols=True,
                        bar_format="{n_fmt}/{total_fmt} |{bar:10}| {desc}")
        self.latest = _("first step")  # later: the last step's values, without the remaining time
        self.bar.set_description_str(_("evaluating") if run.evaluation_due() else self.latest)
        self.step_seconds, self.evaluation_seconds = Mean(), Mean()

    def __enter__(self) -> "Display":
        return self

    def __exit__(self, kind, error, _traceback) -> None:
        """Close the progress line. Raise KeyboardInterrupt and Refusal again, with a text that says
        from which checkpoint the run can be resumed."""
        with self.shutdown.printing():
            self.bar.set_description_str(self.latest)
            self.bar.close()
        if kind is KeyboardInterrupt:
            raise KeyboardInterrupt(_("stopped by hand {rest}", rest=stopped(self.run))) from None
        if kind is Refusal:
            raise Refusal(_("{error}. The run stopped {rest}", error=error,
                            rest=stopped(self.run))) from None

    def step(self, row: StepRow, seconds: float) -> None:
        """Show a finished step, before the evaluation that may follow it."""
        self.step_seconds.add(seconds)
        memory = _("CPU") if row.peak_gib is None else f"{row.peak_gib:.2f} GiB"
        text = _("loss {loss:.3f}, {speed:,.0f} tokens/s, {memory}", loss=row.loss,
                 speed=row.tokens_per_s, memory=memory)
        if row.skipped:
            text += _(", {n} skipped", n=row.skipped)
        self.latest = text
        text += _(", {time} left", time=clock(self.seconds_left()))
        steps = self.run.steps
        with self.shutdown.printing():
            self.bar.set_description_str(text)
            self.bar.update()
            if not self.live and (row.step % max(1, steps // 10) == 0 or row.step in (1, steps)):
                print(_("step {step}/{steps}: {text}", step=row.step, steps=steps, text=text),
                      flush=True)

    def seconds_left(self) -> float:
        """The estimated seconds of the remaining steps and evaluations."""
        run = self.run
        return ((run.steps - run.state.step) * self.step_seconds.value
                + run.still_due(run.config.eval_every) * self.evaluation_seconds.value)

    def evaluation(self, score: Score | None) -> None:
        with self.shutdown.printing():
            self.bar.set_description_str(self.latest)
            if score:
                self.evaluation_seconds.add(score.seconds)
                say(_("step {step}: {score}", step=self.run.state.step, score=score_line(score)))


def stopped(run: Run) -> str:
    """A text about a run that stops without saving: its step and its newest checkpoint."""
    run.settle()
    saved = newest(run.folder, up_to=run.state.step)  # checkpoints of later steps are damaged
    if saved is None:
        return _("after step {n}; no checkpoint was saved yet", n=run.state.step)
    return _("after step {n}; with --out {folder} it resumes from {checkpoint}",
             n=run.state.step, folder=shlex.quote(str(run.folder)), checkpoint=saved.name)


def ended_early(run: Run, why: str, arguments: list[str]) -> None:
    """Print that a run was saved before its last step, and the command that resumes it."""
    print(_("{why}: ended after step {n} of {steps}", why=why, n=run.state.step, steps=run.steps),
          file=sys.stderr)
    if run.state.step == 0:
        return print(_("nothing was trained yet, so nothing is saved"), file=sys.stderr)
    if not run.config.out:
        arguments = [*arguments, "--out", str(run.folder)]
    print(_("saved; resume with:\n  {command}",
            command=f"python {script('train.py')} {shlex.join(arguments)}"), file=sys.stderr)


class Mean:
    """The mean of all values added so far; 0 if there are none."""

    def __init__(self):
        self.total, self.count = 0.0, 0

    def add(self, value: float) -> None:
        self.total, self.count = self.total + value, self.count + 1

    @property
    def value(self) -> float:
        return self.total / max(1, self.count)


def score_line(score: Score) -> str:
    text = _("validation loss {loss:.3f} (perplexity {ppl:.4g})", loss=score.val_loss,
             ppl=score.val_ppl)
    if score.stops is not None:
        text += _("; answers that stop: {n} of {of}", of=len(score.answers),
                  n=round(score.stops * len(score.answers)))
    return text


def clock(seconds: float) -> str:
    """A duration in seconds as text.

    >>> clock(75), clock(3700)
    ('1 min 15 s', '1 h 01 min')
    """
    minutes, s = divmod(round(seconds), 60)
    h, m = divmod(minutes, 60)
    if h:
        return _("{h} h {m:02} min", h=h, m=m)
    return _("{m} min {s:02} s", m=m, s=s) if m else _("{s} s", s=s)


def summary(run: Run, questions: list[str], display: Display) -> None:
    """Print the result of a run: losses, two held-out answers before and after training, and a
    command that asks the trained model a question."""
    # first and best are empty if no rows are held out
    state, first, best = run.state, run.state.first, run.state.best
    steps = str(state.step)
    if display.step_seconds.count:
        steps += _(", {seconds:.2f} s each", seconds=display.step_seconds.value)
    if state.skipped:
        steps += _("; {n} skipped", n=state.skipped)
    lines = {_("steps"): steps}
    if first:
        lines[_("validation loss")] = _("{before:.3f} before, {after:.3f} after",
                                        before=first["val_loss"], after=best["val_loss"])
        if best["answers"] and first["answers"]:
            lines[_("answers that stop")] = _(
                "{before:.0%} before, {after:.0%} after, of {n}", before=first["stops"],
                after=best["stops"], n=len(best["answers"]))
    no_better = bool(first) and best["val_loss"] >= first["val_loss"]
    which = (_("step {n}, the last", n=state.best_step) if not first
             else _("step {n}, the best after training began", n=state.best_step) if no_better
             else _("step {n}, the lowest validation loss", n=state.best_step))
    lines[_("adapter")] = f"{run.folder} ({which})"
    about = [name for name in ("README.md", "loss.png", "loss.svg")
             if (run.folder / name).is_file()]
    if about:
        lines[_("other files")] = ", ".join(about)
    early = state.step < run.steps
    ended = plural(state.not_better,
                   _("ended early: the validation loss was no lower in 1 evaluation"),
                   _("ended early: the validation loss was no lower in {n} evaluations",
                     n=state.not_better))
    listing(ended if early else _("done"), lines)
    if no_better:
        out.print()
        paragraph(_("The training did not improve the model on the held-out rows: at no step is "
                    "the validation loss lower than before training. Try a lower --lr, or more "
                    "rows."))
    if first and best["answers"] and first["answers"]:
        heading(_("held-out questions"))
        shown = zip(questions, first["answers"], best["answers"], strict=False)
        for question, before, after in islice(shown, 2):
            out.print()
            paragraph(question)
            for name, answer, style in ((_("before"), before, "dim"), (_("after"), after, "green")):
                out.print(Text(f"  {name:<7} " + wrapped(one_line(answer), 10), style))
    question = one_line(questions[2]) if len(questions) > 2 else "Câu hỏi của bạn"
    command = f"python {script('generate.py')} --adapter {shlex.quote(str(run.folder))}"
    out.print("\n" + _("Ask the trained model:"), markup=False)
    out.print(f"  {command} {quoted(question)}", markup=False)


def quoted(text: str) -> str:
    """Text quoted for a shell. It gets double quotes, or the quotes of shlex.quote if it contains a
    character that is special inside double quotes."""
    return shlex.quote(text) if set('"$`\\!') & set(text) else f'"{text}"'


def one_line(text: str, width: int = 160) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[:width].rsplit(" ", 1)[0] + " …"
