"""`timeout_s` over HTTP: a request that takes longer ends, before its first call or between two, and others do not."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.lserve_jax.serve.running import HeldEngine, Running, running
from tests.lserve_jax.serve.test_disconnect import Calls

PATHS = ["/v1/chat/completions", "/v1/completions"]
NO_TIME = 1e-9  # over before the engine can make a call
HOURS = 10_000.0  # longer than any test


def body(**fields: Any) -> dict[str, Any]:
    """A body of either route, which ignores the other's field."""
    prompt = {"prompt": "hello", "messages": [{"role": "user", "content": "hello"}]}
    return {**prompt, "max_tokens": 8, "ignore_eos": True, **fields}


def events(stream: bytes) -> list[str]:
    """The data of a stream's events; comments are left out."""
    return [part.removeprefix("data: ") for part in stream.decode().split("\n\n") if part.startswith("data: ")]


@pytest.fixture(scope="module")
def limited(engine: HeldEngine) -> Iterator[Running]:
    with running(engine, request_timeout=HOURS) as server:
        yield server


@pytest.mark.parametrize("path", PATHS)
def test_a_request_whose_time_is_over_gets_504_and_no_call(server: Running, path: str):
    calls: list[None] = []
    server.engine.before_call = lambda: calls.append(None)
    found = server.post(path, body(timeout_s=NO_TIME))
    error = found.json()["error"]
    assert (found.status_code, error["code"], error["type"]) == (504, "timeout", "server_error")
    assert "timeout_s" in error["message"]
    assert found.headers["x-should-retry"] == "false"
    assert not calls


@pytest.mark.parametrize("path", PATHS)
def test_a_stream_whose_time_is_over_ends_with_an_error(server: Running, path: str):
    found = server.post(path, body(timeout_s=NO_TIME, stream=True))
    assert found.status_code == 200
    assert json.loads(events(found.content)[-1])["error"]["code"] == "timeout"


@pytest.mark.parametrize("path", PATHS)
def test_enough_time_changes_nothing(server: Running, path: str):
    answers = [server.post(path, body(**fields)).json() for fields in ({}, {"timeout_s": HOURS}, {"timeout_s": None})]
    assert len({json.dumps(found["choices"]) for found in answers}) == 1
    assert answers[0]["usage"]["completion_tokens"] == 8


def test_time_runs_out_between_two_calls_for_its_request_alone(server: Running, monkeypatch: pytest.MonkeyPatch):
    whole = body(max_tokens=40)
    expected = server.post(PATHS[1], whole).json()["choices"]
    calls = Calls()
    server.engine.before_call = calls.before_call
    with ThreadPoolExecutor(1) as pool:
        patient = pool.submit(server.post, PATHS[1], whole)
        calls.wait()
        hurried = whole | {"timeout_s": HOURS / 2, "n": 2, "stream": True}
        with httpx.stream("POST", server.url + PATHS[1], json=hurried, timeout=60) as answer:
            for _ in range(8):
                calls.permit()
                calls.wait()
            monkeypatch.setattr(server.engine, "ahead", HOURS)
            calls.permit(1000)
            *chunks, last = (json.loads(line) for line in events(answer.read()))
        assert patient.result().json()["choices"] == expected
    assert {choice["index"] for chunk in chunks for choice in chunk["choices"]} == {0, 1}
    assert last["error"]["code"] == "timeout"


@pytest.mark.parametrize("path", PATHS)
def test_no_request_gets_more_time_than_the_server_gives(limited: Running, path: str):
    found = limited.post(path, body(timeout_s=HOURS + 1))
    error = found.json()["error"]
    assert (found.status_code, error["code"], error["param"]) == (400, "invalid_value", "timeout_s")
    assert error["message"] == "timeout_s: at most 10000.0 seconds (the server's --request-timeout), got 10001.0"
    assert limited.post(path, body(timeout_s=HOURS)).status_code == 200


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("value", "code"), [("0", "invalid_value"), ("1e999", "invalid_value"), ('"5"', "invalid_type")]
)
def test_what_is_no_time_is_refused_by_name(server: Running, path: str, value: str, code: str):
    sent = json.dumps(body(timeout_s="here")).replace('"here"', value)
    found = server.post(path, content=sent, headers={"Content-Type": "application/json"})
    error = found.json()["error"]
    assert (found.status_code, error["code"], error["param"]) == (400, code, "timeout_s")
