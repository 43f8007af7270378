"""The choice of the rows to train on and of the held-out rows."""

import json

import pytest
from conftest import write_rows

from phogpt_raw.config import Config
from phogpt_raw.data.conversations import Conversation
from phogpt_raw.data.examples import divide, fingerprint, load_examples, stand_ins
from phogpt_raw.model.weights import NANO, read_config, read_tokenizer
from phogpt_raw.refusal import Refusal


def rows(*numbers, spelled="câu hỏi {}"):
    return [Conversation((("user", spelled.format(n)), ("assistant", f"trả lời {n}")),
                         f"rows.jsonl:{n}") for n in numbers]


def asked(part):
    return {row.question for row in part}


@pytest.mark.parametrize("hold_out, held", [(0, 0), (1, 1), (7, 7), (99, 99)])
def test_a_count_is_held_out(hold_out, held):
    train, held_out = divide(rows(*range(100)), hold_out, 1, "f")
    assert len(held_out) == held and len(train) == 100 - held
    assert asked(train).isdisjoint(asked(held_out))
    for part in (train, held_out):  # both parts keep the order of the file
        assert [int(row.question.split()[-1]) for row in part] == sorted(
            int(row.question.split()[-1]) for row in part)


def test_a_share_is_about_that_share_and_at_least_one_row():
    for count in (1000, 20, 2):
        train, held_out = divide(rows(*range(count)), 0.05, 1, "f")
        assert len(train) + len(held_out) == count and train
        assert len(held_out) == 1 if count == 2 else 1 <= len(held_out) < 0.1 * count


def test_the_default_holds_out_a_few_rows_at_least(tmp_path):
    for count in (40, 60, 80):
        assert 4 <= len(loaded(tmp_path, count).held_out) <= 10
    assert len(loaded(tmp_path, 45).held_out) == 4
    assert len(loaded(tmp_path, 45, hold_out=0.05).held_out) < 4  # a given fraction has no minimum


def test_few_rows_move_when_a_file_with_the_least_held_out_rows_grows(tmp_path):
    before = asked(divide(rows(*range(45)), 0.05, 4, "f")[1])
    after = asked(divide(rows(*range(50)), 0.05, 4, "f")[1])
    assert len(before) == len(after) == 4 and len(before - after) <= 2


def test_with_a_share_new_rows_move_none_of_the_others():
    _, before = divide(rows(*range(200)), 0.1, 1, "f")
    _, after = divide(rows(*range(1000, 1300), *range(199, -1, -1)), 0.1, 1, "f")
    assert asked(before) == asked(after) & asked(rows(*range(200)))
    assert len(asked(after)) > len(asked(before))


def test_rows_that_differ_only_in_spaces_and_capitals_are_on_one_side():
    both = rows(*range(50)) + rows(*range(50), spelled="  CÂU   hỏi {} ")
    for hold_out in (0.2, 11):
        train, held_out = divide(both, hold_out, 1, "f")
        same = [{" ".join(prompt.casefold().split()) for prompt in asked(part)}
                for part in (train, held_out)]
        assert same[0].isdisjoint(same[1])
    assert len(held_out) == 12  # 11 held-out rows would separate two equal rows


@pytest.mark.parametrize("numbers, hold_out", [(range(12), 12), (range(12), 40), ([3] * 12, 1),
                                               ([3], 0.05)])
def test_nothing_left_to_train_on_is_refused(numbers, hold_out):
    with pytest.raises(Refusal, match=r"--hold-out .*: f has only .*; --hold-out 0 trains on all"):
        divide(rows(*numbers), hold_out, 1, "f")


def loaded(tmp_path, count, **config):
    file = write_rows(tmp_path / "rows.jsonl",
                      [(f"câu hỏi {n}", f"trả lời {n}") for n in range(count)])
    tokenizer = read_tokenizer(NANO, read_config(NANO))
    return load_examples(tokenizer, Config(**{"data": str(file), **config}))


def test_by_default_few_different_rows_are_all_trained_on(tmp_path):
    tokenizer = read_tokenizer(NANO, read_config(NANO))
    for different, held in ((1, 0), (39, 0), (40, 1)):
        file = write_rows(tmp_path / "rows.jsonl", [(f"câu {n % different}", "Dạ.")
                                                    for n in range(100)])
        examples = load_examples(tokenizer, Config(data=str(file)))
        assert len(examples.train) + len(examples.held_out) == 100
        assert bool(examples.held_out) == bool(held)
        assert stand_ins(Config(data=str(file))).held_out_rows == examples.held_out_rows


@pytest.mark.parametrize("count, config, held", [
    (39, {}, (0, 0)), (200, {}, (1, 25)), (200, {"hold_out": 0}, (0, 0)),
    (200, {"hold_out": 3}, (3, 3)), (39, {"hold_out": 0.2}, (1, 20))])
def test_a_twentieth_of_enough_rows_is_held_out_unless_said_otherwise(tmp_path, count, config,
                                                                     held):
    examples = loaded(tmp_path, count, **config)
    assert held[0] <= len(examples.held_out) <= held[1]
    assert len(examples.train) + len(examples.held_out) == count


def test_held_out_rows_that_are_training_rows_too_are_counted(tmp_path):
    val = write_rows(tmp_path / "val.jsonl", [("khác", "x"), ("CÂU  hỏi 1", " trả lời 1"),
                                              ("câu hỏi 1", "khác"), ("câu hỏi 2", "trả lời 2")])
    examples = loaded(tmp_path, 5, val=str(val))
    assert examples.trained_too == (f"{val}:2", f"{val}:4")
    assert loaded(tmp_path, 200).trained_too == ()


