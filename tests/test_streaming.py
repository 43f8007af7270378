"""The display of an answer while the model writes it."""

import pytest

from phogpt_raw.inference.streaming import Screen


def shown(text, width, sizes=(1, 2, 3, 7)):
    """The output for a text that arrives in pieces. The size of the pieces must not change it."""
    results = set()
    for size in sizes:
        screen = Screen(width)
        pieces = [screen.put(text[n : n + size]) for n in range(0, len(text), size)]
        results.add("".join(pieces) + screen.end())
    assert len(results) == 1
    return results.pop()


def test_words_do_not_stand_on_two_lines():
    text = "Phở bò là món ăn rất ngon của người Việt Nam, có bánh phở và thịt bò."
    lines = shown(text, 20).split("\n")
    assert max(map(len, lines)) <= 20
    assert " ".join(line.strip() for line in lines) == text


def test_a_word_longer_than_the_screen_and_own_lines_stay_as_they_are():
    text = "một\n\n- " + "x" * 50 + " hai\nba"
    assert shown(text, 20) == "một\n\n- \n" + "x" * 50 + " \nhai\nba"


def test_wide_letters_take_two_columns():
    assert shown("漢字漢字 漢字", 12) == "漢字漢字 \n漢字"


@pytest.mark.parametrize("text", ["Dạ,  phở   ạ.\n", "một hai ba " * 20])
def test_where_no_terminal_reads_it_nothing_changes(text):
    assert shown(text, 0) == text


def test_a_terminal_that_gets_narrower_breaks_words_at_its_new_width():
    screen = Screen(40)
    screen.put("một hai ba bốn năm ")  # 19 columns
    screen.resize(12)  # the terminal has wrapped the text: the cursor is in column 7
    assert screen.put("sáu bảy tám ") == "sáu \nbảy tám "
    screen.resize(0)  # the terminal is closed
    assert screen.width == 12
