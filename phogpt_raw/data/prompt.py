"""A conversation becomes token ids and targets: the token that each position must predict.

The loss is on every answer and its `</s>`, never on a question; on a `{text}` it is on all of it.
PhoGPT's tokenizer adds neither `<s>` nor `</s>` by itself, so `</s>` is appended here; padding is
another token (`<pad>`, 3), so that a mask of the padding never masks `</s>` too. A model whose
`</s>` was masked never stops.

A conversation of several turns is what PhoGPT-4B-Chat's own chat template makes of it: each answer
ends with `</s>`, and the next question follows. Neither template has a place for a system text; it
goes before the first question.

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
AT_ONCE = 512  # conversations that are tokenized together
LETTERS = 256  # no token has more, so a text of more letters for each token does not fit
PART = 1 << 16  # characters of a long text that are tokenized at once


@dataclass(frozen=True)
class Template:
    """VinAI's text around a question, the text between question and answer, and the text between an
    answer and the next question."""

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

    `cut` where the answer did not fit; `where` is file:line.
    """

    ids: list[int]
    targets: list[int]
    cut: bool = False
    where: str = ""

    @property
    def supervised(self) -> int:
        """Tokens that carry loss."""
        return len(self.targets) - self.targets.count(IGNORED)

    @property
    def asks(self) -> bool:
        """Whether it begins with a question; a text carries loss from its second token on."""
        return self.targets[0] == IGNORED

    @property
    def prompt(self) -> list[int]:
        """The ids before the first supervised token: what an answer is generated from."""
        first = next(i for i, target in enumerate(self.targets) if target != IGNORED)
        return self.ids[: first + 1]


def next_tokens(ids: list[int], start: int, stop: int | None = None) -> list[int]:
    """Targets that supervise the tokens ids[start:stop], each predicted from the position before.

    The first token of a document has no position before it and is never predicted.

    >>> next_tokens([5, 6, 7, 8], start=2)
    [-100, 7, 8, -100]
    """
    stop = len(ids) if stop is None else stop
    return [ids[i + 1] if start <= i + 1 < stop else IGNORED for i in range(len(ids))]


def encode_text(tokenizer, text: str) -> list[int]:
    """Ids of plain text; a `</s>` typed by a person stays text."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True,
                     verbose=False)["input_ids"]


def encode_prompt(tokenizer, template: Template, prompt: str) -> list[int]:
    """Ids of the question in its template; a prompt that already contains a template does not
    change."""
    prompt = unicodedata.normalize("NFC", prompt).strip()
    if prompt.startswith("### Câu hỏi:") and prompt.endswith("### Trả lời:"):
        return encode_text(tokenizer, prompt)
    return encode_text(tokenizer, template.question.format(prompt))


def encode_row(tokenizer, template: Template, row: Conversation, max_len: int) -> Example:
    """One conversation as one document of at most max_len tokens; raises Refusal where a question
    leaves no room for an answer."""
    [(_row, found)] = encode(tokenizer, template, [row], max_len, "cut", Findings())
    if isinstance(found, Bad):
        raise Refusal(str(found))
    return found[0]


def encode(tokenizer, template: Template, rows: Iterable[Conversation], max_len: int,
           too_long: str | None, findings: Findings
           ) -> Iterator[tuple[Conversation, list[Example] | Bad]]:
    """Each conversation and its documents of at most max_len tokens: usually one.

    too_long: what happens to one that does not fit. `cut`: its end is left out; `split`: it becomes
    several; `drop`: it becomes none; None: a text is split, anything else cut. An answer that is
    cut has no `</s>`: it must not teach the model to stop in mid-sentence.
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
    """The reason why a conversation cannot be shortened to fit."""


def spoken(template: Template, row: Conversation, end: str, findings: Findings) -> Iterator[str]:
    """The text of each question in the template, and of each answer."""
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
    """Questions and answers, as ids, in documents of at most max_len tokens. All rounds are in one,
    if they fit or if `too_long` is cut; raises TooLong where a question leaves no room."""
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
            if number and too_long == "cut":  # no room for another round
                cut = True
                break
            raise TooLong(f"the question alone has {len(question)} tokens, --max-len is {max_len}; "
                          f"raise it or shorten the row")
        room = max_len - len(ids) - len(question)
        targets += next_tokens(question + answer[:room], start=len(question))
        ids += question + answer[:room]
        cut = room < len(answer)
        if cut and too_long == "cut":
            break
    return [*found, Example(ids, targets, cut, where)]


def encode_plain(tokenizer, row: Conversation, max_len: int, too_long: str) -> list[Example]:
    """A text and its `</s>` in documents of at most max_len tokens; the loss is on all of it but
    the first token of each document."""
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
    if len(starts) > 2 and starts[-1] - starts[-2] == 1:  # a lone </s> would predict nothing
        starts[-2] -= 1
    pieces = [ids[start:stop] for start, stop in pairwise(starts)]
    return [Example(piece, next_tokens(piece, start=0), False, row.where) for piece in pieces]


def parts(text: str) -> Iterator[str]:
    """A long text in parts whose tokens are those of the whole: a part begins with a space."""
    start = 0
    while start < len(text):
        stop = text.find(" ", start + PART)
        stop = len(text) if stop < 0 else stop
        yield text[start:stop]
        start = stop


def encode_texts(tokenizer, texts: list[str]) -> list[list[int]]:
    """`encode_text` of many."""
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True,
                     return_attention_mask=False, verbose=False)["input_ids"] if texts else []
