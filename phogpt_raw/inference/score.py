"""generate.py --eval FILE scores the model on rows with known answers.

It prints the loss of all known answers, in nats per token, and the perplexity. Then the model
answers the last question of each row. Earlier questions of a row keep their known answers. The
generated answers have three scores:

- the share of answers that equal the known answer (capitals, spaces and a full stop at the end
  make no difference)
- chrF (Popović 2015, doi:10.18653/v1/W15-3049), computed by sacrebleu
- the share of answers that end by themselves, before the limit of tokens

With an adapter, each score is printed twice: for the base alone, and with the adapter.
"""

import html
import json
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from phogpt_raw.data.batches import Window
from phogpt_raw.data.conversations import check_map
from phogpt_raw.data.encoded import encode_sources, read_sources
from phogpt_raw.data.prompt import IGNORED, Example, Template
from phogpt_raw.data.records import check_all
from phogpt_raw.data.sources import find_unweighted
from phogpt_raw.files import awaited_file, expanded, write_text
from phogpt_raw.inference import memory_plan
from phogpt_raw.inference.answers import answered
from phogpt_raw.inference.loading import Found
from phogpt_raw.inference.streaming import Generation, say
from phogpt_raw.messages import _, plural
from phogpt_raw.model.phogpt import PhoGPT
from phogpt_raw.refusal import Refusal
from phogpt_raw.show.console import out
from phogpt_raw.training.evaluate import held_out_loss, perplexity
from phogpt_raw.training.limits import Limits
from phogpt_raw.training.loss import chunk_rows

SHOWN = 20  # number of answers on the HTML page
LOSS_MIB = 256  # maximum memory of one chunk of logits, in MiB


@dataclass(frozen=True)
class Score:
    """The scores of one model.

    loss: nats per token of the known answers. exact: share of answers that equal the known answer.
    chrf: from 0 to 100. stops: share of answers that end by themselves.
    """

    loss: float
    perplexity: float
    exact: float
    chrf: float
    stops: float


@dataclass(frozen=True)
class Row:
    """A question, its known answer, and the generated answers by name: "base", "adapter"."""

    question: str
    known: str
    answers: dict[str, str]


def evaluate(found: Found, spec: str, output: Path | None, how: Generation, *,
             mapped: dict[str, str]) -> None:
    """Score the model on the rows of a file, and print a table.

    output: a JSON file for the scores and answers. An HTML page with the first answers is written
    to the same folder.
    """
    metric = chrf()
    with reserved(output) as files:
        scores, rows = scored(found, spec, how, metric, mapped)
        show(scores, len(rows))
        if files:
            write(*files, spec, scores, rows)
            out.print(_("written to {output} and {page}", output=files[0], page=files[1]),
                      markup=False)


@contextmanager
def reserved(output: Path | None) -> Iterator[tuple[Path, Path] | None]:
    """Reserve the names of the JSON file and of its page during the block.

    Yields both names, or None without --output.
    """
    if output is None:
        yield None
        return
    output = expanded(output)
    if output.suffix != ".json":
        raise Refusal(f"--output {output}: with --eval it must end in .json")
    page = output.with_suffix(".html")
    with awaited_file(output), awaited_file(page):
        yield output, page


def scored(found: Found, spec: str, how: Generation, metric,
           mapped: dict[str, str]) -> tuple[dict[str, Score], list[Row]]:
    """The scores of each model by name, and the rows with their generated answers."""
    examples = read(found, spec, mapped)
    prompts = [prompt_of(example) for example in examples]
    memory_plan.check_fits(found, memory_plan.file(found, how, list(map(len, prompts))))
    tokenizer, model = found.tokenizer, found.load()
    known = [text_of(tokenizer, example.ids[last_answer(example)]) for example in examples]
    scores, answers = {}, {}
    for name, setting in settings(model, found):
        with setting:
            limits = Limits(1, chunk_rows(model.config.vocab_size, LOSS_MIB), 0, False)
            loss = held_out_loss(model, Window(examples, tokenizer.pad_token_id), limits)
            given = {n: rest for n, *rest in answered(found, model, dict(enumerate(prompts)), how)}
        answers[name] = [given[n][0] for n in range(len(examples))]
        scores[name] = Score(
            loss, perplexity(loss),
            share(same(*pair) for pair in zip(answers[name], known, strict=True)),
            metric.corpus_score(answers[name], [known]).score,
            share(stopped for _text, stopped in given.values()))
    return scores, [Row(question_in(tokenizer, found.template, prompt), known[n],
                        {name: answers[name][n] for name in answers})
                    for n, prompt in enumerate(prompts)]


