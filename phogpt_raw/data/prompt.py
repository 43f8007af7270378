"""Convert a conversation to token ids and targets. A target is the token that a position must
predict.

The loss is on every answer and its `</s>`, and never on a question. In a `{text}` row, the loss is
on the whole text. PhoGPT's tokenizer does not add `<s>` or `</s>`, so `</s>` is appended here.
Padding has a token of its own, `<pad>` (id 3), so a mask of the padding never masks `</s>`. If
`</s>` were masked in training, the model would never learn to end an answer.

Several turns are written as in PhoGPT-4B-Chat's own chat template: each answer ends with `</s>`,
and the next question follows. Neither template has a place for a system text, so this module puts
the system text before the first question.

>>> TEMPLATES["4b-chat"].question.format("Phở là gì?")
'### Câu hỏi: Phở là gì?\\n### Trả lời:'
"""

import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, pairwise

from phogpt_raw.data.conversations import SYSTEM, TEXT, USER, Conversation
from phogpt_raw.data.records import Bad, Findings
from phogpt_raw.refusal import Refusal

IGNORED = -100  # the target of a position that carries no loss, as in torch
HALF = "\ufffd"  # what a tokenizer decodes from the bytes of an incomplete character
AT_ONCE = 512  # number of conversations that are tokenized together
# No token has more than LETTERS characters. So only the first LETTERS * (max_len + 1) characters of
# a text are encoded.
LETTERS = 256
PART = 1 << 16  # characters of a long text that are tokenized at once


@dataclass(frozen=True)
class Template:
    """A prompt template of VinAI.

    question: the text around a question. gap: the text between a question and its answer. between:
    the text between an answer and the next question.
    """

    question: str
    gap: str
    between: str


TEMPLATES = {
    "7b5-instruct": Template("### Câu hỏi:\n{}\n\n### Trả lời:", gap="", between="\n\n"),
    "4b-chat": Template("### Câu hỏi: {}\n### Trả lời:", gap=" ", between="\n"),
}


@dataclass(frozen=True)
class Example:
    """A document: `targets[i]` is the token that position i must predict, or IGNORED.

    `cut` is True if the end of the document is missing because it did not fit. `where` is
    file:line.
    """

    ids: list[int]
    targets: list[int]
    cut: bool = False
    where: str = ""

    @property
    def supervised(self) -> int:
        """The number of tokens that carry loss."""
        return len(self.targets) - self.targets.count(IGNORED)

    @property
    def asks(self) -> bool:
        """True if the document begins with a question. A plain text carries loss from its second
        token on, so its first target is not IGNORED."""
        return self.targets[0] == IGNORED

    @property
    def prompt(self) -> list[int]:
        """The ids before the first supervised token. An answer is generated from these ids."""
        first = next(i for i, target in enumerate(self.targets) if target != IGNORED)
        return self.ids[: first + 1]


def next_tokens(ids: list[int], start: int, stop: int | None = None) -> list[int]:
    """Return targets that supervise the tokens ids[start:stop].

    Each token is predicted at the position before it.
    The first token of a document has no position before it and is never predicted.

    >>> next_tokens([5, 6, 7, 8], start=2)
    [-100, 7, 8, -100]
    """
    stop = len(ids) if stop is None else stop
    return [ids[i + 1] if start <= i + 1 < stop else IGNORED for i in range(len(ids))]


