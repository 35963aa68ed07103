"""Damaged HTTP requests, and what a server may answer to them: 200, or 4xx in OpenAI's shape; never 5xx."""

import http.client
import json
import random
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tests.fuzz.mutation import ODD_TEXTS, ODD_VALUES, as_json, mutated_bytes, mutated_json, mutated_text, odd_value
from tests.raw_http import JSON, Address, exchange, request_bytes

COMPLETIONS, CHAT, TOKENIZE, DETOKENIZE = "/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"
CONTEXT = "/contexts/mine"

_COMMON: dict[str, Any] = {
    "max_tokens": 3,
    "min_tokens": 1,
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "seed": 7,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "logit_bias": {"5": 1.5},
    "bad_words": ["he"],
    "suppress_tokens": [9],
    "begin_suppress_tokens": [8],
    "stop": ["z"],
    "stop_token_ids": [7],
    "ignore_eos": True,
    "skip_special_tokens": False,
    "n": 2,
    "best_of": 2,
    "stream": False,
    "cache_salt": "a",
    "prompt_cache_key": "b",
    "priority": 1,
    "timeout_s": 600.0,
    "request_id": "mine",
    "return_progress": True,
    "return_lserve": True,
    "user": "me",
    "prompt_logprobs": 1,
    "tools": [],
    "response_format": {"type": "text"},
    "suffix": "",
}
_CHAT: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": "be the order"},
        {"role": "user", "content": [{"type": "text", "text": "hello the world"}]},
    ],
    "max_completion_tokens": 3,
    "logprobs": True,
    "top_logprobs": 2,
    "chat_template_kwargs": {"a": 1},
    "add_generation_prompt": True,
    "continue_final_message": False,
    "echo": False,
}
VALID: Mapping[str, dict[str, Any]] = {
    COMPLETIONS: _COMMON | {"prompt": ["hello", [5, 6, 7]], "logprobs": 2, "echo": False, "add_special_tokens": True},
    CHAT: _COMMON | _CHAT,
    TOKENIZE: {"prompt": "hello the world", "add_special_tokens": True, "return_token_strs": True},
    DETOKENIZE: {"tokens": [5, 6, 7, 80]},
    CONTEXT: {"tokens": list(range(5, 75))},
}
"""A body for each route in which every field is given."""

_RAW = (
    *(b"", b"null", b"1", b"[]", b'"a"', b"{", b"}", b"\x00", b"\xff\xfe", b'{"prompt": "\xff"}', b"{'prompt': 1}"),
    *(b'{"temperature": NaN}', b'{"temperature": 1e999}', b'{"seed": ' + b"9" * 5000 + b"}", b'{"prompt": "\\ud800"}'),
    *(b'{"n": 1, "n": 2}', b'{"x": ' + b"[" * 100_000, b'{"x":' * 50_000 + b"1" + b"}" * 50_000),
    *(b'{"prompt": "' + b"a" * 200_000 + b'"}', '{"prompt": "a"}'.encode("utf-16"), b"prompt=a", b" " * 50_000),
)
_KINDS = (None, "text/plain", "application/x-www-form-urlencoded", "application/json; charset=utf-16", "a" * 5000, "é")
_METHODS = ("GET", "PUT", "DELETE", "HEAD", "OPTIONS", "TRACE", "PATCH", "get", "ABC")
_PATHS = (
    "/",
    "//",
    "/v1",
    "/v1/",
    "/v1/completions/",
    "/v1/models/../x",
    "/%00",
    "/%ff%fe",
    "/?a=b",
    "/a%0d%0ab:c",
    "/contexts/..%2fx",
    "/contexts/",
)
_NAMES = ("X-Request-Id", "Authorization", "Accept", "Origin", "Expect", "Cookie", "X-Forwarded-For", "Accept-Encoding")


@dataclass(frozen=True)
class Damaged:
    """A request, and what is known of the answer.

    Attributes:
      data: what goes over the wire.
      field: the one field of the body that may be wrong; None if it may be anything.
      is_http: whether a program that knows nothing of this server takes it for a request.
      is_whole: whether nothing of it is missing.
    """

    data: bytes
    field: str | None = None
    is_http: bool = True
    is_whole: bool = True