def chrf():
    try:
        from sacrebleu.metrics import CHRF
    except ImportError:
        raise Refusal("--eval: needs the package sacrebleu: pip install -c constraints.txt -e "
                      "'.[eval]'") from None
    return CHRF()


def read(found: Found, spec: str, mapped: dict[str, str]) -> list[Example]:
    """The rows of a file, encoded as train.py encodes them. Raises Refusal for a bad row."""
    rows = encode_sources([find_unweighted(spec, "--eval")], found.tokenizer, found.template,
                          max_len=found.shape.max_seq_len, mapped=mapped)
    findings = rows.together()
    check_all(findings)
    check_map(mapped, findings)
    examples = [document for row in rows.rows for document in row.documents[:1] if document.asks]
    if not examples:
        raise Refusal(no_questions(spec))
    texts = len(rows.rows) - len(examples)
    if texts:
        say(plural(texts, _("(1 row is a text without a question: left out)"),
                   _("({n:,} rows are texts without a question: left out)", n=texts)))
    return examples


def prompt_lengths(found: Found, spec: str, mapped: dict[str, str]) -> list[int]:
    """The number of tokens of each row's prompt.

    Without a tokenizer, each prompt is assumed to be as long as the model allows.
    """
    if found.tokenizer:
        return [len(prompt_of(example)) for example in read(found, spec, mapped)]
    rows = read_sources([find_unweighted(spec, "--eval")], mapped, strict=True)
    asked = [row for row in rows if row.question]
    if not asked:
        raise Refusal(no_questions(spec))
    return [found.shape.max_seq_len - 1] * len(asked)


def no_questions(spec: str) -> str:
    return f"{spec}: holds no questions with answers"


def last_answer(example: Example) -> slice:
    """The slice of the example's ids that contains the last answer and its `</s>`."""
    spoken = [n for n, target in enumerate(example.targets) if target != IGNORED]
    start = next((n for n in range(spoken[-1], 0, -1) if example.targets[n - 1] == IGNORED), 0)
    return slice(start + 1, spoken[-1] + 2)


def prompt_of(example: Example) -> list[int]:
    """The token ids before the last answer: the conversation up to its last question."""
    return example.ids[: last_answer(example).start]


def question_in(tokenizer, template: Template, prompt: list[int]) -> str:
    """The text of the last question in a prompt, without the template."""
    before, after = template.question.split("{}")
    return tokenizer.decode(prompt).removesuffix(after).rpartition(before)[2]


