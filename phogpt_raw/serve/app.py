"""The ASGI application of the server: addresses, checks of requests, and streaming.

Any web page can make the user's browser send requests to 127.0.0.1. Two headers reveal such
requests. The browser adds `Origin`, which names the page; other programs send no `Origin`. A page
can also point its own domain at this computer, which is called DNS rebinding. In this case, the
header `Host` contains that domain.
"""

import asyncio
import base64
import hashlib
import hmac
import ipaddress
import itertools
import re
import secrets
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from phogpt_raw.serve.models import Served
from phogpt_raw.serve.protocol import (
    NO_FLAGS,
    Ask,
    Choice,
    Defaults,
    ProtocolError,
    Reply,
    model_object,
    read_request,
    server_sent,
)
from phogpt_raw.serve.worker import Job, Piece, Worker, broken

MOST_BODY = 2**20  # bytes; the longest conversation that a model allows needs a tenth of this
BODY_S = 30  # seconds within which a request's body must arrive
PAGE = Path(__file__).with_name("page.html").read_text("utf-8")
LEFT = 499  # HTTP status if the client has disconnected; nobody receives this reply


class Answers:
    """Passes pieces of answers from the worker's thread to the requests that wait for them."""

    def __init__(self):
        self.waiting: dict[int, tuple[int, asyncio.Queue]] = {}  # job's key: (choice index, queue)
        self.keys = itertools.count()
        self.loop = None

    def deliver(self, pieces: list[Piece]) -> None:
        """Pass pieces to their requests. May be called in any thread, and does nothing if the event
        loop is closed."""
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.hand_out, pieces)

    def hand_out(self, pieces: list[Piece]) -> None:
        for piece in pieces:
            if piece.key in self.waiting:
                index, to = self.waiting[piece.key]
                to.put_nowait((index, piece))

    @asynccontextmanager
    async def of(self, ask: Ask, served: Served, prompts: list[list[int]], worker: Worker):
        """Submit the jobs of a request. Yields an iterator of (index of the choice, piece).

        The iterator ends after the last piece of all answers. At the end of the context, unfinished
        answers are cancelled.
        """
        keys, to = [], asyncio.Queue()
        seed = secrets.randbits(63) if ask.seed is None else ask.seed
        most = served.model.config.max_seq_len
        try:
            for index, (prompt, copy) in enumerate(itertools.product(prompts, range(ask.n))):
                key = next(self.keys)
                keys.append(key)
                self.waiting[key] = index, to
                worker.submit(Job(
                    key, served.name, prompt, min(ask.max_tokens, most - len(prompt)),
                    (seed + copy + 2**63) % 2**64 - 2**63, ask.sampling, ask.stops,
                    lstrip=ask.chat))
            yield self.pieces(len(keys), to)
        finally:
            for key in keys:
                del self.waiting[key]
                worker.cancel(key)

    async def pieces(self, left: int, to: asyncio.Queue) -> AsyncIterator[tuple[int, Piece]]:
        while left:
            index, piece = await to.get()
            if piece.error:
                raise piece.error
            left -= piece.last
            yield index, piece


