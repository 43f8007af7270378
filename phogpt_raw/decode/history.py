"""A conversation as token ids, in the history format of PhoGPT-4B-Chat.

Its turns follow each other as in the tokenizer's chat template: each answer ends with `</s>`, and
each later question begins on a new line. PhoGPT-7B5-Instruct was published without a history
format; its turns are put together in the same way, with an empty line between them.
"""

import unicodedata
from dataclasses import dataclass

from phogpt_raw.data.prompt import Template, encode_prompt, encode_text


@dataclass(frozen=True)
class Turn:
    """A question and its answer; None where it is still to be written."""

    question: str
    answer: str | None = None


def encode_history(tokenizer, template: Template, turns: list[Turn],
                   system: str = "") -> list[int]:
    """Ids of a conversation, up to where the answer of its last turn begins.

    system: the system text. PhoGPT has no place for it, so it is put before the first question.
    """
    ids = []
    for n, turn in enumerate(turns):
        told = f"{system.strip()}\n" if system.strip() and not n else ""
        if n:
            ids += encode_text(tokenizer, template.between)
        ids += encode_prompt(tokenizer, template, told + turn.question)
        if turn.answer is not None:
            answer = unicodedata.normalize("NFC", turn.answer).strip()
            ids += [*encode_text(tokenizer, template.gap + answer), tokenizer.eos_token_id]
    return ids
