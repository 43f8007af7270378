"""Run `generate.py --serve`: check its flags, start the server, and stop it.

Wrong flags, wrong adapters and an address in use are reported before weights are read. SIGTERM,
SIGHUP and Ctrl-C stop the server after the answers in progress are finished.
"""

import ipaddress
import signal
import socket
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from phogpt_raw.decode.sampling import Sampling
from phogpt_raw.messages import _, plural
from phogpt_raw.refusal import Refusal, tell
from phogpt_raw.serve.models import load, memory_line, plan, show_plan
from phogpt_raw.serve.protocol import NO_FLAGS, Defaults
from phogpt_raw.serve.worker import Worker

HERE = "127.0.0.1"
GRACE_S = 600  # seconds for the last answers; after this time their connections are closed
JOIN_S = 30
BACKLOG = 2048  # number of connections that can wait, also while the model is loaded
# Seconds after which Python switches threads. The time is short, so that the engines' thread does
# not wait long for other threads.
SWITCH_S = 5e-4


def serve(options, adapters: dict[str, Path], sampling: Sampling) -> None:
    """Serve until SIGTERM, SIGHUP or Ctrl-C.

    options: those of generate.py. adapters: {name: folder}, empty for the base alone. sampling: the
    sampling settings for requests without such settings.
    """
    check_extra()
    host, port = address(options.serve)
    check_key(options.api_key)
    if options.seed is not None:
        raise Refusal(f"--seed {options.seed}: with --serve each request names its own seed; leave "
                      f"it out")
    found, slots = plan(options, adapters)
    if options.dry_run:
        return show_plan(found, slots)
    listening = bind(host, port)
    stops = tuple(unicodedata.normalize("NFC", stop) for stop in options.stop)
    defaults = Defaults(sampling, options.max_new_tokens, stops)
    tell(memory_line(found, slots))
    if not (options.api_key or is_this_computer(host)):
        tell(_("(anybody who reaches {host} can ask without a key; --api-key KEY requires a key)",
               host=host))
    run(load(found), slots, listening, host=host, key=options.api_key, defaults=defaults,
        capture=options.capture)


def run(models, slots: int, listening: socket.socket, *, host: str = HERE, key: str | None = None,
        defaults: Defaults = NO_FLAGS, capture: bool = True) -> None:
    """Serve models on a socket that is already bound to an address."""
    import uvicorn

    from phogpt_raw.serve.app import Answers, create_app
    from phogpt_raw.serve.connection import Connection

    answers = Answers()
    worker = Worker(models, slots, answers.deliver, capture)

    class Server(uvicorn.Server):
        async def startup(self, sockets=None) -> None:
            await super().startup(sockets)
            tell(_("serving {models} at {url} (Ctrl-C ends it)",
                  models=", ".join(served.name for served in models),
                  url=f"http://{shown(host)}:{listening.getsockname()[1]}"))

        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            """Handle SIGHUP too. uvicorn does not handle it."""
            with super().capture_signals():
                before = signal.getsignal(signal.SIGHUP)
                if before is not signal.SIG_IGN:  # nohup makes a program ignore SIGHUP
                    signal.signal(signal.SIGHUP, self.handle_exit)
                try:
                    yield
                finally:
                    signal.signal(signal.SIGHUP, before)

        def handle_exit(self, number, frame) -> None:
            """After the first signal, the server finishes the current answers and then ends. The
            second signal stops these answers. The third signal ends the server without waiting for
            the clients."""
            times = len(self._captured_signals)
            worker.close(finish=not times)
            if times < 2:
                self._captured_signals.append(number)
                self.should_exit = True
            else:
                super().handle_exit(number, frame)

        async def shutdown(self, sockets=None) -> None:
            if worker.answering:
                tell(plural(worker.answering, _("finishing 1 answer (Ctrl-C stops it)"),
                            _("finishing {n} answers (Ctrl-C stops them)",
                              n=worker.answering)))
            await super().shutdown(sockets)

    worker.start()
    sys.setswitchinterval(SWITCH_S)
    app = create_app(worker, answers, key=key, host=host, defaults=defaults)
    server = Server(uvicorn.Config(
        app, http=Connection, ws="none", lifespan="on", log_level="warning", access_log=False,
        server_header=False, date_header=False, proxy_headers=False,
        timeout_graceful_shutdown=GRACE_S))
    try:
        server.run(sockets=[listening])
    finally:  # the interpreter must not end while the thread computes
        worker.close(finish=False)
        worker.thread.join(JOIN_S)


# -- flags


def check_extra() -> None:
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise Refusal(f"--serve: needs {error.name}; pip install -c constraints.txt -e '.[serve]'"
                      ) from None


def address(text: str) -> tuple[str, int]:
    """[HOST:]PORT as (host, port); an IPv6 host is in brackets.

    >>> address("8000"), address("0.0.0.0:8000"), address("[::1]:0")
    (('127.0.0.1', 8000), ('0.0.0.0', 8000), ('::1', 0))
    """
    host, _colon, port = text.rpartition(":")
    if not (port.isascii() and port.isdigit()) or int(port) > 65535 or (":" in host) != (
            host.startswith("[") and host.endswith("]")) or (_colon and not host):
        raise Refusal(f"--serve {text}: is not PORT or HOST:PORT, such as 8000 or 0.0.0.0:8000")
    return host.strip("[]") or HERE, int(port)


def is_this_computer(host: str) -> bool:
    """True if the address can be reached only from this computer."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def check_key(key: str | None) -> None:
    if key is not None and not (key and key.isascii() and key.isprintable() and " " not in key):
        raise Refusal("--api-key: must be letters, digits and punctuation of ASCII, without spaces")


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens at the address; raises Refusal if the address cannot be used."""
    try:
        family, _kind, _protocol, _name, place = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, socket.SOCK_STREAM)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(place)
        found.listen(BACKLOG)  # before loading, so that no second server binds the address
    except OSError as error:
        raise Refusal(f"--serve {shown(host)}:{port}: this address cannot be used "
                      f"({error.strerror}); choose another") from None
    return found