def create_app(worker: Worker, answers: Answers, *, key: str | None = None, host: str = "127.0.0.1",
               defaults: Defaults = NO_FLAGS) -> "Guard":
    """The application.

    key: the API key that requests to /v1/ must send, or None if they need no key. host: the name or
    address on which the server listens.
    """
    models = {served.name: served for served in worker.models}
    started = int(time.time())

    async def page(_request: Request) -> Response:
        return HTMLResponse(PAGE, headers={"content-security-policy": PAGE_POLICY,
                                           "referrer-policy": "no-referrer"})

    async def health(_request: Request) -> Response:
        return JSONResponse(
            {"status": "ok" if worker.alive else "failed", "models": list(models),
             "slots": worker.slots, "answering": worker.answering, "waiting": worker.waiting},
            status_code=200 if worker.alive else 503)

    async def list_models(_request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [model_object(name, started)
                                                        for name in models]})

    async def one_model(request: Request) -> Response:
        return JSONResponse(model_object(find(request.path_params["name"]).name, started))

    def find(name: str | None) -> Served:
        if name is None:
            return worker.models[0]
        if name not in models:
            raise ProtocolError(f"the model '{name}' does not exist; use {' or '.join(models)}",
                                status=404, param="model", code="model_not_found")
        return models[name]

    async def chat(request: Request) -> Response:
        return await complete(request, chat=True)

    async def completions(request: Request) -> Response:
        return await complete(request, chat=False)

    async def complete(request: Request, chat: bool) -> Response:
        ask = read_request(await body_of(request), chat, defaults)
        served = find(ask.model)
        prompts = [served.encode(prompt) for prompt in ask.prompts]
        reply = Reply.to(ask, served.name)
        work = answers.of(ask, served, prompts, worker)
        if ask.stream:
            pieces = await work.__aenter__()  # errors are raised here, before headers are sent
            return Streaming(work, events(ask, reply, pieces, prompts))
        return await unless_left(request, whole(ask, reply, work, prompts))

    @asynccontextmanager
    async def lifespan(_app):
        answers.loop = asyncio.get_running_loop()
        yield

    app = Starlette(routes=[
        Route("/", page), Route("/health", health), Route("/v1/models", list_models),
        Route("/v1/models/{name:path}", one_model),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/completions", completions, methods=["POST"]),
    ], lifespan=lifespan, exception_handlers={
        ProtocolError: in_the_protocols_form, HTTPException: unknown_address,
        ClientDisconnect: left, Exception: a_bug})
    return Guard(app, key, host)


# -- an answer


async def whole(ask: Ask, reply: Reply, work, prompts: list[list[int]]) -> Response:
    choices = [Choice() for _ in range(len(prompts) * ask.n)]
    async with work as pieces:
        async for index, piece in pieces:
            add(choices[index], piece)
    return JSONResponse(reply.whole(choices, sum(map(len, prompts))))


async def events(ask: Ask, reply: Reply, pieces, prompts: list[list[int]]) -> AsyncIterator[bytes]:
    """Yield an answer as server-sent events. If an error occurs meanwhile, it is sent as an event.
    """
    choices = [Choice() for _ in range(len(prompts) * ask.n)]
    try:
        for index in range(len(choices) if ask.chat else 0):
            yield server_sent(reply.begin(index))
        async for index, piece in pieces:
            add(choices[index], piece)
            if piece.text or not ask.chat:
                yield server_sent(reply.piece(index, piece.text, None if ask.chat
                                              else piece.finish))
            if piece.finish and ask.chat:
                yield server_sent(reply.piece(index, "", piece.finish))
        if ask.include_usage:
            yield server_sent(reply.used(choices, sum(map(len, prompts))))
    except ProtocolError as error:
        yield server_sent(error.json())
        return
    yield server_sent("[DONE]")


def add(choice: Choice, piece: Piece) -> None:
    choice.text += piece.text
    choice.written, choice.finish = piece.written, piece.finish


