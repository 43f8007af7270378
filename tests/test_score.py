"""generate.py --eval: the scores with and without the adapter, and the written file."""

import json

import pytest
import torch
from conftest import QUESTIONS, write_rows

import generate
from phogpt_raw.data.prompt import TEMPLATES, encode_row
from phogpt_raw.decode.history import Turn, encode_history
from phogpt_raw.files import awaited_file
from phogpt_raw.inference import score as module
from phogpt_raw.model.adapters import load_adapters
from phogpt_raw.model.weights import load_base

pytest.importorskip("sacrebleu")


@pytest.fixture
def rows(tmp_path):
    return write_rows(tmp_path / "rows.jsonl", QUESTIONS[:5])


@pytest.fixture
def adapter(adapted, tmp_path):
    adapted(alpha=400)[1].save(tmp_path / "adapter")
    return tmp_path / "adapter"


def scored(tiny, rows, output, *flags):
    generate.main(["--model", str(tiny), "--eval", str(rows), "--output", str(output),
                   "--no-nf4", "--max-new-tokens", "8", *map(str, flags)])
    return json.loads(output.read_text("utf-8"))


def test_the_loss_is_that_of_all_answer_tokens(tiny, rows, adapter, tmp_path):
    found = scored(tiny, rows, tmp_path / "s.json", "--adapter", adapter)["scores"]
    model, tokenizer = load_base(str(tiny), nf4=False)
    wanted = {}
    for name in ("base", "adapter"):
        if name == "adapter":
            load_adapters(model, adapter, trainable=False)
        losses = []
        for row in conversations_of(rows):
            example = encode_row(tokenizer, TEMPLATES["4b-chat"], row, 128)
            with torch.no_grad():
                logits = model.logits(model(torch.tensor([example.ids])))[0]
            targets = torch.tensor(example.targets)
            losses += torch.nn.functional.cross_entropy(
                logits[targets >= 0], targets[targets >= 0], reduction="none").tolist()
        wanted[name] = sum(losses) / len(losses)
    for name, loss in wanted.items():
        assert found[name]["loss"] == pytest.approx(loss, rel=1e-4)
    assert found["base"]["loss"] != pytest.approx(found["adapter"]["loss"], rel=1e-3)


def conversations_of(rows):
    from phogpt_raw.data.conversations import conversations
    from phogpt_raw.data.records import Findings
    from phogpt_raw.data.sources import read_file

    findings = Findings()
    return list(conversations(read_file(rows, findings), findings))


def test_the_base_is_asked_without_its_adapter(tiny, rows, adapter, tmp_path):
    both = scored(tiny, rows, tmp_path / "both.json", "--adapter", adapter)
    alone = scored(tiny, rows, tmp_path / "alone.json")
    assert both["scores"]["base"] == pytest.approx(alone["scores"]["base"], rel=1e-4)
    assert [row["answers"]["base"] for row in both["answers"]] == [
        row["answers"]["base"] for row in alone["answers"]]
    assert any(row["answers"]["base"] != row["answers"]["adapter"] for row in both["answers"])


def test_an_answer_is_the_known_one_but_for_capitals_spaces_and_a_full_stop():
    assert module.same("Dạ,  phở ạ.", "dạ, phở ạ") and module.same("Pho\u031b\u0309", "phở")
    assert not module.same("phở", "phơ") and not module.same("phở?", "phở")


def test_perfect_answers_score_perfectly(tiny, rows, tmp_path, monkeypatch):
    known = [row.turns[-1][1] for row in conversations_of(rows)]
    monkeypatch.setattr(module, "answered", lambda found, model, prompts, how: [
        (n, known[n], n % 2 == 0) for n in prompts])
    scores = scored(tiny, rows, tmp_path / "s.json")["scores"]["base"]
    assert (scores["exact"], scores["chrf"], scores["stops"]) == (1.0, pytest.approx(100), 0.6)


