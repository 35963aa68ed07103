"""Server-sent events: pings by the clock, errors as events, nothing left waiting; the end when a client leaves."""

import asyncio
import json
from collections.abc import Coroutine
from typing import Any, cast

import pytest

from lserve_jax.engine.outputs import RequestOutput, TextChunk
from lserve_jax.serve.answer import Answer
from lserve_jax.serve.errors import DeadlinePassed, NotReady
from lserve_jax.serve.events import DONE, PING, EventStream, events_of, outputs_of, stream_of, unless_disconnected
from lserve_jax.serve.ticket import Failed, Finished, PromptProgress, Ticket


def run[T](work: Coroutine[Any, Any, T]) -> T:
    async def alone() -> T:
        found = await work
        await asyncio.sleep(0)  # what was cancelled ends
        assert len(asyncio.all_tasks()) == 1, "tasks were left behind"
        return found

    return asyncio.run(alone())


def ticket() -> Ticket:
    return Ticket(generation=cast(Any, None))


def output(text: str = "") -> RequestOutput:
    return cast(RequestOutput, text)


class Plain:
    """An answer whose chunks say what they were made of."""

    def __init__(self, opening: list[dict[str, Any]]) -> None:
        self._opening = opening

    def opening(self) -> list[dict[str, Any]]:
        return self._opening

    def delta(self, index: int, chunk: TextChunk) -> dict[str, Any] | None:
        return {"delta": index, "text": chunk.text} if chunk else None

    def closing(self, index: int, output: Any) -> dict[str, Any]:
        return {"closing": index, "output": output}

    def progress(self, index: int, progress: PromptProgress) -> dict[str, Any] | None:
        return {"progress": index}

    def usage_chunk(self, outputs: Any) -> dict[str, Any] | None:
        return {"usage": outputs}


def answer(*opening: dict[str, Any]) -> Answer:
    return cast(Answer, Plain(list(opening)))


def parsed(parts: list[bytes]) -> list[Any]:
    events = b"".join(part for part in parts if part != PING).split(b"\n\n")
    assert events.pop() == b""
    return [event if event == DONE.strip() else json.loads(event.removeprefix(b"data: ")) for event in events]


PROGRESS = PromptProgress(total=2, cached=0, processed=1, seconds=0.0)


def test_events_become_chunks_in_order_and_outputs_keep_their_places():
    async def act() -> list[bytes]:
        tickets = [ticket(), ticket()]
        tickets[1].events.put_nowait(Finished(output("second")))
        for event in (PROGRESS, TextChunk.of("a", (1,)), TextChunk.of("", (2,)), Finished(output("first"))):
            tickets[0].events.put_nowait(event)
        return [part async for part in stream_of(answer({"role": 0}, {"role": 1}), tickets, None)]

    found = parsed(run(act()))
    assert found[:2] == [{"role": 0}, {"role": 1}]
    assert found[-2:] == [{"usage": ["first", "second"]}, DONE.strip()]
    assert [one for one in found if one not in ({"closing": 1, "output": "second"},)][2:-2] == [
        {"progress": 0},
        {"delta": 0, "text": "a"},
        {"closing": 0, "output": "first"},
    ]


def test_a_stream_without_an_opening_begins_with_a_ping():
    async def act() -> bytes:
        stream = stream_of(answer(), [ticket()], None)
        first = await anext(stream)
        await stream.aclose()
        return first

    assert run(act()) == PING


def test_pings_come_by_the_clock_while_nothing_else_does():
    async def act() -> list[bytes]:
        one = ticket()
        stream = stream_of(answer({"role": 0}), [one], 0.01)
        found = [await anext(stream) for _ in range(5)]  # nobody sends anything meanwhile
        one.events.put_nowait(Finished(output()))
        return found + [part async for part in stream]

    found = run(act())
    assert found[1:5] == [PING] * 4
    assert found[-1].endswith(DONE)


def test_events_that_say_nothing_to_the_client_put_off_no_ping():
    """A long prompt is read in many calls, each shorter than the silence that is allowed."""

    async def act() -> list[bytes]:
        one = ticket()
        stream = stream_of(answer({"role": 0}), [one], 0.05)

        async def work() -> None:
            while True:
                one.events.put_nowait(TextChunk.of("", (1,)))
                await asyncio.sleep(0)  # the next event is always there

        worker = asyncio.ensure_future(work())
        found = [await anext(stream) for _ in range(4)]
        worker.cancel()
        await stream.aclose()
        return found

    async def in_time() -> list[bytes]:
        return await asyncio.wait_for(act(), 20)  # else it would not fail but hang

    assert run(in_time())[1:] == [PING] * 3


