"""The worker's thread: answers start and end in its engines at different times."""

import threading
import time

import pytest

from phogpt_raw.data.prompt import TEMPLATES
from phogpt_raw.decode.engine import GREEDY, answer
from phogpt_raw.decode.text import HALF
from phogpt_raw.model.adapters import load_adapters, same_base
from phogpt_raw.model.weights import load_base
from phogpt_raw.serve.models import Served
from phogpt_raw.serve.protocol import ProtocolError
from phogpt_raw.serve.worker import Job, Worker

LONG = 100_000  # tokens; the cache grows to this length in steps


class Inbox:
    """Collects the pieces of text that a worker delivers. `of(key)` gives the pieces of one job."""

    def __init__(self):
        self.pieces, self.changed = [], threading.Condition()

    def __call__(self, pieces):
        with self.changed:
            self.pieces += pieces
            self.changed.notify_all()

    def of(self, key):
        return [piece for piece in self.pieces if piece.key == key]

    def wait(self, true, seconds=30):
        with self.changed:
            assert self.changed.wait_for(true, seconds), "it did not come to that"

    def ended(self, *keys):
        self.wait(lambda: all(any(p.last for p in self.of(key)) for key in keys))
        return ["".join(p.text for p in self.of(key)) for key in keys]

    def begun(self, key):
        self.wait(lambda: self.of(key))


def until(true, seconds=30):
    ends = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < ends, "it did not come to that"
        time.sleep(0.005)


@pytest.fixture
def base(tiny):
    return load_base(str(tiny), nf4=False)


@pytest.fixture
def work(base):
    """A function that starts a worker with tiny and returns (worker, inbox)."""
    workers = []

    def begin(slots=2, models=None):
        inbox = Inbox()
        model, tokenizer = base
        models = models or [Served("tiny", model, tokenizer, TEMPLATES["4b-chat"])]
        workers.append(Worker(models, slots, inbox))
        workers[-1].start()
        return workers[-1], inbox

    yield begin
    for worker in workers:
        worker.close(finish=False)
        worker.thread.join(30)
        assert not worker.alive


def job(key, prompt=(5, 6, 7), most=6, model="tiny", sampling=GREEDY, **more):
    return Job(key, model, list(prompt), most, 0, sampling, **more)


def alone(model, tokenizer, prompt, most):
    [found] = answer(model, [list(prompt)], eos_id=2, pad_id=3, max_new_tokens=most)
    return tokenizer.decode(found.ids).rstrip(HALF)


def test_more_answers_than_slots_are_each_what_they_are_alone(work, base):
    worker, inbox = work(slots=3)
    prompts = [range(5, 8 + n) for n in range(9)]
    for key, prompt in enumerate(prompts):
        worker.submit(job(key, prompt, most=4 + key))
    assert inbox.ended(*range(9)) == [alone(*base, prompt, 4 + key)
                                      for key, prompt in enumerate(prompts)]
    last = inbox.of(8)[-1]
    assert (last.written, last.finish) == (12, "length")


def test_an_answer_joins_one_that_is_being_written(work):
    worker, inbox = work()
    worker.submit(job(0, most=LONG))
    inbox.begun(0)
    worker.submit(job(1))
    inbox.ended(1)
    assert not any(piece.last for piece in inbox.of(0))


def test_an_answer_that_is_cancelled_frees_its_slot(work):
    worker, inbox = work(slots=1)
    worker.submit(job(0, most=LONG))
    inbox.begun(0)
    worker.submit(job(1))
    until(lambda: worker.waiting == 1)
    worker.cancel(0)
    inbox.ended(1)
    count = len(inbox.of(0))
    until(lambda: worker.answering == worker.waiting == 0)
    assert len(inbox.of(0)) == count


def test_an_answer_that_is_cancelled_while_it_waits_is_never_written(work):
    worker, inbox = work(slots=1)
    worker.submit(job(0, most=LONG))
    inbox.begun(0)
    worker.submit(job(1))
    until(lambda: worker.waiting == 1)
    worker.cancel(1)
    until(lambda: worker.waiting == 0)
    assert inbox.of(1) == [] and worker.answering == 1


