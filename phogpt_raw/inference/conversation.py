"""A conversation in a terminal, or through a pipe with one question per line.

The conversation is stored as token ids, in the base's own history format (decode/history.py). The
ids of an answer are exactly those that the model generated. The engine keeps the keys and values of
earlier turns, so each turn computes only its new tokens. If the conversation becomes too long for
the model, its oldest turns are left out.
"""

import re
import signal
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from phogpt_raw.data.prompt import encode_prompt, encode_text
from phogpt_raw.decode.engine import Engine
from phogpt_raw.inference import memory_plan
from phogpt_raw.inference.loading import Found
from phogpt_raw.inference.question import checked
from phogpt_raw.inference.streaming import Generation, Written, remarks, say, stream, terminal_width
from phogpt_raw.messages import _, plural
from phogpt_raw.refusal import Refusal

RESET, QUIT, HELP = ("/xoá", "/xóa", "/reset"), ("/thoát", "/quit", "/exit"), ("/?", "/help")
PROMPT = "> "


@dataclass(frozen=True)
class Turn:
    """A question, and the token ids of its answer with `</s>`."""

    question: str
    answer: list[int]


class Conversation:
    """The turns that the model reads. If the text becomes too long, the oldest turns are left out.

    most: the largest number of tokens in an answer. system: a text before the oldest question that
    the model reads.
    """

    def __init__(self, found: Found, most: int, system: str = ""):
        self.found, self.most, self.system = found, most, system
        self.turns: list[Turn] = []

    def ask(self, question: str) -> tuple[list[int], int, int]:
        """Begin the next turn. Returns (prompt, the largest number of tokens in the answer, the
        number of turns that are left out).

        The prompt is a list of token ids. The oldest turns are left out until an answer of `most`
        tokens fits, or until no turn remains. Raises Refusal if the question alone is too long. In
        that case no turn is left out.
        """
        holds, before, prompt = self.found.shape.max_seq_len, self.turns, self.prompt(question)
        while self.turns and holds - len(prompt) < self.most:
            self.turns = self.turns[1:]
            prompt = self.prompt(question)
        if len(prompt) >= holds:
            self.turns = before
            raise Refusal(f"the question is too long: {len(prompt):,} tokens; with its answer it "
                          f"can have at most {holds:,}")
        self.question = question
        return prompt, min(self.most, holds - len(prompt)), len(before) - len(self.turns)

    def prompt(self, question: str) -> list[int]:
        """The token ids of the turns and a new question, in the base's own history format."""
        tokenizer, template = self.found.tokenizer, self.found.template
        newline, told, ids = encode_text(tokenizer, template.between), self.system, []
        for turn in (*self.turns, Turn(question, [])):
            said = f"{told}\n{turn.question}" if told else turn.question
            ids += [*encode_prompt(tokenizer, template, said), *turn.answer]
            ids += newline if turn.answer else []
            told = ""
        return ids

    def answered(self, ids: list[int]) -> None:
        """Store the answer to the last question. The answer may be incomplete."""
        self.turns.append(Turn(self.question, [*ids, self.found.tokenizer.eos_token_id]))


def chat(found: Found, how: Generation, system: str = "") -> None:
    """Read questions and print answers until the input ends or the user quits."""
    live = sys.stdin.isatty()
    if not live and hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    conversation = Conversation(found, how.most, system)
    work = memory_plan.conversation(found, how)
    used = memory_plan.check_fits(found, work)
    if found.card.device == "cuda":
        say(memory_plan.in_short(found, work, used))
    model, tokenizer = found.load(), found.tokenizer
    if live:
        edit_lines()
        say(_("/xoá (/reset) starts a new conversation, /thoát (/quit) ends the program, Ctrl-C "
              "stops an answer"))
    with Engine(model, eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id, rows=1,
                capture=how.capture) as engine, CtrlC() as ctrl_c:
        for question in questions(live, ctrl_c):
            if question.lower() in RESET:
                conversation.turns.clear()
                say(_("(a new conversation)"))
            else:
                turn(conversation, question, engine, how, ctrl_c)


