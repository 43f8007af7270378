"""A real server and OpenAI's own client: answers, errors, access, many clients, shutdown."""

import http.client
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")

from serving import served  # noqa: E402

from bench.server import ROOT  # noqa: E402
from phogpt_raw.data.prompt import TEMPLATES, encode_text  # noqa: E402
from phogpt_raw.decode.engine import answer  # noqa: E402
from phogpt_raw.decode.history import Turn, encode_history  # noqa: E402
from phogpt_raw.decode.text import HALF  # noqa: E402
from phogpt_raw.model.weights import load_base  # noqa: E402

TEMPLATE = TEMPLATES["4b-chat"]
ENDLESS = 1000  # tokens; nano without an adapter does not end its answers


@pytest.fixture(scope="module")
def server():
    with served("--model", "nano", "--slots", 4) as found:
        yield found


@pytest.fixture(scope="module")
def client(server):
    return server.client()


@pytest.fixture(scope="module")
def nano():
    return load_base("nano")


def alone(nano, ids, tokens) -> str:
    """The engine's greedy answer without a server, decoded in one piece."""
    model, tokenizer = nano
    [found] = answer(model, [ids], eos_id=2, pad_id=3, max_new_tokens=tokens)
    return tokenizer.decode(found.ids).rstrip(HALF)


def asked(question) -> list[dict]:
    return [{"role": "user", "content": question}]


def until(true, seconds=60):
    ends = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < ends, "it did not come to that"
        time.sleep(0.02)
    return found


def idle(server) -> bool:
    health = server.health()
    return health["answering"] == health["waiting"] == 0


# -- answers


def test_a_chat_is_answered_as_the_engine_answers(client, nano):
    ids = encode_history(nano[1], TEMPLATE, [Turn("Phở bò là gì?")])
    reply = client.chat.completions.create(model="nano", messages=asked("Phở bò là gì?"),
                                           max_tokens=20)
    assert reply.choices[0].message.content == alone(nano, ids, 20).lstrip()
    assert reply.choices[0].finish_reason == "length"
    usage = reply.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (
        len(ids), 20, len(ids) + 20)


def test_a_conversation_is_read_in_the_bases_history_format(client, nano):
    turns = [Turn("Xin chào?", "Chào bạn."), Turn("Phở là gì?")]
    ids = encode_history(nano[1], TEMPLATE, turns, "Trả lời ngắn.")
    reply = client.chat.completions.create(model="nano", max_tokens=12, messages=[
        {"role": "system", "content": "Trả lời ngắn."}, {"role": "user", "content": "Xin chào?"},
        {"role": "assistant", "content": "Chào bạn."}, {"role": "user", "content": "Phở là gì?"}])
    assert reply.choices[0].message.content == alone(nano, ids, 12).lstrip()
    assert reply.usage.prompt_tokens == len(ids)


