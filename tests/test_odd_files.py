"""For each bad or unusual file there is one fixed line. For random bytes there is at most one line.
"""

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from odd_files import FILES, GOOD, write

from phogpt_raw.data.encoded import Rows, encode_sources
from phogpt_raw.data.prompt import IGNORED, TEMPLATES
from phogpt_raw.data.records import named
from phogpt_raw.data.sources import KINDS, find_source
from phogpt_raw.model.weights import NANO, read_config, read_tokenizer
from phogpt_raw.refusal import Refusal

LINES = dict(line.split(": ", 1) for line in (Path(__file__).parent / "odd_lines.txt").read_text(
    "utf-8").splitlines())
TOKENIZER = read_tokenizer(NANO, read_config(NANO))


def read(file: Path) -> Rows:
    rows = encode_sources([find_source(str(file))], TOKENIZER, TEMPLATES["4b-chat"], max_len=256)
    rows.check(strict=False)
    return rows


def said(file: Path) -> str:
    """The line of a file: the error, or the number of rows, the rows left out, and the notes."""
    try:
        rows = read(file)
    except Refusal as refusal:
        return f"refused: {refusal}"
    found = rows.together()
    notes = [f"{kind} {note.count}" for kind, note in found.notes.items()
             if kind != "format prompt, response"]
    left_out = [f"left out: {named(found.bad)}"] if found.bad else []
    return "; ".join([f"{len(rows.rows)} rows", *left_out, *notes])


def test_each_file_has_a_line_and_there_are_over_a_hundred():
    assert [name for name, _ in FILES] == list(LINES) and len(LINES) > 120


@pytest.mark.parametrize("name, content", FILES, ids=[name for name, _ in FILES])
def test_an_odd_file_gets_exactly_its_line(tmp_path, name, content):
    if name.endswith(".xlsx"):
        pytest.importorskip("openpyxl")
    line = said(write(tmp_path, name, content)).replace(f"{tmp_path}/", "")
    assert line == LINES[name]
    assert "\n" not in line


BEGINNINGS = [b"", b"\xff\xfe", b"\xef\xbb\xbf", b"\x1f\x8b\x08\x00", b"PK\x03\x04", b"PAR1", b"[",
              b'{"prompt": ', b'{"data": [', b"prompt,response\n", b"prompt\tresponse\n\"",
              GOOD.encode()]
PIECES = st.lists(st.one_of(
    st.binary(max_size=40), st.text(max_size=20).map(lambda t: t.encode("utf-8", "replace")),
    st.sampled_from([b'"', b",", b";", b"\n", b"\r\n", b"{", b"}", b"[", b"]", b":",
                     b"\\ud83d", b"null", b"1e999", b'"prompt"', b'"response"',
                     b"### C\xc3\xa2u h\xe1\xbb\x8fi:", b"</s>",
                     b"\x00", b"\xff", b'{"prompt": "a", "response": "b"}'])), max_size=30)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=5000, suppress_health_check=list(HealthCheck))
@given(beginning=st.sampled_from(BEGINNINGS), pieces=PIECES)
@example(beginning=b"", pieces=[b"null"])
@example(beginning=b"PAR1", pieces=[b"\x00" * 40, b"PAR1"])
def test_any_bytes_under_any_name_end_in_a_line_or_in_rows(kind, beginning, pieces):
    with tempfile.TemporaryDirectory() as folder:
        file = write(Path(folder), f"rows{kind}", beginning + b"".join(pieces))
        try:
            rows = read(file)
        except Refusal as refusal:
            assert str(refusal).startswith(str(file))
            return
        assert rows.rows
        for row in rows.rows:
            for document in row.documents:
                assert document.supervised > 0 and len(document.ids) <= 256


WORDS = st.text(st.sampled_from("aăâbcdđeêghiklmnoôơpqrstuưvxyáàảãạếềểễệ 01234567.,?!:#\n\"'</s>"),
                min_size=1, max_size=60)


@settings(max_examples=150, deadline=None)
@given(turns=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4),
       max_len=st.integers(8, 120), too_long=st.sampled_from([None, "cut", "split"]),
       template=st.sampled_from(sorted(TEMPLATES)))
def test_targets_cover_all_answers_and_their_ends_and_no_question(turns, max_len, too_long,
                                                                  template):
    from phogpt_raw.data.conversations import Conversation
    from phogpt_raw.data.prompt import encode
    from phogpt_raw.data.records import Bad, Findings

    turns = [(q.strip() or "a", a.strip().removesuffix("</s>").strip() or "b") for q, a in turns]
    spoken = tuple(turn for q, a in turns for turn in (("user", q), ("assistant", a)))
    form = TEMPLATES[template]
    [(_, found)] = encode(TOKENIZER, form, [Conversation(spoken, "r:1")], max_len, too_long,
                          Findings())
    if isinstance(found, Bad):
        return
    end, answers = TOKENIZER.eos_token_id, []
    for document in found:
        assert len(document.ids) <= max_len and document.ids.count(end) <= len(turns)
        supervised = [target for target in document.targets if target != IGNORED]
        predicted = [document.ids[i + 1] for i, target in enumerate(document.targets)
                     if target != IGNORED]
        assert supervised == predicted and supervised
        text = ""
        for place, token in enumerate(document.ids):
            carries = place > 0 and document.targets[place - 1] != IGNORED
            text += "A" if carries else "Q"
            if token == end:
                assert carries  # the end of an answer is never left out
        if not document.cut:
            assert document.ids[-1] == end
        answers += TOKENIZER.decode(supervised).split("</s>")
    if not any(document.cut for document in found):
        told = "".join(form.gap + a + "</s>" for _, a in turns)
        assert "".join(TOKENIZER.decode([t for t in d.targets if t != IGNORED])
                       for d in found) == told


def test_the_rows_of_a_file_with_one_far_quote_are_all_there_but_one(tmp_path):
    """The quote of line 2 is closed 70,000 lines later. The lines between must stay rows."""
    from phogpt_raw.data.conversations import conversations
    from phogpt_raw.data.records import Findings
    from phogpt_raw.data.sources import read_file

    file = write(tmp_path, "far.csv", "prompt,response\nMột?,\"Hai\n" + "Phở?,Món.\n" * 70_000
                 + 'Ba?,Bốn"\nNăm?,Sáu\n')
    findings = Findings()
    rows = list(conversations(read_file(file, findings), findings))
    assert len(rows) == 70_002 and [bad.where for bad in findings.bad] == [f"{file}:2"]
    assert rows[-1].where == f"{file}:70004"


def test_bad_rows_are_all_counted_and_ten_are_named(tmp_path):
    lines = [json.dumps({"prompt": "a", "response": n}) for n in range(25)]
    with pytest.raises(Refusal) as refused:
        read(write(tmp_path, "rows.jsonl", "\n".join(lines)))
    assert "25 of 25 rows" in str(refused.value)
    assert str(refused.value).count("is not text") == 10
