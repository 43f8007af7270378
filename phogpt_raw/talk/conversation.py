"""A conversation in a terminal, or through a pipe with a question a line.

The conversation is kept as token ids in the base's own history format (decode/history.py), exactly
as the model wrote its answers. The engine keeps their keys and values, so a turn costs its own
tokens only. When the conversation outgrows the model, its oldest turns are left out.
"""

import re
import sys
from dataclasses import dataclass, replace

from phogpt_raw.data.prompt import encode_prompt, encode_text
from phogpt_raw.decode.engine import Engine
from phogpt_raw.messages import _
from phogpt_raw.refusal import Refusal
from phogpt_raw.talk.loading import Found
from phogpt_raw.talk.question import checked
from phogpt_raw.talk.streaming import Generation, Written, remarks, say, stream

RESET, QUIT, HELP = ("/xoá", "/xóa", "/reset"), ("/thoát", "/quit", "/exit"), ("/?", "/help")
PROMPT = "> "


@dataclass(frozen=True)
class Turn:
    """A question as typed; token ids of it in its template, and of its answer with `</s>`."""

    asked: str
    question: list[int]
    answer: list[int]


class Conversation:
    """Turns as token ids. system: stands before the first question that is left."""

    def __init__(self, found: Found, most: int, system: str = ""):
        self.found, self.most, self.system = found, most, system
        self.turns: list[Turn] = []

    def ask(self, question: str) -> tuple[list[int], int, int]:
        """(prompt, tokens that the answer may have, oldest turns left out) of the next question.

        Turns are left out until the whole answer fits, or none is left; Refusal where the question
        alone is too long.
        """
        self.asked, self.question = question, self.encoded(question, first=not self.turns)
        left_out = 0
        while self.turns and self.room() < self.most:
            self.turns.pop(0)
            left_out += 1
            if self.turns:
                first = self.turns[0]
                self.turns[0] = replace(first, question=self.encoded(first.asked, first=True))
            else:
                self.question = self.encoded(question, first=True)
        if self.room() < 1:
            raise Refusal(f"the question is too long: {len(self.question):,} tokens of the "
                          f"{self.found.shape.max_seq_len:,} that the model was made for")
        return self.prompt(), min(self.most, self.room()), left_out

    def encoded(self, question: str, first: bool) -> list[int]:
        told = f"{self.system}\n" if self.system and first else ""
        return encode_prompt(self.found.tokenizer, self.found.template, told + question)

    def room(self) -> int:
        return self.found.shape.max_seq_len - len(self.prompt())

    def prompt(self) -> list[int]:
        tokenizer = self.found.tokenizer
        newline = encode_text(tokenizer, self.found.template.between)
        ids = []
        for turn in self.turns:
            ids += [*turn.question, *turn.answer, *newline]
        return ids + self.question

    def answered(self, ids: list[int]) -> None:
        """Keep the answer, whole or not, to the question asked last."""
        answer = [*ids, self.found.tokenizer.eos_token_id]
        self.turns.append(Turn(self.asked, self.question, answer))


def chat(found: Found, how: Generation, system: str = "") -> None:
    """Read questions and print answers until the input ends or a person leaves."""
    live = sys.stdin.isatty()
    if not live and hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    conversation = Conversation(found, how.most, system)
    model, tokenizer = found.load(), found.tokenizer
    if live:
        edit_lines()
        say(_("/xoá (/reset) begins anew, /thoát (/quit) leaves; Ctrl-C ends an answer"))
    with Engine(model, eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id, rows=1,
                capture=how.capture) as engine:
        for question in questions(live):
            if question.lower() in RESET:
                conversation.turns.clear()
                say(_("(a new conversation)"))
            else:
                turn(conversation, question, engine, how)


def turn(conversation: Conversation, question: str, engine: Engine, how: Generation) -> None:
    """Answer one question of a conversation; Ctrl-C ends the answer alone."""
    try:
        prompt, most, left_out = conversation.ask(question)
    except Refusal as refusal:
        return say(f"({refusal})")
    if left_out:
        say(_("(the oldest {n} turns are left out: the model holds {most:,} tokens)", n=left_out,
              most=conversation.found.shape.max_seq_len))
    written = Written()
    try:
        stream(engine, conversation.found.tokenizer, prompt, most, written, how)
        full = len(prompt) + most == conversation.found.shape.max_seq_len
        for line in remarks(written, most, full):
            say(line)
    except KeyboardInterrupt:
        say(_("(stopped by hand)"))
    conversation.answered(written.ids)


def questions(live: bool):
    """What is typed, or the lines of a pipe, until the end or /thoát. A terminal's Ctrl-C throws
    away the line that is being typed."""
    while True:
        try:
            line = input(PROMPT) if live else next_line()
        except EOFError:
            return print() if live else None
        except KeyboardInterrupt:
            print()
            say(_("(/thoát or Ctrl-D leaves)"))
            continue
        except Refusal as refusal:
            say(f"({refusal})")
            continue
        question = line.strip()
        if question.lower() in QUIT:
            return
        if question.lower() in HELP:
            say(_("/xoá (/reset) begins anew, /thoát (/quit) leaves; Ctrl-C ends an answer"))
        elif re.fullmatch(r"/\w+", question) and question.lower() not in RESET:
            say(_("({command} is no command; /xoá, /thoát)", command=question))
        elif question:
            yield question


def next_line() -> str:
    """The next line of a pipe; EOFError after the last, Refusal where it is no text."""
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return checked(line) if line.strip() else ""


def edit_lines() -> None:
    """Arrow keys and a history, and pasted lines as one question."""
    try:
        import readline
    except ImportError:  # Windows
        return
    readline.parse_and_bind("set enable-bracketed-paste on")
