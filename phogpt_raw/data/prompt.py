"""A row becomes token ids, and the token that each position must predict.

The loss is on the answer and its `</s>`, never on the question. PhoGPT's tokenizer adds neither
`<s>` nor `</s>` by itself, so `</s>` is appended here; padding is another token (`<pad>`, 3), so
that no mask made from padding can swallow it. A model whose `</s>` was masked never stops.

>>> TEMPLATES["4b-chat"].question.format("Phở là gì?")
'### Câu hỏi: Phở là gì?\\n### Trả lời:'
"""

import unicodedata
from dataclasses import dataclass

from phogpt_raw.data.rows import Row
from phogpt_raw.messages import _
from phogpt_raw.refusal import Refusal

IGNORED = -100  # the target of a position that carries no loss, as in torch
BLOOM_SIZED = 100_000  # tokens; 7B5's vocabulary is 250,000, 4B's 20,480


@dataclass(frozen=True)
class Template:
    """VinAI's text around a question, and what stands between it and the answer."""

    question: str
    gap: str


TEMPLATES = {
    "7b5-instruct": Template("### Câu hỏi:\n{}\n\n### Trả lời:", gap=""),
    "4b-chat": Template("### Câu hỏi: {}\n### Trả lời:", gap=" "),
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


def choose_template(tokenizer, *asked: str) -> tuple[str, str]:
    """(name, reason): the first of those asked for that is not auto, else by the tokenizer's chat
    template, else by its vocabulary."""
    for name in asked:
        if name != "auto":
            return name, _("asked for by --template")
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": "?"}]
        try:
            shown = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # Jinja's, or whatever the template itself raises
            raise Refusal(f"the tokenizer's chat template cannot be used ({error}); name one of "
                          f"PhoGPT's with --template") from None
        for name, template in TEMPLATES.items():
            if shown == template.question.format("?"):
                return name, _("the tokenizer's chat template")
        raise Refusal(f"the tokenizer's chat template is none of PhoGPT's (it gives {shown!r}); "
                      f"name one with --template")
    if len(tokenizer) > BLOOM_SIZED:
        return "7b5-instruct", _("a vocabulary of {n:,} is 7B5's", n=len(tokenizer))
    return "4b-chat", _("a vocabulary of {n:,} is 4B's", n=len(tokenizer))


def encode_text(tokenizer, text: str) -> list[int]:
    """Ids of plain text; a `</s>` typed by a person stays text."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True,
                     verbose=False)["input_ids"]


def encode_prompt(tokenizer, template: Template, prompt: str) -> list[int]:
    """Ids of the question in its template; a prompt that already wears one is left as it is."""
    prompt = unicodedata.normalize("NFC", prompt).strip()
    if prompt.startswith("### Câu hỏi:") and prompt.endswith("### Trả lời:"):
        return encode_text(tokenizer, prompt)
    return encode_text(tokenizer, template.question.format(prompt))


def encode_row(tokenizer, template: Template, row: Row, max_len: int) -> Example:
    """The row as one document of at most max_len tokens.

    A cut answer has no `</s>`: it must not teach the model to stop in mid-sentence. Raises Refusal
    where the question alone leaves no room for an answer.
    """
    prompt = encode_prompt(tokenizer, template, row.prompt)
    if len(prompt) >= max_len:
        raise Refusal(f"{row.where}: the question alone has {len(prompt)} tokens, --max-len is "
                      f"{max_len}; raise it or shorten the row")
    response = row.response.removesuffix(tokenizer.eos_token).rstrip()
    answer = [*encode_text(tokenizer, template.gap + response), tokenizer.eos_token_id]
    room = max_len - len(prompt)
    ids = prompt + answer[:room]
    return Example(ids, next_tokens(ids, start=len(prompt)), room < len(answer), row.where)
