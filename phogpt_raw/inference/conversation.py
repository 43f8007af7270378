"""A conversation in a terminal, or through a pipe with one question per line.

The conversation is kept as token ids in the base's own history format (decode/history.py), exactly
as the model wrote its answers. The engine keeps their keys and values, so a turn costs its own
tokens only. When the conversation outgrows the model, its oldest turns are left out.
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
    """Turns, and the part of them that the model reads. system: a text before the first question,
    also after the oldest turns were left out."""

    def __init__(self, found: Found, most: int, system: str = ""):
        self.found, self.most, self.system = found, most, system
        self.turns: list[Turn] = []

    def ask(self, question: str) -> tuple[list[int], int, int]:
        """(prompt, tokens that the answer may have, oldest turns left out) of the next question.

        Turns are left out until the whole answer fits, or none is left; Refusal where the question
        alone is too long, which leaves out none.
        """
        holds, before, prompt = self.found.shape.max_seq_len, self.turns, self.prompt(question)
        while self.turns and holds - len(prompt) < self.most:
            self.turns = self.turns[1:]
            prompt = self.prompt(question)
        if len(prompt) >= holds:
            self.turns = before
            raise Refusal(f"the question is too long: {len(prompt):,} tokens of the {holds:,} that "
                          f"the model was made for")
        self.question = question
        return prompt, min(self.most, holds - len(prompt)), len(before) - len(self.turns)

    def prompt(self, question: str) -> list[int]:
        """The turns and a question, in the base's own history format."""
        tokenizer, template = self.found.tokenizer, self.found.template
        newline, told, ids = encode_text(tokenizer, template.between), self.system, []
        for turn in (*self.turns, Turn(question, [])):
            said = f"{told}\n{turn.question}" if told else turn.question
            ids += [*encode_prompt(tokenizer, template, said), *turn.answer]
            ids += newline if turn.answer else []
            told = ""
        return ids

    def answered(self, ids: list[int]) -> None:
        """Keep the answer, whole or not, to the question asked last."""
        self.turns.append(Turn(self.question, [*ids, self.found.tokenizer.eos_token_id]))


def chat(found: Found, how: Generation, system: str = "") -> None:
    """Read questions and print answers until the input ends or the user leaves."""
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
        say(_("/xoá (/reset) begins a new conversation, /thoát (/quit) leaves; Ctrl-C ends an "
              "answer"))
    with Engine(model, eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id, rows=1,
                capture=how.capture) as engine, CtrlC() as ctrl_c:
        for question in questions(live, ctrl_c):
            if question.lower() in RESET:
                conversation.turns.clear()
                say(_("(a new conversation)"))
            else:
                turn(conversation, question, engine, how, ctrl_c)


class CtrlC:
    """Raises KeyboardInterrupt for Ctrl-C only inside the blocks that expect it, and once for each
    block.

    A key that is held down sends many signals. A signal between two turns, or while an answer is
    stored, would end the program.
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
        """A block that Ctrl-C ends."""
        self.expected = True
        try:
            yield
        finally:
            self.expected = False


def turn(conversation: Conversation, question: str, engine: Engine, how: Generation,
         ctrl_c: CtrlC) -> None:
    """Answer one question of a conversation; in a terminal Ctrl-C ends the answer alone."""
    holds = conversation.found.shape.max_seq_len
    try:
        prompt, most, left_out = conversation.ask(question)
    except Refusal as refusal:
        return say(f"({refusal})")
    if left_out:
        say(plural(left_out, _("(the oldest turn is left out: the model holds {most:,} tokens)",
                               most=holds),
                   _("(the oldest {n} turns are left out: the model holds {most:,} tokens)",
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
    """What is typed, or the lines of a pipe, until the end or /thoát. In a terminal, Ctrl-C drops
    the line that is being typed; with a pipe it ends the program."""
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
            say(_("(/thoát or Ctrl-D leaves)"))
            continue
        except Refusal as refusal:
            say(f"({refusal})")
            continue
        question = unicodedata.normalize("NFC", line).strip()
        if question.lower() in QUIT:
            return
        if question.lower() in HELP:
            say(_("/xoá (/reset) begins a new conversation, /thoát (/quit) leaves; Ctrl-C ends an "
                  "answer"))
        elif re.fullmatch(r"/\w+", question) and question.lower() not in RESET:
            say(_("({command} is no command; /xoá, /thoát)", command=question))
        elif question:
            yield question


def typed() -> str:
    """The line that is typed. If the output is not a terminal, the prompt is not written into
    it."""
    if terminal_width():
        return as_text(input(PROMPT))
    print(PROMPT, end="", file=sys.stderr, flush=True)
    return as_text(input())


def as_text(line: str) -> str:
    """A line as text, "" if it is blank; raises Refusal if it cannot be decoded."""
    return checked(line) if line.strip() else ""


def next_line() -> str:
    """The next line of a pipe; raises EOFError after the last, Refusal if the line cannot be
    decoded."""
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return as_text(line)


def edit_lines() -> None:
    """Arrow keys and a history, and pasted lines as one question."""
    try:
        import readline
    except ImportError:  # Windows
        return
    readline.parse_and_bind("set enable-bracketed-paste on")
