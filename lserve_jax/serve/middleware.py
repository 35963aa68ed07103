"""What holds for every request: an id, a line in the log, a count, and who may ask."""

import hmac
import logging
import re
import time
from collections.abc import Sequence
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lserve_jax.config.errors import shown
from lserve_jax.serve.errors import ApiError
from lserve_jax.serve.events import Json
from lserve_jax.serve.metrics import Metrics
from lserve_jax.serve.options import is_address
from lserve_jax.serve.protocol import REQUEST_ID
from lserve_jax.serve.service import Trace

OPEN_PATHS = frozenset({"/health", "/ping"})
"""Paths that need no key: what watches a server has none."""
_WATCHED = OPEN_PATHS | {"/metrics"}  # every few seconds, by what watches a server
_MOST_NAMED = 20  # ignored fields that a response names

logger = logging.getLogger("lserve_jax")


def trace_of(scope: Scope) -> Trace:
    """Returns what is known of a request."""
    return scope["lserve_jax.trace"]


class Tracing:
    """Gives each request an id, which the client may name in X-Request-Id, logs it, and counts its response.

    Args:
      app: the application.
      metrics: counts responses.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        trace, start, status = Trace(), time.perf_counter(), 0
        if REQUEST_ID.fullmatch(named := Headers(scope=scope).get("x-request-id", "")):
            trace.id = named
        scope["lserve_jax.trace"] = trace

        async def traced_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self._metrics.http(trace.route, status)
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = trace.id
                if trace.ignored:
                    headers["X-Ignored-Fields"] = _header_list(trace.ignored)
            await send(message)

        try:
            await self._app(scope, receive, traced_send)
        finally:
            seconds = time.perf_counter() - start
            path = quote(scope["path"][:200])
            level = logging.DEBUG if trace.route in _WATCHED else logging.INFO
            logger.log(level, f"{trace.id} {scope['method']} {path} {status} {seconds:.3f} s")


def _header_list(names: Sequence[str]) -> str:
    # No name is left empty: a header must not end with the space after a comma.
    found = [re.sub(r"[^\w.-]", "?", name, flags=re.ASCII)[:64] or "?" for name in names[:_MOST_NAMED]]
    return ", ".join(found)


class ApiKey:
    """Refuses requests that do not bring the key as their bearer token.

    Args:
      app: the application.
      key: what to bring.
    """

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._key = key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request."""
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS and not self._is_right(scope):
            error = ApiError(401, "invalid_api_key", "this server needs its API key as the bearer token")
            await Json(error.body(), 401, {"WWW-Authenticate": "Bearer"})(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _is_right(self, scope: Scope) -> bool:
        kind, _, token = Headers(scope=scope).get("authorization", "").partition(" ")
        # Headers are read as Latin-1. The comparison takes as long for every wrong token.
        return kind.lower() == "bearer" and hmac.compare_digest(token.strip().encode("latin-1"), self._key)


class LocalName:
    """Refuses requests that name this machine as a foreign web page does.

    The name of the page's own server may lead to this machine (DNS rebinding). A browser then takes this server for
    that one, and the page may read its answers.

    Args:
      app: the application.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request."""
        name = Headers(scope=scope).get("host", "localhost") if scope["type"] == "http" else "localhost"
        if _is_local_name(re.sub(r":\d*$", "", name).lower()):
            await self._app(scope, receive, send)
        else:
            message = f"without an API key this server answers to localhost and to addresses, not to {shown(name)}"
            error = ApiError(403, "foreign_host", message)
            await Json(error.body(), 403)(scope, receive, send)


def _is_local_name(host: str) -> bool:
    return host == "localhost" or host.endswith(".localhost") or is_address(host.removeprefix("[").removesuffix("]"))
