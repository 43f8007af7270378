"""Make questions that the articles' own sentences answer.

From these questions a small base learns the form of a question. It also learns to begin an answer
with the subject of the question.
"""

import random
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from phogpt_raw.nano.recipe.patterns import (
    ABOUT,
    ADVISED,
    CLAUSES,
    KINDS,
    PEOPLE,
    PLACES,
    TELL,
    TWICE,
    WHERE,
    WHO,
)
from phogpt_raw.nano.recipe.phrases import is_clause, is_noun_phrase, words
from phogpt_raw.nano.recipe.sentences import sentences, tail_first
from phogpt_raw.nano.recipe.truecase import Truecaser


@dataclass(frozen=True)
class Question:
    """phrase: the subject of the question. It is also near the beginning of the answer."""

    kind: str
    phrase: str
    question: str
    answer: str


def mine(title: str, text: str, truecaser: Truecaser, rng: random.Random) -> Iterator[Question]:
    """Yield questions that an article's sentences answer."""
    for n, answer in enumerate(sentences(text)):
        found = ask_about_title(title, answer, truecaser, rng) if n == 0 else []
        if not found:
            found = ask(answer, truecaser, rng)
        yield from (q for q in found if names_its_phrase(q))


def ask_about_title(
    title: str, answer: str, truecaser: Truecaser, rng: random.Random
) -> list[Question]:
    """Return questions about the article's title. `answer` is the article's first sentence."""
    phrase, rest = answer[: len(title)], answer[len(title) :]
    if phrase.casefold() != title.casefold() or not rest.startswith((" ", ",")):
        return []
    if len(title.split()) > 6 or title.casefold().split()[0] in words("ngày tháng năm danh"):
        return []
    is_a = r"(?: |, .*, |, )(?:từng |vốn )?là (?:một |vị |tên |ngôi |nhà ga |tên gọi )*"
    if re.search(is_a + f"(?:{PEOPLE})", rest):
        kind, forms = "who", WHO
    elif re.search(is_a + f"(?:{PLACES})", rest) and re.search(r" (ở|tại|thuộc|nằm) ", rest):
        kind, forms = "place", WHERE + ABOUT
    elif re.search(r"\blà ", " ".join(rest.split()[:12])):
        kind, forms = "title", ABOUT
    else:
        kind, forms = "tell", TELL
    return make_questions(kind, phrase, answer, forms, truecaser, rng)


def ask(answer: str, truecaser: Truecaser, rng: random.Random) -> list[Question]:
    """Return questions that the sentence answers. The list is often empty.

    All questions are of the first kind that fits.
    """
    answer = tail_first(answer, truecaser)
    for kind, pattern, forms in CLAUSES:
        if (found := pattern.match(answer)) and is_clause(found["x"], answer):
            if kind == "why" and not is_statement(found["x"]):
                continue
            if kind == "when" and re.search(r", .*\b(nên|cần|phải|hãy) ", answer):
                forms = ADVISED
            return make_questions(kind, found["x"], answer, forms, truecaser, rng)
    for kind, pattern, forms in KINDS:
        if (found := pattern.match(answer)) and is_noun_phrase(found["x"]):
            y = found.groupdict().get("y", "")
            return make_questions(kind, found["x"], answer, forms, truecaser, rng, y)
    return []


def is_statement(phrase: str) -> bool:
    """Return whether the phrase has a noun phrase and a verb, as in 'Cây không mọc'."""
    verb = r" (?:không|bị|có|rất|đã|thường|phải|chưa|trở|được|tăng|giảm|mất|thất|chết|dễ|khó) "
    subject, *predicate = re.split(verb, phrase)
    unfinished = phrase.split()[-1] in words("tự lý lí thể có là")
    return bool(predicate) and is_noun_phrase(subject) and not unfinished


def make_questions(
    kind: str, phrase: str, answer: str, forms: list[str], truecaser: Truecaser, rng: random.Random,
    y: str = "",
) -> list[Question]:  # fmt: skip
    """Return one question about the phrase. Its form is chosen at random from `forms`.

    For a kind in TWICE, return two questions in different forms.
    """
    inside = truecaser.inside(phrase)
    forms = rng.sample(forms, 2 if kind in TWICE else 1)
    return [Question(kind, phrase, f.format(X=phrase, x=inside, y=y), answer) for f in forms]


def names_its_phrase(question: Question) -> bool:
    """Return whether the answer has 8 to 40 words, with the phrase near its beginning."""
    at = question.answer.casefold().find(question.phrase.casefold())
    return 0 <= at <= 12 and 8 <= len(question.answer.split()) <= 40


class Overlap:
    """A set of topics. `phrase in Overlap(topics)` is True if the phrase and a topic overlap.

    A phrase and a topic overlap if they are equal, or if one contains the other. Only whole words
    are compared.
    """

    def __init__(self, topics: Iterable[str]):
        self.topics = {self.words(topic) for topic in topics}
        self.parts = {part for topic in self.topics for part in self.runs(topic)}

    def __contains__(self, phrase: str) -> bool:
        phrase = self.words(phrase)
        return phrase in self.parts or any(run in self.topics for run in self.runs(phrase))

    @staticmethod
    def words(text: str) -> tuple[str, ...]:
        return tuple(re.findall(r"\w+", unicodedata.normalize("NFC", text).casefold()))

    @staticmethod
    def runs(seq: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        return (seq[i:j] for i in range(len(seq)) for j in range(i + 1, len(seq) + 1))
