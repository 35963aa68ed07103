"""Clients in closed loops, conversations, those that wait for a stream, and arrivals at random."""

import asyncio
import random
from collections.abc import Callable
from itertools import islice

import pytest

from bench.serve.client import Answer, Messages
from bench.serve.load import Request, poisson, run
from bench.serve.workloads import Script, Stage, Turn


class FakeClient:
    """Answers each request with as many texts as tokens; ``hold`` requests must be open before any is answered."""

    def __init__(self, hold: int = 1, fails: str = "no such text") -> None:
        self.asked: list[list[tuple[str, str]]] = []
        self.open = self.most = 0
        self.hold, self.fails = hold, fails
        self._enough = asyncio.Event()
        self.texts = 0

    async def ask(self, messages: Messages, max_tokens: int, on_text: Callable[[], None]) -> Answer:
        self.asked.append([(one["role"], one["content"]) for one in messages])
        self.open += 1
        self.most = max(self.most, self.open)
        if self.open >= self.hold:
            self._enough.set()
        await self._enough.wait()
        said = messages[-1]["content"]
        if self.fails in said:
            self.open -= 1
            return Answer(sent=0.0, error="failed")
        for _ in range(max_tokens):
            await asyncio.sleep(0)
            self.texts += 1
            on_text()
        self.open -= 1
        return Answer(sent=0.0, text=f"<{said}>", times=[0.0] * max_tokens, finish_reason="length")


def script(*texts: str, **settings: object) -> Script:
    return Script(tuple(Turn(text, 2) for text in texts), **settings)  # pyright: ignore[reportArgumentType]


def ran(make: Callable[[], FakeClient], *stages: Stage, **options: float) -> tuple[FakeClient, list[Request]]:
    async def main() -> tuple[FakeClient, list[Request]]:
        client, found = make(), []
        await run(client, stages, found.append, **options)  # pyright: ignore[reportArgumentType]
        return client, found

    return asyncio.run(main())


def test_each_client_has_one_request_open_and_all_have_one_at_the_same_time():
    scripts = tuple(script(f"{n} a", f"{n} b", f"{n} c") for n in range(5))
    client, found = ran(lambda: FakeClient(hold=5), Stage("s", scripts))
    assert client.most == 5
    assert len(found) == 15
    for number in range(5):
        mine = [one for one in client.asked if one[-1][1].startswith(f"{number} ")]
        assert mine == [[("user", f"{number} {letter}")] for letter in "abc"]
        assert [one.turn for one in found if one.script == number] == [0, 1, 2]


def test_a_conversation_has_its_earlier_turns_and_answers():
    client, _ = ran(FakeClient, Stage("s", (script("a", "b", system="S", is_conversation=True),)))
    first = [("system", "S"), ("user", "a")]
    assert client.asked == [first, [*first, ("assistant", "<a>"), ("user", "b")]]


def test_stages_run_one_after_the_other():
    client, found = ran(FakeClient, Stage("one", (script("a"), script("b"))), Stage("two", (script("c"),)))
    assert [one.stage for one in found] == ["one", "one", "two"]
    assert client.asked[-1] == [("user", "c")]


def test_a_script_ends_with_the_request_that_failed():
    client, found = ran(lambda: FakeClient(fails="bad"), Stage("s", (script("a", "bad", "c"), script("d", "e"))))
    assert sorted(one[-1][1] for one in client.asked) == ["a", "bad", "d", "e"]
    assert [one.answer.error for one in found].count("failed") == 1


def test_a_script_starts_when_the_stream_has_so_many_texts():
    class Noting(FakeClient):
        before = -1

        async def ask(self, messages: Messages, max_tokens: int, on_text: Callable[[], None]) -> Answer:
            if messages[-1]["content"] == "late":
                self.before = self.texts
            return await super().ask(messages, max_tokens, on_text)

    stream = Script((Turn("stream", 50),))
    client, found = ran(Noting, Stage("s", (stream, script("late", starts_after=20))))
    assert isinstance(client, Noting)
    assert 20 <= client.before < 50
    assert len(found) == 2


def test_nobody_waits_for_a_stream_that_has_ended():
    _, found = ran(lambda: FakeClient(fails="stream"), Stage("s", (script("stream"), script("late", starts_after=9))))
    assert [one.script for one in found] == [0, 1]


def test_arrivals_are_the_same_for_a_seed_and_have_their_rate():
    some = list(islice(poisson(4.0, 7), 2000))
    assert some == list(islice(poisson(4.0, 7), 2000))
    assert some != list(islice(poisson(4.0, 8), 2000))
    assert some[0] == random.Random(7).expovariate(4.0)
    assert some == sorted(some)
    assert some[-1] / 2000 == pytest.approx(1 / 4, rel=0.1)


def test_scripts_wait_for_their_arrival(monkeypatch: pytest.MonkeyPatch):
    waited: list[float] = []

    async def sleep(seconds: float) -> None:
        waited.append(seconds)

    monkeypatch.setattr("bench.serve.load.time.perf_counter", lambda: 100.0)
    monkeypatch.setattr("bench.serve.load.asyncio.sleep", sleep)

    async def answer(self: FakeClient, *_: object) -> Answer:
        del self
        return Answer(sent=0.0)

    monkeypatch.setattr(FakeClient, "ask", answer)
    ran(FakeClient, Stage("s", tuple(script(str(n)) for n in range(4))), rate=2.0, seed=3)
    assert waited == pytest.approx(list(islice(poisson(2.0, 3), 4)))
    waited.clear()
    ran(FakeClient, Stage("s", (script("a"), script("b"))))
    assert waited == [0.0, 0.0]
