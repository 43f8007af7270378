"""Print the first packed rows of a run, for `--inspect N`: as text, or as JSON for scripts."""

import json
from collections.abc import Iterator
from itertools import groupby, islice

from rich.text import Text

from phogpt_raw.data.prompt import IGNORED, Example, decoded
from phogpt_raw.data.records import printable
from phogpt_raw.messages import _, plural
from phogpt_raw.refusal import Refusal
from phogpt_raw.show.console import heading, out
from phogpt_raw.training.setup import Job


def show(job: Job) -> None:
    """Print the first --inspect rows: the text of each example, and the tokens that carry loss.

    With --json, print a line of JSON for each row instead. Raises Refusal if the text is needed and
    there is no tokenizer.
    """
    if job.tokenizer is None and not job.config.json:
        raise Refusal(f"--inspect: needs a tokenizer, which the shape {job.config.model} does not "
                      f"have; name a base with --model, or add --json")
    number = 0
    for number, (examples, length) in enumerate(islice(rows(job), job.config.inspect), 1):
        if job.config.json:
            print(json.dumps(as_lists(examples), ensure_ascii=False))
        else:
            heading(_("row {n}: {tokens:,} of {length:,} tokens; examples: {examples:,}", n=number,
                      examples=len(examples), tokens=sum(len(e.ids) for e in examples),
                      length=length))
            for place, example in enumerate(examples):
                print_example(job.tokenizer, example, place)
    if number < job.config.inspect and not job.config.json:
        out.print(plural(number, _("(one epoch has only this row)"),
                         _("(one epoch has only these {n:,} rows)", n=number)))


def rows(job: Job) -> Iterator[tuple[list[Example], int]]:
    """Yield (examples of the row, its length with padding) for each row of one epoch, in order."""
    for step in range(job.stream.steps(1)):
        for alike, length in job.stream.window(step).layout(1):
            yield alike[0], length


def as_lists(examples: list[Example]) -> dict[str, list]:
    """A row without its padding. targets[i] is the token that position i must predict, or -100;
    documents[i] is the number of the example at position i."""
    return {"ids": [token for e in examples for token in e.ids],
            "targets": [target for e in examples for target in e.targets],
            "documents": [n for n, e in enumerate(examples) for _token in e.ids],
            "where": [printable(e.where) for e in examples]}


def parts(tokenizer, example: Example) -> Iterator[tuple[bool, str]]:
    """Yield (whether it carries loss, text) for each part of an example. A character whose tokens
    are in two parts belongs to the second part."""
    carries_loss = [False, *(target != IGNORED for target in example.targets[:-1])]
    stop = shown = 0
    for supervised, part in groupby(carries_loss):
        stop += len(list(part))
        text = decoded(tokenizer, example.ids[:stop])
        yield supervised, text[shown:]
        shown = len(text)


def print_example(tokenizer, example: Example, place: int | None = None) -> None:
    """Print a training example. The tokens that carry loss are in brackets and in colour."""
    border = "" if place is None else _("document {n}, ", n=place)
    out.print(Text(border + _("{where}; loss on the {n} of {of} tokens between ⟦ and ⟧",
                              where=printable(example.where), n=example.supervised,
                              of=len(example.ids)), "dim cyan"))
    for supervised, text in parts(tokenizer, example):
        out.print(Text(f"⟦{text}⟧" if supervised else text,
                       "bold green" if supervised else ""), end="")
    out.print()
