"""OpenAI's protocol: the check of requests, and the replies."""

import json

import pytest

from phogpt_raw.decode.history import Turn
from phogpt_raw.decode.sampling import Sampling
from phogpt_raw.serve.protocol import (
    NO_FLAGS,
    Choice,
    Conversation,
    Defaults,
    ProtocolError,
    Reply,
    read_request,
    server_sent,
)

ASKED = [{"role": "user", "content": "Phở là gì?"}]


def chat(defaults=NO_FLAGS, **fields):
    return read_request(json.dumps({"messages": ASKED, **fields}).encode(), True, defaults)


def completion(**fields):
    return read_request(json.dumps({"prompt": "Phở", **fields}).encode(), False, NO_FLAGS)


def refusal(call, *args, **fields) -> ProtocolError:
    with pytest.raises(ProtocolError) as caught:
        call(*args, **fields)
    assert caught.value.status == 400
    return caught.value


def test_a_request_that_says_nothing_gets_the_defaults():
    ask = chat(Defaults(Sampling(0.5, top_p=0.9), 77, ("\n###",)))
    assert (ask.sampling, ask.max_tokens, ask.stops) == (Sampling(0.5, top_p=0.9), 77, ("\n###",))
    assert (ask.n, ask.seed, ask.stream, ask.model) == (1, None, False, None)
    assert completion().max_tokens == 16  # the protocol's default


def test_what_a_request_says_counts():
    ask = chat(model="a", temperature=0.7, top_k=5, top_p=0.5, min_p=0.1, repetition_penalty=1.2,
               seed=-3, n=4, stop="một", max_tokens=9, stream=True,
               stream_options={"include_usage": True})
    assert ask.sampling == Sampling(0.7, 5, 0.5, 0.1, 1.2)
    assert (ask.model, ask.seed, ask.n, ask.stops, ask.max_tokens, ask.stream, ask.include_usage) \
        == ("a", -3, 4, ("một",), 9, True, True)
    assert chat(max_completion_tokens=8).max_tokens == 8
    assert chat(stop=["a", "b"]).stops == ("a", "b")


def test_stop_strings_and_prompts_are_in_nfc_as_answers_are():
    assert chat(stop="mo\u0323\u0302t").stops == ("một",)
    assert completion(prompt="mo\u0323\u0302t").prompts == ["một"]


@pytest.mark.parametrize("field, value", [
    ("temperature", "0.7"), ("temperature", -0.1), ("temperature", True), ("temperature", 101),
    ("top_p", 0), ("top_p", 1.1), ("top_k", 1.5), ("top_k", -1), ("min_p", 2),
    ("repetition_penalty", 0), ("seed", 1.0), ("seed", 2**63), ("seed", True), ("n", 0),
    ("n", 129), ("max_tokens", 0), ("max_completion_tokens", "9"), ("stop", ""), ("stop", 5),
    ("stop", ["a"] * 17), ("stop", "\ud800"), ("stream", "yes"), ("model", 5),
    ("stream_options", {"include_usage": True}),  # not allowed without stream
    ("frequency_penalty", 0.5), ("presence_penalty", -1), ("logit_bias", {"5": 1}),
    ("logprobs", True), ("tools", [{"type": "function"}]), ("tool_choice", "required"),
    ("response_format", {"type": "json_object"}), ("echo", True), ("best_of", 2),
    ("logprobs", 0), ("tempature", 0.5),
])
def test_what_cannot_be_is_refused_by_name(field, value):
    error = refusal(chat, **{field: value})
    assert error.param == field and f"'{field}'" in error.message
    assert error.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("fields, said", [
    ({"top_p": 3}, "'top_p' must be a number above 0 and at most 1, not 3"),
    ({"top_k": -1}, "'top_k' must be a whole number from 0 to 2147483647, not -1"),
    ({"messages": [{"role": "assistant", "content": "a"}]},
     "'messages[0]' is an assistant message, which must follow a user message"),
    ({"messages": [*ASKED, {"role": "system", "content": "a"}]},
     "'messages[1]' is a system message, which must come before all others"),
])
def test_an_error_is_a_sentence(fields, said):
    assert refusal(chat, **fields).message == said


@pytest.mark.parametrize("fields", [
    {"frequency_penalty": 0, "presence_penalty": 0.0}, {"tools": None, "temperature": None},
    {"logit_bias": {}, "logprobs": False}, {"user": "a", "metadata": {"a": 1}, "store": False},
    {"response_format": {"type": "text"}}, {"n": 1, "tools": []}, {"stop": None},
])
def test_fields_that_ask_for_nothing_are_accepted(fields):
    assert chat(**fields) == chat()


