"""The fields of requests: strict types, what is refused by name, what is ignored."""

import logging
from typing import Any

import pytest
from pydantic import ValidationError

from lserve_jax.serve import protocol
from lserve_jax.serve.errors import ApiError, api_error
from lserve_jax.serve.protocol import ChatRequest, CompletionRequest

MESSAGES = [{"role": "user", "content": "a"}]

# Of both routes unless the name says so: the body, the field that the error names, and its code.
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"max_tokens": "5"}, "max_tokens", "invalid_type"),
    ({"max_tokens": True}, "max_tokens", "invalid_type"),
    ({"max_tokens": 1.5}, "max_tokens", "invalid_type"),
    ({"max_tokens": 10**400}, "max_tokens", "invalid_value"),
    ({"temperature": "hot"}, "temperature", "invalid_type"),
    ({"temperature": True}, "temperature", "invalid_type"),
    ({"temperature": float("inf")}, "temperature", "invalid_value"),
    ({"temperature": 10**400}, "temperature", "invalid_type"),
    ({"top_p": [1]}, "top_p", "invalid_type"),
    ({"n": 0}, "n", "invalid_value"),
    ({"n": 129}, "n", "invalid_value"),
    ({"n": 2.0}, "n", "invalid_type"),
    ({"seed": 2**64}, "seed", "invalid_value"),
    ({"stop": 5}, "stop", "invalid_type"),
    ({"stop": ["a", 5]}, "stop.1", "invalid_type"),
    ({"stop": ["a"] * 17}, "stop", "invalid_value"),
    ({"stop": "a" * 1001}, "stop.0", "invalid_value"),
    ({"bad_words": ["a"] * 1001}, "bad_words", "invalid_value"),
    ({"logit_bias": dict.fromkeys(map(str, range(10_001)), 1)}, "logit_bias", "invalid_value"),
    ({"stop_token_ids": [1, "2"]}, "stop_token_ids.1", "invalid_type"),
    ({"logit_bias": {"5": "a"}}, "logit_bias.5", "invalid_type"),
    ({"logit_bias": [5]}, "logit_bias", "invalid_type"),
    ({"stream": "yes"}, "stream", "invalid_type"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage", "invalid_type"),
    ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs", "invalid_value"),
    ({"prompt_logprobs": 21}, "prompt_logprobs", "invalid_value"),
    ({"priority": 1.5}, "priority", "invalid_type"),
    ({"timeout_s": 0}, "timeout_s", "invalid_value"),
    ({"timeout_s": -0.5}, "timeout_s", "invalid_value"),
    ({"timeout_s": float("inf")}, "timeout_s", "invalid_value"),
    ({"timeout_s": "5"}, "timeout_s", "invalid_type"),
    ({"timeout_s": True}, "timeout_s", "invalid_type"),
    ({"request_id": "a b"}, "request_id", "invalid_value"),
    ({"request_id": "a\r\nSet-Cookie: x"}, "request_id", "invalid_value"),
    ({"request_id": "a\n"}, "request_id", "invalid_value"),
    ({"model": 5}, "model", "invalid_type"),
    ({"best_of": 2}, "best_of", "unsupported_parameter"),
    ({"best_of": 1, "n": 2}, "best_of", "unsupported_parameter"),
    ({"suffix": "x"}, "suffix", "unsupported_parameter"),
    ({"tools": [{"type": "function"}]}, "tools", "unsupported_parameter"),
    ({"tool_choice": "required"}, "tool_choice", "unsupported_parameter"),
    ({"functions": [{}]}, "functions", "unsupported_parameter"),
    ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
    ({"guided_json": {}}, "guided_json", "unsupported_parameter"),
    ({"chat_template": "/etc/passwd"}, "chat_template", "unsupported_parameter"),
    ({"use_beam_search": True}, "use_beam_search", "unsupported_parameter"),
    ({"audio": {}}, "audio", "unsupported_parameter"),
    ({"modalities": ["text", "audio"]}, "modalities", "unsupported_parameter"),
]
OF_CHATS: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": None}, "messages", "missing_required_parameter"),
    ({"messages": []}, "messages", "invalid_value"),
    ({"messages": ["a"]}, "messages.0", "invalid_type"),
    ({"messages": {"role": "user"}}, "messages", "invalid_type"),
    ({"stop": ["a"] * 5}, "stop", "invalid_value"),
    ({"logprobs": 1}, "logprobs", "invalid_type"),
    ({"top_logprobs": 5}, "top_logprobs", "invalid_value"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message", "invalid_value"),
    ({"echo": True}, "echo", "unsupported_parameter"),
    ({"chat_template_kwargs": "x"}, "chat_template_kwargs", "invalid_type"),
]
OF_COMPLETIONS: list[tuple[dict[str, Any], str, str]] = [
    ({"logprobs": True}, "logprobs", "invalid_type"),
    ({"logprobs": 21}, "logprobs", "invalid_value"),
    ({"logprobs": -1}, "logprobs", "invalid_value"),
    ({"echo": "yes"}, "echo", "invalid_type"),
    ({"max_tokens": 0}, "max_tokens", "invalid_value"),
    ({"stream": True, "echo": True, "logprobs": 1}, "echo", "invalid_value"),
]


