"""The chat-completions and completions protocol: check requests, and build replies as JSON.

This module does not run the model. If a request has a field that would change the answer, but is
not supported, the reply is an error that names the field. So no client relies on a field without
effect. A field with the value `null` counts as missing.
"""

import json
import time
import unicodedata
import uuid
from dataclasses import dataclass

from phogpt_raw.decode.engine import GREEDY
from phogpt_raw.decode.history import Turn
from phogpt_raw.decode.sampling import Sampling

# Largest number of choices, of stop strings, and of characters in a stop string.
MOST_CHOICES, MOST_STOPS, MOST_STOP = 128, 16, 1000
COMPLETION_TOKENS = 16  # the protocol's default of max_tokens for /v1/completions

WITHOUT_EFFECT = {"metadata", "prediction", "prompt_cache_key", "prompt_cache_retention",
                  "safety_identifier", "service_tier", "store", "user"}
# Fields that are not supported, each with the values that have no effect and are accepted.
ONLY = {
    "audio": (), "best_of": (1,), "echo": (False,), "frequency_penalty": (0,),
    "function_call": ("none", "auto"), "functions": ([],), "logit_bias": ({},),
    "logprobs": (False,), "modalities": (["text"],), "parallel_tool_calls": (True, False),
    "presence_penalty": (0,), "reasoning_effort": ("none",), "response_format": ({"type": "text"},),
    "suffix": ("",), "tool_choice": ("none", "auto"), "tools": ([],), "top_logprobs": (0,),
    "verbosity": ("medium",), "web_search_options": (),
}
USED = {"max_completion_tokens", "max_tokens", "min_p", "model", "n", "repetition_penalty", "seed",
        "stop", "stream", "stream_options", "temperature", "top_k", "top_p"}
# {field: (least value, greatest value, True if the least value itself is allowed)}. Sampling
# explains the fields.
BOUNDS = {"temperature": (0, 100, True), "top_k": (0, 2**31 - 1, True), "top_p": (0, 1, False),
          "min_p": (0, 1, True), "repetition_penalty": (0, 100, False)}


class ProtocolError(Exception):
    """An error in reply to a request, with its HTTP status and the protocol's four fields."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None,
                 code: str | None = None, kind: str = "invalid_request_error"):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.kind = \
            status, message, param, code, kind

    def json(self) -> dict:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param,
                          "code": self.code}}


@dataclass(frozen=True)
class Defaults:
    """The values of generate.py's flags. They are used for fields that a request leaves out."""

    sampling: Sampling = GREEDY
    max_tokens: int = 256
    stops: tuple[str, ...] = ()


NO_FLAGS = Defaults()


@dataclass(frozen=True)
class Conversation:
    """The turns of a conversation, and its system text. The last turn has no answer yet."""

    turns: tuple[Turn, ...]
    system: str = ""


@dataclass(frozen=True)
class Ask:
    """A checked request. Each of its prompts gets `n` answers.

    A chat has one prompt, which is a Conversation. A prompt of /v1/completions is text or a list of
    token ids, and is used without a template.
    """

    chat: bool
    model: str | None
    prompts: list[Conversation | str | list[int]]
    max_tokens: int
    n: int
    seed: int | None
    sampling: Sampling
    stops: tuple[str, ...]
    stream: bool
    include_usage: bool


def read_request(body: bytes, chat: bool, defaults: Defaults) -> Ask:
    """Read and check the body of a request. Raises ProtocolError that names the wrong field."""
    fields = read_json(body)
    own = "messages" if chat else "prompt"
    for name, value in fields.items():
        if name not in {*USED, *WITHOUT_EFFECT, own} and not asks_for_nothing(name, value):
            only = " or ".join(json.dumps(value) for value in ONLY.get(name, ()))
            raise wrong(name, f"must be {only} here" if only else "is not supported")
    if fields.get(own) is None:
        raise wrong(own, "is missing", code="missing_required_parameter")
    prompts = [conversation(fields[own])] if chat else raw_prompts(fields[own])
    n = whole(fields, "n", 1, MOST_CHOICES) or 1
    if n * len(prompts) > MOST_CHOICES:
        raise wrong("n", f"times the number of prompts must be at most {MOST_CHOICES}")
    stream = boolean(fields, "stream")
    return Ask(
        chat=chat, model=text(fields, "model"), prompts=prompts,
        max_tokens=max_tokens(fields) or (defaults.max_tokens if chat else COMPLETION_TOKENS),
        n=n, seed=whole(fields, "seed", -2**63, 2**63 - 1),
        sampling=sampling(fields, defaults.sampling),
        stops=(*defaults.stops, *stops(fields.get("stop"))), stream=stream,
        include_usage=include_usage(fields, stream))