@pytest.mark.parametrize("body", [
    b"", b"{", b"[]", b"5", b"\xff", b'{"messages": NaN}', b"[" * 100_000,
    b'{"seed": ' + b"9" * 5000 + b"}"])
def test_a_body_that_is_no_json_object_is_refused(body):
    assert "body" in refusal(read_request, body, True, NO_FLAGS).message


@pytest.mark.parametrize("messages, where", [
    (None, "messages"), ([], "messages"), ("hi", "messages"), ([5], "messages[0]"),
    ([{"role": "user"}], "messages[0].content"),
    ([{"role": "user", "content": " "}], "messages[0].content"),
    ([{"role": "user", "content": "\ud83d"}], "messages[0].content"),
    ([{"role": "user", "content": 5}], "messages[0].content"),
    ([{"role": "tool", "content": "a"}], "messages[0].role"),
    ([{"role": ["user"], "content": "a"}], "messages[0].role"),
    ([{"role": "assistant", "content": "a"}, *ASKED], "messages[0]"),
    ([*ASKED, {"role": "assistant", "content": "a"}], "messages"),
    ([*ASKED, {"role": "system", "content": "a"}, *ASKED], "messages[1]"),
    ([{"role": "system", "content": "a"}], "messages"),
    ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0]"),
    ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
    ([*ASKED, {"role": "assistant", "content": "a", "tool_calls": [1]}, *ASKED],
     "messages[1].tool_calls"),
])
def test_a_conversation_that_cannot_be_is_refused_with_its_message(messages, where):
    assert refusal(chat, messages=messages).param == where


def test_messages_become_turns():
    ask = chat(messages=[
        {"role": "system", "content": "Ngắn."}, {"role": "developer", "content": "Lịch sự."},
        {"role": "user", "content": [{"type": "text", "text": "Xin "},
                                     {"type": "text", "text": "chào"}]},
        {"role": "user", "content": "Phở?", "name": "an"},
        {"role": "assistant", "content": "Dạ.", "refusal": None, "tool_calls": None},
        {"role": "user", "content": "Ở đâu?"}])
    assert ask.prompts == [Conversation((Turn("Xin chào\nPhở?", "Dạ."), Turn("Ở đâu?")),
                                        "Ngắn.\nLịch sự.")]


def test_prompts_are_text_or_ids_or_lists_of_them():
    for prompt, found in (("a", ["a"]), (["a", "b"], ["a", "b"]), ([5, 6], [[5, 6]]),
                          ([[5], [6, 7]], [[5], [6, 7]])):
        assert completion(prompt=prompt).prompts == found
    for prompt in ([], [[]], [5, "a"], {"a": 1}, 5, [True], ["a"] * 129, None):
        assert refusal(completion, prompt=prompt).param == "prompt"
    assert refusal(completion, prompt=["a"] * 64, n=3).param == "n"


def test_a_reply_is_the_protocols():
    reply = Reply.to(chat(), "m")
    made = reply.whole([Choice("Dạ.", 3, "stop"), Choice("Ơi", 2, "length")], 7)
    assert made["object"] == "chat.completion" and made["id"].startswith("chatcmpl-")
    assert [(c["index"], c["message"]["content"], c["finish_reason"]) for c in made["choices"]] \
        == [(0, "Dạ.", "stop"), (1, "Ơi", "length")]
    assert made["usage"] == {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}
    raw = Reply.to(completion(), "m").whole([Choice("Dạ.", 3, "stop")], 7)
    assert raw["object"] == "text_completion" and raw["choices"][0]["text"] == "Dạ."


def test_only_a_stream_that_asked_for_usage_has_its_field():
    plain = Reply.to(chat(stream=True), "m")
    counted = Reply.to(chat(stream=True, stream_options={"include_usage": True}), "m")
    assert "usage" not in plain.piece(0, "a") and counted.piece(0, "a")["usage"] is None
    assert counted.used([Choice("a", 1)], 2)["choices"] == []


def test_an_event_is_one_line_whatever_the_text():
    sent = server_sent({"text": "a\n\ndata: b\r\u2028"})
    assert sent.count(b"\n") == 2 and sent.endswith(b"\n\n")
    assert json.loads(sent[len("data: "):])["text"] == "a\n\ndata: b\r\u2028"
