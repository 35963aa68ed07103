"""Clients that leave: their requests are gone before the next device call, in every state, and nobody else notices."""

import socket
import threading
from typing import Any
from urllib.parse import urlsplit

import pytest

from lserve_jax.serve.events import to_json
from tests.lserve_jax.serve.running import Running

LONG = "the world " * 6  # several prefill calls


class Calls:
    """Lets the engine make one device call after another, when a test says so."""

    def __init__(self) -> None:
        self.made = 0
        self._permits = threading.Semaphore(0)
        self._waits = threading.Semaphore(0)

    def before_call(self) -> None:
        self._waits.release()
        assert self._permits.acquire(timeout=60)
        self.made += 1

    def wait(self) -> None:
        """Returns when the engine is about to make a call."""
        assert self._waits.acquire(timeout=60)

    def permit(self, count: int = 1) -> None:
        for _ in range(count):
            self._permits.release()


def send(server: Running, path: str, body: dict[str, Any]) -> socket.socket:
    address = urlsplit(server.url)
    connection = socket.create_connection((address.hostname, address.port), timeout=60)
    data = to_json(body)
    lines = f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", f"Content-Length: {len(data)}"
    head = "\r\n".join([*lines, "\r\n"])
    connection.sendall(head.encode() + data)
    return connection


@pytest.mark.parametrize("is_stream", [False, True], ids=["plain", "streaming"])
@pytest.mark.parametrize("calls_before", [0, 1, 6], ids=["queued", "between prefill calls", "decoding"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_request_whose_client_left_ends_before_the_next_call(
    server: Running, path: str, calls_before: int, is_stream: bool
):
    engine, calls = server.engine, Calls()
    cancelled = threading.Event()
    cancel = engine.cancel

    def noted_cancel(tickets: Any) -> None:
        cancel(tickets)
        cancelled.set()

    engine.cancel = noted_cancel
    engine.before_call = calls.before_call
    try:
        body = {"messages": [{"role": "user", "content": LONG}], "prompt": [LONG, "b"], "n": 2, "ignore_eos": True}
        connection = send(server, path, body | {"stream": is_stream, "max_tokens": 20})
        for _ in range(calls_before):
            calls.wait()
            calls.permit()
        calls.wait()  # the engine is about to make the next call
        assert not cancelled.is_set() and len(engine.submitted) > 1
        connection.close()
        assert cancelled.wait(60)
        calls.permit()  # of the call that the engine stood before; it looks at its orders first
        engine.wait_until_idle()
        assert calls.made == calls_before + 1
        scheduler = engine.llm.engine.scheduler
        assert scheduler.is_idle
    finally:
        engine.cancel = cancel
        calls.permit(1000)


def test_another_clients_tokens_do_not_change(server: Running):
    body = {"prompt": LONG, "max_tokens": 20, "ignore_eos": True}
    expected = server.post("/v1/completions", body).json()["choices"]
    calls = Calls()
    server.engine.before_call = calls.before_call
    found: list[Any] = []
    other = threading.Thread(target=lambda: found.append(server.post("/v1/completions", body).json()["choices"]))
    other.start()
    for _ in range(6):
        calls.wait()
        calls.permit()
    leaving = send(server, "/v1/completions", body | {"prompt": "b", "stream": True})
    leaving.recv(10)  # it was accepted
    for _ in range(3):
        calls.permit()
    leaving.close()
    calls.permit(1000)
    other.join()
    assert found == [expected]


def test_a_client_that_leaves_while_it_sends_is_no_fault(server: Running, caplog: pytest.LogCaptureFixture):
    address = urlsplit(server.url)
    connection = socket.create_connection((address.hostname, address.port), timeout=60)
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
    connection.sendall(b"Content-Length: 100\r\n\r\n{")
    counted = server.engine.metrics.responses
    connection.close()
    assert server.post("/v1/completions", {"prompt": "a", "max_tokens": 1}).status_code == 200
    assert counted[-1] == ("/v1/completions", 200)
    assert "a request failed" not in caplog.text and not server.engine.submitted[1:]