def refusal(kind: Any, body: dict[str, Any]) -> ApiError:
    base = {"messages": MESSAGES} if kind is ChatRequest else {"prompt": "a"}
    with pytest.raises((ValidationError, ApiError)) as caught:
        kind.of(base | body)
    return api_error(caught.value)


@pytest.mark.parametrize(
    ("kind", "body", "param", "code"),
    [
        *((kind, *case) for kind in (ChatRequest, CompletionRequest) for case in REFUSED),
        *((ChatRequest, *case) for case in OF_CHATS),
        *((CompletionRequest, *case) for case in OF_COMPLETIONS),
    ],
)
def test_what_is_wrong_is_refused_by_name(kind: Any, body: dict[str, Any], param: str, code: str):
    found = refusal(kind, body)
    assert (found.status, found.code, found.param) == (400, code, param)
    assert len(str(found)) < 300 and "\n" not in str(found)


@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest])
def test_a_missing_prompt_is_named(kind: Any):
    with pytest.raises(ValidationError) as caught:
        kind.of({})
    assert api_error(caught.value).code == "missing_required_parameter"


NEUTRAL: dict[str, Any] = {
    "tools": [],
    "tool_choice": "none",
    "response_format": {"type": "text"},
    "suffix": None,
    "best_of": 1,
    "modalities": ["text"],
    "user": "someone",
    "metadata": {"a": "b"},
    "store": False,
    "parallel_tool_calls": True,
    "seed": -1,
    "stop": "a",
    "n": None,
    "stream": None,
    "stream_options": None,
    "temperature": 1,
    "logit_bias": {"5": 1},
    "length_penalty": 1.0,
    "use_beam_search": False,
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_what_asks_for_nothing_special_passes_and_is_known(name: str):
    request = ChatRequest.of({"messages": MESSAGES, name: NEUTRAL[name]})
    assert request.ignored() == []


@pytest.mark.parametrize("cls", [ChatRequest, CompletionRequest])
def test_null_is_the_same_as_none_given(cls: type[ChatRequest | CompletionRequest]):
    """A client that names every field gives null to those that it does not use."""
    least = {"messages": MESSAGES} if cls is ChatRequest else {"prompt": "a"}
    assert cls.of(dict.fromkeys((*cls.model_fields, "tools", "invented")) | least) == cls.of(least)


def test_lm_evals_stop_texts_pass_for_completions():
    request = CompletionRequest.of({"prompt": "a", "stop": ["a"] * 16})
    assert len(request.stop or ()) == 16


def test_unknown_fields_are_ignored_and_logged_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(protocol, "_logged", set())
    with caplog.at_level(logging.WARNING, logger="lserve_jax"):
        for _ in range(3):
            request = CompletionRequest.of({"prompt": "a", "max_token": 5, "x\n" * 999: [1]})
            assert request.ignored() == ["max_token", "x\n" * 999]
    assert len(caplog.records) == 1
    assert "max_token" in caplog.text and len(caplog.records[0].message) < 400
    assert "\n" not in caplog.records[0].message


def test_names_that_someone_invents_do_not_fill_the_memory_or_the_log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(protocol, "_logged", set())
    monkeypatch.setattr(protocol, "_MOST_NAMES", 5)
    for number in range(20):
        CompletionRequest.of({"prompt": "a", f"field{number}": 1}).ignored()
    assert len(caplog.records) == len(protocol._logged) == 5


def test_a_long_name_does_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(protocol, "_logged", set())
    CompletionRequest.of({"prompt": "a", "x" * 1_000_000: 1}).ignored()
    assert [len(name) for name in protocol._logged] == [100]


@pytest.mark.parametrize("name", ["stop", "bad_words", "stop_token_ids", "suppress_tokens", "logit_bias", "messages"])
def test_a_million_wrong_values_are_one_error(name: str):
    """Else 64 MiB of them would take 10 GiB."""
    wrong: Any = {str(index): "a" for index in range(50_000)} if name == "logit_bias" else [None] * 50_000
    with pytest.raises(ValidationError) as caught:
        ChatRequest.of({"messages": MESSAGES} | {name: wrong})
    assert caught.value.error_count() == 1