def text_of(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


@contextmanager
def without_adapter(model: PhoGPT) -> Iterator[None]:
    """A context in which the adapter is switched off."""
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@contextmanager
def as_it_is() -> Iterator[None]:
    yield


def settings(model: PhoGPT, found: Found):
    """A list of (name, context manager). The model is scored once in each context."""
    if not found.adapter:
        return [("base", as_it_is())]
    return [("base", without_adapter(model)), ("adapter", as_it_is())]


def same(one: str, other: str) -> bool:
    """True if two answers are equal except for capitals, spaces and a full stop at the end.

    >>> same("Dạ,  phở ạ.", "dạ, phở ạ"), same("phở", "phơ")
    (True, False)
    """
    one, other = (" ".join(unicodedata.normalize("NFC", text).casefold().split()).rstrip(".")
                  for text in (one, other))
    return one == other


def share(flags) -> float:
    flags = list(flags)
    return sum(flags) / len(flags)


def lines(scores: dict[str, Score]) -> list[tuple[str, ...]]:
    """The cells of the table: a line of column names, then a line for each score."""
    kinds = (("loss", _("loss, nats per token"), "{:.3f}"),
             ("perplexity", _("perplexity"), "{:.2f}"),
             ("exact", _("equals the known answer"), "{:.1%}"),
             ("chrf", _("chrF"), "{:.1f}"),
             ("stops", _("ends by itself"), "{:.1%}"))
    return [("", *map(name_of, scores)),
            *((text, *(form.format(getattr(score, field)) for score in scores.values()))
              for field, text, form in kinds)]


def name_of(setting: str) -> str:
    return _("the base alone") if setting == "base" else _("with the adapter")


def show(scores: dict[str, Score], rows: int) -> None:
    first, *rest = lines(scores)
    table = Table(title=row_count(rows), title_justify="left")
    for n, name in enumerate(first):
        table.add_column(name, justify="right" if n else "left")
    for line in rest:
        table.add_row(*line)
    out.print(table)


def row_count(rows: int) -> str:
    return plural(rows, _("1 row"), _("{n:,} rows", n=rows))


PAGE = """<!doctype html>
<html lang="vi"><meta charset="utf-8"><meta name="viewport"
content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 1rem auto; max-width: 70rem;
  padding: 0 1rem; }}
article {{ border-top: 1px solid #8886; padding: .7rem 0; }}
h1 {{ font-size: 1.3rem; overflow-wrap: anywhere; }}
h2 {{ font-size: 1rem; margin: 0 0 .4rem; white-space: pre-wrap; overflow-wrap: anywhere; }}
table {{ border-collapse: collapse; margin: 0 0 1.5rem; }}
th, td {{ font-weight: normal; text-align: right; padding: .15rem 0 .15rem 1rem; }}
th:first-child {{ text-align: left; padding-left: 0; }}
thead th {{ opacity: .7; vertical-align: bottom; }}
dl {{ display: grid; grid-template-columns: 9rem 1fr; gap: .3rem 1rem; margin: 0; }}
dt {{ opacity: .7; }} dd {{ margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }}
@media (max-width: 40rem) {{ dl {{ grid-template-columns: 1fr; gap: 0; }}
  dd {{ margin-bottom: .4rem; }} }}
</style>
<h1>{title}</h1>
{table}
<p>{shown}</p>
{rows}
</html>
"""


def write(output: Path, page: Path, spec: str, scores: dict[str, Score], rows: list[Row]) -> None:
    """Write the scores and all answers to `output` as JSON, and the first answers to `page`."""
    content = {"rows": Path(spec).name, "scores": {k: asdict(v) for k, v in scores.items()},
               "answers": [asdict(row) for row in rows]}
    write_text(output, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
    articles = []
    for row in rows[:SHOWN]:
        texts = {_("known"): row.known} | {name_of(k): v for k, v in row.answers.items()}
        cells = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>"
                        for name, text in texts.items())
        articles.append(f"<article><h2>{html.escape(row.question)}</h2><dl>{cells}</dl></article>")
    title = f"{Path(spec).name}: {row_count(len(rows))}"
    shown = _("The first {n} answers; all are in {file}.", n=len(articles), file=output.name) \
        if len(rows) > len(articles) else ""
    write_text(page, PAGE.format(title=html.escape(title), table=in_html(lines(scores)),
                                 shown=html.escape(shown), rows="\n".join(articles)))


def in_html(table: list[tuple[str, ...]]) -> str:
    """A table as HTML. Its first line and its first column are headings."""
    first, *rest = [[html.escape(cell) for cell in line] for line in table]
    head = "".join(f"<th>{name}</th>" for name in first)
    body = "".join(f"<tr><th>{name}</th>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
                   for name, *cells in rest)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
