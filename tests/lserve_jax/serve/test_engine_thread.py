"""The thread that owns the model: every ticket gets its last event, once, whatever fails and whenever it is ended."""

import gc
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from lserve_jax import LLM, SamplingParams
from lserve_jax.config.errors import InputError
from lserve_jax.engine.outputs import RequestOutput, TextChunk
from lserve_jax.serve import engine_thread
from lserve_jax.serve.engine_thread import MOST_FAILURES, Cancelled, EngineThread
from lserve_jax.serve.errors import DeadlinePassed, NotReady, QueueFull
from lserve_jax.serve.options import ServeOptions
from lserve_jax.serve.ticket import Event, Failed, Finished, PromptProgress, Ticket
from lserve_jax.text.stream import TextStream

MODEL = str(Path(__file__).parents[2] / "golden" / "tiny" / "llama3")
PARAMS = SamplingParams(max_tokens=9, ignore_eos=True)
LONG = [5 + number % 100 for number in range(150)]  # three chunks
PATIENCE = 600.0


@pytest.fixture(scope="module")
def shared() -> LLM:
    sizes: dict[str, Any] = {"max_model_len": 200, "max_num_seqs": 2, "steps_per_call": 2, "prefill_chunk": 64}
    return LLM(MODEL, attention="dense", prefix_cache=False, **sizes)  # so that calls and pages can be counted


@pytest.fixture
def llm(shared: LLM) -> Iterator[LLM]:
    """The shared model; every slot and page must be free again."""
    yield shared
    scheduler = shared.engine.scheduler
    pools = [pool for pool in (scheduler.allocator.retrieval, scheduler.allocator.streaming) if pool is not None]
    assert shared.session.is_idle
    assert scheduler.num_free_slots == 2
    assert all(pool.num_free == pool.num_pages for pool in pools)


class Clock:
    """A clock that stands until a test moves it."""

    def __init__(self) -> None:
        self.now = time.perf_counter()

    def __call__(self) -> float:
        return self.now


class Gate:
    """Holds the engine's device calls back, one by one."""

    def __init__(self, step: Callable[[], Any]) -> None:
        self._step = step
        self._arrived, self._may_go = threading.Semaphore(0), threading.Semaphore(0)
        self.is_open = False

    def __call__(self) -> Any:
        if not self.is_open:
            self._arrived.release()
            assert self._may_go.acquire(timeout=PATIENCE)
        return self._step()

    def wait(self) -> None:
        """Waits until a call has come to the gate."""
        assert self._arrived.acquire(timeout=PATIENCE)

    def let(self, calls: int = 1) -> None:
        """Lets calls through, one after another, and returns when the next one has come."""
        for _ in range(calls):
            self._may_go.release()
            self.wait()

    def open(self) -> None:
        """Lets all calls through from now on."""
        self.is_open = True
        self._may_go.release()


class Inline:
    """An event loop that runs at once what it is given."""

    def call_soon_threadsafe(self, act: Callable[..., None], *args: Any) -> None:
        act(*args)


class Closed:
    """An event loop that has been closed."""

    def call_soon_threadsafe(self, act: Callable[..., None], *args: Any) -> None:
        raise RuntimeError("Event loop is closed")


type Start = Callable[..., EngineThread]


@pytest.fixture
def start(llm: LLM) -> Iterator[Start]:
    """Starts threads with options, waits until they are ready and stops them at the end."""
    started: list[EngineThread] = []

    def begin(*, clock: Callable[[], float] = time.perf_counter, **options: Any) -> EngineThread:
        thread = EngineThread(llm, ServeOptions(**options), clock=clock)
        started.append(thread)
        thread.start()
        thread.wait_until_warm()
        assert thread.health().status == "ready"
        return thread

    yield begin
    for thread in started:
        thread.stop()
        thread._thread.join(PATIENCE)
        assert not thread.is_alive


@pytest.fixture
def gate(llm: LLM, start: Start, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Gate]]:
    """Puts a gate before the device calls of a thread that has been started."""
    made: list[Gate] = []

    def put() -> Gate:
        made.append(Gate(llm.session.step))
        monkeypatch.setattr(llm.session, "step", made[0])
        return made[0]

    yield put
    for one in made:
        one.open()


