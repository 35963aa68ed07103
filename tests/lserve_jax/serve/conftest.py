"""One small model for all tests of the HTTP side, and one server over it per file."""

from collections.abc import Iterator

import pytest

from lserve_jax import LLM
from tests.lserve_jax.serve.running import MODEL, HeldEngine, Running, running


@pytest.fixture(scope="session")
def llm() -> LLM:
    return LLM(MODEL, attention="dense", max_model_len=96, max_num_seqs=3, steps_per_call=2, prefill_chunk=16)


@pytest.fixture(scope="module")
def engine(llm: LLM) -> Iterator[HeldEngine]:
    engine = HeldEngine(llm)
    yield engine
    engine.stop()


@pytest.fixture(scope="module")
def shared(engine: HeldEngine) -> Iterator[Running]:
    with running(engine, max_body_bytes=100_000, ping_interval=0.02) as server:
        yield server


@pytest.fixture
def server(shared: Running) -> Iterator[Running]:
    """A server that is as it was before, and has nothing to do."""
    yield shared
    engine = shared.engine
    engine.before_call, engine.refusal = (lambda: None), None
    engine.wait_until_idle()
    engine.submitted.clear()
