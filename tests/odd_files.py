"""Bad or unusual files of training rows. For each file the program must print one line of text.

odd_lines.txt has the exact lines. A line is an error message, or it gives the number of rows that
were read and the notes on these rows.
"""

import gzip
import io
import json
import re
import unicodedata
import zipfile
from pathlib import Path

Q, A = "Phở là gì?", "Một món nước."
ROW = json.dumps({"prompt": Q, "response": A}, ensure_ascii=False)
GOOD = "".join(ROW.replace("Phở", f"Phở {n}") + "\n" for n in range(19))  # 19 lines
CSV = "prompt,response\n" + "".join(f"Phở {n} là gì?,Một món.\n" for n in range(19))  # 20 lines


def row(**fields) -> str:
    return json.dumps(fields, ensure_ascii=False)


def talk(*turns) -> str:
    return row(messages=[{"role": role, "content": text} for role, text in turns])


def sheet(rows, *, formulas=(), more=(), hidden=None, cells=None) -> bytes:
    """The bytes of an .xlsx file with these rows.

    formulas: pairs of a cell and its formula. more: the rows of a second sheet. hidden: the index
    of the hidden sheet. cells: the cell range that the file states instead of the right range.
    """
    openpyxl = __import__("openpyxl")
    book = openpyxl.Workbook()
    for values in rows:
        book.active.append(values)
    for cell, text in formulas:
        book.active[cell] = text
    if more:
        second = book.create_sheet("Ghi chú")
        for values in more:
            second.append(values)
    if hidden is not None:
        book.worksheets[hidden].sheet_state = "hidden"
        book.active = 1 - hidden
    made = io.BytesIO()
    book.save(made)
    return in_range(made, cells) if cells else made.getvalue()


def in_range(book: io.BytesIO, cells: str) -> bytes:
    """The .xlsx file with `cells` as its cell range. Some programs write a wrong cell range."""
    made = io.BytesIO()
    with zipfile.ZipFile(book) as old, zipfile.ZipFile(made, "w") as new:
        for name in old.namelist():
            new.writestr(name, re.sub(b'<dimension ref="[^"]*"',
                                      f'<dimension ref="{cells}"'.encode(), old.read(name)))
    return made.getvalue()


def parquet(records, **types) -> bytes:
    """The bytes of a .parquet file. `types`: the columns whose type is given, not inferred."""
    import pyarrow
    from pyarrow.parquet import write_table

    made = io.BytesIO()
    columns = {name: pyarrow.array([one[name] for one in records],
                                   types.get(name) and getattr(pyarrow, types[name])())
               for name in (records[0] if records else types)}
    write_table(pyarrow.table(columns), made)
    return made.getvalue()


TCVN3 = "C©u hái,Tr¶ lêi\nPhë lµ g×?,Mét mãn n­íc ngon.\n".encode("latin-1")
VNI = "Caâu hoûi,Traû lôøi\nPhôû laø gì?,Moät moùn nöôùc ngon.\n".encode("latin-1")
COMBINING = {"ở": "ơ\u0309", "ộ": "ô\u0323", "ướ": "ươ\u0301", "ả": "a\u0309", "ờ": "ơ\u0300",
             "ỏ": "o\u0309", "ì": "i\u0300", "ó": "ó"}


def cp1258(text: str) -> bytes:
    for letter, parts in COMBINING.items():
        text = text.replace(letter, parts)
    return text.encode("cp1258")