def test_a_stream_is_the_answer_in_pieces(client):
    how = {"model": "nano", "messages": asked("Hà Nội có gì?"), "max_tokens": 30}
    whole = client.chat.completions.create(**how)
    chunks = list(client.chat.completions.create(**how, stream=True,
                                                 stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [c.choices[0].delta.content for c in chunks if c.choices]
    assert "".join(filter(None, pieces)) == whole.choices[0].message.content
    assert len([piece for piece in pieces if piece]) > 20
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-2:] == [None, "length"]
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert len({c.id for c in chunks}) == 1 and all(c.usage is None for c in chunks[:-1])


def test_the_first_piece_comes_before_the_last_is_written(client, server):
    with client.chat.completions.create(model="nano", messages=asked("Kể chuyện"), stream=True,
                                        max_tokens=ENDLESS) as stream:
        next(chunk for chunk in stream if chunk.choices[0].delta.content)
        assert server.health()["answering"] == 1
    until(lambda: idle(server))


def test_stop_strings_end_the_answer_before_them(client):
    how = {"model": "nano", "messages": asked("Hà Nội có gì?"), "max_tokens": 40}
    whole = client.chat.completions.create(**how).choices[0].message.content
    stop = whole[20:24]
    reply = client.chat.completions.create(**how, stop=["không có", stop])
    assert reply.choices[0].message.content == whole[: whole.index(stop)]
    assert reply.choices[0].finish_reason == "stop" and reply.usage.completion_tokens < 40
    streamed = client.chat.completions.create(**how, stop=stop, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in streamed) == \
        whole[: whole.index(stop)]


def test_a_seed_repeats_an_answer_and_no_seed_does_not(client):
    def draw(**more):
        return client.chat.completions.create(
            model="nano", messages=asked("Kể chuyện"), temperature=1.5, max_tokens=20,
            **more).choices[0].message.content

    assert draw(seed=5) == draw(seed=5) != draw(seed=6)
    assert draw() != draw()
    assert draw(seed=5, top_p=0.01) != draw(seed=5)
    assert draw(seed=5, extra_body={"top_k": 1}) != draw(seed=5)
    assert draw(seed=5, extra_body={"min_p": 0.9}) != draw(seed=5)
    assert draw(extra_body={"top_k": 1, "repetition_penalty": 1.5}) != draw(
        extra_body={"top_k": 1})


def test_several_choices_are_drawn_apart_and_repeat_with_the_seed(client):
    how = {"model": "nano", "messages": asked("Kể chuyện"), "temperature": 1.0, "max_tokens": 10,
           "n": 6, "seed": 3}  # six choices, but the server has four slots
    replies = [client.chat.completions.create(**how) for _ in range(2)]
    texts = [[c.message.content for c in reply.choices] for reply in replies]
    assert texts[0] == texts[1] and len(set(texts[0])) == 6
    assert [c.index for c in replies[0].choices] == list(range(6))
    assert replies[0].usage.completion_tokens == 60
    streamed = [""] * 6
    for chunk in client.chat.completions.create(**how, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts[0]


def test_completions_continue_plain_text(client, nano):
    ids = [encode_text(nano[1], text) for text in ("Hà Nội là", "Phở")]
    wanted = [alone(nano, one, 10) for one in ids]
    reply = client.completions.create(model="nano", prompt=["Hà Nội là", "Phở"], max_tokens=10)
    assert [c.text for c in reply.choices] == wanted
    assert reply.usage.prompt_tokens == sum(map(len, ids))
    assert [c.text for c in client.completions.create(model="nano", prompt=ids, n=2,
                                                      max_tokens=10).choices] == [
        wanted[0], wanted[0], wanted[1], wanted[1]]
    streamed = list(client.completions.create(model="nano", prompt="Phở", max_tokens=10,
                                              stream=True))
    assert "".join(c.choices[0].text for c in streamed) == wanted[1]
    assert streamed[-1].choices[0].finish_reason == "length"


def test_an_answer_ends_where_the_model_ends(client, nano):
    """The answer ends at the end of the context, before it has `max_tokens` tokens."""
    ids = encode_text(nano[1], "Phở " * 600)
    reply = client.completions.create(model="nano", prompt=ids[:1015], max_tokens=100)
    assert reply.usage.completion_tokens == nano[0].config.max_seq_len - 1015
    assert reply.choices[0].finish_reason == "length"


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["nano"]
    assert client.models.retrieve("nano").owned_by == "phogpt-raw"
    with pytest.raises(openai.NotFoundError, match="does not exist; use nano"):
        client.models.retrieve("vinai/PhoGPT-4B")


# -- errors


def test_errors_have_the_protocols_form_and_status(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-5", messages=asked("a"))
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="nano", messages=asked("a"), frequency_penalty=1)
    assert caught.value.param == "frequency_penalty" and "must be 0" in str(caught.value)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="nano", messages=asked("Ngày mai " * 1000))
    assert caught.value.code == "context_length_exceeded" and "1,024" in str(caught.value)
    for prompt in ([70_000], [-1]):
        with pytest.raises(openai.BadRequestError, match="token id outside 0 to"):
            client.completions.create(model="nano", prompt=prompt)
    with pytest.raises(openai.BadRequestError, match="no token"):
        client.completions.create(model="nano", prompt="")
    with pytest.raises(openai.BadRequestError) as caught:  # the error comes before any event
        client.chat.completions.create(model="nano", messages=asked("a"), stream=True, n=0)
    assert caught.value.param == "n"


@pytest.mark.parametrize("method, path, body, status", [
    ("POST", "/v1/chat/completions", b"{", 400), ("POST", "/v1/chat/completions", b"", 400),
    ("POST", "/v1/chat/completions", b"\xff\xfe", 400),
    ("POST", "/v1/chat/completions", b"[" * 100_000, 400),
    ("POST", "/v1/chat/completions", {"messages": asked("\ud800")}, 400),
    ("POST", "/v1/chat/completions", b" " * (2**20 + 1), 413),
    ("GET", "/v1/chat/completions", None, 405), ("POST", "/v1/models", {}, 405),
    ("GET", "/v1/embeddings", None, 404), ("GET", "/../etc/passwd", None, 404),
])
def test_whatever_is_sent_the_answer_is_an_error_in_json(server, method, path, body, status):
    found, said = server.send(method, path, body)
    assert found == status
    assert set(said["error"]) == {"message", "type", "param", "code"} and said["error"]["message"]
    assert server.health()["status"] == "ok"


def test_a_body_without_a_declared_length_is_bounded_too(server):
    link = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    link.request("POST", "/v1/completions", iter([b" " * 2**19] * 3), encode_chunked=True,
                 headers={"transfer-encoding": "chunked"})
    assert link.getresponse().status == 413
    link.close()


def test_garbage_instead_of_http_does_no_harm(server):
    with socket.create_connection(("127.0.0.1", server.port)) as link:
        link.sendall(b"\x16\x03\x01 this is no HTTP\r\n\r\n")
        assert b"400" in link.recv(100)
    assert server.health()["status"] == "ok"


# -- access


@pytest.mark.parametrize("host, status", [
    (None, 200), ("localhost", 200), ("LOCALHOST:9000", 200), ("[::1]:8000", 200),
    ("192.168.1.9:8000", 200), (socket.gethostname(), 200), ("evil.example", 403),
    ("localhost.evil.example:8000", 403), ("127.0.0.1.evil.example", 403), ("", 403),
    ("evil.example@127.0.0.1", 403), ("127.0.0.1@evil.example", 403), ("[", 403),
])
def test_only_this_servers_own_names_are_answered(server, host, status):
    """In a DNS rebinding attack a foreign page lets its domain name point to this computer.

    The Host header of its requests then contains this domain name.
    """
    headers = {} if host is None else {"host": host}
    for path in ("/", "/health", "/v1/models"):
        assert server.send("GET", path, **headers)[0] == status


@pytest.mark.parametrize("origin, status", [
    ("http://{}", 200), ("https://{}", 200), ("http://evil.example", 403), ("null", 403),
    ("http://localhost:1", 403), ("file://", 403), ("http://{}.evil.example", 403), ("", 403)])
def test_only_this_servers_own_page_is_answered(server, origin, status):
    own = f"127.0.0.1:{server.port}"
    found, said = server.send("POST", "/v1/completions", {"prompt": "a", "max_tokens": 1},
                              origin=origin.format(own))
    assert found == status
    assert status == 200 or said["error"]["code"] == "foreign_origin"


def test_other_pages_get_no_permission_from_a_preflight(server):
    link = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    for origin in ("http://evil.example", f"http://127.0.0.1:{server.port}"):
        link.request("OPTIONS", "/v1/chat/completions", headers={
            "origin": origin, "access-control-request-method": "POST"})
        reply = link.getresponse()
        reply.read()
        assert reply.status in (403, 405)
        assert not [name for name in reply.headers if name.startswith("access-control")]


def test_a_request_that_says_nothing_gets_the_servers_flags(tiny):
    flags = ["--max-new-tokens", 7, "--temperature", 5, "--top-k", 50]
    with served("--model", tiny, *flags) as server:
        how = {"model": tiny.name, "messages": asked("Phở?")}
        replies = [server.client().chat.completions.create(**how) for _ in range(2)]
        assert [reply.usage.completion_tokens for reply in replies] == [7, 7]
        assert replies[0].choices[0].message != replies[1].choices[0].message
        greedy = server.client().chat.completions.create(**how, temperature=0, max_tokens=9)
        assert greedy.usage.completion_tokens == 9


def test_a_key_is_asked_for_where_there_is_one(tiny):
    with served("--model", tiny, "--api-key", "mo-ra") as server:
        assert server.client().models.list().data
        for key in ("mo-r", "mo-raa", "wrong", "mở"):
            with pytest.raises((openai.AuthenticationError, UnicodeEncodeError)):
                server.client(api_key=key).models.list()
        for headers in ({}, {"authorization": "Basic mo-ra"}, {"authorization": "mo-ra"}):
            for path in ("/v1/models", "/v1/nothing"):
                status, said = server.send("GET", path, **headers)
                assert (status, said["error"]["code"]) == (401, "invalid_api_key")
        assert server.send("GET", "/health")[0] == server.send("GET", "/")[0] == 200


def test_the_page_loads_nothing_from_elsewhere(server):
    status, page = server.send("GET", "/")
    assert status == 200 and "http" not in page.replace("https://", "http").split("<body>")[0]
    link = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    link.request("GET", "/")
    policy = link.getresponse().headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    link.close()


# -- many clients, and clients that disconnect


def test_32_clients_at_once_get_what_each_gets_alone(server, nano):
    """32 clients share 4 slots. Some answers are streamed. Some clients disconnect early.

    With SOAK_S=120 in the environment the test runs for two minutes and prints its measurements.
    """
    questions = [f"Câu {n}: {'phở ' * (n % 7)}là gì?" for n in range(32)]
    tokens = [8 + n % 5 for n in range(32)]
    wanted = [alone(nano, encode_history(nano[1], TEMPLATE, [Turn(question)]), most).lstrip()
              for question, most in zip(questions, tokens, strict=True)]
    soak_s, began, memory = float(os.environ.get("SOAK_S", 0)), time.monotonic(), []
    counts = Counter()

    def client_of(n):
        client = server.client()
        for turn in itertools.count():
            which = (n + 5 * turn) % 32
            how = {"model": "nano", "messages": asked(questions[which])}
            kind = ("stream", "whole", "stream", "left")[(n + turn) % 4]
            if kind == "whole":
                reply = client.chat.completions.create(**how, max_tokens=tokens[which])
                assert reply.choices[0].message.content == wanted[which]
            elif kind == "stream":
                pieces = client.chat.completions.create(**how, max_tokens=tokens[which],
                                                        stream=True)
                assert "".join(c.choices[0].delta.content or "" for c in pieces) == wanted[which]
            else:
                with client.chat.completions.create(**how, max_tokens=ENDLESS, stream=True) as one:
                    next(iter(one))
            counts[kind] += 1
            if time.monotonic() - began >= soak_s:
                return

    with ThreadPoolExecutor(33) as pool:
        clients = [pool.submit(client_of, n) for n in range(32)]
        while soak_s and not all(client.done() for client in clients):
            time.sleep(10)
            memory.append(round(server.rss() / 2**20, 1))
        for client in clients:
            client.result()
    until(lambda: idle(server))
    if soak_s:
        print(f"{dict(counts)} in {time.monotonic() - began:.0f} s; MiB each 10 s: {memory}")
        assert max(memory[2:]) - memory[1] < 16


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_client_that_leaves_frees_its_slots(server, stream):
    """The choices of the request that still wait for a slot are dropped too."""
    body = {"messages": asked("Kể chuyện"), "max_tokens": ENDLESS, "stream": stream, "n": 6}
    link = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    link.request("POST", "/v1/chat/completions", json.dumps(body).encode())
    until(lambda: (server.health()["answering"], server.health()["waiting"]) == (4, 2))
    began = time.monotonic()
    link.sock.close()
    if stream:
        link.close()
    until(lambda: idle(server))
    assert time.monotonic() - began < 4  # complete answers would take longer


def test_memory_does_not_grow_with_the_number_of_requests(server, client):
    def many(count):
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda n: client.chat.completions.create(
                model="nano", messages=asked(f"Câu {n}"), max_tokens=4, n=2), range(count)))

    many(40)
    before = server.rss()
    many(200)
    assert server.rss() - before < 8 * 2**20


