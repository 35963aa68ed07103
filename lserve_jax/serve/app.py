"""The application: routes and what stands around them. It starts nothing, so that any ASGI server can run it."""

from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from anyio import to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from lserve_jax.config.errors import shown
from lserve_jax.serve import routes
from lserve_jax.serve.answer import Answer
from lserve_jax.serve.body import parse_body, read_body
from lserve_jax.serve.chat import begin_chat
from lserve_jax.serve.completions import begin_completion
from lserve_jax.serve.contexts import Contexts
from lserve_jax.serve.engine_thread import EngineThread
from lserve_jax.serve.errors import api_error
from lserve_jax.serve.events import CLIENT_LEFT, EventStream, Json, outputs_of, stream_of, unless_disconnected
from lserve_jax.serve.middleware import ApiKey, LocalName, Tracing, trace_of
from lserve_jax.serve.options import ServeOptions
from lserve_jax.serve.service import Service, Trace
from lserve_jax.serve.ticket import Ticket

type Handler = Callable[[Request], Awaitable[Response]]
type Begin = Callable[[Service, Mapping[str, Any], Trace], Answer]


def build_app(thread: EngineThread, options: ServeOptions) -> Starlette:
    """Returns the application.

    Args:
      thread: the engine thread.
      options: the server's.
    """
    service = Service(thread, options)

    def plain(make: Callable[[Service], dict[str, Any]]) -> Handler:
        async def handle(request: Request) -> Response:
            return Json(await to_thread.run_sync(make, service))

        return handle

    def with_body(make: Callable[[Service, Mapping[str, Any]], dict[str, Any]]) -> Handler:
        async def handle(request: Request) -> Response:
            body = await read_body(request, options.max_body_bytes)
            return Json(await to_thread.run_sync(lambda: make(service, parse_body(body))))

        return handle

    async def model(request: Request) -> Response:
        service.require_model(request.path_params["model"])
        return Json(routes.model_card(service))

    async def health(_: Request) -> Response:
        found = thread.health()
        return Json({"status": found.status, "detail": found.detail}, 200 if found.status == "ready" else 503)

    async def metrics(_: Request) -> Response:
        text = await to_thread.run_sync(thread.metrics.render)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    table: list[tuple[str, str, Handler]] = [
        ("POST", "/v1/chat/completions", partial(_generate, service, begin_chat)),
        ("POST", "/v1/completions", partial(_generate, service, begin_completion)),
        ("GET", "/v1/models", plain(routes.models)),
        ("GET", "/v1/models/{model:path}", model),
        ("POST", "/tokenize", with_body(routes.tokenize)),
        ("POST", "/detokenize", with_body(routes.detokenize)),
        ("GET", "/tokenizer_info", plain(routes.tokenizer_info)),
        ("GET", "/version", plain(lambda _: routes.versions())),
        ("GET", "/health", health),
        ("GET", "/ping", health),
        ("GET", "/metrics", metrics),
    ]
    if options.contexts is not None:
        table.append(("POST", "/contexts/{name}", Contexts(service, Path(options.contexts)).save))
    guards = []
    if options.api_key is not None:
        guards.append(Middleware(ApiKey, key=options.api_key))
    elif options.is_local:
        guards.append(Middleware(LocalName))
    app = Starlette(
        routes=[
            Route(path, _answering(path.replace(":path", ""), handler), methods=[method])
            for method, path, handler in table
        ],
        middleware=[Middleware(Tracing, metrics=thread.metrics), *guards],
        exception_handlers={HTTPException: _refuse},
    )
    app.router.redirect_slashes = False  # behind a proxy, a client could not go where this sends it
    return app


def _answering(path: str, handler: Handler) -> Handler:
    """Returns the handler of a route, whose errors are responses."""

    async def handle(request: Request) -> Response:
        trace_of(request.scope).route = path
        try:
            return await handler(request)
        except ClientDisconnect:
            return Response(status_code=CLIENT_LEFT)
        except Exception as error:  # noqa: BLE001 - whatever it is, the client gets OpenAI's shape
            return _error_response(error)

    return handle


async def _refuse(request: Request, error: Exception) -> Response:
    """Returns what a path or a method gets that there is not."""
    assert isinstance(error, HTTPException)
    error.detail = f"{request.method} {shown(request.url.path)}: {error.detail.lower()}"
    return _error_response(error)


def _error_response(error: Exception) -> Response:
    found = api_error(error)
    return Json(found.body(), found.status, found.headers)


async def _generate(service: Service, begin: Begin, request: Request) -> Response:
    """Answers a request for generated text. What can be refused is refused before the first byte."""
    options, thread = service.options, service.thread
    body = await read_body(request, options.max_body_bytes)
    answer = await to_thread.run_sync(lambda: begin(service, parse_body(body), trace_of(request.scope)))
    tickets = [Ticket(generation, deadline=answer.deadline) for generation in answer.generations]
    thread.submit(tickets)
    if answer.is_stream:
        events = stream_of(answer, tickets, options.ping_interval or None)
        return EventStream(events, on_end=partial(thread.cancel, tickets))
    try:
        outputs = await unless_disconnected(request.receive, outputs_of(tickets))
    finally:
        thread.cancel(tickets)
    if outputs is None:
        return Response(status_code=CLIENT_LEFT)
    return Json(await to_thread.run_sync(answer.whole, outputs))
