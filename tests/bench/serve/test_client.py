"""One request: what is read of a stream however it is cut, and what becomes of every kind of failure."""

import asyncio
from typing import Any

import pytest

from bench.serve.client import Answer, Client, take_line
from tests.bench.serve.fakes import DONE, END, OK, ROLE, USAGE, Reply, body, event, fake_server, text

MESSAGES = [{"role": "user", "content": "hello"}]


def ask(reply: Reply, count: list[int] | None = None) -> Answer:
    async def main() -> Answer:
        async with fake_server(reply) as url, Client(url + "/", body, timeout=60) as client:
            return await client.ask(MESSAGES, 5, lambda: count.append(1) if count is not None else None)

    return asyncio.run(main())


def saying(*parts: bytes) -> Reply:
    """Writes parts one by one, each only when the one before has left."""

    async def reply(asked: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        assert asked == {"messages": MESSAGES, "max_tokens": 5, "stream": True}
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0)

    return reply


def test_texts_are_counted_and_other_events_are_not():
    counted: list[int] = []
    answer = ask(saying(OK, ROLE, b": ping\n\n", text("a"), text("b"), text("c"), END, USAGE, DONE), counted)
    assert (answer.text, answer.error, answer.finish_reason) == ("abc", None, "length")
    assert len(answer.times) == len(counted) == 3
    assert answer.times == sorted(answer.times)
    assert 0 < answer.times[-1] <= answer.end
    assert answer.usage["completion_tokens"] == 3
    assert answer.cached_tokens == 4


def test_a_stream_may_be_cut_anywhere():
    whole = ROLE + text("größer") + text("→ 日本") + END + USAGE + DONE
    for size in (1, 3, 50):
        answer = ask(saying(OK, *(whole[at : at + size] for at in range(0, len(whole), size))))
        assert (answer.text, len(answer.times), answer.error) == ("größer→ 日本", 2, None)


def test_a_server_may_say_no_usage_and_end_lines_with_carriage_returns():
    answer = ask(saying(OK, (text("a") + END + DONE).replace(b"\n", b"\r\n")))
    assert (answer.text, answer.usage, answer.cached_tokens, answer.error) == ("a", {}, None, None)


async def _refused(asked: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    del asked
    writer.write(b'HTTP/1.1 429 Busy\r\nContent-Length: 20\r\nConnection: close\r\n\r\n{"error":\n"full up"}')


@pytest.mark.parametrize(
    ("reply", "error", "got"),
    [
        (_refused, 'status 429: {"error": "full up"}', ""),
        (saying(OK, text("a")), "the stream ended without a finish reason", "a"),
        (saying(OK, text("a"), event(error={"message": "out of pages"})), "out of pages", "a"),
        (saying(OK, event(error="it failed")), "it failed", ""),
        (saying(OK, b"data: {oops\n\n"), "an event that is no JSON: {oops", ""),
    ],
)
def test_what_fails_is_said_in_one_line(reply: Reply, error: str, got: str):
    answer = ask(reply)
    assert (answer.error, answer.text) == (error, got)
    assert answer.end > 0


def test_a_server_that_is_not_there_is_an_error_of_the_answer():
    async def main() -> Answer:
        async with fake_server(saying()) as url:
            pass
        async with Client(url, body, timeout=60) as client:
            return await client.ask(MESSAGES, 5)

    error = asyncio.run(main()).error
    assert error is not None
    assert error.startswith("ClientConnectorError")
    assert "\n" not in error


def test_a_connection_that_breaks_inside_an_answer_is_an_error():
    head = OK.replace(b"Connection: close", b"Content-Length: 100000")
    answer = ask(saying(head, text("a")))
    assert answer.error is not None
    assert answer.error.startswith("ClientPayloadError")
    assert answer.text == "a"


def test_lines_of_other_fields_have_no_effect():
    answer = Answer(sent=0.0)
    for line in (b"", b"\r", b"event: error", b"id: 1", b": data: {}", b"data: [DONE]", b"data:[DONE]"):
        assert not take_line(line, answer, 1.0)
    assert answer == Answer(sent=0.0)
    assert take_line(text("x").splitlines()[0], answer, 2.0)
    assert answer.times == [2.0]