# -- shutdown


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_finishes_what_is_written_and_refuses_what_waits(nano, number):
    ids = encode_history(nano[1], TEMPLATE, [Turn("Kể chuyện")])
    with served("--model", "nano", "--slots", "1") as server:
        client = server.client()
        stream = client.chat.completions.create(model="nano", messages=asked("Kể chuyện"),
                                                max_tokens=400, stream=True)
        text = next(c for c in stream if c.choices[0].delta.content).choices[0].delta.content
        refused = []

        def wait_for_a_slot():
            with pytest.raises(openai.InternalServerError) as caught:
                client.chat.completions.create(model="nano", messages=asked("Và?"))
            refused.append((caught.value.status_code, caught.value.code))

        waiting = threading.Thread(target=wait_for_a_slot)
        waiting.start()
        until(lambda: server.health()["waiting"] == 1)
        server.process.send_signal(number)
        waiting.join(30)
        assert refused == [(503, "shutting_down")]
        assert server.process.poll() is None  # the server still writes the answer
        text += "".join(c.choices[0].delta.content or "" for c in stream)
        assert text == alone(nano, ids, 400).lstrip()
        assert server.wait() == 128 + number
        with pytest.raises(OSError):
            server.send("GET", "/health")


def test_ctrl_c_twice_breaks_answers_off_with_an_error_in_the_protocols_form():
    with served("--model", "nano") as server:
        client, caught = server.client(), []

        def ask(stream):
            with pytest.raises(openai.APIError) as error:
                list(client.chat.completions.create(model="nano", messages=asked("Kể chuyện"),
                                                    max_tokens=ENDLESS, stream=stream))
            caught.append(error.value.code)

        clients = [threading.Thread(target=ask, args=(stream,)) for stream in (True, False)]
        for one in clients:
            one.start()
        until(lambda: server.health()["answering"] == 2)
        server.process.send_signal(signal.SIGINT)
        until(lambda: any("finishing 2 answers" in line for line in server.lines))
        assert server.end(signal.SIGINT) == 130
        for one in clients:
            one.join(30)
        assert caught == ["shutting_down"] * 2
        assert server.lines[-1] == "stopped by hand\n"


def test_sigterm_ends_an_idle_server_at_once(tiny):
    with served("--model", tiny) as server:
        link = http.client.HTTPConnection("127.0.0.1", server.port)  # this connection stays open
        link.request("GET", "/health")
        link.getresponse().read()
        began = time.monotonic()
        # the server does not wait for GRACE_S, which is longer than 30 s
        assert server.end() == 143 and time.monotonic() - began < 30


def test_an_address_in_use_is_refused_before_anything_is_loaded(server):
    done = subprocess.run([sys.executable, "generate.py", "--serve", str(server.port)], cwd=ROOT,
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "this address cannot be used" in done.stderr
    assert done.stderr.count("\n") == 1