FILES: list[tuple[str, bytes | str]] = [
    # .jsonl
    ("empty.jsonl", ""),
    ("blank.jsonl", "\n \r\n\t\n"),
    ("broken.jsonl", GOOD + '{"prompt": "a", "response": "b"\n'),
    ("single_quotes.jsonl", GOOD + "{'prompt': 'a', 'response': 'b'}\n"),
    ("trailing_comma.jsonl", GOOD + '{"prompt": "a", "response": "b",}\n'),
    ("two_in_a_line.jsonl", GOOD + ROW + ROW + "\n"),
    ("python.jsonl", GOOD + '{"prompt": None, "response": True}\n'),
    ("only_broken.jsonl", "Phở là gì? Một món nước.\n"),
    ("three_of_four.jsonl", ROW + "\n" + ROW + '\n{"prompt": "a"}\n' + ROW + "\n"),
    ("no_answer.jsonl", GOOD + row(prompt=Q) + "\n"),
    ("empty_answer.jsonl", GOOD + row(prompt=Q, response="") + "\n"),
    ("blank_answer.jsonl", GOOD + row(prompt=Q, response=" \n") + "\n"),
    ("null_answer.jsonl", GOOD + row(prompt=Q, response=None) + "\n"),
    ("only_an_end.jsonl", GOOD + row(prompt=Q, response="</s>") + "\n"),
    ("number.jsonl", GOOD + row(prompt="2 + 2?", response=4) + "\n"),
    ("float.jsonl", GOOD + row(prompt="Pi?", response=3.14) + "\n"),
    ("not_a_number.jsonl", GOOD + '{"prompt": "Pi?", "response": NaN}\n'),
    ("huge_number.jsonl", GOOD + '{"prompt": "Pi?", "response": ' + "9" * 5000 + "}\n"),
    ("list.jsonl", GOOD + row(prompt=Q, response=[A]) + "\n"),
    ("true.jsonl", GOOD + row(prompt=Q, response=True) + "\n"),
    ("object.jsonl", GOOD + row(prompt={"vi": Q}, response=A) + "\n"),
    ("input_object.jsonl", GOOD + row(instruction=Q, input={"b": 1}, output=A) + "\n"),
    ("null_line.jsonl", GOOD + "null\n"),
    ("list_line.jsonl", GOOD + '["a", "b"]\n'),
    ("text_line.jsonl", GOOD + '"Phở"\n'),
    ("empty_object.jsonl", GOOD + "{}\n"),
    ("key_twice.jsonl", GOOD + '{"prompt": "a", "response": "b", "response": "c"}\n'),
    ("same_meaning.jsonl", GOOD + row(**{"question": Q, "Câu hỏi": "Bún?", "answer": A}) + "\n"),
    ("half_letter.jsonl", GOOD + '{"prompt": "\\ud83d", "response": "b"}\n'),
    ("deep.jsonl", GOOD + "[" * 100_000 + "\n"),
    ("unknown_fields.jsonl", row(cau="a", dap="b") + "\n"),
    ("not_utf8.jsonl", GOOD.encode() + b'{"prompt": "caf\xe9", "response": "b"}\n'),
    ("nul.jsonl", GOOD + '{"prompt": "a\\u0000b", "response": "b"}\n'),
    ("nul_bytes.jsonl", b"\x00" * 50),
    ("decomposed.jsonl", unicodedata.normalize("NFD", GOOD)),
    ("windows.jsonl", b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n\r\n").encode()),
    ("utf16.jsonl", GOOD.encode("utf-16")),
    ("utf16_without_mark.jsonl", GOOD.encode("utf-16-be")),
    ("half_utf16.jsonl", GOOD.encode("utf-16")[:-3]),
    ("list_in_lines.jsonl", "[" + ",\n".join(GOOD.splitlines()) + "]"),
    ("pretty.jsonl", json.dumps({"prompt": Q, "response": A}, indent=2)),
    ("mojibake.jsonl", GOOD.encode().decode("cp1252", "ignore")),
    ("lost_letters.jsonl", GOOD.replace("ở", "\ufffd")),
    ("no_marks.jsonl", row(prompt="Pho la gi?", response="Mon nuoc.") + "\n"),
    ("unused.jsonl", row(prompt=Q, response=A, topic="món ăn", id=7) + "\n"),
    ("upper.JSONL", row(PROMPT=Q, RESPONSE=A) + "\n"),
    ("rows[1]*?.jsonl", ROW + "\n"),
    ("missing_as_nan.jsonl", GOOD + '{"instruction": "Một?", "input": NaN, "output": "Hai."}\n'),
    ("marks_in_lines.jsonl", "".join("\ufeff" + line + "\n" for line in GOOD.splitlines())),
    ("no_marks_but_signs.jsonl", row(prompt="Pho la gi?", response="“Mon nuoc”…") + "\n"),
    ("control_answer.jsonl", GOOD + row(prompt=Q, response="\x01\x02") + "\n"),
    ("no_width.jsonl", GOOD + row(prompt=Q, response="\u200b") + "\n"),
    ("control_text.jsonl", row(text="\x00\x01") + "\n"),
    ("control_name.jsonl", row(prompt=Q, response=A, **{"\x1b[2Jtên": 1}) + "\n"),
    ("dolly.jsonl", row(instruction=Q, context="Ở Huế.", response=A, category="qa") + "\n"),
    ("turn_of_a_tree.jsonl", row(text=Q, role="prompter", message_id="1") + "\n"),
    # conversations of several turns
    ("vietnamese_roles.jsonl", row(messages=[{"vai trò": "Người dùng", "nội dung": Q},
                                             {"Vai trò": "Trợ lý ", "Nội dung": A}]) + "\n"),
    ("weight.jsonl", row(messages=[{"role": "user", "content": Q},
                                   {"role": "assistant", "content": A, "weight": 0}]) + "\n"),
    ("history_beside_turns.jsonl", row(history=[["a", "b"]], messages=[
        {"role": "user", "content": Q}, {"role": "assistant", "content": A}]) + "\n"),
    ("system_beside_text.jsonl", row(system="Ngắn.", text=A) + "\n"),
    ("system_and_question.jsonl", row(system="Ngắn.", prompt=Q, response=A) + "\n"),
    ("ends_with_question.jsonl", talk(("user", Q), ("assistant", A), ("user", "Rồi sao?")) + "\n"),
    ("begins_with_answer.jsonl", talk(("assistant", A), ("user", Q), ("assistant", A)) + "\n"),
    ("question_alone.jsonl", talk(("user", Q)) + "\n"),
    ("two_questions.jsonl", talk(("user", Q), ("user", Q), ("assistant", A)) + "\n"),
    ("late_system.jsonl", talk(("user", Q), ("system", "Ngắn."), ("assistant", A)) + "\n"),
    ("tool.jsonl", talk(("user", Q), ("tool", "{}"), ("assistant", A)) + "\n"),
    ("no_turns.jsonl", row(messages=[]) + "\n"),
    ("turns_of_text.jsonl", row(messages=[Q, A]) + "\n"),
    ("turn_without_role.jsonl", row(messages=[{"content": Q}]) + "\n"),
    ("content_list.jsonl", row(messages=[{"role": "user", "content": [{"type": "text"}]}]) + "\n"),
    ("empty_turn.jsonl", talk(("user", Q), ("assistant", "")) + "\n"),
    ("empty_system.jsonl", talk(("system", ""), ("user", Q), ("assistant", A)) + "\n"),
    ("bad_history.jsonl", row(instruction=Q, output=A, history=["a"]) + "\n"),
    # templates
    ("worn.jsonl", row(prompt="### Câu hỏi: Phở?\n### Trả lời:", response=A) + "\n"),
    ("worn_text.jsonl", row(text=f"### Câu hỏi:\n{Q}\n\n### Trả lời: {A}</s>") + "\n"),
    ("worn_answered.jsonl", row(prompt=f"### Câu hỏi: Phở?\n### Trả lời: {A}", response=A) + "\n"),
    ("chatml.jsonl", row(prompt="<|im_start|>user\nPhở?<|im_end|>", response=A) + "\n"),
    ("llama.jsonl", row(text="<s>[INST] Phở? [/INST] Món nước</s>") + "\n"),
    ("alpaca.jsonl", row(text="### Instruction:\nPhở?\n\n### Response:\nMón") + "\n"),
    ("worn_turn.jsonl", talk(("user", "### Câu hỏi: Phở?\n### Trả lời:"), ("assistant", A)) + "\n"),
    ("worn_history.jsonl", row(prompt=Q, response=A, history=[
        ["### Câu hỏi: Phở?\n### Trả lời:", "Có."]]) + "\n"),
    ("worn_after_system.jsonl",
     row(text=f"Trả lời ngắn.\n### Câu hỏi: {Q}\n### Trả lời: {A}") + "\n"),
    ("worn_in_one_line.jsonl", row(text=f"### Câu hỏi: {Q} ### Trả lời: {A}") + "\n"),
    ("chatml_turn.jsonl", talk(("user", "<|im_start|>user\nPhở?"), ("assistant", A)) + "\n"),
    ("chatml_end.jsonl", GOOD + row(prompt=Q, response=A + "<|im_end|>") + "\n"),
    ("template_inside.jsonl", row(prompt="Viết '### Trả lời:' làm gì?", response=A) + "\n"),
    # .json
    ("empty.json", ""),
    ("null.json", "null"),
    ("number.json", "7"),
    ("empty_list.json", "[]"),
    ("cut_off.json", f"[{ROW},\n{ROW}"),
    ("cut_off_inside.json", f'[{ROW},\n{{"prompt": "Phở'),
    ("no_comma.json", f"[{ROW}\n{ROW}]"),
    ("mixed.json", f'[{ROW}, null, "a"]'),
    ("holds_a_list.json", row(version=2, data=[json.loads(ROW)] * 2)),
    ("two_lists.json", row(train=[json.loads(ROW)], test=[json.loads(ROW)])),
    ("columns.json", row(prompt=[Q, Q], response=[A, A])),
    ("lines.json", GOOD),
    ("deep.json", "[" * 100_000),
    ("comma_at_the_end.json", f"[{ROW},\n{ROW},\n]\n\n\n"),
    ("fence.json", f"```json\n[{ROW}]\n```\n"),
    ("lines_with_lists.json", (row(prompt=Q, response=A, sources=[{"url": "x"}]) + "\n") * 2),
    ("text_and_list.json", row(text="Các câu hỏi", rows=[json.loads(ROW)])),
    ("quoted_text.json", '[{"prompt": "Hai?", "response": 4}, {"prompt": "a", "response": "b"}]'),
    # tables
    ("header_only.csv", "prompt,response\n"),
    ("no_header.csv", f"{Q},{A}\n"),
    ("comma.csv", CSV + "Phở là gì?,Món nước, rất ngon\n"),
    ("all_commas.csv", "prompt,response\nPhở?,Món nước, rất ngon\nỞ đâu?,Hà Nội, Việt Nam\n"),
    ("cell_missing.csv", CSV + "Phở là gì?\n"),
    ("empty_cell.csv", CSV + "Phở là gì?,\n"),
    ("column_twice.csv", "prompt,response,response\na,b,c\n"),
    ("open_quote.csv", CSV + 'Phở là gì?,"Món nước\n' + CSV.split("\n", 1)[1]),
    ("far_quote.csv", "prompt,response\nMột?,\"Hai\n" + "Phở là gì?,Món nước.\n" * 3_000
     + 'Ba?,Bốn"\nNăm?,Sáu\n'),
    ("near_quote.csv", "prompt,response\nMột?,\"Hai\n" + "Phở là gì?,Món nước.\n" * 12
     + 'Ba?,Bốn"\n' + CSV.split("\n", 1)[1] * 2),
    ("text_after_quote.csv", CSV + '"Phở" là gì?,Món nước\n'),
    ("backslash.csv", CSV + '"Nói \\"phở\\", là gì?",Món nước\n'),
    ("semicolons.csv", "\ufeffCâu hỏi;Trả lời\r\nPhở, bún?;Món nước, ngon\r\n;\r\n"),
    ("sep.csv", "sep=;\nprompt;response\nPhở, bún?;Món nước\n"),
    ("pipes.csv", "prompt|response\nPhở, bún?|Món; nước\n"),
    ("tab.tsv", "prompt\tresponse\tnote\nPhở?\tMón, nước\tcũ\n"),
    ("old_mac.csv", "prompt,response\rPhở?,Món nước\rBún?,Món khô\r"),
    ("numbers.csv", "prompt,response\nHai cộng hai?,4\nĐiệp viên?,007\nRỗng?,null\n"),
    ("unnamed.csv", ",prompt,response\n0,Phở?,Món\n1,Bún?,Món\n"),
    ("more_commas.csv", "prompt,response,,\nPhở?,Món,,\nBún?,Món,,\n"),
    ("cp1258.csv", cp1258("prompt,response\nPhở ở đó là gì?,Một món nước ngon cả.\n")),
    ("tcvn3.csv", TCVN3),
    ("vni.csv", VNI),
    ("tcvn3_as_letters.jsonl", row(prompt="Phë lµ g×?", response="Mét mãn n­íc ngon.") + "\n"),
    ("latin1.csv", "prompt,response\ncafé crème,déjà vu\n".encode("latin-1")),
    # other kinds of files
    ("notes.txt", "Phở là món nước.\n\nBún là món khác.\n"),
    ("pairs.txt", "### Câu hỏi: Một?\n### Trả lời: Hai.\n\n### Câu hỏi: Ba?\n### Trả lời: Bốn.\n"),
    ("pairs_of_a_mac.txt", unicodedata.normalize(
        "NFD", "### Câu hỏi: Một?\n### Trả lời: Hai.\n\n### Câu hỏi: Ba?\n### Trả lời: Bốn.\n")),
    ("lines.txt", GOOD),
    ("zip.csv", lambda: other_zip()),
    ("zip.txt", lambda: other_zip()),
    ("pdf.txt", b"%PDF-1.7\n%\xe2\xe3\n"),
    ("twice.jsonl.gz", gzip.compress(gzip.compress(GOOD.encode()))),
    ("empty.md", "\n\n"),
    ("rows.jsonl.gz", gzip.compress(GOOD.encode())),
    ("not_gzip.jsonl.gz", GOOD),
    ("half.jsonl.gz", gzip.compress(GOOD.encode())[:60]),
    ("gzip_without_the_name.jsonl", gzip.compress(GOOD.encode())),
    ("rows.pdf", b"%PDF-1.7"),
    ("rows.xls", b"\xd0\xcf\x11\xe0"),
    ("rows", ROW),
    ("text.xlsx", "prompt,response\n"),
    ("other.xlsx", lambda: other_zip()),
    ("rows.xlsx", lambda: sheet([["prompt", "response"], [Q, A]])),
    ("formula.xlsx", lambda: sheet([["prompt", "response"]] + [[Q, A]] * 9 + [[Q, "x"]],
                                   formulas=[("B11", "=A2&A3")])),
    ("number.xlsx", lambda: sheet([["prompt", "response"], ["Hai cộng hai?", 4]])),
    ("float.xlsx", lambda: sheet([["prompt", "response"]] + [[Q, A]] * 9 + [["Pi?", 3.14]])),
    ("long_number.xlsx", lambda: sheet([["prompt", "response"], ["Số?", 12345678901234567890]])),
    ("true.xlsx", lambda: sheet([["prompt", "response"], ["Đúng?", True]])),
    ("second_sheet.xlsx", lambda: sheet([["prompt", "response"], [Q, A]],
                                        more=[["Ngày", "Việc"], ["1", "2"]])),
    ("hidden_sheet.xlsx", lambda: sheet([["prompt", "response"], ["Ẩn?", A]], hidden=0,
                                        more=[["Câu hỏi", "Trả lời"], [Q, A]])),
    ("same_columns.xlsx", lambda: sheet([["prompt", "response"]] + [[Q, A]] * 9,
                                        more=[["response", "prompt"], [4.5, Q]])),
    ("small_range.xlsx", lambda: sheet([["prompt", "response"]] + [[Q, A]] * 9, cells="A1:B3")),
    ("unused_number.xlsx", lambda: sheet([["prompt", "response", "điểm"], [Q, A, 0.5]])),
    ("escaped.xlsx", lambda: sheet([["prompt", "response"], [Q, "Một _x1EDF_"]])),
    ("password.xlsx", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(100)),
    ("twice.xlsx", lambda: sheet([["prompt", "Prompt", "response"], [Q, Q, A]])),
    ("text.parquet", "prompt,response\n"),
    ("fake.parquet", b"PAR1" + b"\x00" * 100 + b"PAR1"),
    ("rows.parquet", lambda: parquet([{"prompt": Q, "response": A}] * 2)),
    ("far_date.parquet", lambda: parquet([{"prompt": Q, "response": A, "day": 10**9}],
                                         day="date32")),
    ("no_rows.parquet", lambda: parquet([], prompt="string", response="string")),
    ("number.parquet", lambda: parquet([{"prompt": Q, "response": 4}])),
]


def other_zip() -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("a.txt", "a")
    return made.getvalue()


def write(folder: Path, name: str, content) -> Path:
    content = content() if callable(content) else content
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file