def test_a_stop_string_ends_an_answer_and_frees_its_slot(work, base):
    whole = alone(*base, (5, 6, 7), 40)
    stop = whole[3:8]
    worker, inbox = work(slots=1)
    engine = worker.lines["tiny"].engine
    worker.submit(job(0, most=LONG, stops=(stop,)))
    assert inbox.ended(0) == [whole[: whole.index(stop)]]
    assert inbox.of(0)[-1].finish == "stop" and inbox.of(0)[-1].written < 40
    until(lambda: not worker.busy)
    [line] = worker.lines.values()
    assert line.engine.rows == [] and line.engine is engine


def test_spaces_before_a_chats_first_letter_are_left_out(work, base):
    """The first token of tiny's answer begins with a space."""
    model, tokenizer = base
    prompt = next([n] for n in range(5, 900) if alone(model, tokenizer, [n], 3).startswith(" "))
    worker, inbox = work()
    worker.submit(job(0, prompt, most=3))
    worker.submit(job(1, prompt, most=3, lstrip=True))
    plain, stripped = inbox.ended(0, 1)
    assert plain.startswith(" ") and stripped == plain.lstrip()


def test_closing_finishes_what_is_written_and_refuses_what_waits(work):
    worker, inbox = work(slots=1)
    worker.submit(job(0, most=300))
    inbox.begun(0)
    worker.submit(job(1))
    until(lambda: worker.waiting == 1)
    worker.close()
    with pytest.raises(ProtocolError, match="shutting down"):
        worker.submit(job(2))
    inbox.ended(0, 1)
    assert inbox.of(0)[-1].written == 300 and inbox.of(0)[-1].finish == "length"
    assert inbox.of(1)[-1].error.status == 503
    until(lambda: not worker.alive)


def test_closing_without_finishing_breaks_answers_off(work):
    worker, inbox = work(slots=1)
    worker.submit(job(0, most=LONG))
    inbox.begun(0)
    worker.close()
    worker.close(finish=False)
    inbox.ended(0)
    assert inbox.of(0)[-1].error.code == "shutting_down"
    until(lambda: not worker.alive)


def test_a_failing_step_ends_its_answers_with_an_error_and_no_others(work, capfd):
    worker, inbox = work(slots=2)
    [line] = worker.lines.values()
    worker.submit(job(0, most=LONG))
    inbox.begun(0)

    def broken(*_):
        raise RuntimeError("broken on purpose")

    line.engine.launch = broken
    inbox.wait(lambda: inbox.of(0)[-1].error)
    assert inbox.of(0)[-1].error.status == 500
    assert "purpose" not in inbox.of(0)[-1].error.message
    assert "broken on purpose" in capfd.readouterr().err
    worker.submit(job(1))
    inbox.ended(1)
    assert inbox.of(1)[-1].finish == "length"


def test_a_worker_whose_thread_has_ended_refuses(work, monkeypatch):
    worker, inbox = work()
    monkeypatch.setattr(worker, "turn", lambda line: 1 / 0)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    worker.submit(job(0))
    inbox.ended(0)
    assert inbox.of(0)[-1].error.status == 500
    worker.thread.join(30)
    with pytest.raises(ProtocolError, match="could not be written"):
        worker.submit(job(1))


def test_a_model_that_cannot_start_says_so_at_the_start(base):
    model, tokenizer = base
    served = Served("tiny", model, tokenizer, TEMPLATES["4b-chat"])
    with pytest.raises(ValueError, match="at least one"):
        Worker([served], 0, lambda pieces: None).start()


def test_adapters_over_one_base_answer_side_by_side_as_each_alone(work, base, adapted, tmp_path):
    model, tokenizer = base
    for n, rank in enumerate((2, 4)):
        _model, adapters = adapted(rank=rank)
        adapters.flat.data.mul_(5 + n)
        adapters.cast()
        adapters.save(tmp_path / str(n))
    models, wanted = [], []
    for name, folder in (("plain", None), ("one", "0"), ("two", "1")):
        one = same_base(model)
        if folder:
            load_adapters(one, tmp_path / folder, trainable=False)
        models.append(Served(name, one, tokenizer, TEMPLATES["4b-chat"]))
        wanted.append(alone(one, tokenizer, range(5, 20), 30))
    assert len(set(wanted)) == 3
    worker, inbox = work(models=models)
    for key, served in enumerate(models):
        worker.submit(job(key, range(5, 20), most=30, model=served.name))
    assert inbox.ended(0, 1, 2) == wanted
