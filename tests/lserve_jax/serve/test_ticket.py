"""Events on their way from the engine thread to the loops of their readers."""

import asyncio
import threading
from typing import Any

from lserve_jax.engine.outputs import TextChunk
from lserve_jax.serve.errors import DeadlinePassed
from lserve_jax.serve.ticket import Failed, PromptProgress, Ticket, send

GENERATION: Any = object()
PROGRESS = PromptProgress(total=4, cached=0, processed=4, seconds=0.5)


def test_each_reader_gets_its_own_events_in_order_from_another_thread():
    async def read() -> list[list[Any]]:
        tickets = [Ticket(GENERATION) for _ in range(2)]
        chunk, failed = TextChunk.of("a", (1,)), Failed(DeadlinePassed())
        events = [(tickets[0], PROGRESS), (tickets[1], PROGRESS), (tickets[0], chunk), (tickets[0], failed)]
        thread = threading.Thread(target=send, args=(events,))
        thread.start()
        found = [
            [await ticket.events.get() for _ in range(count)] for ticket, count in zip(tickets, (3, 1), strict=True)
        ]
        thread.join()
        assert found == [[PROGRESS, chunk, failed], [PROGRESS]]
        return found

    asyncio.run(read())


def test_a_loop_is_woken_once_for_all_events(monkeypatch: Any):
    async def read() -> None:
        loop, calls = asyncio.get_running_loop(), []
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *args: calls.append(args))
        tickets = [Ticket(GENERATION) for _ in range(3)]
        send([(ticket, PROGRESS) for ticket in tickets for _ in range(2)])
        assert len(calls) == 1
        assert len(calls[0][1]) == 6

    asyncio.run(read())


def test_a_closed_loop_does_not_keep_events_from_others():
    async def ticket() -> Ticket:
        return Ticket(GENERATION)

    gone = asyncio.run(ticket())

    async def read() -> None:
        here = Ticket(GENERATION)
        send([(gone, PROGRESS), (here, PROGRESS)])
        assert await here.events.get() is PROGRESS

    asyncio.run(read())
