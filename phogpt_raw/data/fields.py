"""Names of fields and columns, in English and Vietnamese, and what they mean.

Case, spaces, marks and punctuation do not count: `Câu hỏi`, `CAU_HOI` and `cauHoi` are one name.

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
    """A name without case, spaces, marks and punctuation.

    >>> plain("Câu trả lời (đã sửa)")
    'cautraloidasua'
    """
    letters = unicodedata.normalize("NFD", name.casefold().replace("đ", "d"))
    return re.sub(r"[\W_\u0300-\u036f]+", "", letters)


FIELDS = {plain(name): field for field, names in NAMES.items() for name in names.split(",")}


@lru_cache(4096)
def field_of(name: str) -> str | None:
    """What a field of this name means: a key of NAMES, or None."""
    return FIELDS.get(plain(name))
