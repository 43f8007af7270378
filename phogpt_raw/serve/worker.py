"""The thread that runs the engines. Requests join and leave an engine's batch between two steps.

Other threads put orders (functions) into an inbox. Between two steps the thread carries out these
orders. Then it runs one step of each engine with open requests, and delivers the new text of all
answers in one call. If a client disconnects, the row of its answer becomes free at once. If an
engine fails, its requests get an error. A new engine answers later requests.

Tokens are decoded to text in this thread. So a stop string is found before the next step, and the
next step can use the row for another answer.
"""

import copy
import queue
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from phogpt_raw.decode.engine import Engine
from phogpt_raw.decode.sampling import Sampling
from phogpt_raw.decode.text import TextStream
from phogpt_raw.serve.models import Served
from phogpt_raw.serve.protocol import ProtocolError

MOST_WAITING = 2048
WARM_UP = 4  # tokens: one for an eager step, the others to capture and replay a CUDA graph


@dataclass(frozen=True)
class Job:
    """One answer to generate.

    most: the answer has at most this number of tokens. lstrip: True if white space is removed from
    the beginning of the answer.
    """

    key: int
    model: str
    prompt: list[int]
    most: int
    seed: int
    sampling: Sampling
    stops: tuple[str, ...] = ()
    lstrip: bool = False


@dataclass(frozen=True)
class Piece:
    """New text of the answer `key`.

    finish: "stop" or "length" in the last piece of an answer, otherwise None. error: the reason if
    the answer ends with an error.
    """

    key: int
    text: str
    written: int  # number of the answer's tokens up to this piece
    finish: str | None = None
    error: ProtocolError | None = None

    @property
    def last(self) -> bool:
        return bool(self.finish or self.error)


@dataclass
class Open:
    """A job that is being answered or is waiting for a row."""

    job: Job
    stream: TextStream
    written: int = 0
    begun: bool = False  # whether any text has been delivered


@dataclass
class Line:
    """A model, its engine, and its open jobs by key."""

    served: Served
    engine: Engine
    tokenizer: object  # a copy for this thread: two threads cannot use one tokenizer at once
    open: dict[int, Open] = field(default_factory=dict)


