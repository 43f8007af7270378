"""The steps that make `nano`: clean text, questions, a small tokenizer like PhoGPT's, the files."""

import contextlib
import gzip
import json
import math
import random
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from phogpt_raw.model.phogpt import ModelConfig, PhoGPT
from phogpt_raw.nano.recipe import corpus, loop, pages, prepare, pretrain, questions, stream
from phogpt_raw.nano.recipe.evaluate import evaluate
from phogpt_raw.nano.recipe.tokenizer import EOS, WORD, save_tokenizer, train_tokenizer
from phogpt_raw.nano.recipe.truecase import Truecaser
from phogpt_raw.refusal import Refusal
from phogpt_raw.training.optim import lr_at

SHARED = Path(__file__).parents[2] / "shared"
THINGS = ["Cây bàng", "Con trâu", "Hoa sen", "Cây tre", "Chim sẻ", "Cá chép", "Con mèo", "Lúa nước"]
PLACES = ["Hà Nội", "Huế", "Đà Nẵng", "Cần Thơ", "Nha Trang", "Đà Lạt", "Hội An", "Sa Pa"]


def made_up_articles(count=60):
    """Yield invented articles of four sentences. No two titles are equal."""
    for n in range(count):
        thing, place = THINGS[n % 8], PLACES[n // 8]
        name = f"{thing} {place}"
        yield {
            "title": name.lower(),
            "text": f"{name} là một loài quen thuộc ở miền quê của nước Việt Nam xưa.\r\n\r\n"
            f"== Đặc điểm ==\r\n{name} thường sống ở ven sông và được người dân chăm sóc rất kỹ. "
            f"Để chăm sóc {name}, người dân phải dậy sớm và làm việc cho đến tận chiều tối.\r\n"
            f"Khi mùa mưa đến {place}, {name} lớn nhanh hơn và cho nhiều lợi ích hơn hẳn.",
        }


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The folder that `prepare` writes from the invented articles, with two topics held out."""
    folder = tmp_path_factory.mktemp("nano")
    with gzip.open(folder / "articles.jsonl.gz", "wt", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in made_up_articles())
    topics = [{"topic": "con trâu Huế"}, {"topic": "Hoa sen"}]
    (folder / "topics.jsonl").write_text("\n".join(json.dumps(t) for t in topics))
    prepare.main(
        f"--articles {folder}/articles.jsonl.gz --topics {folder}/topics.jsonl "
        f"--out {folder}/data --vocab-size 400 --heldout 0.2 --questions 0.5".split()
    )
    return folder / "data"


def test_cleaning_leaves_running_text():
    text = (
        "Phở ( ) là món ăn truyền thống (tiếng Anh: ) của người Việt Nam.\r\n\r\n"
        "== Lịch sử ==\r\n\r\n=== Trống ===\r\n\r\n== Cách nấu ==\r\n"
        "Nước dùng được ninh từ xương bò .Người nấu thêm {{cần nguồn}} hoa hồi và quế.\r\n"
        "* Bánh phở\r\n  \r\n {\\displaystyle x}\r\n"
        "== Tham khảo ==\r\nMột cuốn sách nào đó rất dài về phở của người Việt.\r\n"
    )
    assert corpus.clean(unicodedata.normalize("NFD", text)) == (
        "Phở là món ăn truyền thống của người Việt Nam.\nCách nấu\n"
        "Nước dùng được ninh từ xương bò. Người nấu thêm hoa hồi và quế."
    )


def test_heldout_articles_are_stable_and_few():
    titles = [f"bài viết số {n}" for n in range(4000)]
    held = [t for t in titles if corpus.is_held_out(t)]
    assert 30 <= len(held) <= 90  # 60 are expected, plus or minus four standard deviations
    assert held[:2] == ["bài viết số 60", "bài viết số 97"]  # the same for any hash seed of Python
    assert corpus.is_held_out(unicodedata.normalize("NFD", held[0]).upper())
    assert set(held) <= {t for t in titles if corpus.is_held_out(t, 0.1)}


def test_a_tail_is_put_first_so_that_the_answer_begins_with_what_was_asked():
    truecaser = Truecaser(["Trên đê người dân đi lại, người dân hát, người dân vui."])
    sentence = "Người dân đắp đê cao ở hai bên bờ sông để ngăn nước lũ lớn."
    (first, second) = questions.ask(sentence, truecaser, random.Random(0))
    assert first.phrase == second.phrase == "ngăn nước lũ lớn"
    assert first.answer == "Để ngăn nước lũ lớn, người dân đắp đê cao ở hai bên bờ sông."
    because = questions.ask(
        "Vì mùa đông năm nay quá lạnh nên cây lúa không lớn được.", truecaser, random.Random(0)
    )
    assert because[0].answer == "Cây lúa không lớn được vì mùa đông năm nay quá lạnh."


@pytest.mark.parametrize(
    "sentence",
    [
        "Nó là một trong những thành phố lớn nhất của đất nước Việt Nam.",
        "Ông là một nhà văn nổi tiếng của Việt Nam trong thế kỷ trước.",
        "Đây là một loài cây rất phổ biến ở các nước nhiệt đới.",
        "Khi đó, người dân trong làng phải rời đi nơi khác để sống.",
        "Loài này có bộ lông màu xám và cái đuôi rất dài.",
        "Khi ông qua đời, người con trai lên nối ngôi và trị vì mười năm.",
    ],
)
def test_nothing_is_asked_about_a_pronoun(sentence):
    assert questions.ask(sentence, Truecaser([]), random.Random(0)) == []


def test_a_common_noun_is_written_small_inside_a_question():
    text = "Ở đây, cây bàng và trận đánh, cây và trận, rồi Hà Nội, Hà Tây, hà mã."
    truecaser = Truecaser([text])
    assert truecaser.inside("Cây bàng") == "cây bàng"
    assert truecaser.inside("Trận Trafalgar") == "trận Trafalgar"
    assert truecaser.inside("Hà Nội") == "Hà Nội" and truecaser.inside("DRAM") == "DRAM"


def test_questions_name_their_phrase_early_and_keep_out_of_heldout_topics(data):
    rows = [questions.Question(**json.loads(line))
            for line in (data / "questions.jsonl").read_text("utf-8").splitlines()]
    assert len({row.kind for row in rows}) >= 4
    for row in rows:
        assert row.phrase.casefold() in row.question.casefold()
        assert row.phrase.casefold() in row.answer.casefold()[: 12 + len(row.phrase)]
        assert 8 <= len(row.answer.split()) <= 40 and row.answer.endswith(".")
        assert not {"dạ", "ạ"} & set(row.answer.casefold().replace(",", "").split())
        assert "trâu huế" not in row.phrase.casefold() and "hoa sen" not in row.phrase.casefold()
    assert any("con trâu" in row.phrase.casefold() for row in rows)  # "con trâu" is not held out


def test_a_topic_overlaps_by_whole_words_in_either_direction():
    overlap = questions.Overlap(["Phở bò Hà Nội"])
    assert all(p in overlap for p in ["phở bò", "Hà Nội", "phở bò Hà Nội", "quán phở bò Hà Nội cũ"])
    assert not any(p in overlap for p in ["bún bò", "phở gà", "Hà", "bánh Hà Nam"][:2])


def test_a_phrase_is_not_asked_about_too_often_and_rare_kinds_stay():
    often = [questions.Question("has", "Cây", f"Cây {n}?", "Cây có lá.") for n in range(50)]
    rare = [questions.Question("why", "cây cao", "Tại sao cây cao?", "Cây cao vì nắng.")]
    chosen = pages.choose(often + rare, length=10**6, cap=3, rng=random.Random(0))
    assert len(chosen) == 4 and rare[0] in chosen
    few = pages.choose(often + rare, length=60, cap=3, rng=random.Random(0))
    assert few.count(rare[0]) == 1


def test_only_a_whole_page_of_questions_ends(data):
    tokenizer = Tokenizer.from_file(str(data / "tokenizer.json"))
    stream = np.fromfile(data / "train.bin", dtype=np.uint16)
    documents = np.split(stream, np.flatnonzero(stream == EOS) + 1)
    assert len(documents.pop()) == 0  # the stream ends with </s>
    pages = [text for text in map(tokenizer.decode, documents) if text.startswith("### Câu hỏi:")]
    counts = json.loads((data / "corpus.json").read_text())
    assert len(pages) == counts["question_pages"] and len(stream) == counts["train_tokens"]
    assert all(6 <= page.count("### Trả lời:") <= 10 for page in pages)
    assert {("### Câu hỏi: " in page) != ("### Câu hỏi:\n" in page) for page in pages} == {True}
    assert len(documents) == counts["articles"] + len(pages)
    tokens = sum(len(d) for d in documents if tokenizer.decode(d[:9]).startswith("### "))
    assert counts["question_share_of_tokens"] == pytest.approx(tokens / len(stream), abs=1e-4)


def test_heldout_text_is_not_trained_on(data):
    tokenizer = Tokenizer.from_file(str(data / "tokenizer.json"))
    text = {f: tokenizer.decode(np.fromfile(data / f, dtype=np.uint16)) for f in
            ("train.bin", "heldout.bin")}  # fmt: skip
    for row in made_up_articles():
        first = corpus.clean(row["text"]).split("\n")[0]
        held = corpus.is_held_out(row["title"], 0.2)
        assert (first in text["heldout.bin"]) == held and (first in text["train.bin"]) != held


def test_tokenizer_has_phogpts_ids_and_gives_any_text_back(data):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(data)
    assert tokenizer.convert_tokens_to_ids(["<unk>", "<s>", "</s>", "<pad>"]) == [0, 1, 2, 3]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (2, 3, 400)
    assert tokenizer.model_max_length == 1024 and tokenizer.padding_side == "right"
    text = "Dấu  cách kép ,\n\n\tchữ Nôm 𡨸喃, emoji 🙂 và ### Trả lời:Đúng! (a|b)…\r\n"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text and 0 not in ids and 1 not in ids
    decomposed = unicodedata.normalize("NFD", text)
    assert tokenizer.decode(tokenizer(decomposed).input_ids) == decomposed  # text is not normalised


def test_chat_template_is_the_4b_chat_prompt(data):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(data)
    turns = [dict(role="user", content=" Huế ở đâu? ")]
    ask = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert ask == "### Câu hỏi: Huế ở đâu?\n### Trả lời:"
    turns += [dict(role="assistant", content="Ở miền Trung."), dict(role="user", content="Và?")]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == (
        "### Câu hỏi: Huế ở đâu?\n### Trả lời: Ở miền Trung.</s>\n### Câu hỏi: Và?"
    )


@pytest.mark.parametrize("template", pages.TEMPLATES)
def test_a_prompts_tokens_do_not_depend_on_the_answer(data, template):
    tokenizer = Tokenizer.from_file(str(data / "tokenizer.json"))
    form = pages.TEMPLATES[template][0]
    prompt = tokenizer.encode(form.format(q="Huế ở đâu?", a="").rstrip(" ")).ids
    for answer in ["Cây bàng", "Con", "(x)", "1", "đi", ":", "###"]:
        assert tokenizer.encode(form.format(q="Huế ở đâu?", a=answer)).ids[: len(prompt)] == prompt


def test_text_is_split_as_phogpt_splits_it():
    theirs = SHARED / "data" / "phogpt4b_tokenizer" / "tokenizer.json"
    articles = SHARED / "data" / "viwiki" / "articles.jsonl.gz"
    if not (theirs.is_file() and articles.is_file()):
        pytest.skip("needs the shared PhoGPT tokenizer and articles, which are not committed")
    split = Tokenizer.from_file(str(theirs)).pre_tokenizer.pre_tokenize_str
    ours = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORD), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    lines = ["a  b(c|d)[e].\n\n，、।۔،…x", "\u00a0\u3000\u2028\u200b x", " .. !?", "^(\\s|[]||"]
    for n, (text,) in enumerate(corpus.read_json_lines(articles, "text")):
        lines += text.split("\n")[:12]
        if n == 400:
            break
    assert len(lines) > 3000
    assert all(ours.pre_tokenize_str(line) == split(line) for line in lines)


@pytest.fixture(scope="module")
def base(data):
    shape = "--d-model 32 --layers 2 --heads 4 --seq-len 64 --batch-tokens 512 --device cpu"
    run = f"--data {data} --out {data.parent}/base --max-steps 3 --warmup 1 {shape}"
    pretrain.main(run.split())
    pretrain.main(f"--data {data} --out {data.parent}/random --random {shape}".split())
    return data.parent / "base"


def test_a_trained_folder_is_what_vinai_ships(base):
    config = json.loads((base / "config.json").read_text())
    weights = torch.load(base / "pytorch_model.bin", weights_only=True)
    model = PhoGPT(ModelConfig.from_json(config))
    assert set(weights) == {name for name, _ in model.named_parameters()}
    assert "transformer.blocks.1.attn.Wqkv.bias" in weights and "lm_head.weight" not in weights
    assert len(weights) == 2 * 12 + 3
    assert {w.dtype for w in weights.values()} == {torch.bfloat16}
    model.load_state_dict(weights)
    assert config["no_bias"] is False and config["attn_config"]["attn_pdrop"] == 0.0
    assert (config["torch_dtype"], config["vocab_size"]) == ("bfloat16", 400)
    assert PreTrainedTokenizerFast.from_pretrained(base).eos_token_id == EOS


def test_the_report_holds_the_curve_and_the_saved_weights_loss(base):
    report = json.loads((base / "pretraining.json").read_text())
    assert report["tokens_seen"] == 3 * 512 and report["curve"][-1]["step"] == 3
    best = min(row["nats_a_token"] for row in report["curve"])
    control = json.loads((base.parent / "random" / "pretraining.json").read_text())
    # the weights are saved in bf16, so their loss differs slightly
    assert report["heldout_as_saved"]["nats_a_token"] == pytest.approx(best, abs=0.02)
    assert best < control["heldout_as_saved"]["nats_a_token"] - 0.05
    assert control["tokens_seen"] == 0
    assert control["heldout_as_saved"]["nats_a_token"] == pytest.approx(np.log(400), abs=0.1)


def test_a_row_numbers_documents_and_predicts_nothing_across_them():
    tokens = torch.tensor([5, 6, EOS, 7, 8, 9, EOS, 5], dtype=torch.int32)
    ids, doc, targets = stream.rows_at(tokens, torch.tensor([0]), 7)
    assert ids.tolist() == [[5, 6, 2, 7, 8, 9, 2]]
    assert doc.tolist() == [[0, 0, 0, 1, 1, 1, 1]]
    assert targets.tolist() == [[6, 2, -100, 8, 9, 2, -100]]


def test_an_epoch_reads_every_row_once():
    generator = torch.Generator().manual_seed(0)
    starts = stream.shuffled_starts(1000, 64, generator).sort().values
    assert (starts.diff() == 64).all() and starts[-1] + 64 <= 999 and len(starts) >= 14


def test_batches_go_on_with_another_order_of_rows_in_each_epoch():
    tokens = torch.arange(4, 1004, dtype=torch.int32)  # no </s>; a token's id gives its place
    data = stream.batches(tokens, 64, 4, seed=0)
    assert stream.steps_of_epoch(1000, 64, 4) == 3
    epochs = [[int(row[0]) for _ in range(3) for row in next(data)[0]] for _ in range(2)]
    assert all(len(set(epoch)) == 12 for epoch in epochs) and epochs[0] != epochs[1]
    # all rows of an epoch are cut at one offset
    assert all(len({first % 64 for first in epoch}) == 1 for epoch in epochs)


def test_evaluation_counts_every_token_whatever_the_seq_len():
    torch.manual_seed(0)
    model = PhoGPT(ModelConfig(d_model=16, n_heads=2, n_layers=1, vocab_size=50, max_seq_len=64))
    tokens = torch.randint(4, 50, (203,), dtype=torch.int32)
    tokens[[50, 120]] = EOS
    for seq_len in (8, 64):
        _, predicted = evaluate(model, tokens, seq_len, 3, contextlib.nullcontext)
        assert predicted == 203 - 1 - 2


def test_the_learning_rate_is_that_of_the_published_base(base, monkeypatch):
    """The rate rises linearly during the warm-up, then falls as a cosine to a tenth of the peak."""
    rates = []

    def recorded(*args):
        rates.append(lr_at(*args))
        return rates[-1]

    monkeypatch.setattr(loop, "lr_at", recorded)
    pretrain.main(f"--data {base.parent}/data --out {base.parent}/again --max-steps 12 --warmup 4 "
                  "--lr 0.006 --d-model 16 --layers 1 --heads 2 --seq-len 64 --batch-tokens 512 "
                  "--device cpu".split())
    cosines = [1 + math.cos(math.pi * n / 8) for n in range(8)]
    assert rates == pytest.approx([
        *(0.006 * n / 4 for n in (1, 2, 3, 4)), *(0.006 * (0.1 + 0.45 * c) for c in cosines)])


@pytest.mark.parametrize(
    "command, flags, reason",
    [
        (prepare, "--articles {d}/none.jsonl --out {d}/x", "none.jsonl: no such file"),
        (prepare, "--articles {d}/bad.jsonl --out {d}/x", "bad.jsonl:2"),
        (prepare, "--articles {d}/bad.jsonl --topics {d}/none.jsonl --out {d}/x", "none.jsonl"),
        (pretrain, "--data {d} --out {d}/x", "corpus.json is missing"),
    ],
)
def test_a_person_is_told_in_one_line_what_is_wrong(tmp_path, capsys, command, flags, reason):
    (tmp_path / "bad.jsonl").write_text('{"title": "a", "text": "b"}\n{"title": 3}\n')
    with pytest.raises(SystemExit) as stopped:
        command.main(flags.format(d=tmp_path).split())
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and reason in error and error.count("\n") == 1


def test_too_little_text_for_the_vocabulary_is_refused(tmp_path):
    with pytest.raises(Refusal, match="--vocab-size 5000"):
        train_tokenizer(["một câu ngắn"], 5000)
    save_tokenizer(train_tokenizer(["một câu ngắn"], 260), tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["model_max_length"] == 1024
