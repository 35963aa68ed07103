"""Bodies: what is no JSON, means two things, or is too long is refused before anything else looks at it."""

import http.client
import json
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from lserve_jax.serve.body import parse_body
from lserve_jax.serve.errors import ApiError
from tests.lserve_jax.serve.running import Running

BAD = {
    "empty": (b"", "not valid JSON"),
    "cut": (b'{"prompt": "a"', "not valid JSON"),
    "a list": (b"[1]", "must hold a JSON object, got list"),
    "a number": (b"1", "must hold a JSON object, got int"),
    "null": (b"null", "must hold a JSON object"),
    "NaN": (b'{"temperature": NaN}', "NaN is no number of JSON"),
    "minus infinity": (b'{"temperature": -Infinity}', "-Infinity is no number"),
    "a key twice": (b'{"max_tokens": 1, "max_tokens": 2}', "'max_tokens' has two different values"),
    "a key twice inside": (b'{"x": {"a": 1, "a": 2}}', "two different values"),
    "not UTF-8": (b'{"prompt": "\xff\xfe"}', "not valid JSON"),
    "UTF-16": ('{"prompt": "a"}'.encode("utf-16"), "not valid JSON"),
    "half a pair": (b'{"prompt": "\\ud800"}', "half of a surrogate pair"),
    "half a pair in a key": (b'{"x": [{"\\uDFFF": 1}]}', "half of a surrogate pair"),
    "too deep": (b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not valid JSON"),
    "objects too deep": (b'{"x":' * 50_000 + b"1" + b"}" * 50_000, "not valid JSON"),
    "a number of 5,000 digits": (b'{"x": ' + b"9" * 5_000 + b"}", "not valid JSON"),
    "a comment": (b'{"x": 1} // y', "not valid JSON"),
    "single quotes": (b"{'x': 1}", "not valid JSON"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_body_is_one_line(name: str):
    body, expected = BAD[name]
    with pytest.raises(ApiError, match=expected) as caught:
        parse_body(body)
    assert (caught.value.status, caught.value.code) == (400, "invalid_json")
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'\xef\xbb\xbf{"a": 1}', {"a": 1}),
        (b'{"a": "\\ud83d\\ude00"}', {"a": "\N{GRINNING FACE}"}),
        (b'{"a": "\\\\ud800"}', {"a": "\\ud800"}),
        (b'{"a": 1, "a": 1}', {"a": 1}),
    ],
    ids=["byte order mark", "a whole pair", "a backslash before it", "twice the same"],
)
def test_an_unusual_body_is_read(body: bytes, expected: dict[str, object]):
    assert parse_body(body) == expected


def send_raw(server: Running, body: object, headers: dict[str, str]) -> tuple[int, str]:
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
    connection.request("POST", "/v1/completions", body, headers, encode_chunked=isinstance(body, Iterator))  # type: ignore[arg-type]
    response = connection.getresponse()
    found = response.status, json.loads(response.read())["error"]["code"]
    connection.close()
    return found


JSON = {"Content-Type": "application/json"}


def test_a_body_that_says_it_is_too_long_is_not_read(server: Running):
    body = b'{"prompt": "' + b"a" * 20_000_000 + b'"}'
    assert send_raw(server, body, JSON) == (413, "body_too_large")


def test_a_body_of_unknown_length_is_read_up_to_the_limit(server: Running):
    parts = (b" " * 65_536 for _ in range(300))
    assert send_raw(server, parts, JSON | {"Transfer-Encoding": "chunked"}) == (413, "body_too_large")


def test_a_body_of_exactly_the_limit_is_read_and_one_byte_more_is_not(server: Running):
    body = b'{"prompt": "a", "max_tokens": 1}'
    assert server.post("/v1/completions", content=body.ljust(100_000), headers=JSON).status_code == 200
    assert server.post("/v1/completions", content=body.ljust(100_001), headers=JSON).status_code == 413


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_what_a_foreign_web_page_can_send_unasked_is_refused(server: Running, kind: str | None):
    headers = {} if kind is None else {"Content-Type": kind}
    assert send_raw(server, b'{"prompt": "a"}', headers) == (415, "unsupported_media_type")


def test_the_charset_of_the_body_may_be_named(server: Running):
    headers = {"Content-Type": "Application/JSON; charset=utf-8"}
    assert (
        server.post("/v1/completions", content=b'{"prompt": "a", "max_tokens": 1}', headers=headers).status_code == 200
    )
