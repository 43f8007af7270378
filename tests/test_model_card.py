"""The model card of a run is valid for the hub, is true, and contains no private data."""

import hashlib
import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import QUESTIONS, example, write_rows
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from phogpt_raw.config import Config
from phogpt_raw.export import model_card


def row_of(card: str, name: str) -> list[str]:
    """The cells of the table row whose first cell is `name`, without this first cell."""
    [found] = re.findall(rf"^\| {re.escape(name)} \| (.*) \|$", card, re.MULTILINE)
    return found.split(" | ")


@pytest.fixture
def card(train, tmp_path):
    """A function that runs train.py and returns the text of the model card."""

    def run(*flags):
        status, _, error = train("--out", tmp_path / "run", *flags)
        assert status == 0, error
        return (tmp_path / "run" / "README.md").read_text("utf-8")

    return run


def job_of(tmp_path, **config):
    """A stand-in for a trained run, from which a model card can be made."""
    lora = SimpleNamespace(r=8, lora_alpha=16, lora_dropout=0.0, use_rslora=False, use_dora=True,
                           target_modules={"Wqkv", "up_proj"})
    state = SimpleNamespace(best_step=2, step=3, best_loss=2.0, skipped=0,
                            first=dict(val_loss=4.0, stops=None, answers=[]))
    return SimpleNamespace(
        config=Config(**config), stream=SimpleNamespace(steps=lambda _epochs: 2),
        model=SimpleNamespace(peft_config={"default": lora}, head=torch.zeros(1)),
        run=SimpleNamespace(folder=tmp_path, state=state, steps=3),
        examples=SimpleNamespace(template="4b-chat", train=[example([5, 6, 7], 1, "row:1")] * 9,
                                 rows=9, held_out=[0] * 3, held_out_rows=3, file=None,
                                 held_out_file=None, trained_too=()))


def test_doctest():
    import doctest

    assert doctest.testmod(model_card).failed == 0


# -- the text of the card


def test_the_card_tells_the_results_of_the_adapter_that_was_kept(card, tmp_path):
    text = card()
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    scores = {row["step"]: row for row in rows if "val_loss" in row}
    kept = min((s for s in scores if s), key=lambda s: scores[s]["val_loss"])
    assert f"the adapter of step {kept} of 7" in text
    for name, key in (("loss, nats per token", "val_loss"), ("perplexity", "val_ppl")):
        assert row_of(text, name) == [f"{scores[0][key]:.4g}", f"{scores[kept][key]:.4g}"]
    assert row_of(text, "answers that end by themselves") == [
        f"{scores[0]['stops']:.0%}", f"{scores[kept]['stops']:.0%}"]
    assert "](loss.png)" in text and (tmp_path / "run/loss.png").is_file()


def test_without_held_out_rows_it_tells_the_training_loss(card, tmp_path):
    text = card("--hold-out", 0)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert (f"{rows[0]['loss']:.4g} at the first step, {rows[-1]['loss']:.4g} at step 7" in text)
    assert "perplexity" not in text
    assert "![training loss, learning rate](loss.png)" in text
    assert row_of(text, "held out") == ["0 rows"]


def test_data_is_named_by_file_and_hash_and_no_path_of_the_machine_is_told(card, tmp_path, rows,
                                                                           tiny):
    val = write_rows(tmp_path / "giữ_lại.jsonl", QUESTIONS[:2])
    text = card("--val", val, "--hold-out", 0)
    for what, file in (("file", rows), ("held-out file", val)):
        assert row_of(text, what) == [file.name]
        assert row_of(text, f"SHA-256 of the {what}") == [
            hashlib.sha256(file.read_bytes()).hexdigest()]
    assert row_of(text, "training") == ["12 rows"]
    assert row_of(text, "held out") == ["2 rows, 2 of them training rows as well"]
    assert str(tmp_path) not in text and str(tiny.parent) not in text
    assert not re.search(r"/(home|tmp|root|work|Users)/", text)


def test_rows_and_the_examples_that_they_give_are_counted_apart(tmp_path):
    job = job_of(tmp_path)
    assert model_card.data(job) == {"training": "9 rows", "held out": "3 rows of the same file"}
    job.examples.rows, job.examples.held_out_rows = 1, 1
    assert model_card.data(job) == {"training": "1 row as 9 examples",
                                    "held out": "1 row of the same file"}


