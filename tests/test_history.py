"""Conversations as token ids."""

from pathlib import Path

import pytest

from phogpt_raw.data.prompt import TEMPLATES, encode_prompt
from phogpt_raw.decode.history import Turn, encode_history
from phogpt_raw.model.weights import NANO, read_config, read_tokenizer

PHOGPT = Path(__file__).parents[2] / "shared" / "data" / "phogpt4b_tokenizer"
SAID = [("Xin chào?", "Chào bạn. Mình khỏe."), ("Phở  là gì?", "Một món ăn."), ("Ở đâu?\nBao giờ?",
        "Hà Nội…"), ("😀 a_b", "1. một\n2. hai"), ("Cảm ơn nhé", "Không có gì!")]


@pytest.fixture(scope="module")
def tokenizer():
    return read_tokenizer(NANO, read_config(NANO))


def test_one_turn_is_the_template(tokenizer):
    for template in TEMPLATES.values():
        assert encode_history(tokenizer, template, [Turn("Phở là gì?")]) == encode_prompt(
            tokenizer, template, "Phở là gì?")


@pytest.mark.skipif(not PHOGPT.is_dir(), reason="PhoGPT-4B's tokenizer is not here")
@pytest.mark.parametrize("turns", range(1, 6))
def test_turns_are_those_of_phogpt_4b_chats_own_template(turns):
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(PHOGPT))
    messages = [message for question, answer in SAID[:turns]
                for message in ({"role": "user", "content": question},
                                {"role": "assistant", "content": answer})][:-1]
    wanted = tokenizer.apply_chat_template(messages, add_generation_prompt=True,
                                           return_dict=False)
    history = [*(Turn(*said) for said in SAID[: turns - 1]), Turn(SAID[turns - 1][0])]
    assert encode_history(tokenizer, TEMPLATES["4b-chat"], history) == wanted


def test_each_answer_ends_and_each_question_begins_anew(tokenizer):
    for name, text in (("4b-chat", "### Câu hỏi: a\n### Trả lời: b</s>\n### Câu hỏi: c\n"
                                   "### Trả lời:"),
                       ("7b5-instruct", "### Câu hỏi:\na\n\n### Trả lời:b</s>\n\n### Câu hỏi:\nc"
                                        "\n\n### Trả lời:")):
        ids = encode_history(tokenizer, TEMPLATES[name], [Turn("a", "b"), Turn("c")])
        assert tokenizer.decode(ids) == text and ids.count(tokenizer.eos_token_id) == 1


def test_an_end_that_a_person_types_stays_text(tokenizer):
    ids = encode_history(tokenizer, TEMPLATES["4b-chat"], [Turn("a", "b</s>"), Turn("</s>")])
    assert ids.count(tokenizer.eos_token_id) == 1


def test_a_system_text_stands_before_the_first_question(tokenizer):
    said = [Turn("a", "b"), Turn("c")]
    ids = encode_history(tokenizer, TEMPLATES["4b-chat"], said, system=" Trả lời ngắn. ")
    assert tokenizer.decode(ids).startswith("### Câu hỏi: Trả lời ngắn.\na\n### Trả lời: b</s>\n"
                                            "### Câu hỏi: c\n")
    assert encode_history(tokenizer, TEMPLATES["4b-chat"], said, system="  ") == encode_history(
        tokenizer, TEMPLATES["4b-chat"], said)
