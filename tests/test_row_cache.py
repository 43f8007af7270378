"""Rows from the cache equal the rows of the files. Every change that affects them is noticed."""

import json
import os

import numpy as np
import pytest

from phogpt_raw.config import Config
from phogpt_raw.data import examples as module
from phogpt_raw.data.encoded import encode_sources
from phogpt_raw.data.examples import load_examples
from phogpt_raw.data.prompt import TEMPLATES
from phogpt_raw.data.row_cache import through_cache
from phogpt_raw.data.sources import Source
from phogpt_raw.model.weights import NANO, read_config, read_tokenizer
from phogpt_raw.refusal import Refusal

TOKENIZER = read_tokenizer(NANO, read_config(NANO))
ROWS = [{"prompt": f"Phở {n} là gì?", "response": "Món nước. " * (n + 1), "topic": "ăn"}
        for n in range(60)]
ROWS += [{"text": "Một câu dài. " * 90}, {"prompt": "a", "response": 4}, {"prompt": "a"},
         {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                       {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]}]


@pytest.fixture
def file(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS), "utf-8")
    return file


def load(file, tokenizer=TOKENIZER, **config):
    return load_examples(tokenizer, Config(data=str(file), **{"max_len": 128, **config}))


@pytest.fixture
def encodings(monkeypatch):
    """A list with one entry for each time that the files were read and encoded."""
    calls = []

    def counted(*args, **kwargs):
        calls.append(args)
        return encode_sources(*args, **kwargs)

    monkeypatch.setattr(module, "encode_sources", counted)
    return calls


def test_the_second_start_reads_no_rows_and_has_the_same(file, tmp_path, encodings):
    cache = str(tmp_path / "cache")
    anew = load(file)
    first, second = load(file, data_cache=cache), load(file, data_cache=cache)
    assert len(encodings) == 2
    assert anew == first == second and len(anew.train) > 50
    assert any(e.cut for e in second.train) and len(second.report.findings.bad) == 2
    assert {type(token) for e in second.train for token in (*e.ids, *e.targets)} == {int}


@pytest.mark.parametrize("change", [
    dict(max_len=200), dict(template="7b5-instruct"), dict(too_long="split"),
    dict(map="answer=response")])
def test_another_setting_is_encoded_anew(file, tmp_path, encodings, change):
    cache = str(tmp_path / "cache")
    load(file, data_cache=cache)
    assert load(file, data_cache=cache, **change) == load(file, **change)
    load(file, data_cache=cache)
    assert len(encodings) == 3


def test_what_does_not_change_a_row_is_not_encoded_again(file, tmp_path, encodings):
    cache = str(tmp_path / "cache")
    for more in (dict(), dict(hold_out=0.2), dict(seed=3), dict(lr=1e-3)):
        load(file, data_cache=cache, **more)
    assert len(encodings) == 1
    with pytest.raises(Refusal, match=r"rows\.jsonl:62: .*; .*:63: .* \(2 of 64 rows .* --strict"):
        load(file, data_cache=cache, strict=True)


def test_a_changed_file_is_noticed_however_small_the_change(file, tmp_path, encodings):
    cache = str(tmp_path / "cache")
    before = load(file, data_cache=cache)
    stat = file.stat()
    file.write_text(file.read_text("utf-8").replace("M\\u00f3n", "M\\u00f2n", 1), "utf-8")


    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # size and time do not change
    after = load(file, data_cache=cache)
    assert len(encodings) == 2 and after != before and after == load(file)


def test_another_tokenizer_is_noticed(file, tmp_path, encodings):
    cache = str(tmp_path / "cache")
    load(file, data_cache=cache)
    other = read_tokenizer(NANO, read_config(NANO))
    other.add_tokens(["Phở"])
    assert load(file, other, data_cache=cache) == load(file, other)
    assert len(encodings) == 3


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 broken", None])
def test_a_damaged_file_is_written_again(file, tmp_path, encodings, damage):
    cache = tmp_path / "cache"
    load(file, data_cache=str(cache))
    [kept] = cache.iterdir()
    kept.write_bytes(kept.read_bytes()[:-400] if damage is None else damage)
    assert load(file, data_cache=str(cache)) == load(file)
    load(file, data_cache=str(cache))
    assert len(encodings) == 3


def test_the_rows_of_a_hub_dataset_are_never_taken_from_a_file(tmp_path):
    source = Source("a/b", (), ("a/b", "train", None))
    made = [through_cache(str(tmp_path), [source], TOKENIZER, TEMPLATES["4b-chat"], {},
                          lambda n=n: n) for n in (1, 2)]
    assert made == [1, 2] and not list(tmp_path.iterdir())


def test_a_file_of_the_cache_holds_no_pickles(file, tmp_path):
    load(file, data_cache=str(tmp_path / "cache"))
    [kept] = (tmp_path / "cache").iterdir()
    with np.load(kept, allow_pickle=False) as found:
        assert {found[name].dtype.kind for name in found.files} <= set("iub")


def test_a_folder_that_cannot_be_made_is_refused_before_the_rows_are_read(file, encodings):
    with pytest.raises(Refusal, match=r"--data-cache .*: this folder cannot be created"):
        load(file, data_cache=str(file))
    assert not encodings
