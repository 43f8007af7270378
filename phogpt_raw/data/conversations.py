"""Convert a record of any known format to a conversation: a list of turns (role, text).

The names of the fields decide the format; fields.py lists the names. A row is one of these:

- a question and its answer: {prompt, response}, {prompt, completion}, {instruction, input, output},
  {instruction, response}, {question, answer}, {input, output}; each of these formats may also have
  the field `system`, and the field `history`, a list of earlier pairs [question, answer];
- {messages: [{role, content}]} or {conversations: [{from, value}]}, with one or more turns;
- {text}, a plain text without roles.

Text is normalised to NFC. Vietnamese text from a Mac is often in NFD, which looks like NFC but
gives different tokens. If a text already contains PhoGPT's template, the template is removed. If a
text field has a number, a list or an incomplete character, the reader does not guess the text: the
row is bad.
"""

import difflib
import hashlib
import re
import shlex
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from phogpt_raw.data.encodings import CONVERT, MOJIBAKE, font_encoding
from phogpt_raw.data.fields import FIELDS, NAMES, field_of, plain
from phogpt_raw.data.json_text import Number, Twice
from phogpt_raw.data.records import LONGEST, Bad, Findings, NoText, Record
from phogpt_raw.refusal import Refusal

USER, ASSISTANT, SYSTEM, TEXT = "user", "assistant", "system", "text"
QUESTIONS = ("prompt", "instruction", "question", "input")
ANSWERS = ("response", "completion", "output", "answer")
# (field of the question, field of the answer): first the usual pairs, then the unusual pairs. Each
# of QUESTIONS makes a pair with each of ANSWERS.
PAIRS = (("prompt", "response"), ("prompt", "completion"), ("instruction", "output"),
         ("instruction", "response"), ("question", "answer"), ("question", "response"),
         ("question", "output"), ("prompt", "answer"), ("prompt", "output"),
         ("instruction", "answer"), ("input", "output"), ("input", "response"),
         ("input", "answer"), ("instruction", "completion"), ("question", "completion"),
         ("input", "completion"))
ROLES = {"user": USER, "human": USER, "nguoidung": USER, "assistant": ASSISTANT, "gpt": ASSISTANT,
         "model": ASSISTANT, "bot": ASSISTANT, "chatgpt": ASSISTANT, "troly": ASSISTANT,
         "system": SYSTEM, "hethong": SYSTEM}  # the keys are as fields.plain returns them
# Field names for the role and for the text of a turn, as fields.plain returns them.
WHO, SAID = ("role", "from", "vaitro"), ("content", "value", "text", "noidung")
NEEDS = ("a row needs prompt and response, instruction and output, question and answer, input and "
         "output, messages, conversations, or text")
ASKS = "a question needs prompt, instruction, question, input, messages or conversations"
CLOSE = 0.8  # two names with at least this similarity (difflib) may be the same name, misspelled
WORN = re.compile(r"^### (Câu hỏi|Trả lời):", re.MULTILINE)
# The beginning of a text in the template of another model.
FOREIGN = re.compile(r"\s*(<\|im_start\|>|<\|user\|>|<\|system\|>|<\|begin_of_text\|>|"
                     r"<\|start_header_id\|>|<s>\s*\[INST\]|\[INST\]|<start_of_turn>|<bos>|"
                     r"### ?Instruction:|### ?Human:|### ?User:|USER:|Human:|"
                     r"Below is an instruction that describes a task)")
# Special tokens that templates of other models have between turns or at the end of an answer.
FOREIGN_INSIDE = re.compile(r"<\|(?:im_start|im_end|eot_id|endoftext|end_of_text|end|"
                            r"start_header_id)\|>|\[/INST\]|<(?:start|end)_of_turn>")
# A visible character. A text without a visible character counts as empty. Spaces, control
# characters and zero-width characters are not visible.
VISIBLE = re.compile(r"[^\s\x00-\x1f\x7f-\x9f\xad\u200b-\u200f\u2060\ufeff]")
SAMPLE = 50  # number of conversations in a file that are tested for TCVN3 and VNI


