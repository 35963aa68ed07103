"""From the engine's events to a stream of server-sent events, or to one body; both end if the client leaves."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from lserve_jax.engine.outputs import RequestOutput, TextChunk
from lserve_jax.serve.answer import Answer
from lserve_jax.serve.errors import api_error
from lserve_jax.serve.ticket import Event, Failed, Finished, PromptProgress, Ticket

PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"
CLIENT_LEFT = 499
"""The status of a response that nobody reads, as nginx counts it."""


def to_json(value: Any) -> bytes:
    """Returns JSON in ASCII: some clients take other line ends of Unicode for the end of an event."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()


class Json(Response):
    """A response of JSON."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Returns the body."""
        return to_json(content)


def data(value: Mapping[str, Any]) -> bytes:
    """Returns a server-sent event."""
    return b"data: " + to_json(value) + b"\n\n"


async def events_of(tickets: Sequence[Ticket]) -> AsyncGenerator[tuple[int, Event]]:
    """Yields the events of requests with their places, until each has had its last."""
    waiting = {asyncio.ensure_future(ticket.events.get()): place for place, ticket in enumerate(tickets)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in [task for task in waiting if task in done]:
                place, event = waiting.pop(task), task.result()
                if not isinstance(event, Finished | Failed):
                    waiting[asyncio.ensure_future(tickets[place].events.get())] = place
                yield place, event
    finally:
        for task in waiting:
            task.cancel()


async def outputs_of(tickets: Sequence[Ticket]) -> list[RequestOutput]:
    """Returns the outputs of requests; raises the error of the first that fails."""
    found: dict[int, RequestOutput] = {}
    async with aclosing(events_of(tickets)) as events:
        async for place, event in events:
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Finished):
                found[place] = event.output
    return [output for _, output in sorted(found.items())]


def stream_of(answer: Answer, tickets: Sequence[Ticket], silence: float | None) -> AsyncGenerator[bytes]:
    """Yields server-sent events, from the opening to [DONE]; an error is an event too, and the last.

    Args:
      answer: writes the events.
      tickets: the requests.
      silence: seconds after which a comment is sent if nothing else was, by the clock and whatever the engine does;
        None for never.
    """
    return _with_pings(_parts_of(answer, tickets), silence)


async def _parts_of(answer: Answer, tickets: Sequence[Ticket]) -> AsyncGenerator[bytes]:
    """Yields what there is to say. Many events of the engine say nothing to the client."""
    try:
        yield b"".join(map(data, answer.opening())) or PING
        found: dict[int, RequestOutput] = {}
        async with aclosing(events_of(tickets)) as events:
            async for place, event in events:
                if (chunk := _chunk(answer, place, event, found)) is not None:
                    yield data(chunk)
        usage = answer.usage_chunk([output for _, output in sorted(found.items())])
        yield (b"" if usage is None else data(usage)) + DONE
    except Exception as error:  # noqa: BLE001 - a stream that just ends looks complete to clients
        yield data(api_error(error).body())


async def _with_pings(parts: AsyncGenerator[bytes], silence: float | None) -> AsyncGenerator[bytes]:
    """Yields parts, and a comment whenever none has come for ``silence`` seconds."""

    async def following() -> bytes | None:
        return await anext(parts, None)

    async with aclosing(parts):
        part = await following()
        while part is not None:
            yield part
            task = asyncio.ensure_future(following())
            try:
                while not (await asyncio.wait({task}, timeout=silence))[0]:
                    yield PING
                part = task.result()
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)


def _chunk(answer: Answer, place: int, event: Event, found: dict[int, RequestOutput]) -> dict[str, Any] | None:
    """Returns the chunk for an event, if it needs one; keeps the output of a request that has finished."""
    match event:
        case PromptProgress():
            return answer.progress(place, event)
        case TextChunk():
            return answer.delta(place, event)
        case Finished(output):
            found[place] = output
            return answer.closing(place, output)
        case Failed(error):
            raise error


class EventStream(Response):
    """A response of server-sent events.

    Args:
      events: what to send.
      on_end: called at the end, also if the client has left or the server stops.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes], on_end: Callable[[], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events."""
        try:
            await unless_disconnected(receive, self._send(send))
        finally:
            self._on_end()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self._events) as events:
            async for part in events:
                await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def unless_disconnected[T](receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """Returns the result of the work; None if the client leaves first, and the work is cancelled then."""
    worker, watcher = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({worker, watcher}, return_when=asyncio.FIRST_COMPLETED)
        return worker.result() if worker.done() else None
    finally:
        worker.cancel()
        watcher.cancel()
        await asyncio.gather(worker, watcher, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
