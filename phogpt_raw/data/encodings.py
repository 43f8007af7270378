"""Find the encoding of a Vietnamese text file from its bytes.

UTF-8 and UTF-16 are read, with or without a byte order mark. Windows-1258 is read too. In this
encoding, ế is two characters: ê, then a combining accent. So the text must be normalised to NFC.

TCVN3 (ABC) and VNI are old encodings that need special fonts. To recognise them, the file's bytes
are decoded with the table of each encoding. With the right table, most words are possible
Vietnamese syllables. With a wrong table, almost no words are possible syllables. Files in TCVN3 and
VNI are refused. In TCVN3, a capital letter with a tone has the same byte as the small letter, and
only a special font shows the capital. So the text could not be restored exactly.

>>> detect("Phở là gì?".encode("utf-16")), detect(b"Ti\\xaa\\xecng Vi\\xea\\xf2t")
('utf-16', None)
>>> detect("Một người và nước".encode().decode().translate(TO_TCVN3).encode("latin-1"))
'TCVN3'
"""

import re
import unicodedata

HEAD = 1 << 20  # bytes at the start of a file that are examined
TONES = "\u0300\u0301\u0303\u0309\u0323"  # grave, acute, tilde, hook, dot below
CONVERT = "convert it to Unicode first, for example with UniKey (Ctrl+Shift+F6)"

# The letters of TCVN 5712:1993-3 for the bytes from 0xA1 on. "." is a byte without a letter.
TCVN3 = dict(zip(range(0xA1, 0x100), (
    "ĂÂÊÔƠƯĐăâêôơưđ......àảãáạ.ằẳẵắ.......ặầẩẫấậè.ẻẽéẹềểễếệìỉ...ĩíịò.ỏõóọồổỗốộờởỡớợù.ủũ"
    "úụừửữứựỳỷỹýỵ."), strict=True))
# VNI for Windows. For most letters, the diacritics are a separate byte after the letter.
VNI = {0xF4: "ơ", 0xF6: "ư", 0xF1: "đ", 0xED: "í", 0xEC: "ì", 0xE6: "ỉ", 0xF3: "ĩ", 0xF2: "ị",
       0xEE: "ỵ", 0xD4: "Ơ", 0xD6: "Ư", 0xD1: "Đ", 0xCD: "Í", 0xCC: "Ì", 0xC6: "Ỉ", 0xD3: "Ĩ",
       0xD2: "Ị", 0xCE: "Ỵ"}
for small, marks in {
        0xF9: "\u0301", 0xF8: "\u0300", 0xFB: "\u0309", 0xF5: "\u0303", 0xEF: "\u0323",
        0xE2: "\u0302", 0xE1: "\u0302\u0301", 0xE0: "\u0302\u0300", 0xE5: "\u0302\u0309",
        0xE3: "\u0302\u0303", 0xE4: "\u0302\u0323", 0xEA: "\u0306", 0xE9: "\u0306\u0301",
        0xE8: "\u0306\u0300", 0xFA: "\u0306\u0309", 0xFC: "\u0306\u0303",
        0xEB: "\u0306\u0323"}.items():
    VNI |= {small: marks, small - 0x20: marks}  # small - 0x20 is the capital's byte
TO_TCVN3 = {ord(letter): byte for byte, letter in TCVN3.items() if letter != "."}

SYLLABLE = re.compile(
    r"(ngh|ng|nh|gh|gi|kh|ph|qu|th|tr|ch|[bcdđghklmnpqrstvx])?[aăâeêioôơuưy]{1,3}"
    r"(ch|ng|nh|[cmnptiuoy])?")
# The error handler surrogateescape decodes an invalid byte to one of these characters.
UNDECODED = re.compile("[\udc80-\udcff]")
# Signs of UTF-8 text that was read as Windows-1252 and stored again. For example, ở became "á»Ÿ", đ
# became "Ä‘", ư became "Æ°", and à became two characters: "Ã", then a no-break space.
MOJIBAKE = re.compile("á[»º][\u0080-ÿŒœŠšŸŽžƒˆ˜–—‘’‚“”„†‡•…‰‹›€™]"
                      "|Ä[‘\u0090\u0091ƒ]|Æ[°¡¯\xa0]|Ã[\u00a0-\u00bf]")


def detect(head: bytes) -> str | None:
    """Return the codec for a file with these first bytes, or "TCVN3" or "VNI", or None if unknown.

    The text counts as UTF-8 if fewer than half of its non-ASCII characters are invalid bytes.
    """
    if head.startswith((b"\xff\xfe\x00\x00", b"\x00\x00\xfe\xff")):
        return "utf-32"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    if head.startswith(b"\xef\xbb\xbf"):
        return "utf-8-sig"
    even, odd = head[::2].count(0), head[1::2].count(0)
    if 3 * max(even, odd) > len(head) // 2 > 0 and 20 * min(even, odd) < len(head):
        return "utf-16-le" if odd > even else "utf-16-be"
    if len(head) == HEAD:
        head = head[: head.rfind(b"\n") + 1] or head[:-4]  # cut off an incomplete character
    text = head.decode("utf-8", "surrogateescape")
    wrong = len(UNDECODED.findall(text))
    if not wrong or 2 * wrong < len(re.findall("[^\x00-\x7f]", text)):
        return "utf-8"
    name, share = max(legacy(head).items(), key=lambda found: found[1])
    return name if share > 0.6 else None


def legacy(content: bytes) -> dict[str, float]:
    """Decode the bytes with each of the three old encodings. Returns {encoding: share}, where the
    share is the result of `vietnamese` for the decoded text."""
    as_latin = content.decode("latin-1")
    return {"cp1258": vietnamese(content.decode("cp1258", "replace")),
            "TCVN3": vietnamese(as_latin.translate(TCVN3)),
            "VNI": vietnamese(as_latin.translate(VNI))}


def vietnamese(text: str) -> float:
    """Return the share of possible Vietnamese syllables among the non-ASCII words of a text.

    Returns 0 if all words of the text are ASCII.

    >>> vietnamese("Phở bò và café"), vietnamese("n­íc §µ")
    (0.75, 0.0)
    """
    words = [word for word in re.findall(r"[^\s\d!-/:-@\[-`{-~…“”‘’–—]+",
                                         unicodedata.normalize("NFC", text))
             if not word.isascii()][:2000]
    return sum(map(is_syllable, words)) / max(1, len(words))


def is_syllable(word: str) -> bool:
    letters = unicodedata.normalize("NFD", word.lower())
    tones = sum(letter in TONES for letter in letters)
    toneless = unicodedata.normalize("NFC", "".join(c for c in letters if c not in TONES))
    return tones <= 1 and SYLLABLE.fullmatch(toneless) is not None


def font_encoding(text: str) -> str | None:
    """Return the encoding, "TCVN3" or "VNI", of a text that was decoded as Windows-1252.

    Returns None if the text is in neither encoding.

    For example, "nước" appears as "n­íc" in TCVN3, and as "nöôùc" in VNI.
    """
    as_it_is = vietnamese(text)
    if text.isascii() or as_it_is > 0.6:
        return None
    content = text.encode("cp1252", "ignore")
    shares = {"TCVN3": vietnamese(content.decode("latin-1").translate(TCVN3)),
              "VNI": vietnamese(content.decode("latin-1").translate(VNI))}
    name, share = max(shares.items(), key=lambda found: found[1])
    return name if share > max(0.6, as_it_is + 0.3) else None
