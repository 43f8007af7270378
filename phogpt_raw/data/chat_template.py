"""Choose which of PhoGPT's two prompt templates is used with a base model.

A chat template is a Jinja program in the files of a base. Jinja's sandbox gives the program no
access to files or to Python. But the program could run for ever or fill the memory. So it runs with
limits on its time and memory.
"""

from phogpt_raw.data.prompt import TEMPLATES
from phogpt_raw.limited import OverLimit, limited
from phogpt_raw.messages import _
from phogpt_raw.refusal import Refusal

BLOOM_SIZED = 100_000  # tokens; 7B5's vocabulary is larger than this, 4B's (20,480) is smaller
LETTERS = 200  # a rendered template is cut to this length; PhoGPT's templates are shorter
NAME_ONE = "choose one of PhoGPT's templates with --template"


def choose_template(tokenizer, *asked: str) -> tuple[str, str]:
    """Return the name of the template, and the reason for it as a text for the user.

    The first name in `asked` that is not auto is used. If all names are auto, the tokenizer's chat
    template decides. If the tokenizer has no chat template, the size of its vocabulary decides.
    Raises Refusal if the chat template is not PhoGPT's.
    """
    for name in asked:
        if name != "auto":
            return name, _("set by --template")
    if tokenizer.chat_template:
        shown = rendered(tokenizer)
        for name, template in TEMPLATES.items():
            if shown == template.question.format("?"):
                return name, _("the tokenizer's chat template")
        raise Refusal(f"the tokenizer's chat template is not PhoGPT's (it gives {shown!r}); "
                      f"{NAME_ONE}")
    if len(tokenizer) > BLOOM_SIZED:
        return "7b5-instruct", _("a vocabulary of {n:,} tokens fits 7B5", n=len(tokenizer))
    return "4b-chat", _("a vocabulary of {n:,} tokens fits 4B", n=len(tokenizer))


def rendered(tokenizer) -> str:
    """Render the question "?" with the chat template; return the first LETTERS characters."""
    def render() -> str:
        return tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False,
                                             add_generation_prompt=True)[:LETTERS]

    try:
        return limited(render)
    except OverLimit as over:
        raise Refusal(f"the tokenizer's chat template {over}; {NAME_ONE}") from None
    except Exception as error:  # an error of Jinja, or an error that the template raises
        said = " ".join(str(error).split())[:LETTERS]
        raise Refusal(f"the tokenizer's chat template cannot be used ({said}); {NAME_ONE}") \
            from None
