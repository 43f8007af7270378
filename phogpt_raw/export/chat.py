"""PhoGPT's template in the formats of other programs: a chat template in Jinja, and Ollama's
Modelfile.

Both formats give exactly the text that the model was trained on. In both formats there is no space
between the question and the answer, even if PhoGPT's template has a space there. The model
generates this space, because the space is the first character of the answer's first token.
"""

import json

from phogpt_raw.data.prompt import Template

EOS = "</s>"


def jinja(template: Template) -> str:
    """The chat template in Jinja. Questions and answers alternate.

    As in training, a system text is put at the start of the first question.
    """
    before, after, between = (json.dumps(part, ensure_ascii=False) for part in (
        *template.question.split("{}"), template.between))
    answer = json.dumps(template.question.split("{}")[1] + template.gap, ensure_ascii=False)
    return ("{%- set so_far = namespace(told='', between='') -%}"
            "{%- for message in messages -%}"
            "{%- set text = message['content'] | trim -%}"
            "{%- if message['role'] == 'assistant' -%}{{ " + answer + " + text + '" + EOS + "' }}"
            "{%- elif message['role'] == 'system' -%}"
            "{%- if text -%}{%- set so_far.told = so_far.told + text + '\n' -%}{%- endif -%}"
            "{%- else -%}{{ so_far.between + " + before + " + so_far.told + text }}"
            "{%- set so_far.told = '' -%}{%- set so_far.between = " + between + " -%}"
            "{%- endif -%}"
            "{%- endfor -%}"
            "{%- if add_generation_prompt -%}{{ " + after + " }}{%- endif -%}")


def modelfile(template: Template, context: int) -> str:
    """Ollama's Modelfile for model.gguf in the same folder. context: the length of the model's
    context in tokens."""
    question = template.question.format(
        "{{ if .System }}{{ .System }}\n{{ end }}{{ .Prompt }}")
    return (f"# ollama create phogpt -f Modelfile && ollama run phogpt\n"
            f"FROM ./model.gguf\n"
            f'TEMPLATE """{question}'
            f'{{{{ .Response }}}}{EOS}\n"""\n'
            f'PARAMETER stop "{EOS}"\n'
            f'PARAMETER stop "### Câu hỏi:"\n'
            f"PARAMETER temperature 0\n"
            f"PARAMETER num_ctx {context}\n")
