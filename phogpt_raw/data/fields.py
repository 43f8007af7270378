"""Names of fields and columns, in English and Vietnamese, and their meanings.

Case, spaces, diacritics and punctuation are ignored. So `Câu hỏi`, `CAU_HOI` and `cauHoi` are the
same name.

>>> field_of("CÂU HỎI"), field_of("cau_hoi"), field_of("Response"), field_of("topic")
('question', 'question', 'response', None)
"""

import re
import unicodedata
from functools import lru_cache

NAMES = {
    "prompt": "prompt, lời nhắc",
    "response": "response, phản hồi",
    "instruction": "instruction, chỉ dẫn, hướng dẫn, yêu cầu, lệnh, chỉ thị",
    "input": "input, đầu vào, dữ liệu vào, ngữ cảnh, context",
    "output": "output, đầu ra, kết quả",
    "question": "question, câu hỏi, hỏi, query",
    "answer": "answer, câu trả lời, trả lời, lời đáp, đáp, đáp án, lời giải",
    "completion": "completion",
    "system": "system, system prompt, hệ thống",
    "history": "history, lịch sử",
    "messages": "messages, tin nhắn",
    "conversations": "conversations, conversation, hội thoại, cuộc hội thoại",
    "text": "text, văn bản, nội dung",
}


def plain(name: str) -> str:
    """Return a name in lower case, without spaces, diacritics and punctuation.

    >>> plain("Câu trả lời (đã sửa)")
    'cautraloidasua'
    """
    letters = unicodedata.normalize("NFD", name.casefold().replace("đ", "d"))
    return re.sub(r"[\W_\u0300-\u036f]+", "", letters)


FIELDS = {plain(name): field for field, names in NAMES.items() for name in names.split(",")}


@lru_cache(4096)
def field_of(name: str) -> str | None:
    """Return the meaning of a field's name: a key of NAMES, or None for an unknown name."""
    return FIELDS.get(plain(name))