def ticket_of(
    llm: LLM, prompt: list[int] | None = None, params: SamplingParams = PARAMS, loop: Any = None, **fields: Any
) -> Ticket:
    generation = llm.request(prompt or [5, 6, 7, 8], params)
    events: Any = queue.Queue()
    loop = loop or Inline()
    return Ticket(generation, loop=loop, events=events, **fields)


def rest(ticket: Ticket) -> list[Event]:
    """The events of a ticket up to its last one; nothing may follow."""
    found: list[Event] = []
    events: Any = ticket.events
    while not found or not isinstance(found[-1], Finished | Failed):
        found.append(events.get(timeout=PATIENCE))
    assert events.empty()
    return found


def error_of(ticket: Ticket) -> Exception:
    last = rest(ticket)[-1]
    assert isinstance(last, Failed)
    return last.error


def output_of(ticket: Ticket) -> RequestOutput:
    last = rest(ticket)[-1]
    assert isinstance(last, Finished), last
    return last.output


def value(thread: EngineThread, name: str, **labels: str) -> float:
    found = thread.metrics.registry.get_sample_value(f"lserve_{name}", labels)
    return 0.0 if found is None else found


# --- what a reader gets ----------------------------------------------------------------------------------------------


def test_readers_get_what_generate_returns_in_order(llm: LLM, start: Start):
    prompts = [[5, 6, 7, 8], LONG, [9, 10, 11], [12] * 70, [13]]
    expected = llm.generate(prompts, PARAMS)
    thread = start()
    tickets = [ticket_of(llm, prompt) for prompt in prompts]
    thread.submit(tickets[:3])
    thread.submit(tickets[3:])
    for ticket, right in zip(tickets, expected, strict=True):
        events = rest(ticket)
        chunks = [event for event in events if isinstance(event, TextChunk)]
        last = events[-1]
        assert isinstance(last, Finished)
        assert last.output.token_ids == right.token_ids
        assert "".join(chunks) == right.text
        assert tuple(token for chunk in chunks for token in chunk.token_ids) == right.token_ids
        kinds = [type(event) for event in events]
        num_chunks = -(-len(right.prompt_token_ids) // 64)
        assert kinds == [PromptProgress] * num_chunks + [TextChunk] * len(chunks) + [Finished]
        assert len(chunks) > 2


def test_a_reader_is_told_how_far_its_prompt_is_read(llm: LLM, start: Start):
    thread, ticket = start(), ticket_of(llm, LONG)
    thread.submit([ticket])
    told = [event for event in rest(ticket) if isinstance(event, PromptProgress)]
    assert [(event.total, event.cached, event.processed) for event in told] == [(150, 0, n) for n in (64, 128, 150)]
    assert 0 < told[0].seconds < told[1].seconds < told[2].seconds


def test_nothing_is_compiled_after_the_engine_is_ready(llm: LLM, start: Start):
    thread = start()
    before = llm.engine.programs.names
    scored = SamplingParams(max_tokens=3, prompt_logprobs=True, logprobs=True, top_logprobs=3, bad_words=[[7, 8]])
    tickets = [ticket_of(llm, prompt, params) for prompt in ([5], LONG) for params in (PARAMS, scored)]
    thread.submit(tickets[:3])
    thread.submit(tickets[3:])
    outputs = [output_of(ticket) for ticket in tickets]
    assert outputs[3].prompt_logprobs is not None
    assert llm.engine.programs.names == before


def test_what_contexts_need_is_compiled_before_the_engine_is_ready(llm: LLM, start: Start, tmp_path: Path):
    start(contexts=str(tmp_path))
    before = llm.engine.programs.names
    llm.engine.write_pages(llm.engine.read_pages([0], []), [0], [])
    assert llm.engine.programs.names == before


def test_it_is_loading_until_every_program_is_compiled(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    inside, leave = threading.Event(), threading.Event()

    def warm_up(**_: Any) -> None:
        inside.set()
        assert leave.wait(PATIENCE)

    monkeypatch.setattr(llm.engine, "warm_up", warm_up)
    thread = EngineThread(llm, ServeOptions())
    assert thread.health().status == "loading"
    thread.start()
    assert inside.wait(PATIENCE)
    assert thread.health().status == "loading"
    with pytest.raises(NotReady) as refused:
        thread.submit([ticket_of(llm)])
    assert refused.value.status == "loading"
    leave.set()
    thread.wait_until_warm()
    assert thread.health().status == "ready"
    thread.stop()


def test_a_failed_warm_up_is_the_end_and_says_why(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    def warm_up(**_: Any) -> None:
        raise MemoryError("no room\nfor programs")

    monkeypatch.setattr(llm.engine, "warm_up", warm_up)
    thread = EngineThread(llm, ServeOptions())
    thread.start()
    with pytest.raises(MemoryError):
        thread.wait_until_warm()
    assert thread.health() == engine_thread.Health("dead", "MemoryError: no room for programs")
    assert thread.drain(PATIENCE)


def test_nothing_is_kept_of_a_request_that_has_ended(llm: LLM, start: Start, gate: Callable[[], Gate]):
    thread = start()
    tickets = [ticket_of(llm) for _ in range(3)]
    ended = [weakref.ref(ticket.generation) for ticket in tickets]
    thread.submit(tickets[:2])
    thread.submit(tickets[2:])
    for ticket in tickets:
        rest(ticket)
    cancelled = ticket_of(llm)
    ended.append(weakref.ref(cancelled.generation))
    held = gate()
    thread.submit([cancelled])
    held.wait()
    thread.cancel([cancelled])
    held.open()
    error_of(cancelled)
    last = ticket_of(llm)  # the thread's own variables now hold this one
    thread.submit([last])
    rest(last)
    del tickets, ticket, cancelled
    gc.collect()
    assert [reference() for reference in ended] == [None] * 4
    assert not llm.session._generations


# --- cancelling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("calls", [0, 1, 2, 4], ids=["not begun", "after a chunk", "after two chunks", "decoding"])
def test_a_cancelled_request_is_gone_within_one_call_and_its_companion_goes_on(
    calls: int, llm: LLM, start: Start, gate: Callable[[], Gate]
):
    expected = llm.generate([[5, 6, 7, 8]], PARAMS)[0]
    thread, one, other = start(), ticket_of(llm, LONG), ticket_of(llm)
    held = gate()
    thread.submit([one, other])
    held.wait()
    held.let(calls)
    thread.cancel([one])
    thread.cancel([one, one])
    held.let(1)  # the call that was about to begin
    assert isinstance(error_of(one), Cancelled)
    assert llm.engine.scheduler.num_free_slots >= 1
    held.open()
    assert output_of(other).token_ids == expected.token_ids
    thread.cancel([one, other])  # both have ended
    thread.submit([last := ticket_of(llm)])
    assert output_of(last).token_ids == expected.token_ids
    assert value(thread, "request_failure_total", reason="cancelled") == 1


def test_a_request_that_waits_for_a_slot_can_be_cancelled(llm: LLM, start: Start, gate: Callable[[], Gate]):
    thread, tickets = start(), [ticket_of(llm) for _ in range(4)]
    held = gate()
    thread.submit(tickets)
    held.wait()
    held.let(2)
    thread.cancel(tickets[2:3])
    held.let(1)
    assert isinstance(error_of(tickets[2]), Cancelled)
    held.open()
    assert all(output_of(tickets[number]).finish_reason == "length" for number in (0, 1, 3))


def test_a_ticket_that_was_never_submitted_can_be_cancelled(llm: LLM, start: Start):
    thread, stranger, ticket = start(), ticket_of(llm), ticket_of(llm)
    thread.cancel([stranger])
    thread.submit([ticket])
    output_of(ticket)
    events: Any = stranger.events
    assert events.empty()


# --- deadlines and limits --------------------------------------------------------------------------------------------


def test_deadlines_end_waiting_and_running_requests(llm: LLM, start: Start, gate: Callable[[], Gate]):
    clock = Clock()
    thread = start(clock=clock)
    soon = clock.now + 5
    running, waiting, patient = ticket_of(llm, deadline=soon), ticket_of(llm, deadline=soon), ticket_of(llm)
    held = gate()
    thread.submit([running, patient, waiting])
    held.wait()
    held.let(2)
    clock.now += 4.9
    held.let(1)
    assert value(thread, "num_requests_running") == 2
    clock.now += 0.2
    held.let(1)
    for ticket in (running, waiting):
        assert isinstance(error_of(ticket), DeadlinePassed)
    held.open()
    output_of(patient)
    assert value(thread, "request_failure_total", reason="timeout") == 2


def test_the_longest_time_of_all_requests_ends_them_too(llm: LLM, start: Start, gate: Callable[[], Gate]):
    clock = Clock()
    thread = start(clock=clock, request_timeout=60.0)
    clock.now = time.perf_counter()
    one, late = ticket_of(llm), ticket_of(llm, deadline=clock.now + 3600)
    held = gate()
    thread.submit([one, late])
    held.wait()
    held.let(2)
    clock.now += 61
    held.open()
    for ticket in (one, late):
        assert isinstance(error_of(ticket), DeadlinePassed)


def test_the_queue_takes_all_of_a_group_or_none(llm: LLM, start: Start, gate: Callable[[], Gate]):
    thread = start(max_queued_requests=2)
    held = gate()
    first = [ticket_of(llm) for _ in range(3)]
    thread.submit(first)  # two have a slot, one waits
    held.wait()
    refused = [ticket_of(llm) for _ in range(2)]
    with pytest.raises(QueueFull) as full:
        thread.submit(refused)
    assert 1 <= full.value.retry_after_s <= 60
    thread.submit(refused[:1])
    with pytest.raises(QueueFull):
        thread.submit(refused[1:])
    with pytest.raises(InputError, match=r"5 prompts at once, but 2 can run and 2 wait: send fewer"):
        thread.submit([ticket_of(llm) for _ in range(5)])
    held.let(3)  # a prompt, a burst, a prompt
    assert value(thread, "num_requests_waiting") == 2
    thread.cancel(first[:1])
    held.let(1)
    thread.submit(refused[1:])
    held.open()
    for ticket in (*first[1:], *refused):
        output_of(ticket)
    assert value(thread, "request_refused_total", reason="queue_full") == 3
    events: Any = refused[1].events
    assert events.empty()


def test_an_empty_queue_of_length_zero_still_takes_what_can_run(llm: LLM, start: Start, gate: Callable[[], Gate]):
    thread = start(max_queued_requests=0)
    held = gate()
    tickets = [ticket_of(llm) for _ in range(2)]
    thread.submit(tickets)
    held.wait()
    with pytest.raises(QueueFull):
        thread.submit([ticket_of(llm)])
    held.open()
    for ticket in tickets:
        output_of(ticket)
    thread.submit(more := [ticket_of(llm) for _ in range(2)])
    for ticket in more:
        output_of(ticket)


def test_tokens_that_wait_are_limited(llm: LLM, start: Start, gate: Callable[[], Gate]):
    thread = start(max_queued_tokens=10)
    held = gate()
    running = [ticket_of(llm, LONG), ticket_of(llm, LONG)]  # long, but with a slot
    thread.submit(running)
    held.wait()
    waiting = ticket_of(llm, [5] * 6)
    thread.submit([waiting])
    with pytest.raises(QueueFull):
        thread.submit([ticket_of(llm, [5] * 5)])
    thread.submit([short := ticket_of(llm, [5] * 4)])
    held.open()
    for ticket in (*running, waiting, short):
        output_of(ticket)


def test_what_never_fits_into_the_queue_is_not_asked_to_come_again(llm: LLM, start: Start):
    thread = start(max_queued_tokens=10)
    with pytest.raises(InputError, match=r"12 tokens would have to wait and 10 may: .*--max-queued-tokens"):
        thread.submit([ticket_of(llm, [5] * 6) for _ in range(4)])  # two have a slot
    thread.submit(fitting := [ticket_of(llm, [5] * 5) for _ in range(4)])
    for ticket in fitting:
        output_of(ticket)


def test_a_long_call_is_stuck_until_it_returns(llm: LLM, start: Start, gate: Callable[[], Gate]):
    clock = Clock()
    thread = start(clock=clock, stuck_after=600.0)
    clock.now += 10_000
    assert thread.health().status == "ready"  # nothing to do is not stuck
    held = gate()
    thread.submit([ticket := ticket_of(llm)])
    held.wait()
    clock.now += 599
    assert thread.health().status == "ready"
    clock.now += 2
    assert thread.health() == engine_thread.Health("stuck", "a device call has taken 601 s so far")
    with pytest.raises(NotReady) as refused:
        thread.submit([ticket_of(llm)])
    assert refused.value.status == "stuck"
    held.let(1)
    assert thread.health().status == "ready"
    held.open()
    output_of(ticket)


# --- faults ----------------------------------------------------------------------------------------------------------


class FaultError(Exception):
    """What a test injects."""


def failing(method: Callable[..., Any], *, at: int, error: BaseException, of: object = None) -> Callable[..., Any]:
    """A method that raises at its n-th call, or at that with one argument."""
    calls = 0

    def act(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += of is None or of in args
        if calls == at and (of is None or of in args):
            raise error
        return method(*args, **kwargs)

    return act


@pytest.mark.parametrize("error", [InputError("it can never run"), FaultError("broken")])
def test_a_request_that_the_engine_refuses_fails_alone(
    error: Exception, llm: LLM, start: Start, monkeypatch: pytest.MonkeyPatch
):
    thread, tickets = start(), [ticket_of(llm) for _ in range(3)]
    monkeypatch.setattr(llm.session, "open", failing(llm.session.open, at=2, error=error))
    thread.submit(tickets)
    assert error_of(tickets[1]) is error
    assert output_of(tickets[0]).token_ids == output_of(tickets[2]).token_ids
    assert value(thread, "request_failure_total", reason="input" if isinstance(error, InputError) else "error") == 1


@pytest.mark.parametrize("at", [1, 4], ids=["first token", "decoding"])
def test_an_error_of_one_requests_text_is_its_own(at: int, llm: LLM, start: Start, monkeypatch: pytest.MonkeyPatch):
    expected = llm.generate([[5, 6, 7, 8]], PARAMS)[0]
    thread, one, other = start(), ticket_of(llm, [9, 10]), ticket_of(llm)
    stream = one.generation._stream
    error = FaultError("unreadable")
    monkeypatch.setattr(TextStream, "push", failing(TextStream.push, at=at, error=error, of=stream))
    thread.submit([one, other])
    assert error_of(one).args == (error,)
    assert output_of(other).token_ids == expected.token_ids


@pytest.mark.parametrize("name", ["take_chunk", "output"])
def test_an_error_of_one_requests_results_is_its_own(
    name: str, llm: LLM, start: Start, monkeypatch: pytest.MonkeyPatch
):
    thread, one, other, error = start(), ticket_of(llm), ticket_of(llm), FaultError("broken")
    owner = one.generation if name == "take_chunk" else llm
    monkeypatch.setattr(owner, name, failing(getattr(owner, name), at=1, error=error))
    thread.submit([one, other])
    ended = [rest(ticket)[-1] for ticket in (one, other)]
    assert [type(end) for end in ended] == [Failed, Finished]
    assert isinstance(ended[0], Failed) and ended[0].error is error


def test_a_failed_call_ends_the_open_requests_and_the_next_ones_run(
    llm: LLM, start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    expected = llm.generate([[5, 6, 7, 8]], PARAMS)[0]
    thread = start()
    for round_number in range(MOST_FAILURES + 1):  # each between successes
        tickets = [ticket_of(llm) for _ in range(3)]
        with monkeypatch.context() as patch:
            error = FaultError("device lost")
            patch.setattr(llm.engine, "step", failing(llm.engine.step, at=3, error=error))
            thread.submit(tickets)
            assert [error_of(ticket).args for ticket in tickets] == [(error,)] * 3
        thread.submit([last := ticket_of(llm)])
        assert output_of(last).token_ids == expected.token_ids
        assert value(thread, "device_failures_total") == round_number + 1
    assert thread.health().status == "ready"
    assert "device lost" in caplog.text and "Traceback" in caplog.text


def test_a_device_that_fails_again_and_again_is_given_up(llm: LLM, start: Start, monkeypatch: pytest.MonkeyPatch):
    thread, error = start(), FaultError("device lost")

    def step(accept: Any) -> Any:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine, "step", step)
        for number in range(MOST_FAILURES):
            assert thread.health().status == "ready", number
            thread.submit([ticket := ticket_of(llm)])
            assert error_of(ticket).args == (error,)
        thread._thread.join(PATIENCE)
    assert thread.health() == engine_thread.Health("dead", "FaultError: device lost")
    with pytest.raises(NotReady) as refused:
        thread.submit([ticket_of(llm)])
    assert refused.value.status == "dead"
    with pytest.raises(FaultError):
        thread.wait_until_warm()
    llm.session.end([])


FAULTS = {
    "a turn": ("_end_late", FaultError("bug")),
    "the gauges": ("_set_gauges", FaultError("bug")),
    "the end of a request": ("_end", FaultError("bug")),
    "the telling": ("_tell", FaultError("bug")),
    "the telling, no exception": ("_tell", SystemExit(3)),
    "the counting of an end": ("_note_end", FaultError("bug")),
    "the opening": ("_begin", FaultError("bug")),
    "the step": ("_step", KeyboardInterrupt()),
}


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("fault", FAULTS)
def test_no_ticket_is_left_without_its_last_event_whatever_breaks(
    fault: str, at: int, llm: LLM, start: Start, monkeypatch: pytest.MonkeyPatch
):
    name, error = FAULTS[fault]
    thread, tickets = start(), [ticket_of(llm, prompt) for prompt in ([5, 6], LONG, [7], [8], [9])]
    monkeypatch.setattr(thread, name, failing(getattr(thread, name), at=at, error=error))
    accepted = []
    for ticket in tickets:
        with suppress(NotReady):  # once it is dead
            thread.submit([ticket])
            accepted.append(ticket)
    for ticket in accepted:
        if isinstance(last := rest(ticket)[-1], Failed):
            assert isinstance(last.error, NotReady) and last.error.status == "dead"
    thread._thread.join(PATIENCE)
    assert thread.health().status == "dead"
    assert not thread._open
    llm.session.end([ticket.generation for ticket in tickets])  # for the other tests


def test_a_reader_that_has_gone_does_not_disturb_the_others(llm: LLM, start: Start):
    thread, gone, here = start(), ticket_of(llm, loop=Closed()), ticket_of(llm)
    thread.submit([gone, here])
    output_of(here)
    thread.submit([again := ticket_of(llm)])
    output_of(again)
    assert thread.health().status == "ready"


# --- the end ---------------------------------------------------------------------------------------------------------


def in_background(act: Callable[[], Any]) -> Callable[[], Any]:
    """Begins something in another thread; returns what waits for its result."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(act()))
    thread.start()

    def result() -> Any:
        thread.join(PATIENCE)
        return found[0]

    return result


def wait_for_status(thread: EngineThread, status: str) -> None:
    while thread.health().status != status:
        time.sleep(0.001)


def test_draining_lets_open_requests_end_and_takes_no_more(llm: LLM, start: Start, gate: Callable[[], Gate]):
    thread, tickets = start(), [ticket_of(llm) for _ in range(3)]
    held = gate()
    thread.submit(tickets)
    held.wait()
    drained = in_background(lambda: thread.drain(PATIENCE))
    wait_for_status(thread, "draining")
    with pytest.raises(NotReady) as refused:
        thread.submit([ticket_of(llm)])
    assert refused.value.status == "draining"
    held.open()
    for ticket in tickets:
        assert output_of(ticket).finish_reason == "length"
    assert drained() is True
    assert not thread.is_alive
    assert thread.health().status == "draining"


def test_what_has_not_ended_when_the_time_is_over_is_told(llm: LLM, start: Start, gate: Callable[[], Gate]):
    thread, tickets = start(), [ticket_of(llm) for _ in range(3)]
    held = gate()
    thread.submit(tickets)
    held.wait()
    drained = in_background(lambda: thread.drain(0.0))
    for ticket in tickets:  # although the device call goes on
        error = error_of(ticket)
        assert isinstance(error, NotReady) and error.status == "draining"
    held.open()
    assert drained() is False
    assert value(thread, "request_failure_total", reason="ended") == 3


def test_stopping_does_not_wait_for_a_call_that_hangs(
    llm: LLM, start: Start, gate: Callable[[], Gate], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(engine_thread, "_GOODBYE_S", 0.0)
    thread, ticket = start(), ticket_of(llm)
    held = gate()
    thread.submit([ticket])
    held.wait()
    thread.stop()
    assert thread.is_alive
    assert isinstance(error_of(ticket), NotReady)
    thread.stop()
    held.open()


def test_a_ticket_that_is_ended_while_its_end_is_made_is_told_once(
    llm: LLM, start: Start, monkeypatch: pytest.MonkeyPatch
):
    thread, ticket, stopped = start(), ticket_of(llm), []
    output = llm.output

    def late(generation: Any) -> RequestOutput:
        stopped.append(in_background(thread.stop))
        while thread._open:
            time.sleep(0.001)
        return output(generation)

    monkeypatch.setattr(llm, "output", late)
    thread.submit([ticket])
    assert isinstance(error_of(ticket), NotReady)
    thread._thread.join(PATIENCE)
    stopped[0]()
    events: Any = ticket.events
    assert events.empty()
    assert thread.health().status == "draining"


def test_a_thread_that_was_never_started_can_be_drained(llm: LLM):
    thread = EngineThread(llm, ServeOptions())
    assert thread.drain(PATIENCE)
    assert thread.health().status == "draining"


def test_many_readers_come_and_go_at_once(llm: LLM, start: Start):
    thread = start(max_queued_requests=64)
    ended: list[str] = []

    def client(number: int) -> None:
        for turn in range(5):
            ticket = ticket_of(llm, [number + 5, turn + 5], SamplingParams(max_tokens=4, ignore_eos=True))
            thread.submit([ticket])
            if (number + turn) % 3 == 0:
                thread.cancel([ticket])
            last = rest(ticket)[-1]
            assert isinstance(last, Finished) or isinstance(last.error, Cancelled)  # type: ignore[union-attr]
            ended.append(type(last).__name__)

    clients = [threading.Thread(target=client, args=(number,)) for number in range(8)]
    for one in clients:
        one.start()
    for one in clients:
        one.join(PATIENCE)
    assert len(ended) == 40
    assert value(thread, "request_success_total", finished_reason="length") == ended.count("Finished")
    assert value(thread, "request_failure_total", reason="cancelled") == ended.count("Failed")


# --- what is counted -------------------------------------------------------------------------------------------------


def test_the_metrics_are_those_of_the_requests(llm: LLM, start: Start):
    thread = start()
    tickets = [ticket_of(llm, LONG), ticket_of(llm)]
    thread.submit(tickets)
    outputs = [output_of(ticket) for ticket in tickets]
    tokens = sum(len(output.token_ids) for output in outputs)
    assert value(thread, "prompt_tokens_total") == 154
    assert value(thread, "prefix_cache_queries_total") == value(thread, "prefix_cache_hits_total") == 0  # no cache here
    assert value(thread, "generation_tokens_total") == tokens == 18
    assert value(thread, "request_success_total", finished_reason="length") == 2
    assert value(thread, "time_to_first_token_seconds_count") == 2
    assert value(thread, "inter_token_latency_seconds_count") == tokens - 2
    assert value(thread, "e2e_request_latency_seconds_count") == 2
    assert value(thread, "request_queue_time_seconds_count") == 2
    assert value(thread, "device_calls_total", kind="prefill") == 4
    assert value(thread, "device_calls_total", kind="decode") >= 4
    seconds = sum(value(thread, "device_seconds_total", kind=kind) for kind in ("prefill", "decode"))
    assert 0 < seconds < value(thread, "e2e_request_latency_seconds_sum")


def test_the_gauges_follow_the_requests(
    llm: LLM, start: Start, gate: Callable[[], Gate], monkeypatch: pytest.MonkeyPatch
):
    thread, tickets = start(), [ticket_of(llm, LONG) for _ in range(3)]
    held = gate()
    thread.submit(tickets)
    held.wait()
    assert value(thread, "num_requests_waiting") == 3
    held.let(5)  # three chunks, a burst, a chunk
    assert (value(thread, "num_requests_running"), value(thread, "num_requests_waiting")) == (2, 1)
    used, pages = (
        value(thread, "kv_pool_usage_perc", pool="retrieval"),
        value(thread, "kv_pool_pages", pool="retrieval"),
    )
    assert value(thread, "kv_cache_usage_perc") == used > 0
    assert pages == llm.engine.scheduler.allocator.retrieval.num_pages  # type: ignore[union-attr]
    with monkeypatch.context() as patched:  # what has left for host memory has no slot
        patched.setattr(llm.engine.scheduler, "swapped", llm.engine.scheduler.running[:1])
        thread._set_gauges()
    names = ("running", "waiting", "swapped")
    assert [value(thread, f"num_requests_{name}") for name in names] == [1, 1, 1]
    held.open()
    for ticket in tickets:
        output_of(ticket)
    thread.stop()
    assert thread.metrics.registry.get_sample_value("lserve_num_requests_waiting") is not None