def read_json(body: bytes) -> dict:
    try:
        fields = json.loads(body, parse_constant=not_a_number)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"the body is not JSON ({error})") from None
    if not isinstance(fields, dict):
        raise ProtocolError("the body is not a JSON object")
    return fields


def not_a_number(name: str):
    raise ValueError(f"{name} is not a JSON number")


def asks_for_nothing(name: str, value) -> bool:
    return (value is None and name in ONLY) or any(
        value == off and isinstance(value, bool) == isinstance(off, bool)
        for off in ONLY.get(name, ()))


def wrong(name: str, what: str, code: str | None = None) -> ProtocolError:
    return ProtocolError(f"'{shortened(name)}' {what}", param=name, code=code)


def shortened(value, most: int = 60) -> str:
    shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return shown if len(shown) <= most else shown[:most] + "…"


# -- fields


def text(fields: dict, name: str) -> str | None:
    value = fields.get(name)
    return None if value is None else clean(value, name)


def clean(value, name: str) -> str:
    """The value. Raises ProtocolError if the value is not text, or if UTF-8 cannot encode the text.

    JSON can contain half of a surrogate pair, which UTF-8 cannot encode.
    """
    if not isinstance(value, str):
        raise wrong(name, f"must be text, not {shortened(value)}")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise wrong(name, "is not valid Unicode: it holds half of a surrogate pair")
    return value


def boolean(fields: dict, name: str) -> bool:
    value = fields.get(name)
    if not isinstance(value, bool | None):
        raise wrong(name, f"must be true or false, not {shortened(value)}")
    return bool(value)


def whole(fields: dict, name: str, least: int, most: int) -> int | None:
    value = fields.get(name)
    if value is None:
        return None
    if type(value) is not int or not least <= value <= most:
        raise wrong(name, f"must be a whole number from {least} to {most}, not {shortened(value)}")
    return value


def max_tokens(fields: dict) -> int | None:
    """The value of max_completion_tokens, or of max_tokens, which is its older name."""
    newer, older = (whole(fields, name, 1, 2**31 - 1)
                    for name in ("max_completion_tokens", "max_tokens"))
    if newer and older and newer != older:
        raise wrong("max_tokens", "and 'max_completion_tokens' are two names of one value; give "
                                  "one of them")
    return newer or older


def sampling(fields: dict, default: Sampling) -> Sampling:
    values = {}
    for name, (least, most, with_least) in BOUNDS.items():
        value = fields.get(name)
        values[name] = value = getattr(default, name) if value is None else value
        kinds = (int,) if name == "top_k" else (int, float)
        if type(value) not in kinds or not least <= value <= most or (
                value == least and not with_least):
            what = "a whole number" if name == "top_k" else "a number"
            span = (f"from {least} to {most}" if with_least
                    else f"above {least} and at most {most}")
            raise wrong(name, f"must be {what} {span}, not {shortened(value)}")
    return Sampling(**values)


def stops(value) -> list[str]:
    """The stop strings of a request, normalised to NFC. Answers are normalised to NFC too."""
    if value is None:
        return []
    found = value if isinstance(value, list) else [value]
    if len(found) > MOST_STOPS:
        raise wrong("stop", f"must be at most {MOST_STOPS} texts")
    for stop in found:
        if not clean(stop, "stop") or len(stop) > MOST_STOP:
            raise wrong("stop", f"must be texts of 1 to {MOST_STOP:,} letters")
    return [unicodedata.normalize("NFC", stop) for stop in found]


def include_usage(fields: dict, stream: bool) -> bool:
    options = fields.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict):
        raise wrong("stream_options", "must be an object")
    if not stream:
        raise wrong("stream_options", "is only for 'stream': true")
    for name in options.keys() - {"include_usage", "include_obfuscation"}:
        raise wrong(f"stream_options.{name}", "is not supported")
    return boolean(options, "include_usage")


# -- prompts


def conversation(messages) -> Conversation:
    """A list of messages as a Conversation.

    System messages must come first. Then each answer follows a question, and the last message is a
    question. Consecutive user messages become one question; line breaks join the messages.
    """
    if not isinstance(messages, list) or not messages:
        raise wrong("messages", "must be a list of at least one message")
    system, turns, asked = [], [], []
    for n, message in enumerate(messages):
        where = f"messages[{n}]"
        if not isinstance(message, dict):
            raise wrong(where, "must be an object with 'role' and 'content'")
        for name in message.keys() - {"role", "content", "name"}:
            if message[name]:
                raise wrong(f"{where}.{name}", "is not supported")
        role, said = message.get("role"), content(message.get("content"), f"{where}.content")
        if role in ("system", "developer"):
            if turns or asked:
                raise wrong(where, f"is a {role} message, which must come before all others")
            system.append(said)
        elif role == "user":
            asked.append(said)
        elif role == "assistant":
            if not asked:
                raise wrong(where, "is an assistant message, which must follow a user message")
            turns.append(Turn("\n".join(asked), said))
            asked = []
        else:
            raise wrong(f"{where}.role", f"must be system, developer, user or assistant, not "
                                         f"{shortened(role)}")
    if not asked:
        raise wrong("messages", "must end with a message of the role 'user'")
    turns.append(Turn("\n".join(asked)))
    return Conversation(tuple(turns), "\n".join(system))