@dataclass(frozen=True)
class Conversation:
    """turns: (role, text) of each turn. The roles are user, assistant and system; only the first
    turn may have the role system. A plain text is one turn with the role text. where: file:line."""

    turns: tuple[tuple[str, str], ...]
    where: str

    @property
    def question(self) -> str:
        """The first question as typed, or "" for a plain text."""
        return next((text for role, text in self.turns if role == USER), "")

    @property
    def hash(self) -> int:
        """A hash of the texts, below 2^64. The hash ignores case and the amount of white space."""
        text = "\0".join(" ".join(text.casefold().split()) for _role, text in self.turns)
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


class Unusable(Exception):
    """A row cannot be used. The text says what is wrong with the row."""


def parse_map(spec: str | None) -> dict[str, str]:
    """Return the value of --map as {name of a column: its meaning}.

    For example, "response=tra_loi,prompt=cau_hoi" becomes {"tra_loi": "response", "cau_hoi":
    "prompt"}.
    """
    found = {}
    for pair in (spec or "").split(","):
        if not pair.strip():
            continue
        field, equals, name = (part.strip() for part in pair.partition("="))
        if not equals or not name or field not in NAMES:
            raise Refusal(f"--map {pair.strip()}: must be FIELD=NAME, where FIELD is one of "
                          f"{', '.join(NAMES)}; for example response=tra_loi,prompt=cau_hoi")
        if name in found or field in found.values():
            raise Refusal(f"--map {spec}: names {name if name in found else field} twice")
        found[name] = field
    return found


def check_map(mapped: dict[str, str], *findings: Findings) -> None:
    """Raise Refusal for a --map that names a column which no row has."""
    for name, field in mapped.items():
        if not any(f"mapped {field}" in found.notes for found in findings):
            raise Refusal(f"--map {field}={name}: no row has a field {name}")


def conversations(records: Iterable[Record | Bad], findings: Findings,
                  mapped: dict[str, str] | None = None) -> Iterator[Conversation]:
    """Yield a conversation for each good record. Bad rows and notes go into `findings`.

    mapped: {name of a column: its meaning}, from --map.
    """
    reader = Reader(findings, mapped or {})
    sample = []
    for record in findings.sift(records):
        try:
            found = reader.conversation(record)
        except Unusable as fault:
            findings.reject(Bad(record.where, str(fault)))
            continue
        if len(sample) < SAMPLE:
            sample.append(found)
            if len(sample) == SAMPLE:
                check_font(sample)
        yield found
    check_font(sample)


def check_font(sample: list[Conversation]) -> None:
    text = " ".join(text for one in sample for _role, text in one.turns)[:20_000]
    if MOJIBAKE.search(text):
        return
    if name := font_encoding(text):
        raise Refusal(f"{sample[0].where}: the text is in {name}, an old Vietnamese encoding; "
                      f"{CONVERT}")


