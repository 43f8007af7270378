"""What the rows of a run are like, before anything is trained: format, lengths, what was found in
them, and which were left out."""

from phogpt_raw.config import Config
from phogpt_raw.data.examples import Examples, questions
from phogpt_raw.data.prompt import TEMPLATES
from phogpt_raw.data.records import Findings, Note, named
from phogpt_raw.data.report import Lengths, Report
from phogpt_raw.messages import _
from phogpt_raw.show.console import listing, one_line

BARS = "▁▂▃▄▅▆▇█"
EXCERPT = 60  # letters of a question or an answer


def show(tokenizer, examples: Examples, config: Config) -> None:
    """The training rows, and of other held-out files what was found in them."""
    report = examples.report
    listing(_("rows"), {
        _("format"): format_line(report.findings),
        _("first"): first_line(tokenizer, examples),
        _("tokens"): tokens_line(report.lengths),
        _("lengths"): histogram(report.lengths),
        _("fit"): fit_line(report, config),
        **found(report),
    })
    if examples.held_out_report:
        others = found(examples.held_out_report)
        if others:
            listing(_("held-out rows"), others)


def found(report: Report) -> dict[str, str]:
    """What was found in rows, as far as there is anything."""
    notes, left_out = note_lines(report), left_out_line(report.findings)
    return {**({_("found"): "; ".join(notes)} if notes else {}),
            **({_("left out"): left_out} if left_out else {})}


def format_line(findings: Findings) -> str:
    """The fields that were used and how many rows have them, and those that were not."""
    used = [_("{fields} ({n:,} rows)", fields=note.example, n=note.count)
            for kind, note in findings.notes.items() if kind.startswith("format ")]
    unused = [note.example for kind, note in findings.notes.items() if kind.startswith("unused ")]
    text = "; ".join(used)
    return text + (_("; not used: {fields}", fields=", ".join(unused)) if unused else "")


def first_line(tokenizer, examples: Examples) -> str:
    """The first training example, shortened."""
    example = examples.train[0]
    learned = [target for target in example.targets if target >= 0]
    where = example.where.rpartition("/")[2]
    answer = one_line(tokenizer.decode(learned), EXCERPT)
    if not example.asks:
        return _("{where}: {text}", where=where, text=answer)
    [question] = questions(tokenizer, TEMPLATES[examples.template], [example])
    return _("{where}: {question} → {answer}", where=where, question=one_line(question, EXCERPT),
             answer=answer)


def tokens_line(lengths: Lengths) -> str:
    return _("{n:,}, of which {learned:,} carry loss; median {median:,}, 95% have at most "
             "{most:,}, longest {longest:,}", n=lengths.total, learned=lengths.supervised,
             median=lengths.median, most=lengths.most, longest=lengths.longest)


def histogram(lengths: Lengths) -> str:
    """A bar for each bin: how many rows have so many tokens."""
    begin = next(n for n, count in enumerate(lengths.counts) if count)
    highest, width = max(lengths.counts), lengths.edges[0]
    bars = "".join(BARS[-(-count * (len(BARS) - 1) // highest)] for count in lengths.counts[begin:])
    return _("{bars} from {least:,} to {longest:,} tokens, {width:,} a bar", bars=bars,
             least=lengths.edges[begin] - width + 1, longest=lengths.edges[-1], width=width)


def fit_line(report: Report, config: Config) -> str:
    notes = report.findings.notes
    split, dropped = (notes[kind].count if kind in notes else 0 for kind in ("split", "dropped"))
    text = _("{share:.1%} of {n:,} rows fit --max-len {limit:,}", share=report.fits,
             n=report.findings.good, limit=config.max_len)
    if split:
        text += _("; {n:,} are split into several", n=split)
    if dropped:
        text += _("; {n:,} are dropped", n=dropped)
    return text


def note_lines(report: Report) -> list[str]:
    """What was found in the rows, and what was done about it."""
    twice = [_("{n:,} rows are there already", n=report.duplicates)] if report.duplicates else []
    texts = (note_text(kind, note) for kind, note in report.findings.notes.items())
    return [*twice, *filter(None, texts)]


def note_text(kind: str, note: Note) -> str | None:
    """A note in words; None where another line says it."""
    values = dict(n=note.count, where=note.where, name=note.example)
    return {
        "turns": _("{n:,} conversations of several turns", **values),
        "text": _("{n:,} texts, learned whole", **values),
        "template": _("{n:,} rows wear PhoGPT's template; it is taken off, and the run's own put "
                      "on (the first: {where})", **values),
        "system": _("{n:,} rows have a system text; it stands before the first question",
                    **values),
        "open question": _("{n:,} conversations end with a question, which is left out (the "
                           "first: {where})", **values),
        "template inside": _("{n:,} rows have ### Câu hỏi: or ### Trả lời: inside a text (the "
                             "first: {where})", **values),
        "no diacritics": _("{n:,} rows have no Vietnamese letters at all (the first: {where})",
                           **values),
        "mojibake": _("{n:,} rows look like UTF-8 that was read as Windows-1252, such as á»Ÿ for ở "
                      "(the first: {where})", **values),
        "lost letters": _("{n:,} rows have letters that were lost, � (the first: {where})",
                          **values),
        "control": _("{n:,} rows have control characters, which the model does not see (the "
                     "first: {where})", **values),
        "cp1258": _("{where} is in Windows-1258 and was read as such", **values),
        "like rows": _("{n:,} quoted cells hold lines that look like rows (the first: {where}); a "
                       "quote too much?", **values),
        "formula": _("{n:,} cells are formulas, whose saved values are used (the first: {where})",
                     **values),
        "number": _("{n:,} cells are numbers, taken as their digits (the first: {where})",
                    **values),
        "sheet": _("{n:,} sheets have other columns and are not read (the first: {name})",
                   **values),
        "file": _("{n:,} files are not read (the first: {name})", **values),
        "beside the list": _("not used beside the list of rows: {name}", **values),
    }.get(kind)


def left_out_line(findings: Findings) -> str:
    """How many rows cannot be used, and the first of them."""
    if not findings.bad:
        return ""
    return _("{n:,} of {total:,} rows; {rows}", n=len(findings.bad),
             total=findings.good + len(findings.bad), rows=named(findings.bad))
