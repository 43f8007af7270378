"""The exact tokens that the model reads. Only the answer and its </s> have a loss."""

import doctest
import unicodedata
from pathlib import Path

import pytest

from phogpt_raw.data import prompt as module
from phogpt_raw.data.conversations import Conversation
from phogpt_raw.data.prompt import (
    TEMPLATES,
    encode,
    encode_prompt,
    encode_row,
)
from phogpt_raw.data.records import Findings
from phogpt_raw.model.weights import NANO
from phogpt_raw.refusal import Refusal

REAL = Path(__file__).parents[2] / "shared" / "data" / "phogpt4b_tokenizer"
EOS, PAD = 2, 3


def read(folder):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(str(folder))


@pytest.fixture(scope="module", params=["nano", "4b"])
def tokenizer(request):
    if request.param == "nano":
        return read(NANO)
    if not REAL.is_dir():
        pytest.skip(f"{REAL}: VinAI's own tokenizer is not part of the project")
    return read(REAL)


@pytest.fixture
def fresh():
    """nano's tokenizer, which a test may change."""
    return read(NANO)


def row(prompt="Phở bò là gì?", response="Dạ, phở bò là món nước ạ."):
    return Conversation((("user", prompt), ("assistant", response)), "rows.jsonl:7")


def supervised(tokenizer, example):
    return tokenizer.decode(example.ids[len(example.prompt) :])


def test_doctest():
    assert doctest.testmod(module).failed == 0


def test_templates_are_vinais_to_the_letter():
    written = {name: t.question.format("X") + t.gap + "Y" for name, t in TEMPLATES.items()}
    assert written == {
        "7b5-instruct": "### Câu hỏi:\nX\n\n### Trả lời:Y",
        "4b-chat": "### Câu hỏi: X\n### Trả lời: Y",
    }


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_example_reads_as_the_template_filled_in(tokenizer, name):
    example = encode_row(tokenizer, TEMPLATES[name], row("Dùng { } và {0} làm gì?"), 1024)
    question = TEMPLATES[name].question.replace("{}", "Dùng { } và {0} làm gì?")
    answer = TEMPLATES[name].gap + "Dạ, phở bò là món nước ạ."
    assert tokenizer.decode(example.ids) == question + answer + "</s>"
    assert supervised(tokenizer, example) == answer + "</s>"
    assert not example.cut
    assert example.where == "rows.jsonl:7"


def test_a_training_prompt_is_what_the_chat_template_asks_at_generation(tokenizer):
    turn = [{"role": "user", "content": "Phở bò là gì?"}]
    asked = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    prompt = encode_prompt(tokenizer, TEMPLATES["4b-chat"], "Phở bò là gì?")
    assert tokenizer.decode(prompt) == asked
    whole_chat = [*turn, {"role": "assistant", "content": "Dạ, phở bò là món nước ạ."}]
    whole = encode_row(tokenizer, TEMPLATES["4b-chat"], row(), 1024)
    assert tokenizer.decode(whole.ids) == tokenizer.apply_chat_template(whole_chat, tokenize=False)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("worn", TEMPLATES)
def test_a_prompt_that_wears_a_template_is_not_wrapped_again(tokenizer, name, worn):
    """VinAI's sample file has prompts that already contain a template. Such prompts stay unchanged.
    """
    wrapped = TEMPLATES[worn].question.format("Ồn ào")
    ids = encode_prompt(tokenizer, TEMPLATES[name], wrapped + "\n")
    assert tokenizer.decode(ids) == wrapped


def test_words_of_the_template_inside_a_question_are_still_wrapped(tokenizer):
    asked = "Viết '### Trả lời:' nghĩa là gì?"
    ids = encode_prompt(tokenizer, TEMPLATES["4b-chat"], asked)
    assert tokenizer.decode(ids) == f"### Câu hỏi: {asked}\n### Trả lời:"


def test_decomposed_and_composed_questions_are_the_same_tokens(tokenizer):
    question = "Ở đâu có phở?"
    assert unicodedata.normalize("NFD", question) != question
    ids = [encode_prompt(tokenizer, TEMPLATES["4b-chat"], unicodedata.normalize(form, question))
           for form in ("NFC", "NFD")]
    assert ids[0] == ids[1]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("response", [
    "Dạ.", "Dạ, phở bò.</s>", "Dạ, phở bò. </s>", "- Một\n- Hai", "5", "(a)", "…", "ạ" * 50,
])
def test_the_end_is_the_last_supervised_token_and_there_once(tokenizer, name, response):
    example = encode_row(tokenizer, TEMPLATES[name], row(response=response), 1024)
    assert example.ids[-1] == EOS
    assert example.ids.count(EOS) == 1
    assert example.supervised >= 2
    said = response.removesuffix("</s>").rstrip()
    assert supervised(tokenizer, example) == TEMPLATES[name].gap + said + "</s>"


def test_padding_is_another_token_than_the_end(tokenizer):
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (EOS, PAD)


