"""Files of every kind give the same records. Folders, weights and hub data sets can be named too.
"""

import csv
import gzip
import io
import json
import logging
import sys
from types import SimpleNamespace

import pytest
from odd_files import parquet, sheet

from phogpt_raw.data.conversations import conversations
from phogpt_raw.data.records import Bad, Findings
from phogpt_raw.data.sources import find_source, find_unweighted, read_file
from phogpt_raw.data.tables import rows_within
from phogpt_raw.refusal import Refusal

PAIRS = [("Phở là gì?", "Một món nước."), ("Hai dòng,\nmột câu; ở đây", 'Có "ngoặc"\tvà tab'),
         ("007 là ai?", "Điệp viên")]


def table(delimiter: str) -> str:
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter).writerows([("prompt", "response"), *PAIRS])
    return text.getvalue()


RECORDS = [{"prompt": q, "response": a} for q, a in PAIRS]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS)
CONTENTS = {
    "rows.jsonl": LINES.encode(), "rows.NDJSON": LINES.encode("utf-8-sig"),
    "lines.jsonl.gz": gzip.compress(LINES.encode()), "utf16.jsonl": LINES.encode("utf-16"),
    "escaped.jsonl": "".join(json.dumps(record) + "\r\n" for record in RECORDS).encode(),
    "list.json": json.dumps(RECORDS, ensure_ascii=False, indent=1).encode(),
    "holds_a_list.json": json.dumps({"version": 1, "data": RECORDS}).encode(),
    "list.jsonl": json.dumps(RECORDS).encode(), "lines.json": LINES.encode(),
    "rows.csv": table(",").encode(), "rows.tsv": table("\t").encode(),
    "excel.csv": table(";").encode("utf-8-sig"), "excel_text.csv": table("\t").encode("utf-16"),
    "bars.csv": table("|").encode(), "rows.csv.gz": gzip.compress(table(",").encode()),
    "rows.parquet": parquet(RECORDS),
}


def read(file):
    findings = Findings()
    [path] = find_source(str(file)).files
    return list(conversations(read_file(path, findings), findings)), findings


@pytest.mark.parametrize("name", [*CONTENTS, "rows.xlsx"])
def test_every_kind_of_file_holds_the_same_rows(tmp_path, name):
    if name == "rows.xlsx":
        pytest.importorskip("openpyxl")
        CONTENTS[name] = sheet([("prompt", "response"), *PAIRS])
    file = tmp_path / name
    file.write_bytes(CONTENTS[name])
    rows, findings = read(file)
    assert [tuple(text for _role, text in row.turns) for row in rows] == PAIRS
    assert not findings.bad and {row.where.split(":")[0] for row in rows} == {str(file)}


@pytest.mark.parametrize("name, lines", [
    ("rows.jsonl", [1, 2, 3]), ("list.json", [2, 6, 10]), ("rows.csv", [2, 3, 5]),
    ("rows.parquet", [1, 2, 3]), ("list.jsonl", [1, 1, 1])])
def test_every_record_knows_the_line_on_which_it_begins(tmp_path, name, lines):
    file = tmp_path / name
    file.write_bytes(CONTENTS[name])
    rows, _ = read(file)
    places = [row.where.removeprefix(f"{file}:").split() for row in rows]
    assert [int(place[0]) for place in places] == lines
    if name.startswith("list"):
        assert [place[1:] for place in places] == [["(record", f"{n})"] for n in (1, 2, 3)]


def test_a_json_file_longer_than_a_piece_is_read_whole(tmp_path):
    """Some records cross the border between two pieces. One record is longer than a piece."""
    records = [{"prompt": f"câu {n}", "response": "đáp " * (400_000 if n == 50 else 4_000)}
               for n in range(100)]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps({"rows": records}, ensure_ascii=False, indent=0), "utf-8")
    rows, findings = read(file)
    assert [row.question for row in rows] == [f"câu {n}" for n in range(100)] and not findings.bad
    assert rows[-1].where == f"{file}:{4 * 99 + 3} (record 100)"


def test_a_record_over_the_limit_is_bad_and_the_next_is_read(tmp_path):
    long = json.dumps({"prompt": "a", "response": "b" * 10_000_001})
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{LINES}{long}\n{LINES}", "utf-8")
    rows, findings = read(file)
    assert len(rows) == 6 and rows[3].where == f"{file}:5"
    assert findings.bad[0].where == f"{file}:4" and "10,000,000" in findings.bad[0].what


