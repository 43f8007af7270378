"""JSON is read in pieces. The places where the pieces end do not change the result."""

import io
import json

import pytest

from phogpt_raw.data import json_text
from phogpt_raw.data.json_text import json_lines, json_values
from phogpt_raw.data.records import Bad, Findings
from phogpt_raw.refusal import Refusal

ROWS = [{"prompt": "Phở \\ \"là\" gì?\n😀", "response": "Món\tnước"},
        {"a": [1, {"b": None}], "c": -12.5e3}]


def plain(value):
    """The value with each number replaced by its text."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return list(map(plain, value))
    return str(value) if isinstance(value, json_text.Number) else value


def read(text):
    findings = Findings()
    return [(plain(record.value), record.where)
            for record in json_values(io.StringIO(text), "f", findings)], findings


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("ascii", [True, False])
def test_the_ends_of_pieces_do_not_show(monkeypatch, piece, ascii):
    listed = json.dumps(ROWS * 3, indent=1, ensure_ascii=ascii)
    texts = [listed, f'{{"version": 1234567, "data": {listed}, "of": "x"}}',
             "\n".join(json.dumps(row, ensure_ascii=ascii) for row in ROWS * 3), "1234567 [89]"]
    whole = [read(text) for text in texts]
    monkeypatch.setattr(json_text, "PIECE", piece)
    assert [read(text) for text in texts] == whole
    assert [value for value, _ in whole[0][0]] == [value for value, _ in whole[1][0]]
    assert [value for value, _ in whole[0][0]][1] == {"a": ["1", {"b": None}], "c": "-12500.0"}
    assert whole[3][0] == [("1234567", "f:1"), ("89", "f:1 (record 1)")]
    assert whole[1][1].notes["beside the list"].example == "version, of"


@pytest.mark.parametrize("text, said", [
    ('[{"a": 1}', "f:1: is not JSON (a comma or ] is missing before the end of the file)"),
    ('[1,\n\n2 3]', "f:3: is not JSON (a comma or ] is missing before '3')"),
    ('[1,]', "f:1: is not JSON (Expecting value before ])"),
    ('{"a": 1,\n b: 2}', "f:2: is not JSON (a name in double quotes is missing before 'b')"),
    ('{"a" 1}', "f:1: is not JSON (a colon is missing before '1')"),
    ('{"a": tru', "f:1: is not JSON (Expecting value before tru)"),
    ('{"prompt": "a", "more": [{"b": 1}]}', "f:1: this object has a row's field, prompt, and"),
])
def test_text_that_is_not_json_is_refused_with_its_line(text, said):
    with pytest.raises(Refusal) as refused:
        read(text)
    assert str(refused.value).startswith(said)


def test_a_row_with_lists_is_a_row():
    talk = {"messages": [{"role": "user"}], "tags": ["a", "b"]}
    assert read(json.dumps(talk))[0] == [(talk, "f:1")]
    assert read(json.dumps([talk]))[0] == [(talk, "f:1 (record 1)")]
    spaced = json.dumps({"data": [talk]}).replace("[{", "[" + " " * 300 + "{")
    assert read(spaced)[0] == [(talk, "f:1 (record 1)")]
    assert read('{"data": [], "id": "1"}{}')[0] == [({"data": [], "id": "1"}, "f:1"), ({}, "f:1")]


def test_an_object_of_lists_without_objects_is_bad():
    [bad] = json_values(io.StringIO('\n{"data": ["a"], "more": []}'), "f", Findings())
    assert bad == Bad("f:2", "no objects in data and more; a .json file is a list of objects, or "
                             "an object that contains one such list")


def test_a_value_without_end_is_refused_before_it_fills_the_memory(monkeypatch):
    monkeypatch.setattr(json_text, "LONGEST", 1000)
    monkeypatch.setattr(json_text, "PIECE", 100)
    with pytest.raises(Refusal, match=r"f:2: a row has more than"):
        read('[1,\n{"a": "' + "x" * 100_000)


def test_a_line_that_is_too_long_is_skipped_whole(monkeypatch):
    monkeypatch.setattr(json_text, "LONGEST", 50)
    found = list(json_lines(io.StringIO('{"a": "' + "x" * 500 + '"}\n{"a": "b"}\n'), "f"))
    assert isinstance(found[0], Bad) and found[0].where == "f:1"
    assert found[1].value == {"a": "b"} and found[1].where == "f:2" and len(found) == 2