def test_nano_has_its_own_held_out_rows():
    tokenizer = read_tokenizer(NANO, read_config(NANO))
    assert len(load_examples(tokenizer, Config()).held_out) == 76
    assert len(load_examples(tokenizer, Config(hold_out=5)).held_out) == 5


def test_a_fingerprint_tells_ids_and_targets(tmp_path):
    first, second = loaded(tmp_path, 2).train
    again = loaded(tmp_path, 2).train[0]
    assert fingerprint(first) == fingerprint(again) != fingerprint(second)
    assert len(json.dumps(fingerprint(first))) == 14


def test_a_map_that_names_no_column_is_refused(tmp_path):
    assert len(loaded(tmp_path, 3, map="answer=response").train) == 3
    with pytest.raises(Refusal, match="--map answer=tra_loi: no row has a field tra_loi"):
        loaded(tmp_path, 3, map="answer=tra_loi")


def both(tmp_path, first, second, count=200, **config):
    """The examples of two files.

    `first` and `second` follow the names of the files and give their weights, such as "=0.5".
    """
    names = []
    for name, weight in (("a", first), ("b", second)):
        file = write_rows(tmp_path / f"{name}.jsonl",
                          [(f"{name} {n}", f"trả lời {n}") for n in range(count)])
        names.append(f"{file}{weight}")
    tokenizer = read_tokenizer(NANO, read_config(NANO))
    return load_examples(tokenizer, Config(model="x/y", template="4b-chat", data=names, **config))


def of(examples, name):
    return [e for e in examples if f"/{name}.jsonl" in e.where]


def test_weights_say_how_often_the_rows_of_a_file_are_trained_on(tmp_path):
    examples = both(tmp_path, "=2", "=0.25", hold_out=0)
    assert len(of(examples.train, "a")) == 400 and len({e.where for e in examples.train}) < 300
    assert 30 < len(of(examples.train, "b")) < 70
    assert both(tmp_path, "=2", "=0.25", hold_out=0).train == examples.train
    assert examples.source == "a.jsonl, b.jsonl"


def test_weights_do_not_repeat_held_out_rows(tmp_path):
    examples = both(tmp_path, "=3", "", hold_out=0.1)
    held = [e.where for e in examples.held_out]
    assert len(held) == len(set(held)) and of(examples.held_out, "a")
    assert len(of(examples.train, "a")) % 3 == 0
    assert not set(held) & {e.where for e in examples.train}


def test_a_weight_that_leaves_no_row_is_refused(tmp_path):
    with pytest.raises(Refusal, match="no row is left to train on"):
        both(tmp_path, "=0.001", "=0.001", count=2, hold_out=0)


@pytest.mark.parametrize("more", [{"hold_out": 3}, {}])
def test_long_rows_dropped_to_the_last_are_refused(tmp_path, more):
    with pytest.raises(Refusal, match=r"rows\.jsonl: no row is left; all are longer than"):
        loaded(tmp_path, 5, max_len=8, too_long="drop", **more)


def test_a_file_that_is_named_twice_is_counted_twice(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [("Phở?", "Dạ.")] * 3)
    tokenizer = read_tokenizer(NANO, read_config(NANO))
    examples = load_examples(tokenizer, Config(data=[str(file), str(file)]))
    assert len(examples.train) == examples.report.findings.good == 6


def test_a_folder_with_one_bad_file_is_refused_though_most_rows_are_good(tmp_path):
    write_rows(tmp_path / "a.jsonl", [(f"câu {n}", "đáp") for n in range(100)])
    (tmp_path / "b.jsonl").write_text('{"cau": "a", "dap": "b"}\n')
    tokenizer = read_tokenizer(NANO, read_config(NANO))
    with pytest.raises(Refusal, match=r"b\.jsonl:1: fields cau, dap"):
        load_examples(tokenizer, Config(data=str(tmp_path)))


def test_the_questions_are_those_of_the_held_out_conversations(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"text": "Một câu."}) + "\n"
                    + json.dumps({"prompt": "Hai { }?", "response": "Dạ."}) + "\n")
    tokenizer = read_tokenizer(NANO, read_config(NANO))
    for template in ("4b-chat", "7b5-instruct"):
        examples = load_examples(tokenizer, Config(val=str(file), template=template))
        assert examples.questions == ["Hai { }?"] and len(examples.held_out) == 2


def test_duplicates_and_lengths_are_reported(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl",
                      [("Phở?", "Dạ."), ("phở?", " Dạ.  "), ("Bún?", "Ơ.")])
    tokenizer = read_tokenizer(NANO, read_config(NANO))
    report = load_examples(tokenizer, Config(data=str(file))).report
    assert (report.rows, report.duplicates, report.fits) == (3, 1, 1)


def test_held_out_rows_have_no_weight(tmp_path):
    with pytest.raises(Refusal, match=r"--val .*rows.jsonl=2: only --data can have a weight"):
        loaded(tmp_path, 5, val=f"{tmp_path}/rows.jsonl=2")


def test_an_empty_name_is_not_the_folder_that_one_is_in(tmp_path):
    """The shell passes an empty name for `--data "$FILE"` if FILE is not set."""
    for name in ("", " "):
        with pytest.raises(Refusal, match=r"names no file|--data: is empty"):
            loaded(tmp_path, 5, data=name)


def test_a_part_of_the_rows_is_a_part_of_those_that_are_not_held_out(tmp_path):
    """A file's weight and the choice of held-out rows must use different bits of a row's hash."""
    loaded(tmp_path, 400)
    found = loaded(tmp_path, 400, data=f"{tmp_path}/rows.jsonl=0.5", hold_out=0.3)
    assert 80 < len(found.held_out) < 160
    assert 0.4 < len(found.train) / (400 - len(found.held_out)) < 0.6
