"""An answer on the screen while it is written."""

import shutil
import sys
import time
from dataclasses import dataclass, field

from rich.cells import cell_len

from phogpt_raw.decode.engine import Engine
from phogpt_raw.decode.sampling import Sampling
from phogpt_raw.decode.text import TextStream, loops
from phogpt_raw.messages import _, plural


@dataclass(frozen=True)
class Generation:
    """How answers are generated. most: tokens of an answer; stops: texts before which it ends;
    capture: run steps as CUDA graphs on a GPU."""

    most: int
    sampling: Sampling
    seed: int = 0
    stops: tuple[str, ...] = ()
    capture: bool = True


@dataclass
class Written:
    """What was written so far. ids: without `</s>`; ended: by `</s>` or a stop string, not by the
    number of tokens; first_s, then_s: seconds until the first token, and from there on."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    ended: bool = False
    first_s: float = 0.0
    then_s: float = 0.0
    screen: "Screen" = field(default_factory=lambda: Screen(terminal_width()))

    def show(self, text: str) -> None:
        """Print text, without white space at its beginning (4B's template begins with a space)."""
        text = text if self.text else text.lstrip()
        self.text += text
        if self.screen.width:
            self.screen.resize(terminal_width())
        print(self.screen.put(text), end="", flush=True)

    def end(self) -> None:
        """Print what was held back, and end the line."""
        print(self.screen.end())


class Screen:
    """Text broken between words where a terminal of `width` columns ends; width 0: as it is.

    A word is held back until it is complete, so that it is never split over two lines.
    """

    def __init__(self, width: int):
        self.width, self.column, self.word = width, 0, ""

    def put(self, text: str) -> str:
        """What of this text, and of what was held back, can be shown now."""
        if not self.width:
            return text
        shown = ""
        for letter in text:
            if not letter.isspace():
                self.word += letter
                continue
            shown += self.place() + letter
            self.column = 0 if letter == "\n" else self.column + 1
        return shown

    def resize(self, width: int) -> None:
        """The terminal has `width` columns now, and has wrapped longer lines."""
        if width and width != self.width:
            self.width, self.column = width, self.column % width

    def place(self) -> str:
        """The complete word, on the next line where this one has no room for it."""
        word, self.word = self.word, ""
        size = cell_len(word)
        wraps = self.column > 0 and self.column + size >= self.width  # a space needs room too
        self.column = size if wraps else self.column + size
        return f"\n{word}" if wraps else word

    def end(self) -> str:
        return self.place()


def terminal_width() -> int:
    """Columns of the terminal that shows the output; 0 where none does."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 0


def stream(engine: Engine, tokenizer, prompt: list[int], most: int, written: Written,
           how: Generation) -> None:
    """Answer one prompt in an engine without other requests, and print the answer meanwhile.

    most: tokens of this answer. `written` is filled as the answer grows: After Ctrl-C it contains
    the text that is on the screen.
    """
    text, begun = TextStream(tokenizer, how.stops), time.perf_counter()
    engine.add(0, prompt, most, how.seed, how.sampling)
    try:
        for token in engine.run():
            now = time.perf_counter() - begun
            written.first_s = written.first_s or now
            written.then_s = now - written.first_s
            if token.id is None:
                written.ended = written.ended or token.stopped
                continue
            written.ids.append(token.id)
            written.show(text.put(token.id))
            if text.stopped:
                written.ended = True
                engine.drop(0)
        written.show(text.end())
    finally:
        engine.drop(0)
        written.end()


def remarks(written: Written, most: int, full: bool) -> list[str]:
    """Remarks for the user on an answer that has ended. most: the limit of its tokens; full:
    whether the model's context is full."""
    lines = []
    if written.ended and not written.text.strip():
        lines.append(_("(the answer is empty)"))
    if not written.ended:
        lines.append(
            _("(cut at {n}: the model was made for no more)", n=tokens(most)) if full else
            _("(cut at {n}: raise --max-new-tokens for a longer answer)", n=tokens(most)))
    if loops(written.ids):
        lines.append(_("(the answer repeats itself; --repetition-penalty 1.2 may help, or more "
                       "training)"))
    return lines


def tokens(count: int) -> str:
    return plural(count, _("1 token"), _("{n:,} tokens", n=count))


def say(line: str) -> None:
    """A line that is not part of an answer."""
    print(line, file=sys.stderr, flush=True)