def test_settings_are_the_adapters_own_where_a_run_goes_on_from_one(train, card, tmp_path):
    first = tmp_path / "trước"
    train("--out", first, "--rank", 2, "--steps", 1, "--eval-answers", 0)
    text = card("--adapter", first)
    assert row_of(text, "rank, alpha, dropout") == ["2, 32, 0"]
    assert row_of(text, "started from") == ["the adapter in a folder named trước"]
    assert row_of(text, "steps") == ["7 (3.1 epochs), 0 skipped"]
    assert row_of(text, "targets") == ["Wqkv, down_proj, out_proj, up_proj"]


def test_the_question_in_its_template_stands_there_for_other_programs(card):
    text = card()
    assert "```text\n### Câu hỏi: Câu hỏi của bạn\n### Trả lời:\n```" in text
    assert "-p '### Câu hỏi: Câu hỏi của bạn\\n### Trả lời:'" in text


def test_texts_are_not_called_questions_and_answers():
    question, text = example([5, 6, 7], 1, "row:1"), example([5, 6, 7], 2, "row:2")
    assert model_card.kind_of([question]) == "questions and answers"
    assert model_card.kind_of([text]) == "texts"
    assert model_card.kind_of([question, text]) == "questions and answers, and on texts,"


# -- for the hub


def test_a_base_of_the_hub_is_named_with_its_licence(tmp_path):
    text = model_card.card(job_of(tmp_path, model="vinai/PhoGPT-4B-Chat", revision="abc"))
    assert ModelCard(text).data.to_dict() == {
        "language": ["vi"], "library_name": "peft", "pipeline_tag": "text-generation",
        "base_model": "vinai/PhoGPT-4B-Chat", "base_model_relation": "adapter",
        "license": "bsd-3-clause", "tags": ["lora", "qlora", "phogpt", "vietnamese"]}
    assert "[vinai/PhoGPT-4B-Chat](https://huggingface.co/vinai/PhoGPT-4B-Chat)" in text
    assert row_of(text, "base") == ["vinai/PhoGPT-4B-Chat, revision abc"]
    assert row_of(text, "adapter") == ["LoRA, DoRA"]


def test_the_licence_of_another_base_is_not_guessed(tmp_path):
    data = ModelCard(model_card.card(job_of(tmp_path, model="someone/PhoGPT-4B", nf4=False))).data
    assert data.base_model == "someone/PhoGPT-4B" and data.license is None
    assert data.tags == ["lora", "phogpt", "vietnamese"]


@pytest.mark.parametrize("model", ["nano", "folder"])
def test_a_base_that_is_not_on_the_hub_is_no_base_model_of_the_card(tmp_path, model):
    base = tmp_path / "my_base" if model == "folder" else None
    if base:
        base.mkdir()
    text = model_card.card(job_of(tmp_path, model=str(base) if base else "nano"))
    data = ModelCard(text).data.to_dict()
    assert "base_model" not in data and "license" not in data and "base_model_relation" not in data
    assert ("a folder named my_base" if base else "`nano`, the very small PhoGPT") in text


@pytest.mark.parametrize("name", ["a|b`c", "*sao*", "<script>", "# x [y](z)", "---", "thơ: “lục”"])
def test_names_with_signs_of_markdown_or_yaml_stay_names(tmp_path, name):
    folder = tmp_path / name.replace("/", "")
    folder.mkdir()
    job = job_of(folder, model="nano")
    job.examples.file = SimpleNamespace(name=name, sha256="0" * 64)
    text = model_card.card(job)
    assert ModelCard(text).data.library_name == "peft"
    assert "<script>" not in text
    [line] = [line for line in text.splitlines() if line.startswith("| file |")]
    assert len(re.findall(r"(?<!\\)\|", line)) == 3  # the row still has two cells


# -- the file


def test_a_run_in_another_folder_of_the_same_name_gives_the_same_card(train, tmp_path):
    for place in ("a", "b"):
        train("--out", tmp_path / place / "run")
    assert ((tmp_path / "a/run/README.md").read_bytes()
            == (tmp_path / "b/run/README.md").read_bytes())


def test_a_resumed_run_writes_its_card_anew(card, tmp_path):
    assert row_of(card("--steps", 3), "steps") == ["3 (1.3 epochs), 0 skipped"]
    assert row_of(card(), "steps") == ["7 (3.1 epochs), 0 skipped"]