def encode_text(tokenizer, text: str) -> list[int]:
    """Return the ids of plain text. A `</s>` in the text is not encoded as the end token."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True,
                     verbose=False)["input_ids"]


def encode_prompt(tokenizer, template: Template, prompt: str) -> list[int]:
    """Return the ids of a question in its template. If the prompt already begins and ends like a
    template, no template is added."""
    prompt = unicodedata.normalize("NFC", prompt).strip()
    if prompt.startswith("### Câu hỏi:") and prompt.endswith("### Trả lời:"):
        return encode_text(tokenizer, prompt)
    return encode_text(tokenizer, template.question.format(prompt))


def encode_row(tokenizer, template: Template, row: Conversation, max_len: int) -> Example:
    """Encode one conversation as one document of at most max_len tokens.

    Raises Refusal if the question leaves no room for an answer.
    """
    [(_row, found)] = encode(tokenizer, template, [row], max_len, "cut", Findings())
    if isinstance(found, Bad):
        raise Refusal(str(found))
    return found[0]


def decoded(tokenizer, ids: list[int]) -> str:
    """Return the text of ids. A token may end inside a character, so the first or last character
    may be incomplete; it is left out."""
    return tokenizer.decode(ids).strip(HALF)


def encode(tokenizer, template: Template, rows: Iterable[Conversation], max_len: int,
           too_long: str | None, findings: Findings
           ) -> Iterator[tuple[Conversation, list[Example] | Bad]]:
    """Yield (conversation, documents) for each conversation. There is usually one document. If the
    conversation is bad, a Bad takes the place of the documents.

    A document has at most max_len tokens. too_long decides about a conversation with more tokens.
    `cut`: the end is left out. `split`: the conversation becomes several documents. `drop`: it
    becomes no document. None: a plain text is split, and other conversations are cut. A cut answer
    has no `</s>`, because it must not teach the model to stop in mid-sentence.
    """
    rows = iter(rows)
    while some := list(islice(rows, AT_ONCE)):
        pieces = [piece for row in some if row.turns[0][0] != TEXT
                  for piece in spoken(template, row, tokenizer.eos_token, findings)]
        encoded = iter(encode_texts(tokenizer, [piece[: LETTERS * (max_len + 1)]
                                                for piece in pieces]))
        between = encode_text(tokenizer, template.between)
        for row in some:
            try:
                if row.turns[0][0] == TEXT:
                    found = encode_plain(tokenizer, row, max_len, too_long or "split")
                else:
                    turns = sum(role != SYSTEM for role, _text in row.turns)
                    rounds = [(question, [*answer, tokenizer.eos_token_id]) for question, answer
                              in zip(*[islice(encoded, turns)] * 2, strict=True)]
                    found = in_documents(rounds, between, max_len, too_long or "cut", row.where)
            except TooLong as fault:
                if too_long != "drop":
                    yield row, Bad(row.where, str(fault))
                    continue
                found = []
            if not found:
                findings.note("dropped", row.where)
            elif any(document.cut for document in found):
                findings.note("cut", row.where)
            elif len(found) > 1:
                findings.note("split", row.where)
            yield row, found


class TooLong(Exception):
    """A conversation cannot be shortened to fit. The text is the reason."""


def spoken(template: Template, row: Conversation, end: str, findings: Findings) -> Iterator[str]:
    """Yield the text of each question in the template, and the text of each answer."""
    before = ""
    for role, said in row.turns:
        if role == SYSTEM:
            findings.note("system", row.where)
            before = said + "\n"
        elif role == USER:
            yield template.question.format(before + said)
            before = ""
        else:
            yield template.gap + said.removesuffix(end).rstrip()


def in_documents(rounds: list[tuple[list[int], list[int]]], between: list[int], max_len: int,
                 too_long: str, where: str) -> list[Example]:
    """Put rounds into documents of at most max_len tokens. A round is a question and its answer, as
    ids.

    All rounds are in one document if they fit, or if `too_long` is cut. Raises TooLong if a
    question leaves no room for its answer.
    """
    total = sum(len(question) + len(answer) for question, answer in rounds)
    if total + len(between) * (len(rounds) - 1) > max_len and too_long == "drop":
        return []
    found, ids, targets, cut = [], [], [], False
    for number, (question, answer) in enumerate(rounds):
        if too_long == "split" and ids and \
                len(ids) + len(between) + len(question) + len(answer) > max_len:
            found.append(Example(ids, targets, cut, where))
            ids, targets, cut = [], [], False
        question = between + question if ids else question
        if len(ids) + len(question) >= max_len:
            if number and too_long == "cut":  # this round does not fit
                cut = True
                break
            raise TooLong(f"the question has {len(question)} tokens, but --max-len is {max_len}; "
                          f"raise --max-len, or shorten the row")
        room = max_len - len(ids) - len(question)
        targets += next_tokens(question + answer[:room], start=len(question))
        ids += question + answer[:room]
        cut = room < len(answer)
        if cut and too_long == "cut":
            break
    return [*found, Example(ids, targets, cut, where)]


def encode_plain(tokenizer, row: Conversation, max_len: int, too_long: str) -> list[Example]:
    """Encode a text and its `</s>` as documents of at most max_len tokens.

    The loss is on all tokens except the first token of each document.
    """
    [(_role, text)] = row.turns
    ids: list[int] = []
    for part in parts(text):
        ids += encode_text(tokenizer, part)
        if too_long != "split" and len(ids) >= max_len:
            break
    ids.append(tokenizer.eos_token_id)
    if len(ids) > max_len and too_long == "drop":
        return []
    if len(ids) > max_len and too_long == "cut":
        return [Example(ids[:max_len], next_tokens(ids[:max_len], start=0), True, row.where)]
    starts = [*range(0, len(ids), max_len), len(ids)]
    if len(starts) > 2 and starts[-1] - starts[-2] == 1:  # a document of only </s> has no loss
        starts[-2] -= 1
    pieces = [ids[start:stop] for start, stop in pairwise(starts)]
    return [Example(piece, next_tokens(piece, start=0), False, row.where) for piece in pieces]


def parts(text: str) -> Iterator[str]:
    """Yield a long text in parts. The tokens of the parts are the same as those of the whole text,
    because each part after the first begins with a space."""
    start = 0
    while start < len(text):
        stop = text.find(" ", start + PART)
        stop = len(text) if stop < 0 else stop
        yield text[start:stop]
        start = stop


def encode_texts(tokenizer, texts: list[str]) -> list[list[int]]:
    """Return the ids of many texts, each encoded as in `encode_text`."""
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True,
                     return_attention_mask=False, verbose=False)["input_ids"] if texts else []
