"""Print an answer while the model generates it."""

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
    """Settings of generation.

    most: the largest number of tokens in an answer. stops: an answer ends before the first of these
    strings. capture: True if steps run as CUDA graphs on a GPU.
    """

    most: int
    sampling: Sampling
    seed: int = 0
    stops: tuple[str, ...] = ()
    capture: bool = True


@dataclass
class Written:
    """The part of an answer that has been generated.

    ids: its token ids, without `</s>`. ended: True if `</s>` or a stop string ended the answer,
    False if the limit of tokens ended it. first_s: seconds until the first token. then_s: seconds
    from the first token to the newest.
    """

    ids: list[int] = field(default_factory=list)
    text: str = ""
    ended: bool = False
    first_s: float = 0.0
    then_s: float = 0.0
    screen: "Screen" = field(default_factory=lambda: Screen(terminal_width()))

    def show(self, text: str) -> None:
        """Print text. White space before the answer is removed, because the answers of 4B begin
        with a space."""
        text = text if self.text else text.lstrip()
        self.text += text
        if self.screen.width:
            self.screen.resize(terminal_width())
        print(self.screen.put(text), end="", flush=True)

    def end(self) -> None:
        """Print the last word, which Screen has held back, and end the line."""
        print(self.screen.end())


class Screen:
    """Breaks lines between words, for a terminal of `width` columns. If `width` is 0, lines stay
    whole.

    A word is held back until it is complete, so that it is never split over two lines.
    """

    def __init__(self, width: int):
        self.width, self.column, self.word = width, 0, ""

    def put(self, text: str) -> str:
        """Add `text`; return the text that can be shown now, up to the last complete word."""
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
        """Use a new width. The terminal itself has already wrapped lines that were too long."""
        if width and width != self.width:
            self.width, self.column = width, self.column % width

    def place(self) -> str:
        """Return the complete word. If it does not fit into the current line, it follows a line
        break."""
        word, self.word = self.word, ""
        size = cell_len(word)
        wraps = self.column > 0 and self.column + size >= self.width  # keeps 1 column for a space
        self.column = size if wraps else self.column + size
        return f"\n{word}" if wraps else word

    def end(self) -> str:
        return self.place()


def terminal_width() -> int:
    """The width of the terminal in columns, or 0 if the output is not a terminal."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 0


def stream(engine: Engine, tokenizer, prompt: list[int], most: int, written: Written,
           how: Generation) -> None:
    """Answer one prompt, and print the answer while it is generated.

    The engine must have no other requests. most: the largest number of tokens in this answer.
    `written` is updated for each token. So after Ctrl-C it contains the text on the screen.
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
    """Remarks for the user about an answer that has ended.

    most: the largest number of tokens in the answer. full: True if this limit is the end of the
    model's context.
    """
    lines = []
    if written.ended and not written.text.strip():
        lines.append(_("(the answer is empty)"))
    if not written.ended:
        lines.append(
            _("(cut at {n}: the model's context is full)", n=tokens(most)) if full else
            _("(cut at {n}: raise --max-new-tokens for a longer answer)", n=tokens(most)))
    if loops(written.ids):
        lines.append(_("(the answer repeats itself; --repetition-penalty 1.2 may help, or more "
                       "training)"))
    return lines


def tokens(count: int) -> str:
    return plural(count, _("1 token"), _("{n:,} tokens", n=count))


def say(line: str) -> None:
    """Print a line that is not part of an answer, to standard error."""
    print(line, file=sys.stderr, flush=True)
