"""A conversation as token ids, in the history format of PhoGPT-4B-Chat.

The turns are joined as in the tokenizer's chat template. Each answer ends with `</s>`, and each
later question begins on a new line. PhoGPT-7B5-Instruct was published without a history format. Its
turns are joined as for 4B-Chat, but with an empty line before each later question.
"""

import unicodedata
from dataclasses import dataclass

from phogpt_raw.data.prompt import Template, encode_prompt, encode_text


@dataclass(frozen=True)
class Turn:
    """A question and its answer. The answer is None if the model must still write it."""

    question: str
    answer: str | None = None


def encode_history(tokenizer, template: Template, turns: list[Turn],
                   system: str = "") -> list[int]:
    """The token ids of a conversation. If the last turn has no answer, the ids end at the position
    where its answer begins.

    system: the system text. PhoGPT's templates have no place for it, so it is put before the first
    question.
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
