"""The clients of a workload: closed-loop, each sending its next request after an answer, or arriving at random."""

import asyncio
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple, Protocol

from bench.serve.client import Answer, Messages
from bench.serve.workloads import Script, Stage


class Asks(Protocol):
    """What a client can do, see `bench.serve.client.Client.ask`."""

    async def ask(self, messages: Messages, max_tokens: int, on_text: Callable[[], None]) -> Answer: ...


class Request(NamedTuple):
    """An answer, and which request of the workload it answers."""

    stage: str
    script: int
    turn: int
    answer: Answer


type OnRequest = Callable[[Request], None]


async def run(
    client: Asks, stages: Sequence[Stage], on_request: OnRequest, *, rate: float = 0.0, seed: int = 0
) -> None:
    """Runs stages one after the other.

    Args:
      client: asks the server.
      stages: the workload.
      on_request: called with each request when it has ended.
      rate: scripts that arrive per second, at random (Poisson); 0 starts all at once.
      seed: of the arrivals.
    """
    for stage in stages:
        begin, texts = time.perf_counter(), _Texts()
        at = list(islice(poisson(rate, seed), len(stage.scripts))) if rate else [0.0] * len(stage.scripts)
        async with asyncio.TaskGroup() as group:
            for number, script in enumerate(stage.scripts):
                group.create_task(_follow(client, stage.name, number, script, texts, begin + at[number], on_request))


def poisson(rate: float, seed: int) -> Iterator[float]:
    """Yields the seconds of arrivals, of which there are ``rate`` per second on average."""
    rng, at = random.Random(seed), 0.0
    while True:
        at += rng.expovariate(rate)
        yield at


class _Texts:
    """How many texts a stage's first script has got, for those that wait for it."""

    def __init__(self) -> None:
        self._count, self._is_over = 0, False
        self._waiting: list[tuple[int, asyncio.Event]] = []

    def add(self) -> None:
        self._count += 1
        self._wake()

    def close(self) -> None:
        """Lets everybody go: there will be no more."""
        self._is_over = True
        self._wake()

    async def wait(self, count: int) -> None:
        if self._count >= count or self._is_over:
            return
        event = asyncio.Event()
        self._waiting.append((count, event))
        await event.wait()

    def _wake(self) -> None:
        for count, event in self._waiting:
            if self._count >= count or self._is_over:
                event.set()


async def _follow(
    client: Asks, stage: str, number: int, script: Script, texts: _Texts, start: float, on_request: OnRequest
) -> None:
    """Sends a script's requests; one that fails ends the script, because nobody talks on without an answer."""
    await asyncio.sleep(max(start - time.perf_counter(), 0.0))
    await texts.wait(script.starts_after)
    messages: list[Mapping[str, Any]] = [{"role": "system", "content": script.system}] if script.system else []
    on_text = texts.add if number == 0 else lambda: None
    for index, turn in enumerate(script.turns):
        asked = [*messages, {"role": "user", "content": turn.text}]
        answer = await client.ask(asked, turn.max_tokens, on_text)
        on_request(Request(stage, number, index, answer))
        if answer.error is not None:
            break
        if script.is_conversation:
            messages = [*asked, {"role": "assistant", "content": answer.text}]
    if number == 0:
        texts.close()
