"""Build training pages: choose questions, and join them with their answers in VinAI's templates.

A page is one document of six to ten unrelated questions and answers, with a single </s> at its end.
So the base learns to continue with the next question after an answer. Fine-tuning must teach it to
stop after an answer.
"""

import random
from collections import Counter, defaultdict
from itertools import chain, zip_longest

from phogpt_raw.nano.recipe.questions import Question

# {name: (VinAI's template of a question with its answer, the text between two questions of a page)}
TEMPLATES = {
    "4B-Chat": ("### Câu hỏi: {q}\n### Trả lời: {a}", "\n"),
    "7B5-Instruct": ("### Câu hỏi:\n{q}\n\n### Trả lời:{a}", "\n\n"),
}


def choose(questions: list[Question], length: int, cap: int, rng: random.Random) -> list[Question]:
    """Choose questions that have about `length` characters in all, with their answers.

    At most `cap` questions are about the same phrase. In each round, one question of each kind is
    chosen, so that rare kinds are included.
    """
    of_kind, times = defaultdict(list), Counter()
    for question in rng.sample(questions, len(questions)):
        times[question.phrase.casefold()] += 1
        if times[question.phrase.casefold()] <= cap:
            of_kind[question.kind].append(question)
    chosen = []
    for question in filter(None, chain.from_iterable(zip_longest(*of_kind.values()))):
        if length <= 0:
            break
        chosen.append(question)
        length -= len(TEMPLATES["4B-Chat"][0].format(q=question.question, a=question.answer)) - 5
    return rng.sample(chosen, len(chosen))


def make_pages(questions: list[Question], rng: random.Random, chat: float = 0.75) -> list[str]:
    """Return documents of 6 to 10 questions and answers.

    chat: about this share of the documents is in 4B-Chat's template. The other documents are in
    7B5-Instruct's template. If fewer than 6 questions remain at the end, these questions are left
    out.
    """
    out, rest = [], list(questions)
    while len(rest) >= 6:
        count = rng.randint(6, 10)
        page, rest = rest[-count:], rest[:-count]
        template, between = TEMPLATES["4B-Chat" if rng.random() < chat else "7B5-Instruct"]
        out.append(between.join(template.format(q=q.question, a=q.answer) for q in page))
    return out