class Worker:
    """Answers jobs from `start` until `close`. After `start` returns, its engines are warmed up.

    slots: number of rows of each engine. deliver: a function that gets the pieces of each step. It
    is called in the worker's thread.
    """

    def __init__(self, models: list[Served], slots: int, deliver: Callable[[list[Piece]], None],
                 capture: bool = True):
        self.models, self.slots, self.deliver, self.capture = models, slots, deliver, capture
        self.inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.lines: dict[str, Line] = {}
        self.pieces: list[Piece] = []
        self.closing = False
        self.answering = self.waiting = 0  # jobs with and without a row; read by other threads
        self.ready, self.failed = threading.Event(), None
        self.thread = threading.Thread(target=self.work, name="engines", daemon=True)

    # -- from any thread

    def start(self) -> None:
        """Start the thread, and wait until every engine has answered once.

        If this fails in the thread, the thread's error is raised here.
        """
        self.thread.start()
        self.ready.wait()
        if self.failed:
            raise self.failed

    def submit(self, job: Job) -> None:
        """Add a job. Raises ProtocolError if the worker accepts no more jobs."""
        if self.closing:
            raise shutting_down()
        if not self.alive:
            raise broken()
        if self.waiting + self.inbox.qsize() >= MOST_WAITING:
            raise ProtocolError(f"{MOST_WAITING} answers are waiting already; try again later",
                                status=503, kind="server_error", code="overloaded")
        self.inbox.put(lambda: self.add(job))

    def cancel(self, key: int) -> None:
        """Stop an answer that nobody waits for any more. No more pieces of it are delivered."""
        self.inbox.put(lambda: self.drop(key))

    def close(self, finish: bool = True) -> None:
        """Finish or stop the answers in progress, refuse the jobs that wait, then end the
        thread."""
        self.closing = True
        self.inbox.put(lambda: self.refuse(finish))

    @property
    def alive(self) -> bool:
        return self.thread.is_alive()

    # -- in the thread

    @torch.no_grad()  # without it, the exit of a replaced engine would switch gradients on again
    def work(self) -> None:
        try:
            for served in self.models:
                self.lines[served.name] = self.line_of(served)
            for line in self.lines.values():
                warm_up(line.engine)
        except BaseException as error:
            self.failed = error
            return
        finally:
            self.ready.set()
        try:
            while self.busy or not self.closing:
                self.take()
                for line in self.lines.values():
                    if line.open:
                        self.turn(line)
                self.send()
        finally:  # also after an error that a new engine cannot fix
            self.pieces += [Piece(key, "", 0, error=broken()) for line in self.lines.values()
                            for key in line.open]
            self.send()
            for line in self.lines.values():
                line.engine.__exit__(None, None, None)

    @property
    def busy(self) -> bool:
        return any(line.open for line in self.lines.values())

    def line_of(self, served: Served) -> Line:
        tokenizer = served.tokenizer
        engine = Engine(served.model, eos_id=tokenizer.eos_token_id,
                        pad_id=tokenizer.pad_token_id, rows=self.slots, capture=self.capture)
        engine.__enter__()
        return Line(served, engine, copy.deepcopy(tokenizer))

    def take(self) -> None:
        """Carry out the orders in the inbox; if there is nothing to answer, wait for an order."""
        wait = not (self.busy or self.closing)
        while True:
            try:
                order = self.inbox.get(block=wait)
            except queue.Empty:
                return
            order()
            wait = False

    def add(self, job: Job) -> None:
        line = self.lines[job.model]
        line.open[job.key] = Open(job, TextStream(line.tokenizer, job.stops))
        line.engine.add(job.key, job.prompt, job.most, job.seed, job.sampling)

    def drop(self, key: int) -> None:
        for line in self.lines.values():
            if line.open.pop(key, None):
                line.engine.drop(key)
        self.count()

    def refuse(self, but_begun: bool) -> None:
        for line in self.lines.values():
            begun = {row.key for row in line.engine.rows} if but_begun else set()
            for key in line.open.keys() - begun:
                self.pieces.append(Piece(key, "", line.open.pop(key).written,
                                         error=shutting_down()))
                line.engine.drop(key)
        self.count()

    def turn(self, line: Line) -> None:
        """Run one step of an engine, and store the text of its tokens in `pieces`."""
        try:
            for token in line.engine.run():
                self.got(line, token)
                if not line.engine.out:
                    break
        except Exception as error:
            self.fail(line, error)
        self.count()

    def got(self, line: Line, token) -> None:
        one = line.open[token.key]
        if token.id is None:
            text, finish = one.stream.end(), "stop" if token.stopped else "length"
        else:
            one.written += 1
            text, finish = one.stream.put(token.id), None
        if one.stream.stopped:
            finish = "stop"
            line.engine.drop(token.key)
        if one.job.lstrip and not one.begun:
            text = text.lstrip()
        one.begun = one.begun or bool(text)
        if text or finish:
            self.pieces.append(Piece(token.key, text, one.written, finish))
        if finish:
            del line.open[token.key]

    def fail(self, line: Line, error: Exception) -> None:
        """Send an error to all requests of an engine. A new engine answers later requests."""
        traceback.print_exception(error, file=sys.stderr)
        full = type(error).__name__ == "OutOfMemoryError"
        told = broken()
        if full:
            told = ProtocolError("the GPU's memory is full; start the server with fewer --slots",
                                 status=503, kind="server_error")
        self.pieces += [Piece(key, "", one.written, error=told) for key, one in line.open.items()]
        line.open.clear()
        line.engine.__exit__(None, None, None)
        self.lines[line.served.name] = self.line_of(line.served)

    def count(self) -> None:
        self.answering = sum(len(line.engine.rows) for line in self.lines.values())
        self.waiting = sum(len(line.engine.queue) for line in self.lines.values())

    def send(self) -> None:
        if self.pieces:
            self.deliver(self.pieces)
            self.pieces = []


def warm_up(engine: Engine) -> None:
    """Gather the weights, compile the kernels and capture a graph before the first request."""
    engine.answers([[engine.pad_id]], WARM_UP)


def shutting_down() -> ProtocolError:
    return ProtocolError("the server is shutting down", status=503, kind="server_error",
                         code="shutting_down")


def broken() -> ProtocolError:
    return ProtocolError("the answer could not be written; the server's output says why",
                         status=500, kind="server_error")
