"""Find sentences of a text that can be answers, and put their clauses in the order of an answer.

A question asks about the first words of its answer. So a purpose, a condition or a time is moved to
the beginning of the sentence. A reason is moved to the end, because a "why" question asks about the
effect.
"""

import re
from collections.abc import Iterator
from itertools import chain

from phogpt_raw.nano.recipe.phrases import NOT_A_CLAUSE, UNTURNED
from phogpt_raw.nano.recipe.truecase import Truecaser

SENTENCE_END = re.compile(
    r"(?<=[\w)”\"%][a-zà-ỹ0-9)”\"%][.!?])(?<!\b[SDMJ][trs]\.)\s+(?=[A-ZÀ-ỸĐ\"“0-9])"
)
CONNECTIVE = re.compile(
    r"^(?:Tuy nhiên|Ngoài ra|Do đó|Do vậy|Vì vậy|Vì thế|Bên cạnh đó|Mặt khác|Đồng thời|Hiện nay"
    r"|Hiện tại|Hiện|Ngày nay|Thông thường|Nói chung|Nhìn chung|Đặc biệt|Trên thực tế|Thực tế"
    r"|Theo đó|Trong đó|Cuối cùng|Ban đầu|Sau đó|Trước đó|Từ đó|Ngược lại|Nhưng|Và|Cũng theo đó"
    r"|Mặc dù vậy|Tuy vậy|Về sau|Khi đó|Lúc này|Bởi vậy|Như vậy|Chính vì vậy|Thêm vào đó"
    r"|Hơn nữa),? (?=\w)"
)
BECAUSE = re.compile(r"^(?:Vì|Do|Bởi|Bởi vì) ([^,]+),? (?:nên|cho nên) ([^,.]+)(?:,[^.]*)?\.$")
TAIL = re.compile(r"^([^,]{20,}) (nhằm|để|khi|sau khi|nếu) (\w+(?: [^\W\d_]+){2,5})\.$")


def sentences(text: str) -> Iterator[str]:
    """Yield sentences of 8 to 40 words that end in a full stop.

    Remarks in parentheses are removed. Words that only link a sentence to the previous sentence are
    removed too.
    """
    text = re.sub(r"\s*\([^()\n]*\)", "", text)
    for whole in chain.from_iterable(SENTENCE_END.split(line) for line in text.split("\n")):
        sentence = CONNECTIVE.sub("", whole)
        if sentence != whole:
            sentence = sentence[0].upper() + sentence[1:]
        sentence = re.sub(r";.*", ".", sentence)
        if (
            8 <= len(sentence.split()) <= 40
            and sentence.endswith(".")
            and not re.search(r"[()\[\]{}=*…:\"“”‘?!]|\.[. ]|\b(dạ|ạ)\b", sentence, re.I)
        ):
            yield sentence


def tail_first(sentence: str, truecaser: Truecaser) -> str:
    """Return the sentence with its purpose, condition or time first, or with its reason last.

    'Người ta đắp đê để ngăn lũ lớn.' -> 'Để ngăn lũ lớn, người ta đắp đê.'

    'Vì trời lạnh nên cây không mọc.' -> 'Cây không mọc vì trời lạnh.'

    Other sentences are returned unchanged.
    """
    if because := BECAUSE.match(sentence):
        cause, effect = because.groups()
        return f"{effect[0].upper()}{effect[1:]} vì {cause}."
    if tail := TAIL.match(sentence):
        main, link, clause = tail.groups()
        if main.split()[-1] not in UNTURNED and clause.split()[0] not in NOT_A_CLAUSE:
            return f"{link.capitalize()} {clause}, {truecaser.inside(main)}."
    return sentence
