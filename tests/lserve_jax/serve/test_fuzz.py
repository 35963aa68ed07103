"""Bodies that nobody thought of: each becomes requests to the engine, or a 4xx of one line; nothing else."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lserve_jax import LLM
from lserve_jax.serve.body import parse_body
from lserve_jax.serve.chat import begin_chat
from lserve_jax.serve.completions import begin_completion
from lserve_jax.serve.engine_thread import EngineThread
from lserve_jax.serve.errors import api_error
from lserve_jax.serve.options import ServeOptions
from lserve_jax.serve.protocol import _HARMLESS, _UNSUPPORTED, ChatRequest, CompletionRequest
from lserve_jax.serve.routes import detokenize, tokenize
from lserve_jax.serve.service import Service, Trace

pytestmark = pytest.mark.slow

FIELDS = sorted({*ChatRequest.model_fields, *CompletionRequest.model_fields, *_UNSUPPORTED, *_HARMLESS, "tokens"})

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-2, 130)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["a", "tiny", "<|im_end|>", "user", "text", 10**300, -(2**63), 1e308, 2**31])
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "5", "include_usage"]), inner, max_size=4)
    ),
    max_leaves=8,
)
plausible = {
    "messages": st.lists(
        st.fixed_dictionaries({"role": st.sampled_from(["user", "x"]), "content": values}), max_size=3
    ),
    "prompt": st.text(max_size=9) | st.lists(st.integers(-1, 130), max_size=9),
}
bodies = st.dictionaries(st.sampled_from(FIELDS), values, max_size=2).flatmap(
    lambda body: st.fixed_dictionaries(plausible).map(lambda more: {**more, **body})
)


def outcome(act: Callable[[], Any]) -> Any:
    """What a function returns, or what a client is told instead."""
    try:
        return act()
    except Exception as error:  # noqa: BLE001 - the test says what may come
        return api_error(error)


@pytest.fixture(scope="module")
def service(llm: LLM) -> Service:
    return Service(EngineThread(llm, ServeOptions()), ServeOptions(served_model_name="tiny"))


def check(service: Service, make: Callable[[Service, Mapping[str, Any]], Any], body: Any) -> None:
    found = outcome(lambda: make(service, parse_body(json.dumps(body).encode())))
    if hasattr(found, "status"):
        assert found.status in (400, 404), found
        message = found.body()["error"]["message"]
        assert message and len(message.splitlines()) == 1 and len(message) < 4200
        json.dumps(found.body()).encode()


@settings(max_examples=250)
@given(body=bodies)
def test_any_body_of_a_chat(service: Service, body: dict[str, Any]):
    check(service, lambda service, body: begin_chat(service, body, Trace()), body)


@settings(max_examples=250)
@given(body=bodies)
def test_any_body_of_a_completion(service: Service, body: dict[str, Any]):
    check(service, lambda service, body: begin_completion(service, body, Trace()), body)


@settings(max_examples=100)
@given(body=bodies)
def test_any_body_of_the_tokenizers_routes(service: Service, body: dict[str, Any]):
    check(service, tokenize, body)
    check(service, detokenize, body)


@settings(max_examples=300)
@given(data=st.binary(max_size=40) | st.text(max_size=40).map(str.encode))
def test_any_bytes(service: Service, data: bytes):
    found = outcome(lambda: begin_completion(service, parse_body(data), Trace()))
    assert found.status in (400, 404)