class CtrlC:
    """Raises KeyboardInterrupt for Ctrl-C only inside `with ends()` blocks, at most once in each.

    If the user holds Ctrl-C down, many signals arrive. Without this class, a signal that arrives
    between two turns, or while an answer is stored, would end the program.
    """

    def __init__(self):
        self.expected = False

    def __enter__(self) -> "CtrlC":
        self.before = signal.signal(signal.SIGINT, self.arrived)
        return self

    def __exit__(self, *error) -> None:
        signal.signal(signal.SIGINT, self.before)

    def arrived(self, _number, _frame) -> None:
        if self.expected:
            self.expected = False
            raise KeyboardInterrupt

    @contextmanager
    def ends(self) -> Iterator[None]:
        """A context in which Ctrl-C raises KeyboardInterrupt."""
        self.expected = True
        try:
            yield
        finally:
            self.expected = False


def turn(conversation: Conversation, question: str, engine: Engine, how: Generation,
         ctrl_c: CtrlC) -> None:
    """Answer one question of a conversation. In a terminal, Ctrl-C stops only the answer."""
    holds = conversation.found.shape.max_seq_len
    try:
        prompt, most, left_out = conversation.ask(question)
    except Refusal as refusal:
        return say(f"({refusal})")
    if left_out:
        say(plural(left_out, _("(the oldest turn is left out: the model reads {most:,} tokens)",
                               most=holds),
                   _("(the oldest {n} turns are left out: the model reads {most:,} tokens)",
                     n=left_out, most=holds)))
    written = Written()
    try:
        with ctrl_c.ends():
            stream(engine, conversation.found.tokenizer, prompt, most, written, how)
        full = len(prompt) + most == holds
        for line in remarks(written, most, full):
            say(line)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        say(_("(stopped by hand)"))
    conversation.answered(written.ids)


def questions(live: bool, ctrl_c: CtrlC):
    """Yield the questions from the terminal or the pipe, until the input ends or is /thoát.

    In a terminal, Ctrl-C discards the line that is being typed. With a pipe, Ctrl-C ends the
    program.
    """
    while True:
        try:
            with ctrl_c.ends():
                line = typed() if live else next_line()
        except EOFError:
            return say("") if live else None
        except KeyboardInterrupt:
            if not live:
                raise
            say("")
            say(_("(/thoát or Ctrl-D ends the program)"))
            continue
        except Refusal as refusal:
            say(f"({refusal})")
            continue
        question = unicodedata.normalize("NFC", line).strip()
        if question.lower() in QUIT:
            return
        if question.lower() in HELP:
            say(_("/xoá (/reset) starts a new conversation, /thoát (/quit) ends the program, "
                  "Ctrl-C stops an answer"))
        elif re.fullmatch(r"/\w+", question) and question.lower() not in RESET:
            say(_("({command} is not a command; type /xoá or /thoát)", command=question))
        elif question:
            yield question


def typed() -> str:
    """The line that the user types. If the output is not a terminal, the prompt goes to stderr."""
    if terminal_width():
        return as_text(input(PROMPT))
    print(PROMPT, end="", file=sys.stderr, flush=True)
    return as_text(input())


def as_text(line: str) -> str:
    """The text of a line, or "" if it is blank. Raises Refusal if the line cannot be decoded."""
    return checked(line) if line.strip() else ""


def next_line() -> str:
    """The next line of a pipe.

    Raises EOFError after the last line, and Refusal if the line cannot be decoded.
    """
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return as_text(line)


def edit_lines() -> None:
    """Enable arrow keys and a history of lines. Several lines that are pasted together become one
    question."""
    try:
        import readline
    except ImportError:  # Windows has no readline
        return
    readline.parse_and_bind("set enable-bracketed-paste on")
