"""Records of every format become the same conversations. The program names what it leaves out."""

import doctest
import json
import shlex
import unicodedata
from itertools import product

import pytest

from phogpt_raw.data import conversations as module
from phogpt_raw.data.conversations import Conversation, conversations, parse_map
from phogpt_raw.data.fields import NAMES, field_of
from phogpt_raw.data.records import Findings, Record
from phogpt_raw.refusal import Refusal

Q, A = "Phở là gì?", "Một món nước."
ONE = (("user", Q), ("assistant", A))


def read(*records, mapped=None) -> tuple[list[Conversation], Findings]:
    findings = Findings()
    found = conversations((Record(value, f"rows:{n}") for n, value in enumerate(records, 1)),
                          findings, parse_map(mapped))
    return list(found), findings


def turns(record, mapped=None):
    [found], _ = read(record, mapped=mapped)
    return found.turns


def fault(record) -> str:
    found, findings = read(record)
    assert not found
    return findings.bad[0].what


def test_doctests():
    from phogpt_raw.data import fields, records

    for one in (module, fields, records):
        assert doctest.testmod(one).failed == 0 < doctest.testmod(one).attempted


@pytest.mark.parametrize("record", [
    {"prompt": Q, "response": A},
    {"prompt": Q, "completion": A},
    {"instruction": Q, "output": A},
    {"instruction": Q, "input": "", "output": A},
    {"instruction": Q, "input": None, "output": A, "history": []},
    {"instruction": Q, "response": A},
    {"question": Q, "answer": A},
    {"input": Q, "output": A},
    {"messages": [{"role": "user", "content": Q}, {"role": "assistant", "content": A}]},
    {"conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": A}]},
    {"text": f"### Câu hỏi: {Q}\n### Trả lời: {A}"},
    {"text": f"### Câu hỏi:\n{Q}\n\n### Trả lời:{A}</s>"},
    {"Câu hỏi": Q, "Trả lời": A},
    {"CÂU HỎI": Q, "CÂU TRẢ LỜI": A},
    {"cau_hoi": Q, "tra_loi": A},
    {"Hỏi": Q, "Đáp": A},
    {"Yêu cầu": Q, "Đầu vào": "", "Đầu ra": A},
    {"Prompt": Q, "RESPONSE": A},
    {"prompt": f"### Câu hỏi: {Q}\n### Trả lời:", "response": A},
    {"prompt": f"### Câu hỏi:\n{Q}\n\n### Trả lời:", "response": f"### Trả lời: {A}"},
    {"prompt": unicodedata.normalize("NFD", f"  {Q}\n"), "response": f"{A}\r\n"},
], ids=lambda record: ", ".join(record)[:40])
def test_every_format_is_the_same_conversation(record):
    assert turns(record) == ONE


def test_every_name_is_known_in_any_spelling():
    for meaning, names in NAMES.items():
        for name in names.split(","):
            for spelled in (name, name.upper(), name.title(), name.replace(" ", "_"),
                            unicodedata.normalize("NFD", name)):
                assert field_of(spelled) == meaning


def test_input_system_and_history_have_their_places():
    record = {"system": "Ngắn gọn.", "instruction": "Dịch", "input": "cat", "output": "mèo",
              "history": [["Chào", "Dạ chào"], ["Khỏe?", "Dạ khỏe"]]}
    assert turns(record) == (
        ("system", "Ngắn gọn."), ("user", "Chào"), ("assistant", "Dạ chào"), ("user", "Khỏe?"),
        ("assistant", "Dạ khỏe"), ("user", "Dịch\ncat"), ("assistant", "mèo"))


def test_many_turns_and_a_template_with_many():
    said = [("system", "Ngắn."), ("user", "Một?"), ("assistant", "Hai."), ("user", "Ba?"),
            ("assistant", "Bốn.")]
    assert turns({"messages": [{"role": r, "content": t} for r, t in said]}) == tuple(said)
    worn = "### Câu hỏi: Một?\n### Trả lời: Hai.</s>\n### Câu hỏi: Ba?\n### Trả lời:"
    assert turns({"prompt": worn, "response": "Bốn."}) == tuple(said[1:])
    assert turns({"text": worn + " Bốn.</s>"}) == tuple(said[1:])


def test_a_text_is_kept_as_it_is():
    assert turns({"text": " Một.\n\nHai. "}) == (("text", "Một.\n\nHai."),)
    assert turns({"text": "Một dòng ### Trả lời: giữa chừng"})[0][0] == "text"


def test_a_map_names_other_columns_and_takes_the_meaning_from_usual_ones():
    record = {"response": "cũ", "hoi_gi": Q, "Trả  lời": A}
    assert turns(record, "response=tra_loi, prompt=HOI_GI") == ONE
    found, findings = read(record, mapped="response=Trả lời,prompt=hoi_gi")
    assert found[0].turns == ONE and "unused response" in findings.notes


@pytest.mark.parametrize("spec, said", [
    ("response", "must be FIELD=NAME"),
    ("reply=x", "must be FIELD=NAME, where FIELD is one of prompt, response"),
    ("response=", "must be FIELD=NAME"), ("response=a,response=b", "names response twice"),
    ("prompt=a,response=a", "names a twice")])
def test_a_map_that_cannot_be_is_refused(spec, said):
    with pytest.raises(Refusal, match=said):
        parse_map(spec)


def test_what_is_used_and_what_is_not_is_noted_for_good_rows_alone():
    _, findings = read({"prompt": Q, "response": A, "topic": "món", "id": 3, "empty": ""},
                       {"prompt": Q, "response": 4, "other": "x"})
    assert {kind: (note.count, note.example) for kind, note in findings.notes.items()} == {
        "unused topic": (1, "topic"), "unused id": (1, "id"),
        "format prompt, response": (1, "prompt, response")}