@pytest.mark.parametrize("typed", ["</s>", "<pad>", "<s>", "<unk>"])
def test_a_special_token_that_a_person_typed_is_only_text(tokenizer, typed):
    example = encode_row(tokenizer, TEMPLATES["4b-chat"],
                         row(f"Thẻ {typed} là gì?", f"Dạ, {typed} là một thẻ ạ."), 1024)
    assert [i for i in example.ids if i < 4] == [EOS]
    assert tokenizer.decode(example.ids).count(typed) == (3 if typed == "</s>" else 2)


def test_typed_ends_stay_text_after_the_tokenizer_was_used_otherwise(fresh):
    ids = encode_prompt(fresh, TEMPLATES["4b-chat"], "a</s>b")
    assert EOS in fresh("a</s>b")["input_ids"]
    assert encode_prompt(fresh, TEMPLATES["4b-chat"], "a</s>b") == ids


def test_a_cut_answer_has_no_end(tokenizer):
    whole = encode_row(tokenizer, TEMPLATES["4b-chat"], row(), 1024)
    for max_len in range(len(whole.prompt) + 1, len(whole.ids)):
        cut = encode_row(tokenizer, TEMPLATES["4b-chat"], row(), max_len)
        assert cut.cut
        assert cut.ids == whole.ids[:max_len]
        assert cut.supervised == max_len - len(whole.prompt)
        assert EOS not in cut.ids
    exact = encode_row(tokenizer, TEMPLATES["4b-chat"], row(), len(whole.ids))
    assert exact == whole
    assert not exact.cut


def test_a_question_without_room_for_an_answer_is_refused_with_its_line(tokenizer):
    question = len(encode_prompt(tokenizer, TEMPLATES["4b-chat"], "Phở bò là gì?"))
    with pytest.raises(Refusal, match=rf"^rows\.jsonl:7: .* {question} tokens, but --max-len is"):
        encode_row(tokenizer, TEMPLATES["4b-chat"], row(), question)
    assert encode_row(tokenizer, TEMPLATES["4b-chat"], row(), question + 1).supervised == 1


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("response", [
    "Dạ, phở ạ.", "phở", "5", "- Một", "\"Phở\"", "(a) phở", "…", "...", "### Phở", ": phở",
    "ạ", "Ở đây", "|x|", "?", "https://a.vn", "của", "🍜",
])
def test_the_border_of_the_prompt_is_a_border_of_tokens(tokenizer, name, response):
    """Question and answer are tokenised separately.

    The ids of question and answer, joined, must equal the ids of the whole text.
    """
    template = TEMPLATES[name]
    example = encode_row(tokenizer, template, row(response=response), 1024)
    text = template.question.format("Phở bò là gì?") + template.gap + response
    assert tokenizer.decode(example.ids[:-1]) == text
    whole = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert example.ids[:-1] == whole


TURNS = ["Phở là gì?", "Dạ, một món nước ạ.", "Ăn lúc nào?", "Buổi sáng ạ!", "Ở đâu ngon?",
         "Hà Nội ạ…", "Giá bao nhiêu?", "40.000 đồng", "(Cảm ơn)", "- Dạ\n- Vâng"]


def spoken(count: int, *before) -> Conversation:
    """A conversation of the turns `before`, then `count` questions with their answers."""
    roles = ("user", "assistant")
    said = [(roles[n % 2], text) for n, text in enumerate(TURNS[: 2 * count])]
    return Conversation((*before, *said), "rows.jsonl:7")


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_turns_are_the_tokenizers_own_chat_template(tokenizer, count):
    """The ids equal those of VinAI's chat template. Only the answers and their </s> are supervised.
    """
    row = spoken(count)
    messages = [{"role": role, "content": text} for role, text in row.turns]
    wanted = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    example = encode_row(tokenizer, TEMPLATES["4b-chat"], row, 1024)
    assert example.ids == wanted
    learned = tokenizer.decode([t for t in example.targets if t != -100])
    assert learned == "".join(f" {text}</s>" for text in TURNS[1 : 2 * count : 2])
    assert example.targets[:-1] == [after if target != -100 else -100 for after, target in zip(
        example.ids[1:], example.targets, strict=False)]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_each_prompt_of_a_conversation_is_what_generation_would_ask(tokenizer, count):
    row = spoken(count)
    messages = [{"role": role, "content": text} for role, text in row.turns[:-1]]
    asked = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True,
                                          return_dict=False)
    example = encode_row(tokenizer, TEMPLATES["4b-chat"], row, 1024)
    assert example.ids[: len(asked)] == asked and example.targets[len(asked) - 1] != -100


def test_turns_of_7b5_are_its_template_again_after_each_end(tokenizer):
    example = encode_row(tokenizer, TEMPLATES["7b5-instruct"], spoken(2), 1024)
    assert tokenizer.decode(example.ids) == (
        f"### Câu hỏi:\n{TURNS[0]}\n\n### Trả lời:{TURNS[1]}</s>\n\n"
        f"### Câu hỏi:\n{TURNS[2]}\n\n### Trả lời:{TURNS[3]}</s>")