def damaged_request(rng: random.Random) -> Damaged:
    """Returns a request at random: most often one with a damaged body."""
    kinds: list[Callable[[random.Random], Damaged]] = [_one_field, _fields, _raw, _framed, _addressed]
    return rng.choices(kinds, [5, 5, 2, 2, 1])[0](rng)


def _one_field(rng: random.Random) -> Damaged:
    """A plain body with one field of any value."""
    path = rng.choice(list(VALID))
    least = {COMPLETIONS: {"prompt": "hello"}, CHAT: {"messages": _CHAT["messages"]}}.get(path, dict(VALID[path]))
    field = rng.choice([name for name in VALID[path] if name != "request_id"])
    value = rng.choice([rng.choice(ODD_VALUES), mutated_json([VALID[path][field]], rng, 1)])
    body = least | ({"stream": True} if rng.random() < 0.3 else {}) | {field: value}
    return Damaged(request_bytes(path, as_json(body, rng, is_damaged=False)), field)


def _fields(rng: random.Random) -> Damaged:
    """A body with all fields, some of them changed."""
    path = rng.choice([COMPLETIONS, CHAT])
    names = rng.sample(list(VALID[path]), rng.randrange(1, 12))
    names += [name for name in ("prompt", "messages") if name in VALID[path]]
    body = mutated_json({name: VALID[path][name] for name in names}, rng)
    if rng.random() < 0.3 and isinstance(body, dict):
        body |= {rng.choice(ODD_TEXTS): odd_value(rng), "stream": True}
    return Damaged(request_bytes(path, as_json(body, rng)))


def _raw(rng: random.Random) -> Damaged:
    """A body that is no JSON, or hardly any."""
    path = rng.choice(list(VALID))
    data = rng.choice([*_RAW, json.dumps(VALID[path]).encode()])
    return Damaged(request_bytes(path, mutated_bytes(data, rng, len(data)) if rng.random() < 0.5 else data))


def _framed(rng: random.Random) -> Damaged:
    """A body in other pieces, or of another length, than it says."""
    body = json.dumps({"prompt": "hello", "max_tokens": 2}).encode()
    kind = rng.randrange(6)
    if kind == 0:
        return Damaged(request_bytes(COMPLETIONS, body, length=rng.randrange(len(body))))
    if kind == 1:
        return Damaged(request_bytes(COMPLETIONS, body, length=len(body) + rng.randrange(1, 100)), is_whole=False)
    if kind == 2:  # refused before it is read
        return Damaged(request_bytes(COMPLETIONS, body, length=10 ** rng.randrange(9, 18)))
    if kind == 3:
        lengths = ("-1", "1e3", "a", "", "0x10", "9" * 30, "5, 6", "+5")
        headers = JSON | {"Content-Length": rng.choice(lengths)}
        return Damaged(request_bytes(COMPLETIONS, body, headers, length=-1), is_http=False)
    chunked = JSON | {"Transfer-Encoding": "chunked"}
    cut = rng.randrange(1, len(body))
    pieces = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:cut], body[cut:])) + b"0\r\n\r\n"
    if kind == 4:
        return Damaged(request_bytes(COMPLETIONS, pieces, chunked, length=-1))
    broken = mutated_bytes(pieces, rng, len(pieces))
    return Damaged(request_bytes(COMPLETIONS, broken, chunked, length=-1), is_http=False, is_whole=False)


def _addressed(rng: random.Random) -> Damaged:
    """A plain body with other headers, to another path or by another method."""
    body = json.dumps({"prompt": "hello", "max_tokens": 2}).encode()
    kind = rng.randrange(4)
    if kind == 0:
        found = rng.choice(_KINDS)
        return Damaged(request_bytes(COMPLETIONS, body, {} if found is None else {"Content-Type": found}))
    if kind == 1:
        return Damaged(request_bytes(rng.choice([COMPLETIONS, *_PATHS]), b"", method=rng.choice(_METHODS)))
    if kind == 2:
        text = mutated_text(rng.choice(["a-b.c:1", "Bearer x", "*/*"]), rng)
        printable = "".join(one for one in text if one.isprintable()).strip()
        headers = JSON | {rng.choice(_NAMES): printable.encode("latin-1", "replace").decode("latin-1")}
        return Damaged(request_bytes(COMPLETIONS, body, headers), is_http=False)
    data = request_bytes(COMPLETIONS, body)
    return Damaged(mutated_bytes(data, rng, data.index(b"\r\n\r\n")), is_http=False, is_whole=False)


