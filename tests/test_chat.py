"""The exported templates for other programs give the same text as the training."""

import re

import pytest

from phogpt_raw.data.conversations import Conversation
from phogpt_raw.data.prompt import TEMPLATES, encode_row
from phogpt_raw.decode.history import Turn, encode_history
from phogpt_raw.export.chat import jinja, modelfile
from phogpt_raw.model.weights import NANO, read_config, read_tokenizer

TURNS = [{"role": "user", "content": " Phở là gì? "},
         {"role": "assistant", "content": "Dạ, món nước."},
         {"role": "user", "content": 'Còn "bún" thì sao?'}]


def rendered(template: str, turns, generate=True) -> str:
    tokenizer = read_tokenizer(NANO, read_config(NANO))
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generate,
                                         chat_template=template)


@pytest.mark.parametrize("name", TEMPLATES)
def test_one_question_is_the_prompt_of_training(name):
    template = TEMPLATES[name]
    assert rendered(jinja(template), TURNS[:1]) == template.question.format("Phở là gì?")
    assert rendered(jinja(template), TURNS[:2], generate=False) == (
        template.question.format("Phở là gì?") + template.gap + "Dạ, món nước.</s>")


def test_several_turns_are_those_of_the_tokenizers_own_template():
    tokenizer = read_tokenizer(NANO, read_config(NANO))
    for count in range(1, 4):
        own = tokenizer.apply_chat_template(TURNS[:count], tokenize=False,
                                            add_generation_prompt=count != 2)
        assert rendered(jinja(TEMPLATES["4b-chat"]), TURNS[:count], count != 2) == own


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_with_a_system_text_is_the_one_of_training(name):
    """These give the same text: the exported template, nano's template, generate.py and training.

    The Modelfile puts the system text before the question.
    """
    tokenizer = read_tokenizer(NANO, read_config(NANO))
    turns = [{"role": "system", "content": "Trả lời ngắn. "}, *TURNS,
             {"role": "assistant", "content": "Dạ, món khô."}]
    row = Conversation(tuple((turn["role"], turn["content"].strip()) for turn in turns), "x:1")
    trained = tokenizer.decode(encode_row(tokenizer, TEMPLATES[name], row, 512).ids)
    assert trained.startswith(TEMPLATES[name].question.format("Trả lời ngắn.\nPhở là gì?"))
    assert rendered(jinja(TEMPLATES[name]), turns, generate=False) == trained
    if name == "4b-chat":
        assert rendered(tokenizer.chat_template, turns, generate=False) == trained
    asked = [Turn("Phở là gì?", "Dạ, món nước."), Turn('Còn "bún" thì sao?')]
    ids = encode_history(tokenizer, TEMPLATES[name], asked, "Trả lời ngắn.")
    assert tokenizer.decode(ids) == rendered(jinja(TEMPLATES[name]), turns[:-1])
    assert "{{ if .System }}{{ .System }}\n{{ end }}{{ .Prompt }}" in modelfile(
        TEMPLATES[name], 1024)


def test_an_empty_system_text_leaves_nothing():
    turns = [{"role": "system", "content": " "}, *TURNS[:1]]
    for template in (jinja(TEMPLATES["4b-chat"]),
                     read_tokenizer(NANO, read_config(NANO)).chat_template):
        assert rendered(template, turns) == rendered(template, TURNS[:1])


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_modelfile_gives_the_prompt_and_the_stop(name):
    """The test renders the template for one question as Ollama does, up to the answer."""
    text = modelfile(TEMPLATES[name], 8192)
    assert text.splitlines()[1] == "FROM ./model.gguf"
    template = re.search(r'TEMPLATE """(.*?)"""', text, re.DOTALL)[1]
    before = re.sub(r"\{\{ if \.System \}\}.*?\{\{ end \}\}", "", template, flags=re.DOTALL)
    before = before.split("{{ .Response }}")[0].replace("{{ .Prompt }}", "Phở là gì?")
    assert before == TEMPLATES[name].question.format("Phở là gì?")
    assert template.split("{{ .Response }}")[1] == "</s>\n"
    parameters = re.findall(r"^PARAMETER (.*)$", text, re.MULTILINE)
    assert parameters == ['stop "</s>"', 'stop "### Câu hỏi:"', "temperature 0", "num_ctx 8192"]
