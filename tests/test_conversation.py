"""generate.py --chat: turns, the prompts for the model, and how a user leaves."""

import codecs
import fcntl
import io
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import pytest

import generate
from phogpt_raw.data.prompt import TEMPLATES
from phogpt_raw.decode.engine import Engine, Token, answer
from phogpt_raw.decode.history import Turn, encode_history
from phogpt_raw.inference.conversation import Conversation, CtrlC
from phogpt_raw.model.weights import NANO, load_base, read_config, read_tokenizer
from phogpt_raw.refusal import Refusal

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tokenizer():
    return read_tokenizer(NANO, read_config(NANO))


def conversation(tokenizer, *, holds=200, most=20, system="", template="4b-chat"):
    return Conversation(SimpleNamespace(tokenizer=tokenizer, template=TEMPLATES[template],
                                        shape=SimpleNamespace(max_seq_len=holds)), most, system)


@pytest.fixture
def chat(capsys, monkeypatch):
    """A function that pipes lines to generate.py --chat and returns (status, stdout, stderr)."""

    def run(lines, *flags):
        content = io.TextIOWrapper(io.BytesIO(lines if isinstance(lines, bytes)
                                              else lines.encode("utf-8")))
        monkeypatch.setattr(sys, "stdin", content)
        status = 0
        try:
            generate.main(["--chat", *map(str, flags)])
        except SystemExit as left:
            status = left.code
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_prompt_is_the_history_of_the_base(tokenizer, template):
    """The test assumes that the tokens of an answer equal the tokens of its decoded text.

    This is nearly always true.
    """
    talk, said = conversation(tokenizer, template=template), []
    for question, written in (("Phở bò là gì?", "Dạ, món ăn ạ."), ("Còn mèo?", "Con vật ạ."),
                              ("Cảm ơn", None)):
        prompt, _, _ = talk.ask(question)
        said.append(Turn(question))
        assert prompt == encode_history(tokenizer, TEMPLATES[template], said)
        if written:
            said[-1] = Turn(question, written)
            gap = TEMPLATES[template].gap
            talk.answered(tokenizer(gap + written, add_special_tokens=False)["input_ids"])


def test_each_prompt_begins_with_all_that_was_said(tokenizer):
    """The engine reads only the new tokens if a prompt begins with the previous prompt and answer.
    """
    talk, before = conversation(tokenizer), []
    for question, ids in (("a", [50, 60]), ("b", [70]), ("c", [])):
        prompt, _, _ = talk.ask(question)
        assert prompt[: len(before)] == before and len(prompt) > len(before)
        talk.answered(ids)
        before = prompt + ids


def test_the_oldest_turns_go_when_the_model_holds_no_more(tokenizer):
    talk = conversation(tokenizer, holds=60, most=20)
    seen = []
    for n in range(6):
        prompt, most, left_out = talk.ask(f"câu {n}")
        assert len(prompt) + most <= 60 and most == 20
        seen.append((left_out, len(talk.turns)))
        talk.answered([50] * 12)
    assert seen[0] == (0, 0) and sum(n for n, _ in seen) > 0
    assert prompt[:4] == talk.ask("câu 0")[0][:4]  # it begins as a new conversation does


def test_an_answer_is_shorter_before_the_question_is_refused(tokenizer):
    talk = conversation(tokenizer, holds=40, most=30)
    _, most, _ = talk.ask("một câu hỏi dài hơn một chút")
    assert 0 < most < 30
    with pytest.raises(Refusal, match="the question is too long"):
        talk.ask("dài " * 60)


def test_the_system_text_stands_before_the_first_question_alone(tokenizer):
    talk = conversation(tokenizer, system="Trả lời ngắn.")
    said = [Turn("a", "b"), Turn("c")]
    talk.ask("a")
    talk.answered(tokenizer(" b", add_special_tokens=False)["input_ids"])
    assert talk.ask("c")[0] == encode_history(tokenizer, TEMPLATES["4b-chat"], said,
                                              "Trả lời ngắn.")


def test_the_system_text_stays_where_the_oldest_turns_go(tokenizer):
    talk = conversation(tokenizer, holds=60, most=20, system="Trả lời ngắn.")
    alone = conversation(tokenizer, system="Trả lời ngắn.").ask("câu")[0]
    for n in range(6):
        prompt, _, left_out = talk.ask(f"câu {n}")
        talk.answered([50] * 12)
        assert prompt[: len(alone) - 8] == alone[:-8]
    assert left_out


