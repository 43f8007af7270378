"""generate.py --input FILE --output FILE answers many questions, one JSON line for each answer.

Prompts are answered in batches. The longest prompts come first, so the cache has its final size
from the start and is allocated only once. Each answer is stored as soon as it is finished. If the
program is killed, the same command later continues with the remaining questions. The output file is
written at the end, in the order of the input.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from phogpt_raw.data.conversations import (
    ASSISTANT,
    SYSTEM,
    USER,
    Conversation,
    Reader,
    Unusable,
    check_map,
)
from phogpt_raw.data.records import Bad, Findings, check_all
from phogpt_raw.data.sources import (
    find_unweighted,
    form_of_rows,
    opened,
    read_file,
    read_hub,
    suffix,
)
from phogpt_raw.decode.engine import Engine
from phogpt_raw.decode.history import Turn, encode_history
from phogpt_raw.decode.text import TextStream
from phogpt_raw.files import awaited_file, expanded, write_text
from phogpt_raw.inference import memory_plan
from phogpt_raw.inference.loading import Found
from phogpt_raw.inference.streaming import Generation, say
from phogpt_raw.messages import _, plural
from phogpt_raw.model.phogpt import PhoGPT
from phogpt_raw.refusal import Refusal

STAND_IN = "-"  # the reader puts it in place of a missing answer; no question contains it
LINES = (".txt", ".md", ".markdown")  # in these files each line is a question
PROGRESS = ".progress"  # ending of the file that stores the finished answers until the end


@dataclass(frozen=True)
class Question:
    """A conversation that ends with a question. where: its file and line, as file:line."""

    turns: tuple[Turn, ...]
    system: str
    where: str


@dataclass(frozen=True)
class Line:
    """A line of the output.

    stopped: True if the model or a stop string ended the answer. sample: the number of this answer
    to the question, from 0 to --num-samples minus 1.
    """

    question: str
    answer: str
    stopped: bool
    sample: int
    where: str


def read_questions(spec: str, mapped: dict[str, str]) -> list[Question]:
    """The questions of a file, in any format that train.py reads.

    The rows may have answers, but need none. In a text file each line is a question. Raises
    Refusal, which names the unusable rows, if there are any.
    """
    source, found, findings = find_unweighted(spec, "--input"), [], Findings()
    units = [(read_hub(source), None)] if source.hub else [
        (read_file(path, findings), path) for path in source.files]
    reader = Reader(findings, mapped, stand_in=STAND_IN)
    for records, path in units:
        if path and suffix(path) in LINES:
            found += lines_of(path, findings)
            continue
        for record in findings.sift(records):
            try:
                found.append(question_of(reader.conversation(record)))
            except Unusable as fault:
                findings.bad.append(Bad(record.where, str(fault)))
    findings.good = len(found)
    check_all(findings)
    # A question needs no answer, so a --map for training rows may name a column that is not there.
    check_map({name: field for name, field in mapped.items() if field != "response"}, findings)
    if not found:
        raise Refusal(f"{spec}: holds no questions; {form_of_rows(source, 'question')}")
    return found


def lines_of(path: Path, findings: Findings) -> Iterator[Question]:
    with opened(path, findings) as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield Question((Turn(line.strip()),), "", f"{path}:{number}")


def question_of(row: Conversation) -> Question:
    """The conversation without its last answer. Raises Unusable for a text without a question."""
    system = "".join(text for role, text in row.turns if role == SYSTEM)
    turns = [text for role, text in row.turns if role in (USER, ASSISTANT)]
    if len(turns) < 2:
        raise Unusable("is a text; name a file of questions")
    pairs = list(zip(turns[::2], turns[1::2], strict=True))
    said = [Turn(*pair) for pair in pairs[:-1]]
    return Question((*said, Turn(pairs[-1][0])), system, row.where)


class Progress:
    """The finished answers, stored in a progress file until the output file is written.

    The first line of the progress file is a hash of the questions, the settings and the model. If
    this hash differs from `key`, Refusal is raised. Each answer has its own hash. An answer with a
    wrong hash is damaged or belongs to other questions. Its question is answered again.
    """

    def __init__(self, output: Path, key: str):
        self.key = key
        self.file = output.with_name(output.name + PROGRESS)
        self.done: dict[int, Line] = {}
        first, *lines = self.file.read_bytes().split(b"\n") if self.file.is_file() else [b""]
        if first and first != key.encode():
            raise Refusal(f"{self.file}: belongs to other questions, flags or another model; "
                          f"delete it, or name another --output")
        for line in lines:
            hashed, _space, text = line.partition(b" ")
            if hashed == self.hash_of(text):  # a kill or a full disk can cut off the last line
                row = json.loads(text)
                n = row.pop("n")
                self.done[n] = Line(**row)
        write_text(self.file, key + "\n" + "".join(map(self.line, self.done)))

    def line(self, n: int) -> str:
        text = as_json({"n": n} | asdict(self.done[n]))
        return f"{self.hash_of(text.encode()).decode()} {text}\n"

    def hash_of(self, text: bytes) -> bytes:
        return hashlib.sha256(self.key.encode() + text).hexdigest()[:16].encode()

    def add(self, n: int, line: Line) -> None:
        self.done[n] = line
        try:
            with self.file.open("a", encoding="utf-8") as unfinished:
                unfinished.write(self.line(n))
        except OSError as error:
            raise Refusal(f"{self.file}: {error.strerror}; it holds {counted(len(self.done) - 1)}; "
                          f"free some disk space and run the same command again") from None


def counted(answers: int) -> str:
    return plural(answers, _("1 answer"), _("{n:,} answers", n=answers))


def as_json(row: dict) -> str:
    return json.dumps(row, ensure_ascii=False)


def encoded(found: Found, asked: list[Question]) -> list[list[int]]:
    """The token ids of each question's prompt. Raises Refusal if a prompt is too long."""
    prompts = [encode_history(found.tokenizer, found.template, list(one.turns), one.system)
               for one in asked]
    for one, prompt in zip(asked, prompts, strict=True):
        if len(prompt) >= found.shape.max_seq_len:
            raise Refusal(f"{one.where}: the question has {len(prompt):,} tokens; with its answer "
                          f"it can have at most {found.shape.max_seq_len:,}; shorten it")
    return prompts


