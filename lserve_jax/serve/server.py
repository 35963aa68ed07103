"""uvicorn around the app: the port is taken first, the address printed when it can answer, and a signal ends in order.

While requests end after SIGTERM, the server still listens, so that /health can say "draining" and others are refused
with an answer and not a broken connection.
"""

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from starlette.applications import Starlette

from lserve_jax.config.errors import InputError, shown
from lserve_jax.serve.engine_thread import EngineThread

logger = logging.getLogger("lserve_jax")

_GOODBYE_S = 5
"""How long answers may take to leave after the engine has ended."""


def take_port(host: str, port: int) -> socket.socket:
    """Returns a socket bound to an address, not listening yet; port 0 takes a free one.

    Raises:
      InputError: if the address is none of this machine's, or in use.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise InputError(f"--host {shown(host)} is not an address of this machine ({error})") from None
    family, kind, protocol, _, address = min(found, key=lambda one: one[0] != socket.AF_INET)  # as most clients do
    taken = socket.socket(family, kind, protocol)
    try:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
    except OSError as error:
        taken.close()
        raise InputError(
            f"cannot listen at {host}:{port} ({error.strerror}): another --port or --host may be free"
        ) from None
    return taken


def address_of(taken: socket.socket) -> str:
    """Returns the URL at which a client on this machine finds a socket."""
    host, port = taken.getsockname()[:2]
    nearest = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{nearest}]:{port}" if taken.family == socket.AF_INET6 else f"http://{nearest}:{port}"


def serve(
    app: Starlette, thread: EngineThread, taken: socket.socket, *, drain_timeout: float, on_ready: Callable[[], None]
) -> None:
    """Starts the engine and serves until a signal ends both.

    SIGTERM and SIGINT let open requests end within ``drain_timeout`` seconds; a second SIGINT ends the process at once.

    Args:
      app: the routes.
      thread: the engine, not started.
      taken: the socket to listen at.
      drain_timeout: seconds.
      on_ready: called when the engine can answer.

    Raises:
      Exception: what kept the engine from getting ready.
    """
    config = uvicorn.Config(
        app, log_config=None, access_log=False, ws="none", server_header=False, timeout_graceful_shutdown=_GOODBYE_S
    )
    server = _Server(config, thread, drain_timeout, on_ready)
    server.run(sockets=[taken])
    if server.is_broken:
        thread.wait_until_warm()  # raises the cause
    if thread.is_alive:  # compiling or in a device call: nothing can interrupt it, and the interpreter would wait
        _end_now(0)


class _Server(uvicorn.Server):
    """uvicorn with other signals: the first drains the engine before connections are closed."""

    def __init__(
        self, config: uvicorn.Config, thread: EngineThread, drain_timeout: float, on_ready: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self.is_broken = False
        self._engine = thread
        self._drain_timeout = drain_timeout
        self._on_ready: Callable[[], None] | None = on_ready
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens, and then starts the engine: compilation leaves little time for others."""
        await super().startup(sockets)
        self._engine.start()

    async def on_tick(self, counter: int) -> bool:
        """Returns whether to end; announces once that the engine is ready, and ends if it never will be."""
        if self._on_ready is not None and (status := self._engine.health().status) != "loading":
            on_ready, self._on_ready = self._on_ready, None
            if status == "ready":
                on_ready()
            elif status == "dead":
                self.is_broken = self.should_exit = True
        return await super().on_tick(counter)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Takes SIGTERM and SIGINT while the server runs."""
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGTERM, signal.SIGINT)
        for number in numbers:
            loop.add_signal_handler(number, self._on_signal, number)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    def _on_signal(self, number: int) -> None:
        if self._draining is None:
            self._draining = asyncio.get_running_loop().create_task(self._drain())
        elif number == signal.SIGINT:
            _end_now(128 + number)

    async def _drain(self) -> None:
        logger.info(f"ending: open requests have {self._drain_timeout:g} s; another Ctrl-C ends at once")
        try:
            await asyncio.to_thread(self._engine.drain, self._drain_timeout)
        finally:
            self.should_exit = True


def _end_now(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
