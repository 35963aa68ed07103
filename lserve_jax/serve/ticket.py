"""What passes between the HTTP side, which is asyncio, and the engine thread: one `Ticket` per request."""

import asyncio
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field

from lserve_jax.engine.generation import Generation
from lserve_jax.engine.outputs import RequestOutput, TextChunk


@dataclass(frozen=True, kw_only=True)
class PromptProgress:
    """How far a prompt has been read.

    Attributes:
      total: tokens of the prompt.
      cached: tokens of it that an earlier request had left in the cache.
      processed: tokens that are in the cache now, ``cached`` included.
      seconds: seconds since the request came.
    """

    total: int
    cached: int
    processed: int
    seconds: float


@dataclass(frozen=True)
class Finished:
    """The end of a request; its last text has been sent before."""

    output: RequestOutput


@dataclass(frozen=True)
class Failed:
    """The end of a request that did not finish.

    Attributes:
      error: an `InputError` if the user can correct it; else one of `lserve_jax.serve.errors`, or a fault of ours.
    """

    error: Exception


type Event = PromptProgress | TextChunk | Finished | Failed


@dataclass(eq=False)
class Ticket:
    """A request between the two sides. The engine thread sends events, in order; `Finished` or `Failed` is the last.

    Attributes:
      generation: the request in the engine.
      deadline: time of `time.perf_counter` at which it is ended; None if it may take any time.
      on_finish: called in the engine thread when the request has finished, before another call; an error fails it.
      loop: the event loop of the reader.
      events: what the reader has not taken yet.
    """

    generation: Generation
    deadline: float | None = None
    on_finish: Callable[[], None] | None = None
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)


def send(events: Iterable[tuple[Ticket, Event]]) -> None:
    """Gives events to their readers, from the engine thread, waking each loop once."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Ticket, Event]]] = {}
    for ticket, event in events:
        by_loop.setdefault(ticket.loop, []).append((ticket, event))
    for loop, some in by_loop.items():
        with suppress(RuntimeError):  # the loop is closed: nobody reads any more
            loop.call_soon_threadsafe(_deliver, some)


def _deliver(events: list[tuple[Ticket, Event]]) -> None:
    for ticket, event in events:
        ticket.events.put_nowait(event)
