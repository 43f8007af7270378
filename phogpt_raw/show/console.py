"""What a run shows and writes down: a start card, one progress line, a summary, metrics.jsonl.

On a terminal the progress line is live; anywhere else it is a plain line now and then.
"""

import json
import math
import shlex
import sys
import time
from itertools import islice
from pathlib import Path

import torch
from rich.console import Console as Rich
from rich.table import Table
from tqdm import tqdm

out = Rich(highlight=False, soft_wrap=True)


def card(title: str, lines: dict[str, str]) -> None:
    """A titled list of name and value."""
    grid = Table.grid(padding=(0, 2))
    for name, value in lines.items():
        grid.add_row(f"[bold]{name}[/bold]", str(value).replace("[", r"\["))
    out.print(f"\n[bold cyan]{title}[/bold cyan]")
    out.print(grid)


def example(tokenizer, encoded) -> None:
    """One training example, the part that carries loss in brackets and colour."""
    split = len(encoded.ids) - encoded.answer
    question, answer = tokenizer.decode(encoded.ids[:split]), tokenizer.decode(encoded.ids[split:])
    out.print(f"\n[bold cyan]one training example[/bold cyan] ({encoded.where}; loss on the "
              f"{encoded.answer} of {len(encoded.ids)} tokens between ⟦ and ⟧)")
    out.print(question, markup=False, end="")
    out.print(f"⟦{answer}⟧", markup=False, style="bold green")


def say(text: str) -> None:
    """A line above the progress line."""
    tqdm.write(text, file=sys.stdout)


class Progress:
    """The live line, and DIR/metrics.jsonl behind it; rows after `step` are dropped (resume)."""

    def __init__(self, folder: Path, step: int, steps: int):
        self.file = folder / "metrics.jsonl"
        self.live = sys.stderr.isatty()
        self.bar = tqdm(total=steps, initial=step, disable=not self.live, dynamic_ncols=True,
                        unit="step", desc="training")
        self.steps, self.every = steps, max(1, steps // 10)
        self.seconds, self.taken, self.since = 0.0, 0, None
        kept = []
        if step and self.file.is_file():  # a row torn by a power cut is of a later step
            kept = [row for row in self.file.read_text("utf-8").splitlines()
                    if row.endswith("}") and json.loads(row)["step"] <= step]
        self.file.write_text("".join(row + "\n" for row in kept))

    def begin(self) -> None:
        """A step begins: its time runs from here."""
        self.since = time.perf_counter()

    def step(self, progress, stats, window, *, lr: float, scale: float) -> None:
        """Show and write a finished step; reading its loss waits for the card."""
        loss, grad_norm = float(stats.loss), float(stats.grad_norm)
        seconds = time.perf_counter() - self.since
        self.seconds, self.taken = self.seconds + seconds, self.taken + 1
        peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
        speed = window.tokens / seconds
        self.write(step=progress.step, loss=loss, lr=lr, grad_norm=grad_norm,
                   tokens=window.supervised, tokens_per_s=round(speed, 1),
                   peak_gib=peak and round(peak, 3), scale=scale, skipped=progress.skipped)
        text = f"loss {loss:.3f}, {speed:,.0f} tokens/s, " + (f"{peak:.2f} GiB" if peak else "CPU")
        self.line(progress, text)

    def without_tokens(self, progress) -> None:
        """A window whose rows carry no loss: nothing to learn, said and counted."""
        self.line(progress, "no supervised tokens in this window")

    def line(self, progress, text: str) -> None:
        if progress.skipped:
            text += f", {progress.skipped} skipped"
        self.bar.set_postfix_str(text)
        self.bar.update()
        step = progress.step
        if not self.live and (step % self.every == 0 or step in (1, self.steps)):
            left = (self.steps - step) * self.seconds / max(1, self.taken)
            print(f"step {step}/{self.steps}: {text}, {clock(left)} left", flush=True)

    def evaluated(self, step: int, score) -> None:
        if score:
            self.write(step=step, val_loss=score.val_loss, val_ppl=score.val_ppl,
                       stops=score.stops)
            say(f"step {step}: {score_line(score)}")

    def write(self, **row) -> None:
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v
               for k, v in row.items()}
        with self.file.open("a") as metrics:
            metrics.write(json.dumps(row) + "\n")

    def close(self) -> None:
        self.bar.close()


def score_line(score) -> str:
    text = f"validation loss {score.val_loss:.3f} (perplexity {score.val_ppl:.4g})"
    if score.stops is not None:
        text += f", {score.stops:.0%} of {len(score.answers)} answers stop by themselves"
    return text


def clock(seconds: float) -> str:
    """
    >>> clock(75), clock(3700)
    ('1 min 15 s', '1 h 01 min')
    """
    minutes, s = divmod(round(seconds), 60)
    h, m = divmod(minutes, 60)
    return f"{h} h {m:02} min" if h else f"{m} min {s:02} s" if m else f"{s} s"


def summary(run, questions: list[str], last, show: Progress) -> None:
    """What the run came to: losses, two held-out answers before and after, the next command."""
    show.close()
    progress, first = run.progress, run.progress.first
    lines = {"steps": f"{progress.step}, {show.seconds / max(1, show.taken):.2f} s each"
                      + (f"; {progress.skipped} skipped" if progress.skipped else "")}
    if last:
        lines["validation loss"] = (
            f"{first['val_loss']:.3f} before, {last.val_loss:.3f} after "
            f"({last.val_loss / first['val_loss'] - 1:+.0%})")
        if last.answers and first["answers"]:
            lines["answers that stop"] = (f"{first['stops']:.0%} before, {last.stops:.0%} after, "
                                          f"of {len(last.answers)}")
    kept = f"step {progress.best_step}" + (", the lowest validation loss" if last else ", the last")
    lines["adapter"] = f"{run.folder} ({kept})"
    card("done", lines)
    if last and last.answers and first["answers"]:
        out.print("\n[bold cyan]held-out questions[/bold cyan]")
        told = zip(questions, first["answers"], last.answers, strict=False)
        for question, before, after in islice(told, 2):
            out.print(f"\n{question}", markup=False)
            out.print(f"  before  {one_line(before)}", markup=False, style="dim")
            out.print(f"  after   {one_line(after)}", markup=False, style="green")
    asked = one_line(questions[2]) if len(questions) > 2 else "…"
    command = ["python", "generate.py", "--adapter", str(run.folder)]
    out.print(f"\nAsk it yourself:\n  {shlex.join(command)} {quoted(asked)}", markup=False)


def quoted(text: str) -> str:
    """In double quotes where these are safe in a shell, else as shlex does it."""
    return shlex.quote(text) if set('"$`\\!') & set(text) else f'"{text}"'


def one_line(text: str, width: int = 160) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[:width].rsplit(" ", 1)[0] + " …"
