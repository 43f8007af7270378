"""A question from the user: as an argument, on standard input, or as a line of a pipe."""

import codecs
import os
import sys

from phogpt_raw.refusal import Refusal


def read_question(given: str) -> str:
    """The question of the command line, or of standard input for `-`."""
    return checked(from_stdin() if given == "-" else given)


def from_stdin() -> str:
    """Standard input as text, with or without the byte order mark that Windows writes."""
    read = getattr(sys.stdin, "buffer", None)
    if read is None:
        return sys.stdin.read()
    content = read.read()
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return content.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError:
        raise Refusal("the question is not UTF-8; save it as UTF-8, or type it again") from None


def checked(question: str) -> str:
    """The question without a byte order mark; Refusal where it is empty or no text.

    Where the system's encoding is not UTF-8, Python turns the bytes of an argument that it cannot
    decode into lone surrogates. They are read again as UTF-8.
    """
    try:
        question = os.fsencode(question).decode("utf-8") if broken(question) else question
    except UnicodeError:
        raise Refusal("the question is not UTF-8; convert it, or type it again") from None
    question = question.removeprefix("\ufeff")
    lost = next((letter for letter in question if letter in "\0\ufffd\ufffe\uffff"), None)
    if lost:
        raise Refusal(f"the question holds U+{ord(lost):04X}, which no text has: it was saved or "
                      f"converted in another encoding; save it as UTF-8")
    if not question.strip():
        raise Refusal("the question is empty")
    return question


def broken(text: str) -> bool:
    """Whether a text has lone surrogates."""
    return any("\ud800" <= letter <= "\udfff" for letter in text)