def test_a_question_that_is_too_long_leaves_the_conversation_as_it_was(tokenizer):
    talk = conversation(tokenizer, holds=60, most=20)
    talk.ask("a")
    talk.answered([50])
    with pytest.raises(Refusal, match="the question is too long"):
        talk.ask("dài " * 100)
    assert len(talk.turns) == 1
    assert talk.ask("b")[0][: len(talk.prompt("b"))] == talk.prompt("b")


def test_greedy_answers_are_those_to_one_long_prompt(chat, tiny, tokenizer):
    status, out, _ = chat("Xin chào\nPhở là gì?\nCòn mèo?\n", "--model", tiny,
                          "--max-new-tokens", 12)
    assert status == 0
    model, its = load_base(str(tiny))
    ids, wanted = [], []
    for question in ("Xin chào", "Phở là gì?", "Còn mèo?"):
        ids += encode_history(its, TEMPLATES["4b-chat"], [Turn(question)])
        [written] = answer(model, [ids], eos_id=2, pad_id=3, max_new_tokens=12)
        wanted.append(its.decode(written.ids).lstrip())
        ids = ids + written.ids + [2] + its("\n", add_special_tokens=False)["input_ids"]
    assert out == "\n".join(wanted) + "\n"


def test_a_turn_costs_its_own_tokens_only(chat, tiny, monkeypatch):
    read, known = [], Engine.known

    def noted(engine, prompt):
        read.append(len(prompt) - known(engine, prompt))
        return known(engine, prompt)

    monkeypatch.setattr(Engine, "known", noted)
    chat("một câu hỏi khá dài ở đây\na\na\na\n", "--model", tiny, "--max-new-tokens", 5)
    assert read[1] == read[2] == read[3] < read[0]


def test_a_new_conversation_forgets(chat, tiny, monkeypatch):
    prompts, add = [], Engine.add
    monkeypatch.setattr(Engine, "add", lambda engine, key, prompt, *more: prompts.append(prompt)
                        or add(engine, key, prompt, *more))
    for command in ("/xoá", "/xóa", "/reset", "/RESET"):
        prompts.clear()
        _, _, err = chat(f"a\na\n{command}\na\n", "--model", tiny, "--max-new-tokens", 9)
        assert "(a new conversation)" in err
        assert prompts[0] == prompts[2] != prompts[1]


@pytest.mark.parametrize("command", ["/thoát", "/quit", "/exit", ""])
def test_a_person_leaves(chat, tiny, command):
    status, out, _ = chat(f"\n\n{command}\n" + ("a\n" if command else ""), "--model", tiny)
    assert (status, out) == (0, "")


def test_lines_that_are_no_questions_are_said_and_the_next_is_answered(chat, tiny):
    status, out, err = chat(b"\xff\xfe x\n/foo\n" + "dài ".encode() * 900 + b"\n/help\na\n",
                            "--model", tiny, "--max-new-tokens", 9)
    assert status == 0 and out == chat("a\n", "--model", tiny, "--max-new-tokens", 9)[1]
    for said in ("(the question is not UTF-8", "(/foo is not a command",
                 "(the question is too long", "/xoá (/reset) starts a new conversation"):
        assert said in err


def test_commands_and_questions_may_be_typed_with_combining_marks(chat, tiny):
    apart = unicodedata.normalize("NFD", "/xoá\nở đâu\n")
    status, out, err = chat(apart + unicodedata.normalize("NFD", "/thoát\n"), "--model", tiny,
                            "--max-new-tokens", 9)
    assert status == 0 and "(a new conversation)" in err
    assert out == chat("ở đâu\n", "--model", tiny, "--max-new-tokens", 9)[1]


def test_an_empty_answer_is_said(chat, tiny, monkeypatch):
    monkeypatch.setattr(Engine, "run", lambda engine: iter([Token(0, None, stopped=True)]))
    assert "(the answer is empty)" in chat("a\n", "--model", tiny)[2]


def test_ctrl_c_is_raised_once_and_only_where_it_is_expected():
    with CtrlC() as ctrl_c:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt), ctrl_c.ends():
            try:
                signal.raise_signal(signal.SIGINT)
            finally:
                signal.raise_signal(signal.SIGINT)  # a second signal, while the first is handled
        with ctrl_c.ends():
            pass
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("flags, line", [
    ([], "what to ask?"), (["--chat", "?"], "what to ask?"), (["--system", "x", "?"], "--system")])
def test_a_question_or_a_conversation(flags, line, capsys):
    with pytest.raises(SystemExit) as stopped:
        generate.main(flags)
    assert stopped.value.code == 2 and line in capsys.readouterr().err