def test_a_readme_of_somebody_else_stays_and_a_line_says_so(train, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "README.md").write_text("# Của tôi\n", "utf-8")
    status, said, _ = train("--out", out)
    assert status == 0 and (out / "README.md").read_text("utf-8") == "# Của tôi\n"
    assert f"{out}/README.md was not written by this program and is not replaced" in said


def test_a_card_of_ours_without_its_mark_is_somebodys(train, tmp_path):
    out = tmp_path / "run"
    train("--out", out, "--steps", 3)
    mine = (out / "README.md").read_text("utf-8").replace(model_card.MARK + "\n", "")
    (out / "README.md").write_text(mine, "utf-8")
    train("--out", out)
    assert (out / "README.md").read_text("utf-8") == mine


def test_a_full_disk_costs_the_card_and_not_the_run(train, tmp_path, monkeypatch):
    def full(_job):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_card, "card", full)
    status, said, _ = train("--out", tmp_path / "run")
    assert status == 0 and "README.md was not written" in said and "the disk is full" in said
    assert not list((tmp_path / "run").glob("README*"))


def test_a_run_that_failed_has_no_card(train, tmp_path):
    assert train("--out", tmp_path / "run", "--lr", 1e25)[0] == 1
    assert not (tmp_path / "run/README.md").exists()


# -- the code and the commands in the card


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_its_lines_for_peft_give_our_logits(tmp_path, adapted, tiny, kind):
    """The test runs the Python code of the model card. In the code it replaces only two folders."""
    model, adapters = adapted()
    adapters.save(tmp_path / "adapter")
    text = model_card.card(job_of(tmp_path, model="nano"))
    [code] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    base = shutil.copytree(tiny, tmp_path / "base")
    if kind == "safetensors":
        save_file(torch.load(base / "pytorch_model.bin"), base / "model.safetensors")
        (base / "pytorch_model.bin").unlink()
    code = code.replace("BASE", str(base)).replace("FOLDER", str(tmp_path / "adapter"))
    names = {}
    exec(code, names)
    ids = torch.randint(4, 4000, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = names["model"].eval()(input_ids=ids).logits
        ours = model.eval().logits(model(ids))
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-4)
    for file in (*base.glob("*.bin"), *base.glob("*.safetensors")):
        file.unlink()
    # without a weights file the code must fail and not use a random model
    with pytest.raises(AssertionError):
        exec(code, {})


def test_its_command_for_here_is_one_that_generate_takes(card):
    import generate

    [command] = re.findall(r"python generate.py (.*) \"Câu hỏi của bạn\"", card())
    assert generate.parse([*command.split(), "Câu hỏi của bạn"]).adapter == ["FOLDER"]


def test_its_commands_name_what_only_the_runs_folder_records(tmp_path, monkeypatch):
    """The hub does not get the config.json of the run. So the commands must name template and
    precision."""
    import generate
    from phogpt_raw.export import __main__ as export

    monkeypatch.chdir(tmp_path)
    (tmp_path / "FOLDER").mkdir()
    (tmp_path / "FOLDER" / "adapter_config.json").write_text("{}")
    job = job_of(tmp_path, nf4=False, model="here/it/is")
    job.examples.template = "7b5-instruct"
    text = model_card.card(job)
    [command] = re.findall(r"python generate.py (.*) \"Câu hỏi của bạn\"", text)
    options = generate.parse([*command.split(), "?"])
    assert (options.template, options.nf4, options.model) == ("7b5-instruct", False, "BASE")
    assert ", not quantised. The program adds the template" in text
    exports = re.findall(r"python -m phogpt_raw.export (.*)", text)
    assert len(exports) == 3
    for command in exports:
        options = export.parse(command.split())
        assert (options.template, options.model) == ("7b5-instruct", "BASE")
        assert options.base_nf4 is (False if options.merged else None)


def test_it_says_where_the_loss_was_and_which_held_out_rows_were_trained_on(train, tmp_path, rows):
    text = {"text": "Phở là món ăn của Hà Nội, có bánh và thịt bò."}
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text(rows.read_text("utf-8") + json.dumps(text, ensure_ascii=False) + "\n", "utf-8")
    out = tmp_path / "run"
    assert train("--data", mixed, "--val", rows, "--hold-out", 0, "--out", out)[0] == 0
    card = (out / "README.md").read_text("utf-8")
    assert "| loss | on all tokens of the row of text, on the answer and its end token" in card
    assert "| held out | 12 rows, 12 of them training rows as well |" in card