# --- answers ---------------------------------------------------------------------------------------------------------


def answer_to(address: Address, damaged: Damaged, *, allowed: frozenset[str] = frozenset()) -> str | None:
    """Returns the message with which a server refuses a request; None if it is answered, or if it never was whole.

    Args:
      address: of the server.
      damaged: the request.
      allowed: codes of errors that need no damage, such as "queue_full".

    Raises:
      AssertionError: if the answer is one that no server should give.
    """
    with exchange(address, damaged.data) as one:
        if not damaged.is_whole:
            one.socket.shutdown(socket.SHUT_WR)
        try:
            response = one.answer()
            body = response.read()
        except (http.client.HTTPException, ConnectionError):
            assert not (damaged.is_http and damaged.is_whole), "no answer"
            return None
    if not damaged.is_http and response.getheader("Content-Type", "").startswith("text/plain"):
        assert response.status == 400, f"status {response.status} for what is not HTTP"
        return "the server's library takes this for no request"
    if response.status != 200:
        return _refusal(response.status, body, damaged, allowed)
    if b'"error"' in body[-2000:] and response.getheader("Content-Type", "").startswith("text/event-stream"):
        return _refusal(None, body.rsplit(b"data: ", 1)[-1], damaged, allowed)
    _require_whole_answer(response, body)
    return None


def _refusal(status: int | None, body: bytes, damaged: Damaged, allowed: frozenset[str]) -> str:
    """Returns the message of an error, whose status is None if it is the last event of a stream."""
    if not body and status in (404, 405):
        return "to a HEAD, without a body"
    error = json.loads(body)["error"]
    assert error.keys() == {"message", "type", "param", "code"}, error
    assert isinstance(error["code"], str) and isinstance(error["message"], str), error
    if error["code"] in allowed:
        return error["message"]
    assert status is None or 400 <= status < 500, f"status {status}: {error}"
    assert error["type"] == "invalid_request_error", error
    if damaged.field is not None:
        assert _names(error, damaged.field), f"{damaged.field} is wrong, not {error['param']}: {error['message']}"
    return error["message"]


def _names(error: Mapping[str, Any], field: str) -> bool:
    """Returns whether an error says which field is wrong."""
    param = (error["param"] or "").split(".")[0]
    # JSON has no half of a surrogate pair wherever it stands. The others depend on what else is asked for.
    others = {
        "continue_final_message": "messages",
        "add_generation_prompt": "messages",
        "messages": "prompt",
        "tokens": "prompt",
    }
    return error["code"] == "invalid_json" or param in (field, others.get(field))


def _require_whole_answer(response: http.client.HTTPResponse, body: bytes) -> None:
    if response.getheader("Content-Type", "").startswith("text/event-stream"):
        lines = [line for line in body.decode().split("\n\n") if line]
        assert lines[-1] == "data: [DONE]", lines[-1]
        assert all(line.startswith(("data: ", ": ")) for line in lines), lines
        assert all(isinstance(json.loads(line.removeprefix("data: ")), dict) for line in lines[:-1] if line[0] != ":")
    elif response.getheader("Content-Type", "").startswith("application/json"):
        assert "error" not in json.loads(body)


def plain_answer(address: Address) -> Any:
    """Returns the choices of a request that never changes."""
    body = {"prompt": "hello the world", "max_tokens": 4, "ignore_eos": True, "logprobs": 1}
    with exchange(address, request_bytes(COMPLETIONS, json.dumps(body).encode())) as one:
        return json.loads(one.answer().read())["choices"]