def lengths_in(found: Found, spec: str, mapped: dict[str, str]) -> list[int]:
    """The number of tokens of each question in a file.

    Without a tokenizer, each question is assumed to be as long as the model allows.
    """
    asked = read_questions(spec, mapped)
    if found.tokenizer is None:
        return [found.shape.max_seq_len - 1] * len(asked)
    return list(map(len, encoded(found, asked)))


def answer_file(found: Found, spec: str, output: Path, how: Generation, *, samples: int = 1,
                mapped: dict[str, str]) -> None:
    """Answer every question of a file `samples` times; write one line for each answer to `output`.
    """
    output = expanded(output)
    with awaited_file(output):
        answer_held_file(found, spec, output, how, samples, mapped)


def answer_held_file(found: Found, spec: str, output: Path, how: Generation, samples: int,
                     mapped: dict[str, str]) -> None:
    """The work of answer_file. The caller holds the lock, so no other process writes `output`."""
    asked = read_questions(spec, mapped)
    prompts = encoded(found, asked)
    memory_plan.check_fits(found, memory_plan.file(found, how, samples * list(map(len, prompts))))
    key = hashlib.sha256(repr((prompts, how, samples, found.identity())).encode()).hexdigest()
    progress = Progress(output, key)
    waiting = [n for n in range(len(asked) * samples) if n not in progress.done]
    if progress.done:
        say(_("({answers} already finished)", answers=counted(len(progress.done))))
    prompt_of = {n: prompts[n // samples] for n in waiting}
    try:
        for n, answer, stopped in (answered(found, found.load(), prompt_of, how,
                                            done=len(progress.done)) if waiting else ()):
            one = asked[n // samples]
            progress.add(n, Line(one.turns[-1].question, answer, stopped, n % samples, one.where))
    except (KeyboardInterrupt, SystemExit):
        say(_("({answers} saved in {file}; the same command continues)",
              answers=counted(len(progress.done)), file=progress.file))
        raise
    write_text(output, "".join(as_json(asdict(progress.done[n])) + "\n"
                               for n in sorted(progress.done)))
    progress.file.unlink()
    stopped = sum(line.stopped for line in progress.done.values())
    say(_("{answers} in {output}; ended by themselves: {stopped:,}",
          answers=counted(len(progress.done)), output=output, stopped=stopped))


def answered(found: Found, model: PhoGPT, prompts: dict[int, list[int]], how: Generation,
             done: int = 0) -> Iterator[tuple[int, str, bool]]:
    """Yield (key, answer, stopped) for each prompt as soon as its answer is finished.

    prompts: {key: token ids}. stopped: True if the model or a stop string ended the answer. done:
    number of answers from an earlier run; the progress bar starts with this number.
    """
    tokenizer, holds = found.tokenizer, found.shape.max_seq_len
    longest = min(max(map(len, prompts.values())) + how.most, holds)
    rows = memory_plan.rows_at_once(found, longest, len(prompts), free_mib(model))
    texts = {key: TextStream(tokenizer, how.stops) for key in prompts}
    written = dict.fromkeys(prompts, "")
    with Engine(model, eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id, rows=rows,
                capture=how.capture) as engine, tqdm(
                    total=len(prompts) + done, initial=done, desc=_("answers"), disable=None,
                    leave=False) as bar:
        for key, prompt in sorted(prompts.items(), key=lambda one: -len(one[1])):
            engine.add(key, prompt, min(how.most, holds - len(prompt)), how.seed + key,
                       how.sampling)
        for token in engine.run():
            key, text = token.key, texts[token.key]
            if token.id is not None:
                written[key] += text.put(token.id)
                if not text.stopped:
                    continue
                engine.drop(key)
            bar.update()
            yield key, (written[key] + text.end()).strip(), text.stopped or token.stopped


def free_mib(model: PhoGPT) -> int:
    """The memory in MiB that keys and values may use: half of the GPU's free memory, or CPU_MIB on
    a CPU."""
    if model.head.device.type != "cuda":
        return memory_plan.CPU_MIB
    return torch.cuda.mem_get_info()[0] // 2**21
