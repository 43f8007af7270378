"""The choice of the prompt template for a base, and protection from a harmful chat template."""

import time

import pytest

from phogpt_raw import limited
from phogpt_raw.data.chat_template import choose_template
from phogpt_raw.model.weights import NANO
from phogpt_raw.refusal import Refusal


@pytest.fixture
def fresh():
    """nano's tokenizer, whose chat template the test may change."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(str(NANO))


class Words(dict):
    """A stand-in for a tokenizer: it has only a chat template and a size."""

    def __init__(self, size, chat_template=None):
        super().__init__()
        self.size, self.chat_template = size, chat_template

    def __len__(self):
        return self.size


def test_template_by_chat_template_by_vocabulary_and_by_flag(fresh):
    assert choose_template(fresh) == ("4b-chat", "the tokenizer's chat template")
    assert choose_template(fresh, "7b5-instruct") == ("7b5-instruct", "set by --template")
    fresh.chat_template = ("{{ '### Câu hỏi:\\n' + messages[0]['content'] }}"
                           "{{ '\\n\\n### Trả lời:' if add_generation_prompt }}")
    assert choose_template(fresh) == ("7b5-instruct", "the tokenizer's chat template")
    assert choose_template(Words(250_680)) == (
        "7b5-instruct", "a vocabulary of 250,680 tokens fits 7B5")
    assert choose_template(Words(20_480)) == ("4b-chat", "a vocabulary of 20,480 tokens fits 4B")


def test_a_foreign_chat_template_is_refused_unless_a_template_is_named(fresh):
    fresh.chat_template = "{{ '<|user|>' + messages[0]['content'] }}"
    with pytest.raises(Refusal, match=r"<\|user\|>\?.*--template"):
        choose_template(fresh)
    assert choose_template(fresh, "4b-chat")[0] == "4b-chat"


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize("template, line", [
    ("{{ raise_exception('no system text') }}", "cannot be used \\(no system text\\)"),
    ("{% for i in range(10**9) %}{% endfor %}", "cannot be used \\(Range too big"),
    ("{{ 'a' * 10**10 }}", "chat template needs more than 512 MiB"),
    ("{{ 'a' * 10**6 }}", "not PhoGPT's \\(it gives 'a{200}'\\)"),
    ("{% for", "cannot be used"), ("{{ a.b.c }}", "cannot be used \\('a' is undefined"),
    ("{% include '/etc/passwd' %}", "cannot be used"),
    ("{{ ''.__class__.__mro__ }}", "cannot be used \\(access to attribute"),
    (3, "cannot be used"), ([], "a vocabulary"), ({}, "a vocabulary"),
    (LOOP, "chat template takes more than 1 s")])
def test_a_template_that_fails_loops_or_grows_is_one_line(fresh, monkeypatch, template, line):
    monkeypatch.setattr(limited, "SECONDS", 1)
    fresh.chat_template = template
    begun = time.monotonic()
    if not template:
        assert choose_template(fresh)[1].startswith(line)
        return
    with pytest.raises(Refusal, match=line + ".*; choose one of PhoGPT's templates with --template$"
                       ) as said:
        choose_template(fresh)
    assert len(str(said.value)) < 400 and "\n" not in str(said.value)
    assert time.monotonic() - begun < 20


def test_one_of_several_named_templates_is_the_default(fresh):
    fresh.chat_template = {"default": fresh.chat_template, "tools": "{{ raise_exception('x') }}"}
    assert choose_template(fresh)[0] == "4b-chat"