@pytest.mark.parametrize(
    ("error", "code"),
    [(DeadlinePassed(), "timeout"), (NotReady("draining"), "draining"), (KeyError(1), "internal_error")],
)
def test_an_error_is_the_last_event_and_nothing_looks_complete(error: Exception, code: str):
    async def act() -> list[bytes]:
        one, other = ticket(), ticket()
        one.events.put_nowait(TextChunk.of("a", (1,)))
        one.events.put_nowait(Failed(error))
        return [part async for part in stream_of(answer({"role": 0}), [one, other], None)]

    found = parsed(run(act()))
    assert found[-1]["error"]["code"] == code
    assert DONE.strip() not in found


def test_a_fault_while_a_chunk_is_made_is_an_event_too():
    class Broken(Plain):
        def delta(self, index: int, chunk: TextChunk) -> dict[str, Any]:
            raise ValueError("a fault")

    async def act() -> list[bytes]:
        one = ticket()
        one.events.put_nowait(TextChunk.of("a", (1,)))
        return [part async for part in stream_of(cast(Answer, Broken([])), [one], None)]

    assert parsed(run(act()))[-1]["error"]["code"] == "internal_error"


def test_outputs_come_in_the_order_of_the_tickets_whoever_ends_first():
    async def act() -> list[RequestOutput]:
        tickets = [ticket(), ticket(), ticket()]
        waiting = asyncio.ensure_future(outputs_of(tickets))
        for place in (2, 0, 1):
            tickets[place].events.put_nowait(TextChunk.of("a", (1,)))
            tickets[place].events.put_nowait(Finished(output(str(place))))
            await asyncio.sleep(0)
        return await waiting

    assert run(act()) == ["0", "1", "2"]


def test_the_first_failure_ends_all():
    async def act() -> None:
        tickets = [ticket(), ticket()]
        tickets[1].events.put_nowait(Failed(DeadlinePassed("over")))
        with pytest.raises(DeadlinePassed, match="over"):
            await outputs_of(tickets)

    run(act())


def test_what_is_closed_early_leaves_no_task():
    async def act() -> None:
        tickets = [ticket(), ticket()]
        tickets[1].events.put_nowait(PROGRESS)
        events = events_of(tickets)
        assert await anext(events) == (1, PROGRESS)
        await events.aclose()

    run(act())


class Client:
    """A client that takes ``reads`` messages and leaves when it has them, if ``leaves``."""

    def __init__(self, reads: int, *, leaves: bool) -> None:
        self.sent: list[Any] = []
        self._reads, self._leaves = reads, leaves
        self._has_all = asyncio.Event()

    async def send(self, message: Any) -> None:
        self.sent.append(message)
        if len(self.sent) == self._reads:
            self._has_all.set()

    async def receive(self) -> Any:
        await self._has_all.wait()
        if not self._leaves:
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}


def test_a_client_that_leaves_a_stream_ends_it_while_nothing_is_sent():
    async def act() -> tuple[int, list[Any]]:
        ended: list[int] = []
        client = Client(2, leaves=True)
        stream = EventStream(stream_of(answer({"role": 0}), [ticket()], None), on_end=lambda: ended.append(1))
        await stream({}, client.receive, client.send)
        return len(ended), client.sent

    ended, sent = run(act())
    assert ended == 1
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]


def test_a_stream_that_is_read_to_its_end_says_so_and_has_no_length():
    async def act() -> list[Any]:
        one, ended = ticket(), []
        one.events.put_nowait(Finished(output()))
        client = Client(0, leaves=False)
        await EventStream(stream_of(answer(), [one], None), on_end=lambda: ended.append(1))(
            {}, client.receive, client.send
        )
        assert ended == [1]
        return client.sent

    start, *bodies = run(act())
    headers = dict(start["headers"])
    assert headers[b"content-type"].startswith(b"text/event-stream") and b"content-length" not in headers
    assert [body.get("more_body", False) for body in bodies] == [True] * (len(bodies) - 1) + [False]


def test_a_client_that_leaves_cancels_plain_work():
    async def act() -> tuple[Any, bool]:
        was_cancelled = False

        async def work() -> None:
            nonlocal was_cancelled
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                was_cancelled = True
                raise

        async def receive() -> Any:
            return {"type": "http.disconnect"}

        return await unless_disconnected(receive, work()), was_cancelled

    assert run(act()) == (None, True)


def test_plain_work_gives_its_result_or_its_error():
    async def act() -> None:
        client = Client(1, leaves=False)

        async def good() -> int:
            return 5

        async def bad() -> int:
            raise DeadlinePassed("over")

        assert await unless_disconnected(client.receive, good()) == 5
        with pytest.raises(DeadlinePassed, match="over"):
            await unless_disconnected(client.receive, bad())

    run(act())
