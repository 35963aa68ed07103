"""A server for tests: the application on a real socket, over an engine thread that tests can hold."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from lserve_jax import LLM, RequestOutput, SamplingParams
from lserve_jax.engine.progress import Progress
from lserve_jax.serve.app import build_app
from lserve_jax.serve.engine_thread import EngineThread, Health
from lserve_jax.serve.metrics import Metrics
from lserve_jax.serve.options import ServeOptions
from lserve_jax.serve.ticket import Ticket
from lserve_jax.text.tokenizer import Tokenizer

MODEL = str(Path(__file__).parents[2] / "golden" / "tiny" / "llama3")
NAME = "tiny"


class Counts(Metrics):
    """Metrics that remember the responses by route and status."""

    def __init__(self) -> None:
        super().__init__()
        self.responses: list[tuple[str, int]] = []

    def http(self, route: str, status: int) -> None:
        super().http(route, status)
        self.responses.append((route, status))


class HeldEngine(EngineThread):
    """The engine thread; tests may hold it before a device call, refuse for it, and say how it is."""

    metrics: Counts

    def __init__(self, llm: LLM) -> None:
        self.ahead = 0.0  # seconds by which its clock is set forward
        super().__init__(llm, ServeOptions(), Counts(), clock=lambda: time.perf_counter() + self.ahead)
        self.state: Health | None = None
        self.refusal: Exception | None = None
        self.before_call: Callable[[], object] = lambda: None
        self.submitted: list[Ticket] = []
        step = llm.session.step

        def held_step() -> list[Progress]:
            self.before_call()
            return step()

        llm.session.step = held_step
        self.start()
        self.wait_until_warm()

    def health(self) -> Health:
        return self.state or super().health()

    def submit(self, tickets: Sequence[Ticket]) -> None:
        if self.refusal is not None:
            raise self.refusal
        super().submit(tickets)
        self.submitted += tickets

    def wait_until_idle(self) -> None:
        """Returns when no request is open and nothing else waits."""
        with self._lock:
            assert self._has_ended_some.wait_for(lambda: not self._open, 60)
        done = threading.Event()
        self._work.put(done.set)
        assert done.wait(60)
        assert self.llm.session.is_idle

    def stop(self) -> None:
        super().stop()
        del self.llm.session.step  # what the class has


@dataclass
class Running:
    """A server that listens.

    Attributes:
      url: its address.
      engine: the engine under it.
    """

    url: str
    engine: HeldEngine

    @property
    def llm(self) -> LLM:
        return self.engine.llm

    @property
    def tokenizer(self) -> Tokenizer:
        assert self.llm.tokenizer is not None
        return self.llm.tokenizer

    def alone(self, prompt: Any, *, max_tokens: int = 8, **params: Any) -> RequestOutput:
        """The output of a prompt, or of a list of messages, in this process, with nothing else running."""
        self.engine.wait_until_idle()
        is_chat = isinstance(prompt, list) and isinstance(prompt[0], dict)
        ids = self.llm.render_chat(prompt) if is_chat else prompt
        (output,) = self.llm.generate([ids], SamplingParams(max_tokens=max_tokens, **params))
        return output

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        sent: dict[str, Any] = {"json": body} if body is not None else {}
        with httpx.Client(timeout=60) as client:
            return client.post(self.url + path, **sent, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        with httpx.Client(timeout=60) as client:
            return client.get(self.url + path, **options)


@contextmanager
def running(engine: HeldEngine, **options: Any) -> Iterator[Running]:
    """Yields a server on a free port; the one place where tests build the application."""
    app = build_app(engine, ServeOptions(served_model_name=NAME, **options))
    config = uvicorn.Config(app, port=0, log_config=None, access_log=False, timeout_graceful_shutdown=5, ws="none")
    server = uvicorn.Server(config)
    is_up = threading.Event()
    startup = server.startup

    async def noted_startup(sockets: Any = None) -> None:
        await startup(sockets)
        is_up.set()

    server.startup = noted_startup
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert is_up.wait(60)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Running(f"http://127.0.0.1:{port}", engine)
    finally:
        server.should_exit = True
        thread.join()
