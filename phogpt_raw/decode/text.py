"""Turn tokens into text as they are written, and stop before a stop string.

A Vietnamese letter with a diacritic takes two or three bytes, and a token may end inside it. An
incomplete character is held back until later tokens complete it. Text that may be the beginning of
a stop string is held back too.
"""

from collections.abc import Sequence

from phogpt_raw.data.prompt import HALF

TURNS = 4  # an answer that ends with TURNS repetitions of a passage is in a loop


class TextStream:
    """Decodes a stream of tokens. `stopped` becomes True when one of the strings in `stops` is
    found.

    The results of `put` and `end`, joined, are the same text as all tokens decoded at once, up to
    the first stop string. An incomplete character at the end is left out.
    """

    def __init__(self, tokenizer, stops: Sequence[str] = ()):
        self.tokenizer, self.stops, self.stopped = tokenizer, [s for s in stops if s], False
        self.ids: list[int] = []
        self.shown, self.read = 0, 0  # the start and the end of the last piece in ids
        self.waiting = ""  # decoded text that may be the beginning of a stop string

    def put(self, token: int) -> str:
        """Add a token. Returns the text that is now complete."""
        self.ids.append(token)
        return self.decoded(whole=False)

    def end(self) -> str:
        """Call this after the last token. Returns the text that was held back."""
        return self.decoded(whole=True)

    def decoded(self, whole: bool) -> str:
        if self.stopped:
            return ""
        # A token's text may depend on the token before it, so the last piece is decoded again too.
        before = self.text(self.ids[self.shown : self.read])
        now = self.text(self.ids[self.shown :])
        if whole:
            now = now.rstrip(HALF)
        if whole or (not now.endswith(HALF) and len(now) > len(before)):
            self.waiting += now[len(before) :]
            self.shown, self.read = self.read, len(self.ids)
        return self.certain(whole)

    def certain(self, whole: bool) -> str:
        places = [place for stop in self.stops if (place := self.waiting.find(stop)) >= 0]
        if places:
            self.stopped = True
            text, self.waiting = self.waiting[: min(places)], ""
            return text
        held = 0 if whole else max((begun(self.waiting, stop) for stop in self.stops), default=0)
        text = self.waiting[: len(self.waiting) - held]
        self.waiting = self.waiting[len(text) :]
        return text

    def text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def begun(text: str, stop: str) -> int:
    """The number of characters at the end of `text` that may be the beginning of `stop`.

    >>> begun("một câu\\n#", "\\n###"), begun("một câu", "\\n###")
    (2, 0)
    """
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1)
                 if text.endswith(stop[:n])), 0)


def loops(ids: list[int], least: int = 24) -> bool:
    """Whether the ids end with a passage that occurs at least four times in a row. The repetitions
    must have at least `least` tokens in total.

    >>> loops([5, 6] + [7, 8, 9] * 8), loops([7, 8, 9] * 3), loops(list(range(50)))
    (True, False, False)
    """
    for n in range(1, len(ids) // TURNS + 1):  # length of the passage
        tail = ids[-max(least, TURNS * n) :]
        if len(tail) >= least and tail[n:] == tail[:-n]:
            return True
    return False
