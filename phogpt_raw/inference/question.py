"""Read a question of the user: an argument, the text of standard input, or a line of a pipe."""

import codecs
import os
import sys

from phogpt_raw.refusal import Refusal


def read_question(given: str) -> str:
    """The question of the command line. If it is `-`, the question is read from standard input."""
    return checked(from_stdin() if given == "-" else given)


def from_stdin() -> str:
    """Standard input as text. Its encoding is UTF-8, or UTF-16 with a byte order mark (Windows)."""
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
    """The question without a byte order mark. Raises Refusal if it is empty or not text.

    If the system's encoding is not UTF-8, Python cannot decode some bytes of an argument, and
    replaces these bytes with lone surrogates. This function decodes these bytes again, as UTF-8.
    """
    try:
        question = os.fsencode(question).decode("utf-8") if broken(question) else question
    except UnicodeError:
        raise Refusal("the question is not UTF-8; convert it, or type it again") from None
    question = question.removeprefix("\ufeff")
    lost = next((letter for letter in question if letter in "\0\ufffd\ufffe\uffff"), None)
    if lost:
        raise Refusal(f"the question holds U+{ord(lost):04X}, which is not part of a text; it was "
                      f"saved in another encoding; save it as UTF-8")
    if not question.strip():
        raise Refusal("the question is empty")
    return question


def broken(text: str) -> bool:
    """True if a text contains lone surrogates."""
    return any("\ud800" <= letter <= "\udfff" for letter in text)
