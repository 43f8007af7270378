"""Choose the template of PhoGPT that a base uses.

A chat template is a program in Jinja that comes with a base. Jinja's sandbox gives it no access to
files and to Python. But it could run for ever or fill the memory, so it runs with limits.
"""

from phogpt_raw.data.prompt import TEMPLATES
from phogpt_raw.limited import OverLimit, limited
from phogpt_raw.messages import _
from phogpt_raw.refusal import Refusal

BLOOM_SIZED = 100_000  # tokens; 7B5's vocabulary is 250,000, 4B's 20,480
LETTERS = 200  # no template of PhoGPT's is longer
NAME_ONE = "name one of PhoGPT's with --template"


def choose_template(tokenizer, *asked: str) -> tuple[str, str]:
    """(name, reason): the first name in `asked` that is not auto. If there is none, the tokenizer's
    chat template decides, or without one the size of its vocabulary."""
    for name in asked:
        if name != "auto":
            return name, _("asked for by --template")
    if tokenizer.chat_template:
        shown = rendered(tokenizer)
        for name, template in TEMPLATES.items():
            if shown == template.question.format("?"):
                return name, _("the tokenizer's chat template")
        raise Refusal(f"the tokenizer's chat template is not PhoGPT's (it gives {shown!r}); "
                      f"{NAME_ONE}")
    if len(tokenizer) > BLOOM_SIZED:
        return "7b5-instruct", _("a vocabulary of {n:,} is 7B5's", n=len(tokenizer))
    return "4b-chat", _("a vocabulary of {n:,} is 4B's", n=len(tokenizer))


def rendered(tokenizer) -> str:
    """The first characters of the text that the chat template gives for the question "?"."""
    def render() -> str:
        return tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False,
                                             add_generation_prompt=True)[:LETTERS]

    try:
        return limited(render)
    except OverLimit as over:
        raise Refusal(f"the tokenizer's chat template {over}; {NAME_ONE}") from None
    except Exception as error:  # Jinja's, or whatever the template itself raises
        said = " ".join(str(error).split())[:LETTERS]
        raise Refusal(f"the tokenizer's chat template cannot be used ({said}); {NAME_ONE}") \
            from None