class Reader:
    """Converts records to conversations. Notes on the records go into `findings`.

    stand_in: the answer of a record that has no answer. If it is None, such a record is bad.
    """

    def __init__(self, findings: Findings, mapped: dict[str, str], stand_in: str | None = None):
        self.findings, self.typed, self.stand_in = findings, mapped, stand_in
        self.mapped = {plain(name): field for name, field in mapped.items()}
        self.found: list[tuple[str, str]] = []  # (kind, example) of each note on this record

    def conversation(self, record: Record) -> Conversation:
        """Convert one record. Raises Unusable if the record is bad."""
        self.found = []
        conversation = Conversation(self.turns(record), record.where)
        for kind, example in self.found:
            self.findings.note(kind, record.where, example)
        return conversation

    def note(self, kind: str, example: str = "") -> None:
        self.found.append((kind, example))

    def turns(self, record: Record) -> tuple[tuple[str, str], ...]:
        fields = self.fields(record)
        names = frozenset(field for field, (_name, value) in fields.items() if value is not None)
        shape = shape_of(names)
        if shape is None:
            empty = shape_of(frozenset(fields))
            if empty:
                missing = next(f for f in empty if f in fields and fields[f][1] is None)
                raise Unusable(f"{fields[missing][0]} is empty; write a text, or remove the row")
            raise Unusable(self.no_format(record, fields))
        kind = shape[0]
        if kind == "text" and any(plain(name) in WHO for name in record.value):
            raise Unusable("is one turn (text with a role); a row is a whole conversation, "
                           '{"messages": [{"role": "user", "content": "…"}, …]}')
        more = () if kind == "text" else (
            "system",) if kind in ("messages", "conversations") else ("system", "history")
        for field, (name, value) in fields.items():
            if field not in (*shape, *more) and value not in (None, "", []):
                self.note(f"unused {name}", name)
        used = ", ".join(fields[field][0] for field in (*shape, *more)
                         if field in names and (field in shape or fields[field][1]))
        self.note(f"format {used}", used)
        if kind in ("messages", "conversations"):
            turns = list(self.listed(*fields[kind]))
            if self.stand_in and turns[-1:] and turns[-1][0] == USER:
                turns.append((ASSISTANT, self.stand_in))
        elif kind == "text":
            turns = self.plain_text(*fields["text"])
        else:
            turns = self.asked(shape, fields)
        if "system" in fields and kind != "text":
            name, value = fields["system"]
            if value is not None and value != "":
                turns.insert(0, (SYSTEM, text(name, value)))
        return self.ordered(turns)

    def fields(self, record: Record) -> dict[str, tuple[str, object]]:
        """Return {meaning: (name, value)} of the record's fields.

        If the name of a field has no known meaning, the key is the name in parentheses.
        """
        if not isinstance(record.value, dict):
            raise Unusable(f"a row is an object with fields, not {kind_of(record.value)}")
        if isinstance(record.value, Twice):
            raise Unusable(f"{record.value.key} appears twice; remove one")
        found: dict[str, tuple[str, object]] = {}
        for name, value in record.value.items():
            if isinstance(value, float) and value != value:
                value = None  # pandas writes a missing text as NaN
            usual = field_of(name) if field_of(name) not in self.mapped.values() else None
            meaning = self.mapped.get(plain(name)) or usual or f"({name})"
            if plain(name) in self.mapped:
                self.note(f"mapped {meaning}", name)
            if meaning in found and found[meaning][1] not in (None, "") \
                    and value not in (None, ""):
                raise Unusable(f"{found[meaning][0]} and {name} mean the same; rename or remove "
                               f"one, or choose with --map")
            if meaning not in found or found[meaning][1] in (None, ""):
                found[meaning] = (name, value)
        if self.stand_in and not any(found[field][1] for field in ANSWERS if field in found):
            found = {field: one for field, one in found.items() if field not in ANSWERS}
            found["response"] = ("response", self.stand_in)
        return found

    def no_format(self, record: Record, fields: dict[str, tuple[str, object]]) -> str:
        """Return the message about a record whose fields make no known format.

        fields: the result of `fields`.
        """
        names = ", ".join(map(str, record.value))[:200] or "none"
        parts = [f"fields {names}",
                 *(f"--map makes {name} the {meaning}" for meaning, (name, _) in fields.items()
                   if plain(name) in self.mapped),
                 NEEDS if self.stand_in is None else ASKS]
        known = fields.keys() & NAMES.keys()
        if record.table and not any(fields[field][0] in record.value for field in known):
            parts.append("the first row of the table must name the columns")
        meant = misspelled(fields)
        shape = shape_of(frozenset(known | meant.keys()))
        if shape:
            meant = {field: name for field, name in meant.items() if field in shape}
            parts.append(f"did you mean {' and '.join(meant)}? Correct the name, or give")
        else:
            lacking = [some[0] for some in (QUESTIONS, ANSWERS) if not known & {*some}]
            meant = dict.fromkeys(lacking, "NAME")
            parts.append(f"missing: {' and '.join(lacking)}; for other names, give")
        typed = {field: name for name, field in self.typed.items()}
        spec = ",".join(f"{field}={name}" for field, name in (typed | meant).items())
        return f"{'; '.join(parts)} --map {shlex.quote(spec)}"

    def asked(self, shape: tuple[str, ...], fields: dict) -> list[tuple[str, str]]:
        """Return the turns of a record with a question and an answer: the turns of the history,
        the question with its input, and the answer."""
        question, answer = shape[0], shape[-1]
        asked = self.unworn(*fields[question])
        if len(shape) == 3 and fields["input"][1] not in (None, "") \
                and not str(fields["input"][1]).isspace():
            role, first = asked[-1]
            asked[-1] = (role, f"{first}\n{text(*fields['input'])}")
        before = []
        if "history" in fields and fields["history"][1]:
            for said, answered in pairs(*fields["history"]):
                before += [*self.unworn(*said), (ASSISTANT, text(*answered))]
        answered = text(*fields[answer])
        if WORN.match(answered) and answered.startswith("### Trả lời:"):
            answered = answered.removeprefix("### Trả lời:").strip()
        return [*before, *asked, (ASSISTANT, answered)]

    def unworn(self, name: str, value) -> list[tuple[str, str]]:
        """Return the turns of a prompt. A prompt in PhoGPT's template may have several turns."""
        prompt = text(name, value)
        if not prompt.startswith("### Câu hỏi:"):
            refuse_foreign(name, prompt)
            return [(USER, prompt)]
        self.note("template")
        turns = worn(prompt)
        if turns[-1] == (ASSISTANT, ""):
            turns.pop()
        if not turns or turns[-1][0] != USER:
            raise Unusable(f"{name} contains PhoGPT's template with an answer; a prompt "
                           f"must end with ### Trả lời:")
        return turns

    def plain_text(self, name: str, value) -> list[tuple[str, str]]:
        whole = text(name, value)
        refuse_foreign(name, whole)
        before, *parts = WORN.split(whole)
        if parts[:1] != ["Câu hỏi"] or "### Trả lời:" not in whole:
            return [(TEXT, whole)]
        self.note("template")
        system = [(SYSTEM, before.strip())] if before.strip() else []
        return system + worn(whole)

    def listed(self, name: str, value) -> Iterator[tuple[str, str]]:
        """Yield the turns of a record with the field `messages` or `conversations`."""
        if not isinstance(value, list) or not value:
            raise Unusable(f"{name} is not a list of turns; write "
                           f'[{{"role": "user", "content": "…"}}, …]')
        for n, turn in enumerate(value, 1):
            if not isinstance(turn, dict):
                raise Unusable(f"turn {n} of {name} is not an object with role and content")
            if isinstance(turn, Twice):
                raise Unusable(f"turn {n} of {name} has {turn.key} twice; remove one")
            keys = {plain(key): key for key in turn}
            who = next((keys[key] for key in WHO if key in keys), None)
            said = next((keys[key] for key in SAID if key in keys), None)
            if who is None or said is None:
                raise Unusable(f"turn {n} of {name} has fields {', '.join(turn) or 'none'}; a turn "
                               f"needs role and content, or from and value")
            role = ROLES.get(plain(turn[who])) if isinstance(turn[who], str) else None
            if role is None:
                raise Unusable(f"turn {n} of {name} has the role {shown(turn[who])}; known roles "
                               f"are user, assistant, system, human, gpt")
            for key in turn:
                if key not in (who, said) and turn[key] not in (None, "", []):
                    self.note(f"unused {key} of a turn", f"{key} of a turn")
            if role == USER:
                yield from self.unworn(f"{said} of turn {n}", turn[said])
            elif role != SYSTEM or turn[said] not in (None, ""):
                yield role, text(f"{said} of turn {n}", turn[said])

    def ordered(self, turns: list[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
        """Return the turns. Raises Unusable if questions and answers do not alternate.

        If the last of several turns is a question, it has no answer and is left out.
        """
        if turns[0][0] == TEXT:
            return tuple(turns)
        spoken = [role for role, _ in turns if role != SYSTEM]
        systems = [n for n, (role, _) in enumerate(turns) if role == SYSTEM]
        if systems not in ([], [0]):
            raise Unusable(f"turn {systems[-1] + 1} has the role system; only the first turn may "
                           f"have it")
        if not spoken or spoken[0] != USER:
            raise Unusable("begins with an answer; a conversation begins with a question"
                           if spoken else "has no question")
        for n, (one, after) in enumerate(pairwise(spoken), 1 + len(systems)):
            if one == after:
                raise Unusable(f"turns {n} and {n + 1} both have the role {one}; join them")
        for role, said in turns:
            if not said or (role == ASSISTANT and not said.removesuffix("</s>").strip()):
                raise Unusable(f"a turn of the {role} is empty; write a text, or remove the row")
            if ("<" in said or "[" in said) and (found := FOREIGN_INSIDE.search(said)):
                raise Unusable(f"a turn of the {role} holds {found[0]}, a mark of another model's "
                               f"template; give the plain text")
        if spoken[-1] == USER:
            if len(spoken) == 1:
                raise Unusable("has a question and no answer")
            self.note("open question")
            turns = turns[:-1]
        return tuple(turns)


@lru_cache(1024)
def shape_of(names: frozenset[str]) -> tuple[str, ...] | None:
    """Return the fields of the known format that these names match, or None.

    If the format has a question, the order is: the question, the input (if any), the answer.
    """
    for one in ("messages", "conversations"):
        if one in names:
            return (one,)
    for question, answer in PAIRS:
        if question in names and answer in names:
            more = ("input",) if "input" in names and question != "input" else ()
            return (question, *more, answer)
    return ("text",) if "text" in names else None


def misspelled(fields: Iterable[str]) -> dict[str, str]:
    """Return {meaning: name} of the unknown fields whose names are similar to known names.

    fields: meanings; an unknown name is in parentheses.

    >>> misspelled(["(promt)", "(topic)", "response", "(respons)"])
    {'prompt': 'promt'}
    """
    found = {}
    for field in fields:
        meaning = similar_field(plain(field)) if field.startswith("(") else None
        if meaning and meaning not in fields:
            found.setdefault(meaning, field[1:-1])
    return found


@lru_cache(1024)  # many bad rows have the same names
def similar_field(name: str) -> str | None:
    """Return the meaning of the known name that is most similar to a name, or None."""
    close = difflib.get_close_matches(name, FIELDS, 1, CLOSE)
    return FIELDS[close[0]] if close else None


def pairs(name: str, value) -> Iterator[tuple[tuple, tuple]]:
    """Yield each question and its answer from a history, which is [[question, answer], …].

    A question is yielded as (name, value), and so is its answer. The name is used in messages, such
    as "question 1 of history".
    """
    for n, pair in enumerate(value if isinstance(value, list) else [None], 1):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise Unusable(f"{name} is not a list of [question, answer]")
        yield (f"question {n} of {name}", pair[0]), (f"answer {n} of {name}", pair[1])


def worn(whole: str) -> list[tuple[str, str]]:
    """Return the turns of a text in PhoGPT's template.

    >>> worn("### Câu hỏi: Một?\\n### Trả lời: Hai.</s>")
    [('user', 'Một?'), ('assistant', 'Hai.')]
    """
    parts = WORN.split(whole)[1:]
    return [(USER if name == "Câu hỏi" else ASSISTANT,
             said.strip().removesuffix("</s>").strip())
            for name, said in zip(parts[::2], parts[1::2], strict=True)]


def refuse_foreign(name: str, value: str) -> None:
    if found := FOREIGN.match(value):
        raise Unusable(f"{name} contains the template of another model ({found[1]}); give "
                       f"the plain text")


def text(name: str, value) -> str:
    """Return a field's text in NFC, without white space at its start and end.

    Raises Unusable if the value is not a text, or if the text is empty, too long or damaged.
    """
    if isinstance(value, NoText):
        raise Unusable(f"{name} {value.why}")
    if not isinstance(value, str):
        right = f'write "{value}"' if kind_of(value) == "a number" and len(str(value)) < 40 else (
            "write a text in quotes")
        raise Unusable(f"{name} is not text but {kind_of(value)}; {right}")
    if len(value) > LONGEST:
        raise Unusable(f"{name} has {len(value):,} characters; cut it into rows of at most "
                       f"{LONGEST:,}")
    if not value.isascii():
        if HALF.search(value):
            raise Unusable(f"{name} holds half a character (such as a lone \\ud83d) or bytes that "
                           f"are not UTF-8; type it again")
        value = unicodedata.normalize("NFC", value)
    value = value.replace("\r\n", "\n").replace("\r", "\n").strip()
    if not VISIBLE.search(value):
        raise Unusable(f"{name} is empty; write a text, or remove the row")
    return value


HALF = re.compile("[\ud800-\udfff]")


def kind_of(value) -> str:
    """Return the type of a value in words, such as "a number"."""
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, Number | int | float):
        return "a number"
    names = {str: "text", NoText: "no text", list: "a list", tuple: "a list", dict: "an object",
             Twice: "an object", type(None): "null", bytes: "bytes"}
    return names.get(type(value), type(value).__name__)


def shown(value) -> str:
    return value[:40] if isinstance(value, str) else kind_of(value)
