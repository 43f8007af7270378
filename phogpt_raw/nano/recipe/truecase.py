"""Decide which words are written in lower case inside a sentence, by their counts in the text."""

import re
from collections import Counter
from collections.abc import Iterable


class Truecaser:
    """Counts how often each word inside a sentence is in lower case, and how often it is
    capitalised."""

    def __init__(self, texts: Iterable[str]):
        self.lower, self.upper = Counter(), Counter()
        for text in texts:
            for word in re.findall(r"(?<=[a-zà-ỹ,] )[^\W\d_]+", text):
                (self.upper if word[0].isupper() else self.lower)[word.casefold()] += 1

    def inside(self, phrase: str) -> str:
        """Return the phrase as it is written inside a sentence: 'Con mèo' -> 'con mèo'."""
        first, _, rest = phrase.partition(" ")
        lower, upper = self.lower[first.casefold()], self.upper[first.casefold()]
        share = 0.95 if rest[:1].isupper() else 0.3 if rest else 0.7
        if first[1:] == first[1:].lower() and lower > share * (lower + upper):
            return phrase[0].lower() + phrase[1:]
        return phrase
