"""A row becomes token ids, and which of them carry loss.

The loss is on the answer and its `</s>`, never on the question. PhoGPT's tokenizer adds neither
`<s>` nor `</s>` by itself, so `</s>` is appended here; padding is another token (`<pad>`, 3), so
that no mask made from padding can swallow it. A model whose `</s>` was masked never stops.

>>> TEMPLATES["4b-chat"].question.format("Phở là gì?")
'### Câu hỏi: Phở là gì?\\n### Trả lời:'
"""

import unicodedata
from dataclasses import dataclass

from phogpt_raw.data.rows import Row
from phogpt_raw.refusal import Refusal

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
    """`ids`, of which the last `answer` carry loss; `cut` where the answer did not fit."""

    ids: list[int]
    answer: int
    cut: bool
    where: str


def choose_template(tokenizer, asked: str = "auto") -> tuple[str, str]:
    """(name, reason): by the tokenizer's chat template, else by its vocabulary."""
    if asked != "auto":
        return asked, "asked for by --template"
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": "?"}]
        shown = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        for name, template in TEMPLATES.items():
            if shown == template.question.format("?"):
                return name, "the tokenizer's chat template"
        raise Refusal(f"the tokenizer's chat template is none of PhoGPT's (it gives {shown!r}); "
                      f"name one with --template")
    if len(tokenizer) > BLOOM_SIZED:
        return "7b5-instruct", f"a vocabulary of {len(tokenizer):,} is 7B5's"
    return "4b-chat", f"a vocabulary of {len(tokenizer):,} is 4B's"


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
    kept = answer[:room]
    return Example(prompt + kept, len(kept), len(kept) < len(answer), row.where)
