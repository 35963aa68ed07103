"""The kind "http": damaged requests to a server of a tiny model, in this process but on a real socket."""

import atexit
import random
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import uvicorn

from lserve_jax import LLM
from lserve_jax.config.errors import InputError
from lserve_jax.serve.app import build_app
from lserve_jax.serve.engine_thread import EngineThread
from lserve_jax.serve.options import ServeOptions
from lserve_jax.serve.server import take_port
from tests.fuzz.requests import answer_to, damaged_request, plain_answer
from tests.raw_http import Address

_MODEL = Path(__file__).parents[1] / "golden" / "tiny" / "llama3"


@contextmanager
def served(llm: LLM, options: ServeOptions) -> Iterator[tuple[EngineThread, Address]]:
    """Yields the engine thread and the address of a server on a free port, which ends at the end."""
    thread = EngineThread(llm, options)
    thread.start()
    thread.wait_until_warm()
    taken = take_port("127.0.0.1", 0)
    config = uvicorn.Config(
        build_app(thread, options), log_config=None, access_log=False, ws="none", timeout_graceful_shutdown=5
    )
    server = uvicorn.Server(config)
    taken.listen(1024)  # from here on clients are not refused, they wait
    loop = threading.Thread(target=server.run, kwargs={"sockets": [taken]}, daemon=True)
    loop.start()
    try:
        yield thread, taken.getsockname()[:2]
    finally:
        thread.stop()
        server.should_exit = True
        loop.join()


@cache
def _server() -> Address:
    """Returns the address of the server of this process, which ends with it."""
    sizes: dict[str, Any] = {"page_size": 8, "sub_page_size": 8, "prefill_chunk": 16, "steps_per_call": 2}
    try:
        llm = LLM(str(_MODEL), attention="dense", max_model_len=96, max_num_seqs=3, **sizes)
    except InputError as error:
        raise AssertionError("the server does not start") from error  # else it would count as refused input
    kept = ExitStack()
    atexit.register(kept.close)
    options = ServeOptions(
        served_model_name="tiny",
        default_max_tokens=4,
        max_queued_requests=16,
        max_body_bytes=100_000,
        contexts=kept.enter_context(tempfile.TemporaryDirectory()),
    )
    return kept.enter_context(served(llm, options))[1]


@cache
def _expected() -> object:
    return plain_answer(_server())


def http(rng: random.Random, folder: Path) -> None:
    """A request over HTTP; then a plain one, whose answer must be what it always is."""
    del folder
    expected = _expected()
    # One of the fields that are damaged is a time, which may become too short for any answer.
    message = answer_to(_server(), damaged_request(rng), allowed=frozenset({"timeout"}))
    assert plain_answer(_server()) == expected, "the server does not answer as before"
    if message is not None:
        raise InputError(message)