def test_the_page_shows_question_known_answer_and_both(tiny, rows, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHOWN", 2)
    monkeypatch.setattr(module, "answered", lambda found, model, prompts, how: [
        (n, "<b>&", True) for n in prompts])
    scored(tiny, rows, tmp_path / "s.json", "--adapter", adapter)
    page = (tmp_path / "s.html").read_text("utf-8")
    assert page.count("<article>") == 2 and page.count("&lt;b&gt;&amp;") == 4
    assert "### Câu hỏi" not in page and "http" not in page


def test_of_a_conversation_the_last_question_is_asked_after_all_that_was_said(
        tiny, tmp_path, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(module, "answered", lambda found, model, prompts, how: [
        asked.append(prompts) or (n, "x", True) for n in prompts])
    said = [{"role": role, "content": text} for role, text in (
        ("system", "s"), ("user", "a?"), ("assistant", "b"), ("user", "c?"), ("assistant", "d"))]
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"messages": said}) + "\n" + '{"text": "một hai ba"}\n'
                    + '{"prompt": "e?", "response": "f"}\n', "utf-8")
    found = scored(tiny, file, tmp_path / "s.json")
    assert [(row["question"], row["known"]) for row in found["answers"]] == [
        ("c?", "d"), ("e?", "f")]
    tokenizer = load_base(str(tiny), nf4=False)[1]
    turns = [Turn("a?", "b"), Turn("c?")]
    assert asked[0][0] == encode_history(tokenizer, TEMPLATES["4b-chat"], turns, "s")
    assert "(1 row is a text without a question: left out)" in capsys.readouterr().err


@pytest.mark.parametrize("name, line", [("s.txt", "must end in .json"), ("there.json", "exists")])
def test_a_place_that_cannot_be_is_said_before_the_weights(tiny, rows, tmp_path, capsys, name,
                                                           line, monkeypatch):
    monkeypatch.setattr("phogpt_raw.inference.loading.load_base", None)
    (tmp_path / "there.json").touch()
    with pytest.raises(SystemExit) as stopped:
        scored(tiny, rows, tmp_path / name)
    assert stopped.value.code == 2 and line in capsys.readouterr().err


def test_the_page_has_the_scores_and_no_text_of_a_row_as_markup(tmp_path, monkeypatch):
    score = module.Score(1.5, 4.48, 0.25, 33.3, 1.0)
    rows = [module.Row("<script>alert(1)</script>\n  b", "<img onerror=x>", {"base": "</dd>&amp;"})]
    module.write(tmp_path / "s.json", tmp_path / "s.html", "x/<b>.jsonl", {"base": score}, rows)
    page = (tmp_path / "s.html").read_text("utf-8")
    for cell in ("<td>1.500</td>", "<td>4.48</td>", "<td>25.0%</td>", "<td>33.3</td>"):
        assert cell in page
    for bad in ("<script", "<img", "</dd>&amp;<", "<b>"):
        assert bad not in page
    assert "&lt;b&gt;.jsonl: 1 row" in page and "The first" not in page
    monkeypatch.setattr(module, "SHOWN", 2)
    module.write(tmp_path / "s.json", tmp_path / "s.html", "r.jsonl", {"base": score}, 3 * rows)
    assert "The first 2 answers; all are in s.json." in (tmp_path / "s.html").read_text("utf-8")


@pytest.mark.parametrize("name", ["scores.json", "scores.html"])
def test_two_evaluations_do_not_write_the_same_files(tiny, rows, tmp_path, capsys, name):
    with awaited_file(tmp_path / name), pytest.raises(SystemExit) as stopped:
        scored(tiny, rows, tmp_path / "scores.json")
    assert stopped.value.code == 2
    assert f"{name}: another process is about to write it" in capsys.readouterr().err
    assert not list(tmp_path.glob("scores*"))


def test_a_map_to_a_column_that_no_row_has_is_refused(tiny, rows, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        scored(tiny, rows, tmp_path / "scores.json", "--map", "system=x")
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: --map system=x: no row has a field x\n"
