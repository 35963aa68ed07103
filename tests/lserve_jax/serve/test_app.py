"""The routes beside those that generate, and what a server says that cannot answer."""

from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from lserve_jax import LLM
from lserve_jax.serve.engine_thread import Health
from lserve_jax.serve.errors import NotReady, QueueFull
from lserve_jax.serve.options import ServeOptions
from lserve_jax.serve.service import Service
from tests.lserve_jax.serve.running import NAME, HeldEngine, Running


@pytest.fixture
def healthy(server: Running) -> Iterator[Running]:
    yield server
    server.engine.state = None


@pytest.mark.parametrize("path", ["/health", "/ping"])
def test_health_is_good_only_when_the_engine_can_answer(healthy: Running, path: str):
    assert (healthy.get(path).status_code, healthy.get(path).json()["status"]) == (200, "ready")
    for status in ("loading", "draining", "stuck", "dead"):
        healthy.engine.state = Health(status, "a reason")
        found = healthy.get(path)
        assert (found.status_code, found.json()) == (503, {"status": status, "detail": "a reason"})


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("is_stream", [False, True])
def test_what_the_engine_refuses_is_refused_before_the_first_byte(server: Running, path: str, is_stream: bool):
    body = {"prompt": "a", "messages": [{"role": "user", "content": "a"}], "stream": is_stream}
    server.engine.refusal = QueueFull(4.5)
    found = server.post(path, body)
    assert (found.status_code, found.json()["error"]["code"], found.headers["retry-after"]) == (429, "queue_full", "5")
    server.engine.refusal = NotReady("draining", "the server is going down")
    found = server.post(path, body)
    assert (found.status_code, found.json()["error"]["code"]) == (503, "draining")


def test_models(server: Running):
    found = server.get("/v1/models").json()
    (card,) = found["data"]
    assert found["object"] == "list"
    assert (card["id"], card["object"], card["max_model_len"]) == (NAME, "model", 96)
    assert server.get(f"/v1/models/{NAME}").json() == card
    missing = server.get("/v1/models/a/b")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")


def test_a_model_is_called_by_the_last_part_of_its_path(llm: LLM, engine: HeldEngine):
    assert Service(engine, ServeOptions()).model == "llama3"


def test_a_text_is_tokenized_as_lm_eval_asks(server: Running):
    tokenizer = server.llm.tokenizer
    assert tokenizer is not None
    for adds in (True, False):
        found = server.post("/tokenize", {"prompt": "hello world", "add_special_tokens": adds}).json()
        assert found["tokens"] == tokenizer.encode("hello world", add_special_tokens=adds)
        assert (found["count"], found["max_model_len"]) == (len(found["tokens"]), 96)
    assert server.post("/detokenize", {"tokens": found["tokens"]}).json() == {"prompt": "hello world"}
    assert server.post("/tokenize", {"prompt": "", "add_special_tokens": False}).json()["tokens"] == []


def test_a_chat_is_tokenized_as_it_is_answered(server: Running):
    messages = [{"role": "user", "content": "hello"}]
    found = server.post("/tokenize", {"messages": messages, "return_token_strs": True}).json()
    assert found["tokens"] == server.llm.render_chat(messages)
    assert "".join(found["token_strs"]) == server.tokenizer.render_chat(messages)


def test_special_tokens_and_the_template_are_told(server: Running):
    found = server.get("/tokenizer_info").json()
    assert (found["bos_token"], found["eos_token"], found["pad_token"]) == ("<s>", "</s>", None)
    assert found["chat_template"] == server.tokenizer.chat_template


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{}]}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": [{}]}, "messages"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {"tokens": [True]}, "tokens.0"),
        ("/detokenize", {"tokens": [-1]}, "tokens.0"),
        ("/detokenize", {"tokens": [10**30]}, "tokens.0"),
    ],
)
def test_the_tokenizers_routes_refuse_what_they_cannot_read(server: Running, path: str, body: Any, param: str):
    found = server.post(path, body)
    assert (found.status_code, found.json()["error"]["param"]) == (400, param)


def test_unknown_ids_have_no_text(server: Running):
    assert server.post("/detokenize", {"tokens": [2**31 - 1]}).json() == {"prompt": ""}


def test_metrics_and_version(server: Running):
    server.get("/health")
    found = server.get("/metrics")
    assert found.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = {family.name: family for family in text_string_to_metric_families(found.text)}
    samples = families["lserve_http_requests"].samples
    (alive,) = (
        one for one in samples if one.name.endswith("_total") and one.labels == {"route": "/health", "status": "200"}
    )
    assert alive.value >= 1
    assert server.get("/version").json()["version"]


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("OPTIONS", "/v1/completions", 405, "method_not_allowed"),
        ("POST", "/health", 405, "method_not_allowed"),
        ("GET", "/%ff%00", 404, "not_found"),
    ],
)
def test_what_is_not_there_is_said_in_openais_shape(server: Running, method: str, path: str, status: int, code: str):
    import httpx

    found = httpx.request(method, server.url + path)
    assert (found.status_code, found.json()["error"]["code"]) == (status, code)
    assert set(found.json()["error"]) == {"message", "type", "param", "code"}
    if status == 405:
        assert found.headers["allow"]


@pytest.mark.parametrize("path", ["/v1/completions/", "/v1/models/", "/health/"])
def test_a_path_with_a_slash_too_many_is_an_error_and_no_redirect(server: Running, path: str):
    found = server.post(path, {}) if "completions" in path else server.get(path)
    assert (found.status_code, found.json()["error"]["type"]) == (404, "invalid_request_error")