def documents(tokenizer, row, max_len, too_long=None):
    findings = Findings()
    [(_row, found)] = encode(tokenizer, TEMPLATES["4b-chat"], [row], max_len, too_long, findings)
    return found, set(findings.notes)


def test_a_system_text_stands_before_the_first_question_and_is_noted(tokenizer):
    found, notes = documents(tokenizer, spoken(2, ("system", "Ngắn gọn.")), 1024)
    plain = spoken(2)
    joined = Conversation((("user", "Ngắn gọn.\n" + TURNS[0]), *plain.turns[1:]), plain.where)
    assert found == documents(tokenizer, joined, 1024)[0] and notes == {"system"}


def test_a_text_is_learned_whole_and_ends_with_its_end(tokenizer):
    row = Conversation((("text", "Phở là món nước. </s> là chữ."),), "notes.txt:1")
    [example], notes = documents(tokenizer, row, 64)
    assert tokenizer.decode(example.ids) == "Phở là món nước. </s> là chữ.</s>"
    assert example.ids.count(EOS) == 1
    assert example.targets == [*example.ids[1:], -100] and not example.asks
    assert not notes


@pytest.mark.parametrize("max_len", [8, 13, 64])
def test_a_long_text_is_split_and_nothing_of_it_is_lost(tokenizer, max_len):
    text = "Phở là món nước có bánh, thịt bò.\n\nBún chả thì nướng. " * 40
    row = Conversation((("text", text),), "notes.txt:1")
    found, notes = documents(tokenizer, row, max_len)
    assert [token for example in found for token in example.ids] == [
        *tokenizer(text)["input_ids"], EOS]
    assert all(2 <= len(e.ids) <= max_len and e.supervised == len(e.ids) - 1 for e in found)
    assert notes == {"split"} and not any(example.cut for example in found)


def test_a_text_of_one_token_over_leaves_no_lone_end(tokenizer):
    text = "Phở là món nước có bánh, thịt bò và hành."
    whole = len(tokenizer(text)["input_ids"]) + 1
    for max_len in range(8, whole):
        found, _ = documents(tokenizer, Conversation((("text", text),), "f:1"), max_len)
        assert all(example.supervised for example in found)
        assert sum(len(example.ids) for example in found) == whole


def test_parts_of_a_very_long_text_have_the_tokens_of_the_whole(tokenizer, monkeypatch):
    text = "Phở bò, bún  chả.\n\n\tCơm   tấm … " * 60
    whole, _ = documents(tokenizer, Conversation((("text", text),), "f:1"), 10_000)
    monkeypatch.setattr(module, "PART", 50)
    assert documents(tokenizer, Conversation((("text", text),), "f:1"), 10_000)[0] == whole


def test_too_long_turns_are_cut_split_or_dropped_as_asked(tokenizer):
    row = spoken(5)
    whole = encode_row(tokenizer, TEMPLATES["4b-chat"], row, 1024)
    max_len = len(whole.ids) // 2
    [cut], notes = documents(tokenizer, row, max_len)
    assert cut.ids == whole.ids[: len(cut.ids)] and cut.cut and notes == {"cut"}
    assert cut.targets[-1] == -100 and cut.supervised
    split, notes = documents(tokenizer, row, max_len, "split")
    assert len(split) > 1 and notes == {"split"} and not any(e.cut for e in split)
    learned = [t for e in split for t in e.targets if t != -100]
    assert learned == [t for t in whole.targets if t != -100]
    for example in split:
        assert tokenizer.decode(example.ids).startswith("### Câu hỏi: ")
        assert example.ids[-1] == EOS and len(example.ids) <= max_len
    assert documents(tokenizer, row, max_len, "drop") == ([], {"dropped"})
    assert documents(tokenizer, row, len(whole.ids), "drop") == ([whole], set())


def test_a_cut_never_ends_within_a_question(tokenizer):
    row = spoken(5)
    first = len(encode_row(tokenizer, TEMPLATES["4b-chat"], spoken(1), 1024).ids)
    for max_len in range(first, len(encode_row(tokenizer, TEMPLATES["4b-chat"], row, 1024).ids)):
        [example], _ = documents(tokenizer, row, max_len)
        assert example.targets[-2] != -100  # the last token has a loss
        assert example.cut
        assert example.ids.count(EOS) >= 1


def test_a_question_too_long_is_bad_unless_long_rows_are_dropped(tokenizer):
    row = Conversation((("user", "dài " * 100), ("assistant", "x")), "f:1")
    assert str(documents(tokenizer, row, 64)[0]).startswith("f:1: the question has ")
    assert documents(tokenizer, row, 64, "drop") == ([], {"dropped"})
    huge = Conversation((("user", "dài " * 100), ("assistant", "x" * 5_000_000)), "f:1")
    assert documents(tokenizer, huge, 1024)[1] == {"cut"}