def content(value, where: str) -> str:
    """The text of a message. `value` is a string or a list of parts of type text."""
    if isinstance(value, list) and value:
        for n, part in enumerate(value):
            if not isinstance(part, dict) or part.get("type") != "text":
                raise wrong(f"{where}[{n}]", "must be of type text; PhoGPT reads nothing else")
        value = "".join(clean(part.get("text"), f"{where}[{n}].text")
                        for n, part in enumerate(value))
    value = clean(value, where)
    if not value.strip():
        raise wrong(where, "is empty")
    return value


def raw_prompts(prompt) -> list[str | list[int]]:
    """The prompts of /v1/completions: a text, a list of token ids, or a list of either.

    A text goes to the model without a template.
    """
    if isinstance(prompt, list) and prompt and all(type(item) is int for item in prompt):
        prompts = [prompt]
    else:
        prompts = prompt if isinstance(prompt, list) else [prompt]
    if not 1 <= len(prompts) <= MOST_CHOICES:
        raise wrong("prompt", f"must be 1 to {MOST_CHOICES} prompts")
    return [one if isinstance(one, list) and one and all(type(token) is int for token in one)
            else unicodedata.normalize("NFC", clean(one, "prompt")) for one in prompts]


# -- replies


@dataclass
class Choice:
    """The part of an answer that has been generated. `written` is its number of tokens."""

    text: str = ""
    written: int = 0
    finish: str | None = None


@dataclass(frozen=True)
class Reply:
    """The JSON objects that answer one request."""

    chat: bool
    model: str
    with_usage: bool  # add the field `usage` to every chunk; it is null in all but the last chunk
    id: str
    created: int

    @classmethod
    def to(cls, ask: Ask, model: str) -> "Reply":
        kind = "chatcmpl-" if ask.chat else "cmpl-"
        return cls(ask.chat, model, ask.include_usage, kind + uuid.uuid4().hex, int(time.time()))

    def head(self, streamed: bool) -> dict:
        kind = "text_completion"
        if self.chat:
            kind = "chat.completion.chunk" if streamed else "chat.completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def whole(self, choices: list[Choice], prompt_tokens: int) -> dict:
        made = []
        for index, choice in enumerate(choices):
            said = ({"message": {"role": "assistant", "content": choice.text, "refusal": None}}
                    if self.chat else {"text": choice.text})
            made.append({"index": index, **said, "logprobs": None, "finish_reason": choice.finish})
        return {**self.head(False), "choices": made, "usage": usage(choices, prompt_tokens)}

    def begin(self, index: int) -> dict:
        """The first chunk of a chat's choice. It contains the role and no text."""
        return self.chunk(index, {"delta": {"role": "assistant", "content": ""}}, None)

    def piece(self, index: int, text: str, finish: str | None = None) -> dict:
        if self.chat:
            return self.chunk(index, {"delta": {"content": text} if text else {}}, finish)
        return self.chunk(index, {"text": text}, finish)

    def chunk(self, index: int, said: dict, finish: str | None) -> dict:
        made = {**self.head(True), "choices": [
            {"index": index, **said, "logprobs": None, "finish_reason": finish}]}
        return {**made, "usage": None} if self.with_usage else made

    def used(self, choices: list[Choice], prompt_tokens: int) -> dict:
        """The last chunk, with the numbers of tokens. It is sent if a request asks for it with
        stream_options.include_usage."""
        return {**self.head(True), "choices": [], "usage": usage(choices, prompt_tokens)}


def usage(choices: list[Choice], prompt_tokens: int) -> dict:
    """The numbers of tokens. Each prompt is counted once; `</s>` of an answer is not counted."""
    written = sum(choice.written for choice in choices)
    return {"prompt_tokens": prompt_tokens, "completion_tokens": written,
            "total_tokens": prompt_tokens + written}


def server_sent(message: dict | str) -> bytes:
    """A message as the bytes of a server-sent event."""
    data = message if isinstance(message, str) else json.dumps(message, ensure_ascii=False)
    return f"data: {data}\n\n".encode()


def model_object(name: str, created: int) -> dict:
    return {"id": name, "object": "model", "created": created, "owned_by": "phogpt-raw"}