def test_of_two_formats_in_one_row_the_first_is_used_and_the_other_named():
    found, findings = read({"prompt": Q, "response": A, "instruction": "Dịch", "output": "mèo"})
    assert found[0].turns == ONE
    assert {"unused instruction", "unused output"} < findings.notes.keys()


def test_a_last_question_without_an_answer_is_left_out_and_noted():
    found, findings = read({"messages": [*({"role": r, "content": t} for r, t in ONE),
                                         {"role": "user", "content": "Rồi sao?"}]})
    assert found[0].turns == ONE and findings.notes["open question"].where == "rows:1"


@pytest.mark.parametrize("record, said", [
    ({"prompt": "a", "response": json.loads("[1]")}, "response is not text but a list"),
    ({"system": 3, "prompt": "a", "response": "b"}, "system is not text but a number"),
    ({"prompt": "a", "response": b"b"}, "response is not text but bytes"),
    ({"prompt": None, "response": "b"}, "prompt is empty; write a text"),
    ({"messages": "a"}, "messages is not a list of turns"),
    ({"messages": [{"role": 3, "content": "a"}]}, "turn 1 of messages has the role a number"),
    ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": None}]},
     "value of turn 2 is not text but null"),
    ({"instruction": "a", "output": "b", "history": [["a"]]}, "history is not a list of ["),
    ({"instruction": "a", "output": "b", "history": [["a", 3]]}, "answer 1 of history is not text"),
    ({"prompt": "USER: hi ASSISTANT:", "response": "b"}, "template of another model (USER:)"),
    ({"prompt": "a" * 10_000_001, "response": "b"}, "prompt has 10,000,001 characters"),
])
def test_a_record_that_cannot_be_used_says_why(record, said):
    assert said in fault(record)


FORMATS = ("a row needs prompt and response, instruction and output, question and answer, input "
           "and output, messages, conversations, or text; ")


@pytest.mark.parametrize("record, mapped, said", [
    ({"prompt": "a"}, None, "missing: response; for other names, give --map response=NAME"),
    ({"completion": "a"}, None, "missing: prompt; for other names, give --map prompt=NAME"),
    ({"a": "a", "b": "b"}, None,
     "missing: prompt and response; for other names, give --map prompt=NAME,response=NAME"),
    ({"promt": "a", "response": "b"}, None,
     "did you mean prompt? Correct the name, or give --map prompt=promt"),
    ({"promt": "a", "respons": "b", "topic": "c"}, None,
     "did you mean prompt and response? Correct the name, or give --map "
     "prompt=promt,response=respons"),
    ({"Câu hỏii": "a", "answer": "b"}, None,
     "did you mean question? Correct the name, or give --map 'question=Câu hỏii'"),
    ({"mesages": []}, None, "did you mean messages? Correct the name, or give --map "
     "messages=mesages"),
    ({"promt": "a"}, None,
     "missing: prompt and response; for other names, give --map prompt=NAME,response=NAME")])
def test_a_record_of_no_known_format_says_which_field_is_missing(record, mapped, said):
    assert fault(record) == f"fields {', '.join(record)}; {FORMATS}{said}"


def test_a_misspelled_name_is_read_with_the_map_that_the_message_gives():
    record = {"promt": Q, "Trả lờii": A}
    [_, spec] = shlex.split(fault(record).partition("give ")[2])
    assert turns(record, spec) == ONE


def test_a_map_that_takes_the_answer_as_the_question_is_named_and_completed():
    _, findings = read({"prompt": A, "response": Q}, mapped="prompt=response")
    said = findings.bad[0].what
    assert said == (f"fields prompt, response; --map makes response the prompt; {FORMATS}missing: "
                    f"response; for other names, give --map prompt=response,response=NAME")
    assert turns({"prompt": A, "response": Q}, "prompt=response,response=prompt") == ONE


def test_any_question_and_any_answer_make_a_pair():
    assert set(module.PAIRS) == set(product(module.QUESTIONS, module.ANSWERS))


def test_a_row_of_a_table_without_known_columns_says_that_the_first_row_names_them():
    findings = Findings()
    table = [Record({Q: "a", A: "b"}, "rows.csv:2", table=True),
             Record({"prompt": "a", "b": "b"}, "rows.csv:3", table=True)]
    assert not list(conversations(table, findings))
    assert ["the first row of the table must name the columns" in bad.what
            for bad in findings.bad] == [True, False]


def test_half_a_character_in_a_name_can_be_printed(capsys):
    found, findings = read({"prompt": Q, "response": A, "\ud83d": "x"}, {"\ud83d": "x"})
    print(findings.bad[0], findings.notes)
    assert len(found) == 1 and "fields \\ud83d" in findings.bad[0].what
    assert findings.notes["unused \\ud83d"].example == "\\ud83d"


def test_letters_of_an_old_font_are_refused_by_name():
    with pytest.raises(Refusal, match="rows:1: the text is in VNI"):
        read({"prompt": "Nöôùc Vieät Nam ôû ñaâu?", "response": "Daï, ôû chaâu AÙ aï."})


def test_the_hash_does_not_see_capitals_and_spaces_but_roles_and_texts():
    [one, same, other], _ = read({"prompt": "Phở  là gì?", "response": A},
                                 {"prompt": "phở LÀ gì?", "response": A},
                                 {"prompt": Q, "response": "Khác."})
    assert one.hash == same.hash != other.hash
    assert 0 <= one.hash < 2**64 and one.question == "Phở  là gì?"