class Terminal:
    """generate.py --chat in its own pseudo-terminal."""

    def __init__(self, *flags, output=None, **environment):
        self.ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "generate.py", "--chat", *map(str, flags)], cwd=ROOT, stdin=theirs,
            stdout=output or theirs, stderr=theirs, start_new_session=True,
            env=os.environ | environment,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
        os.close(theirs)
        self.seen, self.decode = "", codecs.getincrementaldecoder("utf-8")().decode

    def until(self, text, seconds=60):
        """Read the output until this text appears; return the output before it."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            ready, _, _ = select.select([self.ours], [], [], max(0, end - time.monotonic()))
            assert ready, f"no {text!r} in {self.seen!r}"
            self.seen += self.decode(os.read(self.ours, 4096))
        before, _, self.seen = self.seen.partition(text)
        return before

    def type(self, text):
        time.sleep(0.2)  # types slowly: Python can lose a Ctrl-C while it shows a prompt
        os.write(self.ours, text.encode("utf-8"))


def test_in_a_terminal_ctrl_c_ends_the_answer_and_not_the_program():
    terminal = Terminal("--model", "nano", "--max-new-tokens", 2000, "--temperature", 30)
    terminal.until("> ")
    terminal.type("Phở\n")
    terminal.until("Phở\r\n")
    time.sleep(0.5)
    terminal.type("\x03")
    terminal.until("(stopped by hand)")
    terminal.until("> ")
    terminal.type("\x03")  # at the prompt: deletes the typed text, does not end the program
    terminal.until("Ctrl-D ends the program")
    terminal.until("> ")
    terminal.type("\x1b[A")  # the arrow key brings back the question
    terminal.until("Phở")
    terminal.type("\x15/quit\n")
    assert terminal.process.wait(20) == 0


def test_in_a_terminal_pasted_lines_are_one_question(tmp_path):
    terminal = Terminal("--model", "nano", "--max-new-tokens", 3)
    terminal.until("> ")
    terminal.type("\x1b[200~dòng một\ndòng hai\x1b[201~\n")
    terminal.until("(cut at 3 tokens")
    terminal.until("> ")
    terminal.type("\x04")
    assert terminal.process.wait(20) == 0
    assert "(cut at" not in terminal.seen  # the two lines got no second answer


def test_in_a_terminal_a_ctrl_c_that_is_held_down_does_not_end_the_program():
    terminal = Terminal("--model", "nano", "--max-new-tokens", 2000, "--temperature", 30)
    terminal.until("> ")
    for _ in range(5):
        terminal.type("Phở\n")
        terminal.until("Phở\r\n")
        for _ in range(40):
            os.write(terminal.ours, b"\x03")
            time.sleep(0.01)
        terminal.until("> ")
    terminal.type("\x15/quit\n")
    assert terminal.process.wait(20) == 0


def test_the_prompt_is_not_in_an_output_that_goes_elsewhere(tmp_path):
    with (tmp_path / "out").open("wb") as output:
        terminal = Terminal("--model", "nano", "--max-new-tokens", 3, output=output)
        terminal.until("> ")
        terminal.type("Phở\n")
        terminal.until("(cut at 3 tokens")
        terminal.until("> ")
        terminal.type("\x03")
        terminal.until("Ctrl-D ends the program")
        terminal.until("> ")
        terminal.type("\x04")
        assert terminal.process.wait(20) == 0
    assert (tmp_path / "out").read_text("utf-8").count("\n") == 1
    assert ">" not in (tmp_path / "out").read_text("utf-8")


def test_a_terminal_in_the_c_locale_is_read_as_utf8():
    terminal = Terminal("--model", "nano", "--max-new-tokens", 3, LC_ALL="C", PYTHONUTF8="0",
                        PYTHONCOERCECLOCALE="0")
    terminal.until("> ")
    terminal.type("Phở\n")
    terminal.until("(cut at 3 tokens")
    terminal.until("> ")
    terminal.type("\x04")
    assert terminal.process.wait(20) == 0


@pytest.mark.parametrize("redirected, asked, status", [
    ("<&-", "--chat", 0), ("<&-", "-", 2), (">&-", "Phở?", 0), ("2>&-", "Phở?", 0)])
def test_a_program_that_is_started_without_a_stream_ends_as_it_should(redirected, asked, status):
    ended = subprocess.run(
        f"{sys.executable} generate.py --max-new-tokens 2 {asked} {redirected}", shell=True,
        cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == status and "Traceback" not in ended.stderr, ended.stderr