class Streaming(StreamingResponse):
    """A streamed response. It exits the context `work` at its end, also after an error."""

    def __init__(self, work, content: AsyncIterator[bytes]):
        super().__init__(content, media_type="text/event-stream",
                         headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        self.work = work

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.work.__aexit__(None, None, None)


async def unless_left(request: Request, answer) -> Response:
    """The response of the coroutine `answer`. If the client disconnects before the response is
    complete, the coroutine is cancelled."""
    answering, leaving = asyncio.ensure_future(answer), asyncio.ensure_future(gone(request))
    try:
        await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
        if answering.done():
            return answering.result()
        return Response(status_code=LEFT)
    finally:
        for task in (answering, leaving):
            task.cancel()
        await asyncio.gather(answering, leaving, return_exceptions=True)


async def gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def body_of(request: Request) -> bytes:
    """The body of a request. Raises ProtocolError if it is too large or arrives too late."""
    too_large = ProtocolError(f"the body is larger than {MOST_BODY:,} bytes", status=413)
    declared = request.headers.get("content-length", "0")
    if not declared.isdigit() or int(declared) > MOST_BODY:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            async for part in request.stream():
                body += part
                if len(body) > MOST_BODY:
                    raise too_large
    except TimeoutError:
        raise ProtocolError(f"the body did not arrive within {BODY_S} s", status=408) from None
    return bytes(body)


# -- errors


def error_response(error: ProtocolError) -> Response:
    return JSONResponse(error.json(), status_code=error.status)


async def in_the_protocols_form(_request: Request, error: ProtocolError) -> Response:
    return error_response(error)


async def unknown_address(request: Request, error: HTTPException) -> Response:
    what = {404: "no such address", 405: f"{request.method} is not for this address"}
    return error_response(ProtocolError(
        f"{request.url.path}: {what.get(error.status_code, error.detail)}",
        status=error.status_code, code="unknown_url"))


async def left(_request: Request, _error: ClientDisconnect) -> Response:
    return Response(status_code=LEFT)


async def a_bug(_request: Request, _error: Exception) -> Response:
    return error_response(broken())


# -- access control


class Guard:
    """Passes requests on to `app` unless they come from a foreign page.

    If the server has an API key, requests to /v1/ must send it. The server's own page and /health
    need no key.
    """

    def __init__(self, app, key: str | None, host: str):
        self.app, self.key = app, key
        self.names = {"localhost", host.lower(), socket.gethostname().lower()}

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "http" and (error := self.refusal(scope)):
            await error_response(error)(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def refusal(self, scope) -> ProtocolError | None:
        headers: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name, []).append(value)
        hosts, origins = headers.get(b"host", []), headers.get(b"origin", [])
        host = hosts[0].decode("latin-1").lower() if len(hosts) == 1 else ""
        if not self.is_own(host):
            return ProtocolError(f"Host: {host or 'missing'} is not this server; use its IP "
                                 f"address or localhost", status=403, code="foreign_host")
        for origin in origins:
            if origin.decode("latin-1").lower() not in (f"http://{host}", f"https://{host}"):
                return ProtocolError("Origin: requests from other pages are not answered",
                                     status=403, code="foreign_origin")
        if self.key and scope["path"].startswith("/v1/") and not self.has_key(headers):
            return ProtocolError("the API key is missing or wrong; send it as 'Authorization: "
                                 "Bearer KEY'", status=401, code="invalid_api_key")
        return None

    def is_own(self, host: str) -> bool:
        """True if a Host header contains a name of this server, or any IP address.

        With DNS rebinding, the header contains a domain. So every IP address can be accepted.
        """
        try:
            place = urlsplit(f"//{host}")
            name = place.hostname or ""
            return place.netloc == host and place.username is None and (
                name in self.names or bool(ipaddress.ip_address(name)))
        except ValueError:
            return False

    def has_key(self, headers: dict[bytes, list[bytes]]) -> bool:
        [given] = headers.get(b"authorization", [b""])[:1]
        kind, _, key = given.partition(b" ")
        return kind.lower() == b"bearer" and hmac.compare_digest(key.strip(), self.key.encode())


def policy(page: str) -> str:
    """A Content-Security-Policy for a page, as the text of the header.

    It allows the page's own script and style, and requests to this server. Everything else is
    blocked.
    """
    def hashes(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return " ".join("'sha256-{}'".format(base64.b64encode(hashlib.sha256(
            text.encode()).digest()).decode()) for text in found)

    return (f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; "
            "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
            "frame-ancestors 'none'")


PAGE_POLICY = policy(PAGE)
