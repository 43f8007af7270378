"""The encoding of a file: Vietnamese text in each encoding, and text in other languages."""

import doctest
import unicodedata

import pytest

from phogpt_raw.data import encodings
from phogpt_raw.data.encodings import MOJIBAKE, TCVN3, TO_TCVN3, VNI, detect, font_encoding

TEXT = ("Phở bò ở Hà Nội có gì đặc biệt? Dạ, nước dùng ngọt và thơm, người ta ăn vào buổi sáng. "
        "Ừ, lễ hội Huế thì kỹ lưỡng, rẽ phải rồi hỏi cụ già ở ngõ nhỏ, đừng quên ghé xã Mỹ Lệ!")


def as_vni(text: str) -> bytes:
    """The text in VNI: a letter becomes one byte, or its base letter and a byte for its marks."""
    marks = {found: byte for byte, found in VNI.items() if "̀" <= found[0] <= "ͯ"
             and byte >= 0xE0}
    letters = {found: byte for byte, found in VNI.items() if found.isalpha()}
    made = bytearray()
    for letter in text:
        parts = unicodedata.normalize("NFD", letter)
        if letter in letters:
            made.append(letters[letter])
        elif letter.isascii():
            made += letter.encode()
        elif "̛" in parts:  # VNI has separate codes for ơ and ư
            horn = unicodedata.normalize("NFC", parts[:2])
            made += bytes([letters[horn], marks[parts[2]]])
        else:
            order = "".join(sorted(parts[1:], key=lambda mark: mark not in "̂̆"))
            made += parts[0].encode() + bytes([marks[order]])
    return bytes(made)


def as_cp1258(text: str) -> bytes:
    """The text in cp1258 as Windows writes it.

    A letter that the code page lacks becomes two characters: the letter without its tone, then the
    combining tone.
    """
    made = b""
    for letter in text:
        try:
            made += letter.encode("cp1258")
        except UnicodeEncodeError:
            parts = unicodedata.normalize("NFD", letter)
            tone = next(mark for mark in parts if mark in encodings.TONES)
            base = unicodedata.normalize("NFC", parts.replace(tone, ""))
            made += (base + tone).encode("cp1258")
    return made


def test_doctests():
    assert doctest.testmod(encodings).failed == 0


@pytest.mark.parametrize("content, found", [
    (TEXT.encode(), "utf-8"), (TEXT.encode("utf-8-sig"), "utf-8-sig"),
    (TEXT.encode("utf-16"), "utf-16"), (TEXT.encode("utf-16-le"), "utf-16-le"),
    (TEXT.encode("utf-16-be"), "utf-16-be"), (TEXT.encode("utf-32"), "utf-32"),
    (as_cp1258(TEXT), "cp1258"), (TEXT.translate(TO_TCVN3).replace("Ừ", "õ").encode("latin-1"),
                                  "TCVN3"),
    (as_vni(TEXT.replace("Ừ, ", "")), "VNI"), (b"plain", "utf-8"), (b"", "utf-8"),
    ("café crème déjà".encode("latin-1"), None), (b"\x80\x81\xfe\xff" * 9, None),
    (TEXT.encode() + b"\n\xff\xfe", "utf-8")])
def test_the_encoding_of_a_file_is_found(content, found):
    assert detect(content) == found


def test_windows_1258_is_read_to_composed_letters():
    assert unicodedata.normalize("NFC", as_cp1258(TEXT).decode("cp1258")) == TEXT


def test_vni_and_tcvn3_tables_are_each_others_inverse():
    text = TEXT.replace("Ừ, ", "")
    assert unicodedata.normalize("NFC", as_vni(text).decode("latin-1").translate(VNI)) == text
    assert text.translate(TO_TCVN3).encode("latin-1").decode("latin-1").translate(TCVN3) == text
    assert len({letter for letter in TCVN3.values() if letter != "."}) == 7 * 2 + 60


def test_a_head_that_ends_within_a_letter_is_still_utf8():
    head = ("ở" * encodings.HEAD).encode()[: encodings.HEAD]
    assert detect(head) == "utf-8"


def test_fonts_are_found_in_unicode_text_and_not_in_other_languages():
    assert font_encoding(TEXT) is None
    assert font_encoding(TEXT.translate(TO_TCVN3)) == "TCVN3"
    assert font_encoding(as_vni(TEXT.replace("Ừ, ", "")).decode("latin-1")) == "VNI"
    for other in ("Où est l'école française? À côté, déjà là.", "Größe, Straße, übermäßig",
                  "日本語", "plain words"):
        assert font_encoding(other) is None


def test_mojibake_is_seen_and_vietnamese_is_not_taken_for_it():
    assert MOJIBAKE.search(TEXT.encode().decode("cp1252", "ignore"))
    assert not MOJIBAKE.search(TEXT) and not MOJIBAKE.search(TEXT.upper())
    assert not MOJIBAKE.search("«nhà xá» và “phố”")


def test_some_lines_of_another_encoding_among_utf8_are_bad_lines_of_a_utf8_file():
    line = "Phở là một món nước.\n".encode()
    assert detect(line * 9 + b"caf\xe9, d\xe9j\xe0, m\xf3n\n" * 2) == "utf-8"