def test_a_row_over_the_limit_in_parquet_is_refused_unread(tmp_path):
    long = [{"prompt": "a", "response": "ạ" * 20_000_000}]
    (tmp_path / "rows.parquet").write_bytes(parquet(long))
    with pytest.raises(Refusal, match=r"rows\.parquet: a row has more than 10,000,000 characters"):
        read(tmp_path / "rows.parquet")


def test_a_file_of_bad_rows_without_end_is_not_read_to_its_end(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("prompt,response\n" + "a\n" * 500_000)
    with pytest.raises(Refusal, match=r"rows\.csv:2, :3, .* \(so far, 100,001 rows cannot be used"):
        read(file)


def test_a_folder_is_its_data_files_by_name_and_says_what_it_leaves(tmp_path):
    for name in ("b.jsonl", "sub/a.csv", "README.md", "picture.png", ".hidden.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(CONTENTS["rows.csv" if "csv" in name else "rows.jsonl"])
    source = find_source(str(tmp_path))
    assert [file.name for file in source.files] == ["b.jsonl", "a.csv"]
    assert {file.name for file in source.not_read()} == {".hidden.jsonl", "README.md",
                                                         "picture.png"}
    (tmp_path / "empty").mkdir()
    with pytest.raises(Refusal, match=r"empty: holds no data file; \.jsonl"):
        find_source(str(tmp_path / "empty"))


def test_a_weight_stands_behind_a_file_unless_a_file_is_called_so(tmp_path):
    (tmp_path / "a.jsonl").write_text(LINES, "utf-8")
    assert find_source(f"{tmp_path}/a.jsonl=2.5").weight == 2.5
    assert find_source(f"{tmp_path}/a.jsonl").weight == 1
    (tmp_path / "a=2.jsonl").write_text(LINES, "utf-8")
    assert find_source(f"{tmp_path}/a=2.jsonl").weight == 1
    for wrong in ("0", "1.2.3", "1001", "nan", "-1", "1e400", "", "hai"):
        with pytest.raises(Refusal, match=f"a.jsonl={wrong}: the weight after = must be a number"):
            find_source(f"{tmp_path}/a.jsonl={wrong}")
    with pytest.raises(Refusal, match=r"--eval .*a.jsonl=2: only --data can have a weight"):
        find_unweighted(f"{tmp_path}/a.jsonl=2", "--eval")


@pytest.mark.parametrize("name", ["rows.jsonl", "no/such.csv", "x.PARQUET", "~/none.json.gz", "a",
                                  "a/b/c", "no/such.xls", "data/rows.jsonl=2"])
def test_a_file_that_is_not_there_is_never_looked_up_on_the_hub(name):
    with pytest.raises(Refusal, match="no such data file"):
        find_source(name)


@pytest.mark.parametrize("name, hub", [
    ("owner/name", ("owner/name", "train", None)),
    ("owner/name:test", ("owner/name", "test", None)),
    ("owner/name@v1.0", ("owner/name", "train", "v1.0")),
    ("owner/na.me:test@refs/pr/1", ("owner/na.me", "test", "refs/pr/1"))])
def test_a_hub_dataset_has_a_split_and_a_revision(monkeypatch, name, hub):
    asked = []

    def load_dataset(repository, **how):
        asked.append((repository, how.pop("split"), how.pop("revision")))
        assert how == {"streaming": True}
        return iter(RECORDS)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    from phogpt_raw.data.sources import read_hub

    rows = list(conversations(read_hub(find_source(name)), Findings()))
    assert asked == [hub] and len(rows) == 3
    assert rows[1].where == f"{hub[0]}:{hub[1]}:2"


def test_a_hub_that_does_not_answer_is_one_line(monkeypatch, caplog):
    logger = logging.getLogger("huggingface_hub.utils._http")

    def load_dataset(*_, **__):
        logger.warning("Retrying in 8s")
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub\nlong\ntrace")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    from phogpt_raw.data.sources import read_hub

    with pytest.raises(Refusal, match=r"^owner/name: is not a file on .*Couldn't reach"):
        list(read_hub(find_source("owner/name=2")))
    assert not caplog.records
    logger.warning("later")
    assert caplog.messages == ["later"]


def test_a_local_file_needs_no_datasets_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    for name, content in CONTENTS.items():
        (tmp_path / name).write_bytes(content)
        if name != "rows.xlsx":
            assert len(read(tmp_path / name)[0]) == 3


def test_without_openpyxl_an_excel_file_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    (tmp_path / "rows.xlsx").write_bytes(b"PK")
    with pytest.raises(Refusal, match=r"rows\.xlsx: .*pip install openpyxl"):
        read(tmp_path / "rows.xlsx")


def test_the_identity_of_a_file_is_its_bytes(tmp_path):
    (tmp_path / "a.jsonl").write_text(LINES, "utf-8")
    one = find_source(str(tmp_path / "a.jsonl")).identity()
    (tmp_path / "a.jsonl").write_text(LINES + "\n", "utf-8")
    assert len(one) == 64 and find_source(str(tmp_path / "a.jsonl")).identity() != one


def test_a_file_that_may_not_be_read_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text(LINES, "utf-8")

    def forbidden(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("phogpt_raw.data.sources.detect", forbidden)
    with pytest.raises(Refusal, match=r"a\.jsonl: cannot be read \(Permission denied\)"):
        read(tmp_path / "a.jsonl")


def test_letters_that_excel_writes_as_codes_are_read_as_letters(tmp_path):
    pytest.importorskip("openpyxl")
    file = tmp_path / "rows.xlsx"
    file.write_bytes(sheet([["prompt", "response"],
                            ["Một_x000D_\nHai?", "_x1EDF_ đâu, _x005F_x1EDF_"]]))
    [record] = read_file(file, Findings())
    assert record.value == {"prompt": "Một\r\nHai?", "response": "ở đâu, _x1EDF_"}


def test_a_row_of_a_second_sheet_names_it_and_columns_may_change_places(tmp_path):
    pytest.importorskip("openpyxl")
    file = tmp_path / "rows.xlsx"
    file.write_bytes(sheet([["prompt", "response"], ["a", "b"]],
                           more=[["response", "prompt"], ["d", "c"]]))
    assert [(record.where, record.value) for record in read_file(file, Findings())] == [
        (f"{file}:2", {"prompt": "a", "response": "b"}),
        (f"{file}:Ghi chú:2", {"prompt": "c", "response": "d"})]


def test_after_a_question_over_the_limit_a_text_file_is_read_on(tmp_path, monkeypatch):
    monkeypatch.setattr("phogpt_raw.data.sources.LONGEST", 100)
    rows = [f"### Câu hỏi: {n}?\n### Trả lời: Dạ {'dài ' * (30 if n == 2 else 1)}\n\n"
            for n in range(5)]
    file = tmp_path / "rows.txt"
    file.write_text("".join(rows), "utf-8")
    found = list(read_file(file, Findings()))
    assert [one.where for one in found] == [f"{file}:{line}" for line in (1, 4, 7, 10, 13)]
    assert [isinstance(one, Bad) for one in found] == [False, False, True, False, False]


def test_an_empty_cell_of_excel_is_an_empty_field_of_its_column(tmp_path):
    pytest.importorskip("openpyxl")
    file = tmp_path / "rows.xlsx"
    file.write_bytes(sheet([["Câu hỏi", "Trả lời", "id"], ["a", "b", 1], ["a", None, 2], ["a"]]))
    rows, findings = read(file)
    assert len(rows) == 1 and [str(bad) for bad in findings.bad] == [
        f"{file}:{line}: Trả lời is empty; write a text, or remove the row" for line in (3, 4)]


def test_what_an_open_excel_leaves_in_a_folder_is_not_read(tmp_path):
    (tmp_path / "~$rows.xlsx").write_bytes(b"\x05Ho")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    assert [file.name for file in find_source(str(tmp_path)).files] == ["rows.jsonl"]


@pytest.mark.parametrize("name", ["./rows", "../rows"])
def test_a_path_that_is_not_there_is_no_name_of_the_hub(name):
    with pytest.raises(Refusal, match="no such data file"):
        find_source(name)


def test_a_folder_of_save_to_disk_says_what_to_write(tmp_path):
    (tmp_path / "data-00000-of-00001.arrow").write_bytes(b"ARROW1")
    (tmp_path / "dataset_info.json").write_text('{"citation": ""}')
    with pytest.raises(Refusal, match=r"data-00000-of-00001\.arrow: .* to_parquet or to_json"):
        find_source(str(tmp_path))


def test_a_whole_number_is_read_from_excel_as_far_as_it_is_exact(tmp_path):
    pytest.importorskip("openpyxl")
    file = tmp_path / "rows.xlsx"
    file.write_bytes(sheet([["prompt", "response"], ["a", 2**53 - 1], ["b", 2**53]]))
    exact, rounded = (record.value["response"] for record in read_file(file, Findings()))
    assert exact == "9007199254740991" and "may show differently" in rounded.why


def test_lines_within_a_cell_look_like_rows_if_nearly_all_do():
    def cell(alike, others):
        return "x\n" + "a,b\n" * alike + "c\n" * others + "y"

    assert [rows_within(cell(*lines), ["p", "r"], ",") for lines in (
        (19, 1), (9, 1), (8, 2), (2, 0), (1, 0))] == [19, 9, 0, 2, 0]
