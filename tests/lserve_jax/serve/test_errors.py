"""Every exception as a status and a body in OpenAI's shape."""

import logging

import pytest
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from lserve_jax.config.errors import InputError
from lserve_jax.serve.errors import ApiError, DeadlinePassed, NotReady, QueueFull, api_error, bad_request
from lserve_jax.serve.protocol import CompletionRequest

CASES = {
    "a wrong setting": (InputError("x must be y"), 400, "invalid_value", "invalid_request_error"),
    "a full queue": (QueueFull(2.1), 429, "queue_full", "rate_limit_error"),
    "loading": (NotReady("loading", "weights"), 503, "loading", "server_error"),
    "draining": (NotReady("draining"), 503, "draining", "server_error"),
    "dead": (NotReady("dead", "out of memory"), 503, "dead", "server_error"),
    "too long": (DeadlinePassed(), 504, "timeout", "server_error"),
    "no such route": (HTTPException(404), 404, "not_found", "invalid_request_error"),
    "a wrong key": (ApiError(401, "invalid_api_key", "no"), 401, "invalid_api_key", "authentication_error"),
}


@pytest.mark.parametrize("name", CASES)
def test_each_error_has_its_status_code_and_type(name: str):
    error, status, code, kind = CASES[name]
    found = api_error(error)
    assert found.status == status
    assert {"code": code, "type": kind}.items() <= found.body()["error"].items()
    assert set(found.body()["error"]) == {"message", "type", "param", "code"}


def test_a_full_queue_says_when_to_come_back_in_whole_seconds():
    assert api_error(QueueFull(2.1)).headers == {"Retry-After": "3"}
    assert api_error(QueueFull(0.0)).headers == {"Retry-After": "1"}


def test_a_fault_of_ours_is_logged_and_kept_from_the_client(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.ERROR, logger="lserve_jax"):
        found = api_error(KeyError("a secret"))
    assert (found.status, found.code, found.headers) == (500, "internal_error", {"x-should-retry": "false"})
    assert "secret" not in str(found)
    assert "a secret" in caplog.text


def test_what_a_client_did_wrong_is_not_logged_as_a_fault(caplog: pytest.LogCaptureFixture):
    for error, *_ in CASES.values():
        api_error(error)
    api_error(bad_request("x"))
    assert not caplog.records


def test_a_wrong_type_names_the_field_and_cuts_what_was_sent():
    with pytest.raises(ValidationError) as caught:
        CompletionRequest.model_validate({"prompt": "a", "max_tokens": "9" * 10_000, "stream": 1})
    found = api_error(caught.value)
    assert (found.status, found.code, found.param) == (400, "invalid_type", "max_tokens")
    assert str(found).startswith("max_tokens: must be a valid integer, got '999")
    assert len(str(found)) < 200
