"""`generate.py --serve`: wrong flags are refused before anything is loaded."""

import asyncio
import doctest
import socket
import sys
import threading

import pytest

import generate
from phogpt_raw.serve import start
from phogpt_raw.serve.start import address, bind

pytest.importorskip("uvicorn")


@pytest.fixture
def refused(capsys, monkeypatch):
    """A function that runs generate.py and returns its one line of error."""
    monkeypatch.setattr(start, "load", lambda *_: pytest.fail("weights were read"))

    def run(*flags):
        with pytest.raises(SystemExit) as left:
            generate.main([str(flag) for flag in flags])
        said = capsys.readouterr()
        assert left.value.code == 2 and said.out == "" and said.err.count("\n") == 1, said.err
        return said.err

    return run


def test_doctest():
    assert doctest.testmod(start).failed == 0


@pytest.mark.parametrize("text", ["", "a", ":8000", "70000", "1.2.3.4", "::1:80", "[::1]", "-1",
                                  "８０００", "a:b:80", "[::1:80", "80 "])
def test_what_is_no_address_is_refused(text):
    with pytest.raises(start.Refusal, match="is not PORT or HOST:PORT"):
        address(text)


def test_an_address_that_cannot_be_had_is_refused():
    with pytest.raises(start.Refusal, match="this address cannot be used"):
        bind("203.0.113.7", 8000)  # no computer has this address
    with pytest.raises(start.Refusal, match="this address cannot be used"):
        bind("no-such-host.invalid", 8000)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(start.Refusal, match="choose another"):
            bind(*taken.getsockname())


def test_an_address_is_taken_from_the_start():
    """If two servers start together, the second is refused before it loads anything."""
    with bind("127.0.0.1", 0) as first, pytest.raises(start.Refusal, match="choose another"):
        bind(*first.getsockname())


@pytest.mark.parametrize("host, key, warned", [
    ("0.0.0.0", None, True), ("[::]", None, True), ("0.0.0.0", "a", False),
    ("127.0.0.1", None, False), ("127.0.0.9", None, False), ("[::1]", None, False),
    ("localhost", None, False)])
def test_a_server_that_others_reach_without_a_key_says_so(host, key, warned, tiny, monkeypatch,
                                                          capsys):
    monkeypatch.setattr(start, "bind", lambda *_: None)
    monkeypatch.setattr(start, "run", lambda *_, **_more: None)
    flags = ["--api-key", key] if key else []
    generate.main(["--model", str(tiny), "--serve", f"{host}:8000", *flags])
    assert ("can ask without a key" in capsys.readouterr().err) == warned


@pytest.fixture
def plain(monkeypatch):
    """The port of a small server. Its clients must send the headers within 0.3 s."""
    import uvicorn

    from phogpt_raw.serve import connection

    async def app(scope, receive, send):
        await asyncio.sleep(0.6)  # an answer may take longer than the limit for headers
        await send({"type": "http.response.start", "status": 200,
                    "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    monkeypatch.setattr(connection, "HEAD_S", 0.3)
    listening = bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, http=connection.Connection, lifespan="off",
                                           log_level="error"))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    yield listening.getsockname()[1]
    server.should_exit = True
    thread.join()


def test_a_head_that_does_not_arrive_closes_the_connection(plain):
    whole = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
    for sent, answers in ((b"", 0), (b"GET / HT", 0), (whole, 1), (whole + b"GET / HT", 1)):
        with socket.create_connection(("127.0.0.1", plain), timeout=10) as link:
            link.sendall(sent)
            found = b""
            if answers:
                while not found.endswith(b"ok") and (part := link.recv(4096)):
                    found += part
                link.sendall(b"GE")  # the next request stays incomplete
            while part := link.recv(4096):  # until the server closes the connection
                found += part
        assert found.count(b"200 OK") == answers


@pytest.mark.parametrize("flags, said", [
    (["--serve", "0", "Phở?"], "what to ask?"),
    ([], "what to ask?"),
    (["--slots", "2", "Phở?"], "--slots: has an effect only with --serve"),
    (["--api-key", "a", "Phở?"], "--api-key: has an effect only with --serve"),
    (["--adapter", "a=b", "--adapter", "c", "Phở?"], "several adapters need --serve"),
    (["--serve", "0", "--slots", "0"], "--slots 0"),
    (["--serve", "0", "--api-key", "mở ra"], "--api-key: must be letters"),
    (["--serve", "0", "--api-key", ""], "--api-key: is empty"),
    (["--serve", "0", "--seed", "5", "--temperature", "1"], "each request names its own seed"),
    (["--serve", "0", "--temperature", "-1"], "--temperature -1"),
    (["--serve", "0", "--adapter", "a=/no/such"], "/no/such/adapter_config.json: missing"),
    (["--serve", "0", "--model", "/no/such"], "no such folder"),
])
def test_flags_that_cannot_be_are_refused(refused, flags, said):
    assert said in refused(*flags)


@pytest.mark.parametrize("package", ["uvicorn", "starlette"])
def test_a_missing_extra_is_named(refused, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert f"--serve: needs {package}; pip install" in refused("--serve", "0")


def test_without_the_extra_the_package_is_imported_and_a_question_answered(tiny, capsys,
                                                                           monkeypatch):
    for package in ("uvicorn", "starlette"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "phogpt_raw.serve.app", raising=False)
    generate.main(["--model", str(tiny), "--max-new-tokens", "2", "Phở?"])
    assert capsys.readouterr().out.strip()
