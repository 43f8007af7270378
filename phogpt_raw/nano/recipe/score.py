"""Score nano's answers to the held-out questions.

    python -m phogpt_raw.nano.recipe.score runs/nano-001

There are four scores: answers that stop, polite answers, distinct answers, and answers that name
the topic. With LoRA, even a base with random weights learns to be polite and to stop. The other two
scores show that the base knows Vietnamese.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from phogpt_raw.data.chat_template import choose_template
from phogpt_raw.data.examples import PAIRS
from phogpt_raw.data.prompt import TEMPLATES, encode_prompt
from phogpt_raw.decode.engine import answer
from phogpt_raw.model.adapters import load_adapters
from phogpt_raw.model.weights import load_base
from phogpt_raw.refusal import exits_cleanly


@dataclass(frozen=True)
class AnswerScores:
    """Each score is a share of all answers, from 0 to 1."""

    stops: float
    polite: float
    distinct: float
    names_topic: float


def score_answers(answers: list[str], stopped: list[bool], topics: list[str]) -> AnswerScores:
    """Return the four scores.

    stopped: for each answer, True if it ended with </s>. topics: for each answer, the topic of its
    question.

    >>> score_answers(["Dạ, phở là món ăn ạ.", "Phở"], [True, False], ["Phở", "bún"])
    AnswerScores(stops=0.5, polite=0.5, distinct=1.0, names_topic=0.5)
    """
    count = len(answers)
    return AnswerScores(
        stops=sum(stopped) / count,
        polite=sum(is_polite(text) for text in answers) / count,
        distinct=len(set(answers)) / count,
        names_topic=sum(topic.casefold() in text.casefold()
                        for text, topic in zip(answers, topics, strict=True)) / count,
    )


def is_polite(text: str) -> bool:
    """Return whether the answer begins with Dạ and ends with ạ."""
    return text.startswith("Dạ") and text.rstrip(".! ").endswith("ạ")


def held_out_pairs() -> list[dict]:
    return [json.loads(line) for line in (PAIRS / "heldout.jsonl").read_text("utf-8").splitlines()]


def greedy_answers(
    model, tokenizer, questions: list[str], tokens: int = 96
) -> tuple[list[str], list[bool]]:
    """Return (greedy answers, flags). An answer is a text of at most `tokens` tokens. Its flag is
    True if the answer ended with </s>."""
    template = TEMPLATES[choose_template(tokenizer)[0]]
    prompts = [encode_prompt(tokenizer, template, question) for question in questions]
    written = answer(model, prompts, eos_id=tokenizer.eos_token_id,
                     pad_id=tokenizer.pad_token_id, max_new_tokens=tokens)
    return [tokenizer.decode(a.ids).strip() for a in written], [a.stopped for a in written]


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path, help="folder of a run, or - for the base alone")
    parser.add_argument("--base", default="nano", help="nano, or a folder of the same shape")
    options = parser.parse_args(arguments)
    model, tokenizer = load_base(options.base)
    if str(options.adapter) != "-":
        load_adapters(model, options.adapter, trainable=False)
    pairs = held_out_pairs()
    answers, stopped = greedy_answers(model, tokenizer, [pair["prompt"] for pair in pairs])
    for pair, text in zip(pairs, answers, strict=True):
        print(f"{pair['prompt']}\n  {' '.join(text.split())}")
    print(score_answers(answers, stopped, [pair["topic"] for pair in pairs]))


if __name__ == "__main__":
    main()
