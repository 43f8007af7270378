"""From tokens to text: complete characters, unchanged text, stop strings, loops."""

import doctest
import random

import pytest
from checkpoints import NANO

from phogpt_raw.decode import text as module
from phogpt_raw.decode.text import HALF, TextStream, loops

LETTERS = ("aăâbcdđeêghiklmnoôơpqrstuưvxyàáảãạằắẳẵặầấẩẫậèéẻẽẹềếểễệìíỉĩịòóỏõọồốổỗộờớởỡợ"
           "ùúủũụừứửữựỳýỷỹỵ")
OTHERS = LETTERS.upper() + "0123456789.,;:!?\"'()-–—…%/ \n\t€🙂🇻🇳漢"


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(NANO)


def strings(count, seed=0):
    dice = random.Random(seed)
    for _ in range(count):
        words = ["".join(dice.choices(LETTERS, k=dice.randint(1, 7)))
                 for _ in range(dice.randint(0, 12))]
        text = " ".join(words) + "".join(dice.choices(OTHERS, k=dice.randint(0, 6)))
        yield text if dice.random() < 0.5 else text.capitalize()


def test_doctest():
    assert doctest.testmod(module).failed == 0


def test_pieces_joined_are_the_text_decoded_at_once_and_hold_no_half_letter(tokenizer):
    """The test uses 1,000 random strings. In half of them each byte of a character is a token."""
    half = 0
    for n, text in enumerate(strings(1000)):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        if n % 2:  # byte tokens, which a model can write
            ids = [i for c in text for i in byte_tokens(tokenizer, c)]
        stream = TextStream(tokenizer)
        pieces = [*map(stream.put, ids), stream.end()]
        assert "".join(pieces) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        assert HALF not in "".join(pieces)
        half += sum(HALF in tokenizer.decode(ids[: k + 1]) for k in range(len(ids)))
    # The tokens so far often end inside a character. So tokens cannot be decoded one by one.
    assert half > 5000


def byte_tokens(tokenizer, letter):
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    table = bytes_to_unicode()
    return tokenizer.convert_tokens_to_ids([table[b] for b in letter.encode()])


def test_a_character_that_is_cut_off_at_the_end_is_left_out(tokenizer):
    ids = tokenizer("Phở")["input_ids"]
    stream = TextStream(tokenizer)
    text = "".join(stream.put(i) for i in ids + byte_tokens(tokenizer, "ế")[:2])
    assert text + stream.end() == "Phở"
    assert HALF in tokenizer.decode(stream.ids)


def test_bytes_that_are_no_character_amid_the_text_are_shown_as_such(tokenizer):
    stream = TextStream(tokenizer)
    ids = byte_tokens(tokenizer, "ế")[:2] + tokenizer("Phở")["input_ids"]
    assert "".join(map(stream.put, ids)) + stream.end() == tokenizer.decode(ids)


def test_a_letter_comes_as_soon_as_it_is_whole(tokenizer):
    stream = TextStream(tokenizer)
    assert [stream.put(i) for i in byte_tokens(tokenizer, "aếb")] == ["a", "", "", "ế", "b"]


@pytest.mark.parametrize("stops, shown", [
    (["\n###"], "Phở là món nước."), (["món"], "Phở là "), (["xyz"], None),
    (["nước", "món"], "Phở là "), (["nước", "nướ"], "Phở là món "), ([""], None)])
def test_a_stop_string_ends_the_text_before_it(tokenizer, stops, shown):
    text = "Phở là món nước.\n### Câu hỏi"
    for ids in (tokenizer(text).input_ids, [i for c in text for i in byte_tokens(tokenizer, c)]):
        stream = TextStream(tokenizer, stops)
        pieces = []
        for i in ids:
            pieces.append(stream.put(i))
            if stream.stopped:
                break
        pieces.append(stream.end())
        assert "".join(pieces) == (text if shown is None else shown)
        assert stream.stopped == (shown is not None)


def test_of_what_may_begin_a_stop_string_the_longest_waits(tokenizer):
    stream = TextStream(tokenizer, ["\n\n#"])
    assert "".join(stream.put(i) for i in byte_tokens(tokenizer, "a\n\n#b")) == "a"
    assert stream.stopped


def test_a_token_may_depend_on_the_one_before_it():
    """Some tokenizers put a space before a word only if another word precedes it."""

    class Words:
        def decode(self, ids, **_):
            return " ".join(f"w{i}" for i in ids)

    stream = TextStream(Words())
    assert [stream.put(i) for i in (1, 2, 3)] == ["w1", " w2", " w3"]


def test_what_may_begin_a_stop_string_waits(tokenizer):
    stream = TextStream(tokenizer, ["\n###"])
    ids = byte_tokens(tokenizer, "a\n##b")
    assert [stream.put(i) for i in ids] == ["a", "", "", "", "\n##b"]


def test_a_loop_is_four_times_the_same_passage_at_the_end():
    assert loops([1, 2, 3] * 8) and loops([9] * 24) and loops([5, 6, *range(8), *[*range(8)] * 3])
    assert loops([1, 2, 3, 4, 5] * 7) and loops([*range(20)] * 4)
    assert not loops([9] * 23) and not loops([1, 2, 3] * 8 + [4]) and not loops([*range(20)] * 3)
    assert not loops([*range(8)] * 3) and not loops([])
