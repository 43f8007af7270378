"""Print statistics of a run's rows before training: format, lengths, findings, and rows that are
left out."""

from phogpt_raw.config import Config
from phogpt_raw.data.examples import Examples, questions
from phogpt_raw.data.prompt import IGNORED, TEMPLATES, decoded
from phogpt_raw.data.records import NAMED, Findings, Note, named, printable
from phogpt_raw.data.report import Lengths, Report
from phogpt_raw.messages import _, plural
from phogpt_raw.show.console import listing, one_line

BARS = "▁▂▃▄▅▆▇█"
FEW = 10  # no histogram is drawn for fewer examples
USUAL = ("turns", "text", "system")  # notes that are not warnings and name no row
EXCERPT = 60  # the largest number of characters that are shown of a text


def show(tokenizer, examples: Examples, config: Config) -> None:
    """Print the statistics of the training rows, and the findings in separate held-out files."""
    report = examples.report
    listing(_("rows"), {
        _("format"): format_line(report.findings),
        _("first"): first_line(tokenizer, examples),
        _("tokens"): tokens_line(report.lengths),
        **({_("lengths"): histogram(report.lengths)} if report.documents >= FEW else {}),
        _("fit"): fit_line(report, config),
        **found(report),
    })
    if examples.held_out_report:
        others = found(examples.held_out_report)
        if others:
            listing(_("held-out rows"), others)


def found(report: Report) -> dict[str, str]:
    """The lines about findings and about rows that are left out; empty if there are none."""
    notes, left_out = note_lines(report), left_out_line(report.findings)
    return {**({_("found"): "; ".join(notes)} if notes else {}),
            **({_("left out"): left_out} if left_out else {})}


def format_line(findings: Findings) -> str:
    """The fields that are used, with their number of rows, and the fields that are not used."""
    used = [_("{fields}: {n:,}", fields=note.example, n=note.count)
            for kind, note in findings.notes.items() if kind.startswith("format ")]
    unused = [one_line(note.example, EXCERPT) for kind, note in findings.notes.items()
              if kind.startswith("unused ")]
    text = "; ".join(used)
    if unused:
        text += _("; not used: {fields}", fields=", ".join(unused[:NAMED]))
    if len(unused) > NAMED:
        text += _(" and {n:,} others", n=len(unused) - NAMED)
    return text


def first_line(tokenizer, examples: Examples) -> str:
    """The first training example, shortened."""
    example = examples.train[0]
    where = printable(example.where.rpartition("/")[2])
    if not example.asks:
        text = one_line(decoded(tokenizer, example.ids), EXCERPT)
        return _("{where}: {text}", where=where, text=text)
    learned = [target for target in example.targets if target != IGNORED]
    answer = one_line(decoded(tokenizer, learned), EXCERPT)
    [question] = questions(tokenizer, TEMPLATES[examples.template], [example])
    return _("{where}: {question} → {answer}", where=where, question=one_line(question, EXCERPT),
             answer=answer)


def tokens_line(lengths: Lengths) -> str:
    return _("{n:,}, of which {learned:,} carry loss; median {median:,}, 95% have at most "
             "{most:,}, longest {longest:,}", n=lengths.total, learned=lengths.supervised,
             median=lengths.median, most=lengths.most, longest=lengths.longest)


def histogram(lengths: Lengths) -> str:
    """A histogram of the row lengths, as one line of text with a bar for each bin."""
    begin = next(n for n, count in enumerate(lengths.counts) if count)
    highest, width = max(lengths.counts), lengths.edges[0]
    bars = "".join(BARS[-(-count * (len(BARS) - 1) // highest)] for count in lengths.counts[begin:])
    each = plural(width, _("1 token"), _("{n:,} tokens", n=width))
    return _("{bars} from {shortest:,} to {longest:,} tokens; a bar for each {each}", bars=bars,
             shortest=lengths.shortest, longest=lengths.longest, each=each)


def fit_line(report: Report, config: Config) -> str:
    notes = report.findings.notes
    split, dropped = (notes[kind].count if kind in notes else 0 for kind in ("split", "dropped"))
    n = report.findings.good
    text = _("--max-len {limit:,} is enough for {share:.1%} of {rows}", share=report.fits,
             rows=plural(n, _("1 row"), _("{n:,} rows", n=n)), limit=config.max_len)
    if split:
        text += _("; split into several: {n:,}", n=split)
    if dropped:
        text += _("; dropped: {n:,}", n=dropped)
    return text


def note_lines(report: Report) -> list[str]:
    """A text for each finding in the rows. It also says what is done about the finding."""
    twice = [_("rows that repeat an earlier row: {n:,}", n=report.duplicates)]
    texts = (note_text(kind, note) for kind, note in report.findings.notes.items())
    return [*(twice if report.duplicates else []), *filter(None, texts)]


def note_text(kind: str, note: Note) -> str | None:
    """The text of a note; None if another line of the report shows this note."""
    values = dict(n=note.count, where=note.where, name=note.example)
    text = {
        "turns": _("conversations of several turns: {n:,}", **values),
        "text": _("texts without a question, learned as a whole: {n:,}", **values),
        "template": _("rows in PhoGPT's template, replaced by the run's template: {n:,}", **values),
        "system": _("rows with a system text, which is put before the first question: {n:,}",
                    **values),
        "open question": _("conversations that end with a question, which is left out: {n:,}",
                           **values),
        "template inside": _("rows with ### Câu hỏi: or ### Trả lời: inside a text: {n:,}",
                             **values),
        "no diacritics": _("rows without any Vietnamese letters: {n:,}", **values),
        "mojibake": _("rows that seem to be UTF-8 read as Windows-1252, such as á»Ÿ for ở: {n:,}",
                      **values),
        "lost characters": _("rows with lost characters (�): {n:,}", **values),
        "control": _("rows with control characters, which the model does not see: {n:,}",
                     **values),
        "like rows": _("quoted cells with lines that look like rows (an extra quote?): {n:,}",
                       **values),
        "formula": _("cells with formulas, whose saved values are used: {n:,}", **values),
        "number": _("cells with numbers, read as text: {n:,}", **values),
    }.get(kind)
    if text:
        return text if kind in USUAL else text + _(" (the first: {where})", where=note.where)
    return {
        "hidden sheet": _("hidden sheets, not read: {n:,} (the first: {name})", **values),
        "cp1258": _("{where} was read as Windows-1258", **values),
        "sheet": _("sheets with other columns, not read: {n:,} (the first: {name})", **values),
        "file": _("files not read: {n:,} (the first: {name})", **values),
        "beside the list": _("fields outside the list of rows, not used: {name}", **values),
    }.get(kind)


def left_out_line(findings: Findings) -> str:
    """The number of rows that cannot be used, and the names of the first of these rows."""
    if not findings.bad:
        return ""
    return _("{n:,} of {total:,} rows; {rows}", n=len(findings.bad),
             total=findings.good + len(findings.bad), rows=named(findings.bad))
