"""The real engine thread behind real sockets: too many requests, silence during a prefill, clients that leave."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest

from lserve_jax import LLM
from lserve_jax.serve.engine_thread import EngineThread
from lserve_jax.serve.options import ServeOptions
from tests.fuzz.serving import served
from tests.lserve_jax.serve.running import MODEL, NAME
from tests.raw_http import Address, Exchange, exchange, request_bytes

pytestmark = pytest.mark.slow

PATIENCE = 600.0
QUEUE, SLOTS = 32, 3
PATH = "/v1/completions"
LONG = [5 + number % 100 for number in range(80)]
"""Ten chunks."""
BODY: dict[str, Any] = {"prompt": [5, 6, 7], "max_tokens": 6, "ignore_eos": True}


class Gate:
    """Lets device calls through, one by one or all; it is closed until a test opens it."""

    def __init__(self, step: Callable[[], Any]) -> None:
        self.made = 0
        self._step = step
        self._is_open = True

    def __call__(self) -> Any:
        if not self._is_open:
            self._arrived.release()
            assert self._permits.acquire(timeout=PATIENCE)
        self.made += 1
        return self._step()

    def close(self) -> None:
        """Holds back all calls from now on; no request may be open."""
        self._arrived, self._permits = threading.Semaphore(0), threading.Semaphore(0)
        self.made, self._is_open = 0, False

    def wait(self) -> None:
        """Returns when the engine is about to make a call."""
        assert self._arrived.acquire(timeout=PATIENCE)

    def let(self, count: int) -> None:
        """Lets calls through, one after another, and returns when the next one has come."""
        for _ in range(count):
            self.let_last()
            self.wait()

    def let_last(self) -> None:
        """Lets a call through after which none need come."""
        self._permits.release()

    def open(self) -> None:
        if not self._is_open:
            self._is_open = True
            self._permits.release(1000)


class Served:
    """A server and what is behind it."""

    def __init__(self, thread: EngineThread, address: Address) -> None:
        self.thread, self.address = thread, address
        self.url = "http://{}:{}".format(*address)
        self.gate = Gate(thread.llm.session.step)
        thread.llm.session.step = self.gate
        self.is_cancelled = threading.Event()
        cancel = thread.cancel

        def noted(tickets: Any) -> None:
            is_early = any(ticket.generation.request.id in thread._open for ticket in tickets)
            cancel(tickets)
            if is_early:  # it is also called for requests that have ended
                self.is_cancelled.set()

        thread.cancel = noted

    def choices(self, **fields: Any) -> Any:
        with exchange(self.address, self.data(**fields)) as one:
            return json.loads(one.answer().read())["choices"]

    def data(self, **fields: Any) -> bytes:
        return request_bytes(PATH, json.dumps(BODY | fields).encode())

    def wait_until_idle(self) -> None:
        with self.thread._lock:
            assert self.thread._has_ended_some.wait_for(lambda: not self.thread._open, PATIENCE)


@pytest.fixture(scope="module")
def model() -> LLM:
    return LLM(MODEL, attention="dense", max_model_len=96, max_num_seqs=SLOTS, steps_per_call=2, prefill_chunk=8)


@pytest.fixture(scope="module")
def shared(model: LLM) -> Iterator[Served]:
    options = ServeOptions(served_model_name=NAME, max_queued_requests=QUEUE, ping_interval=0.02)
    with served(model, options) as (thread, address):
        yield Served(thread, address)


@pytest.fixture
def server(shared: Served) -> Iterator[Served]:
    """A server with nothing to do, whose slots and pages must all be back at the end."""
    yield shared
    shared.gate.open()
    shared.wait_until_idle()
    shared.is_cancelled.clear()
    scheduler = shared.thread.llm.engine.scheduler
    assert shared.thread.llm.session.is_idle and scheduler.num_free_slots == SLOTS
    assert all(pool.num_free + pool.num_evictable == pool.num_pages for _, pool in scheduler.allocator.pools)


# --- too many requests -----------------------------------------------------------------------------------------------


async def answers_of(url: str, count: int, on_refusal: Callable[[], None]) -> list[httpx.Response]:
    limits = httpx.Limits(max_connections=count)
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE, limits=limits) as client:

        async def ask() -> httpx.Response:
            found = await client.post(PATH, json=BODY)
            if found.status_code != 200:
                on_refusal()
            return found

        return await asyncio.gather(*(ask() for _ in range(count)))


def test_of_300_requests_at_once_those_that_fit_are_answered_and_the_others_told_at_once(server: Served):
    expected = server.choices()
    fitting = QUEUE + SLOTS
    refused: list[None] = []
    server.gate.close()

    def on_refusal() -> None:
        refused.append(None)
        if len(refused) == 300 - fitting:
            server.gate.open()

    answers = asyncio.run(answers_of(server.url, 300, on_refusal))
    good = [one for one in answers if one.status_code == 200]
    assert len(good) == fitting
    assert all(one.json()["choices"] == expected for one in good)
    for one in answers:
        if one.status_code != 200:
            assert one.status_code == 429 and int(one.headers["retry-after"]) >= 1
            assert one.json()["error"]["code"] == "queue_full"
            assert one.json()["error"]["type"] == "rate_limit_error"


def test_openais_own_retries_succeed_when_the_queue_has_room_again(server: Served):
    expected = server.choices()[0]["text"]
    server.gate.close()
    refused: list[int] = []

    async def note(response: Any) -> None:
        if response.status_code == 429:
            refused.append(1)
            server.gate.open()

    async def act() -> list[str]:
        http = openai.DefaultAsyncHttpxClient(timeout=PATIENCE, event_hooks={"response": [note]})
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=20, http_client=http
        ) as client:
            asked = (
                client.completions.create(
                    model=NAME, prompt=BODY["prompt"], max_tokens=6, extra_body={"ignore_eos": True}
                )
                for _ in range(QUEUE + SLOTS + 10)
            )
            return [found.choices[0].text for found in await asyncio.gather(*asked)]

    assert asyncio.run(act()) == [expected] * (QUEUE + SLOTS + 10)
    assert refused


# --- silence ---------------------------------------------------------------------------------------------------------


def test_a_device_call_of_more_than_openais_timeout_is_no_silence(server: Served):
    """The second of ten chunks stands still until openai-python would have given up without pings."""
    expected = server.choices(prompt=LONG)[0]["text"]
    server.gate.close()
    has_begun, found = threading.Event(), []

    def ask() -> None:
        timeout = openai.Timeout(PATIENCE, read=5)
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=timeout, max_retries=0) as client:
            chunks = client.completions.create(
                model=NAME, prompt=LONG, max_tokens=6, stream=True, extra_body={"ignore_eos": True}
            )
            has_begun.set()  # the head has come
            found.extend(chunk.choices[0].text for chunk in chunks)

    other = threading.Thread(target=ask)
    other.start()
    server.gate.wait()
    server.gate.let(1)
    assert has_begun.wait(PATIENCE)  # before the prompt has been read
    assert server.gate.made == 1 and not found
    with exchange(server.address, server.data(stream=True)) as one:
        response = one.answer()
        clock = threading.Event()
        pings = 0
        while pings < 100 or not clock.wait(0):
            assert response.readline() == b": ping\n" and response.readline() == b"\n"
            pings += 1
            if pings == 1:
                threading.Timer(6, clock.set).start()  # seconds that the client must outlast
        assert server.gate.made == 1 and not found  # all within one call
        server.gate.open()
        assert b"[DONE]" in response.read()
    other.join()
    assert "".join(found) == expected


# --- clients that leave ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_stream", [False, True], ids=["plain", "streaming"])
@pytest.mark.parametrize("calls", [0, 1, 11], ids=["queued", "in the second of ten chunks", "decoding"])
def test_a_request_whose_client_left_is_gone_within_one_call(server: Served, calls: int, is_stream: bool):
    server.gate.close()
    one = Exchange(server.address, server.data(prompt=LONG, max_tokens=15, stream=is_stream))
    server.gate.wait()
    server.gate.let(calls)
    assert not server.is_cancelled.is_set()
    one.close()
    assert server.is_cancelled.wait(PATIENCE)
    server.gate.let_last()  # the engine was about to make it
    server.wait_until_idle()
    assert server.gate.made == calls + 1


def test_one_who_waits_for_a_slot_and_leaves_never_gets_it(server: Served):
    server.gate.close()
    others = [Exchange(server.address, server.data(prompt=LONG, stream=True)) for _ in range(SLOTS)]
    server.gate.wait()
    waiting = Exchange(server.address, server.data(max_tokens=20, stream=True))
    assert waiting.answer().readline() == b": ping\n"
    (*_, last) = list(server.thread._open.values())
    waiting.close()
    assert server.is_cancelled.wait(PATIENCE)
    server.gate.open()
    for other in others:
        assert b"[DONE]" in other.answer().read()
        other.close()
    assert last.started_at is None


def test_a_second_clients_tokens_do_not_change_when_the_first_leaves(server: Served):
    expected = server.choices(prompt=LONG[:20], max_tokens=20)
    server.gate.close()
    leaving = Exchange(server.address, server.data(prompt=LONG, stream=True))
    server.gate.wait()
    found: list[Any] = []
    other = threading.Thread(target=lambda: found.append(server.choices(prompt=LONG[:20], max_tokens=20)))
    other.start()
    server.gate.let(6)
    leaving.close()
    assert server.is_cancelled.wait(PATIENCE)
    server.gate.open()
    other.join()
    assert found == [expected]
