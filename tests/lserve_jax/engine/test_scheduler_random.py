"""Random requests on pools that are too small, checked page by page (`page_model`)."""

import random
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lserve_jax.config.sizes import most_pages
from lserve_jax.engine import room
from lserve_jax.engine.request import Request, Sequence, Status
from lserve_jax.engine.scheduler import Scheduler, Turns
from tests.lserve_jax.engine.page_model import (
    Device,
    Settings,
    assert_all_free,
    assert_nothing_leaks,
    make_request,
)

LONGEST = 240
_GENERATOR = random.Random(5)
DOCUMENTS = [[_GENERATOR.randrange(1000) for _ in range(LONGEST)] for _ in range(3)]


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """A request: so many tokens of a document, and then tokens of its own.

    Attributes:
      delay: calls before it arrives.
      stop: generated tokens at which it stops.
      abort: calls after its arrival at which it is aborted; None for never.
    """

    delay: int
    document: int
    shared: int
    own: int
    max_tokens: int
    stop: int
    salt: bytes
    priority: int
    is_cacheable: bool
    is_stepwise: bool
    abort: int | None

    def request(self, number: int) -> Request:
        prompt = DOCUMENTS[self.document][: self.shared] + [10_000 + number] * self.own
        return make_request(
            number,
            prompt[:LONGEST] or [number],
            self.max_tokens,
            salt=self.salt,
            priority=self.priority,
            is_cacheable=self.is_cacheable,
            is_stepwise=self.is_stepwise,
        )


def make_settings(
    *,
    page: int,
    pages_per_chunk: int,
    kinds: str,
    spare: tuple[float, float],
    swap: float,
    short: float,
    short_rows: int,
    busy_steps: int | None,
    prefill_calls: int,
    **fields: Any,
) -> Settings:
    """Pools between what one sequence needs and what all need at once."""
    chunk = page * pages_per_chunk
    turns = Turns(
        prefill_calls=prefill_calls, busy_steps=busy_steps, short_chunk=round(short * chunk), short_rows=short_rows
    )
    config = Settings(max_model_len=LONGEST, page_size=page, prefill_chunk=chunk, turns=turns, **fields)
    slots = config.max_num_seqs

    def pool(name: str, share: float) -> int:
        one = most_pages(config.attention, config.sizes, LONGEST, LONGEST, keeps_all=name == "retrieval")
        return one + round(share * (slots - 1) * one) if kinds in ("both", name) else 0

    retrieval = pool("retrieval", spare[0])
    return replace(
        config, retrieval_pages=retrieval, streaming_pages=pool("streaming", spare[1]), swap=round(swap * retrieval)
    )


SETTINGS = st.builds(
    make_settings,
    max_num_seqs=st.integers(1, 5),
    page=st.sampled_from([1, 4, 8, 16]),
    pages_per_chunk=st.integers(1, 4),
    steps_per_call=st.integers(1, 20),
    sink=st.integers(0, 40),
    local=st.integers(1, 60),
    prefill_local=st.integers(1, 100),
    kinds=st.sampled_from(["both", "both", "retrieval", "streaming"]),
    spare=st.tuples(st.sampled_from([0.0, 0.1, 0.5, 1.2]), st.sampled_from([0.0, 0.3, 1.5])),
    swap=st.sampled_from([0.0, 0.6, 5.0]),
    short=st.sampled_from([0.0, 0.5, 1.0]),
    short_rows=st.sampled_from([1, 3]),
    busy_steps=st.sampled_from([None, 1, 4, 30]),
    prefill_calls=st.sampled_from([1, 1, 3]),
)
ARRIVAL = st.builds(
    Arrival,
    delay=st.integers(0, 6),
    document=st.integers(0, 2),
    shared=st.integers(0, 200),
    own=st.one_of(st.just(0), st.integers(0, 40)),
    max_tokens=st.integers(1, 120),
    stop=st.integers(1, 150),
    salt=st.sampled_from([b"", b"", b"other"]),
    priority=st.sampled_from([0, 0, 0, -1, 1]),
    is_cacheable=st.sampled_from([True, True, True, False]),
    is_stepwise=st.sampled_from([False, False, False, True]),
    abort=st.one_of(st.none(), st.none(), st.integers(0, 40)),
)
MARGINS = st.sampled_from([1, 8, 32])


def run_all(config: Settings, arrivals: list[Arrival], margin: int) -> tuple[Scheduler, Device]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "MARGIN", margin)
        scheduler = config.scheduler()
        device = Device(scheduler, {number: arrival.stop for number, arrival in enumerate(arrivals)})
        sequences: list[Sequence] = []
        due: dict[int, int] = {}
        clock = 0

        def tick() -> bool:
            nonlocal clock
            clock += 1
            for number in [number for number, when in due.items() if when <= clock]:
                del due[number]
                is_open = sequences[number].status is not Status.FINISHED
                assert scheduler.abort(number) == is_open
                device.check()
            return device.step() is not None

        for number, arrival in enumerate(arrivals):
            for _ in range(arrival.delay):
                tick()
            sequences.append(scheduler.add(arrival.request(number)))
            if arrival.abort is not None:
                due[number] = clock + arrival.abort
        # Each call reads a chunk or adds a token to everybody; between two calls each slot moves twice at most.
        calls = sum(len(one.request.prompt) + one.request.sampling.max_tokens for one in sequences)
        for _ in range(calls * (1 + 2 * config.max_num_seqs) + 1):
            if not tick():
                break
        else:
            raise AssertionError("somebody waits for ever")
        check_results(config, arrivals, sequences)
        # Whoever leaves has seen others take more pages than all had coming to them when the last one came in.
        steps = max(margin, config.steps_per_call)
        assert scheduler.num_swaps <= config.max_num_seqs * (1 + device.num_steps // steps)
        if config.swap == 0:
            assert scheduler.num_swaps == 0
    return scheduler, device


def check_results(config: Settings, arrivals: list[Arrival], sequences: list[Sequence]) -> None:
    for sequence, arrival in zip(sequences, arrivals, strict=True):
        assert sequence.status is Status.FINISHED
        due = max(1, min(arrival.max_tokens, config.max_model_len - sequence.prompt_length))
        if sequence.finish_reason == "abort":
            assert arrival.abort is not None
            continue
        assert len(sequence.generated) == min(due, arrival.stop)
        assert sequence.finish_reason == ("stop" if arrival.stop <= due else "length")
        assert sequence.decode_steps == len(sequence.generated) - 1
        assert sequence.num_cached == len(sequence.tokens) - 1
        assert arrival.is_cacheable or sequence.prefix.num_hit == 0


@settings(max_examples=100)
@given(SETTINGS, st.lists(ARRIVAL, min_size=1, max_size=14), MARGINS)
def test_every_call_reads_what_a_run_alone_would_have_written(config: Settings, arrivals: list[Arrival], margin: int):
    scheduler, _ = run_all(config, arrivals, margin)
    assert_nothing_leaks(scheduler)
    assert_all_free(scheduler)


def random_arrival(generator: random.Random, chunk: int) -> Arrival:
    is_short = generator.random() < 0.2
    return Arrival(
        delay=generator.choice([0, 0, 1, 3, 12]),
        document=generator.randrange(3),
        shared=0 if is_short else generator.choice([generator.randrange(7) * chunk, generator.randrange(200)]),
        own=generator.randrange(1 + chunk // 2) if is_short else generator.choice([0, generator.randrange(40)]),
        max_tokens=generator.choice([1, 5, 40, 120]),
        stop=generator.randrange(1, 200),
        salt=generator.choice([b"", b"", b"", b"other"]),
        priority=generator.choice([0, 0, 0, 0, -1, 1]),
        is_cacheable=generator.random() < 0.9,
        is_stepwise=generator.random() < 0.1,
        abort=generator.randrange(60) if generator.random() < 0.2 else None,
    )


@pytest.mark.parametrize("kinds", ["both", "retrieval", "streaming"])
@pytest.mark.parametrize(("swap", "spare"), [(0.0, 1.0), (1.2, 0.2), (5.0, 0.1)])
def test_a_long_run_of_random_requests(kinds: str, swap: float, spare: float):
    generator = random.Random(f"{kinds} {swap}")
    config = make_settings(
        max_num_seqs=4,
        page=8,
        pages_per_chunk=3,
        steps_per_call=6,
        sink=10,
        local=20,
        prefill_local=50,
        kinds=kinds,
        spare=(spare, 0.6),
        swap=swap,
        short=0.5,
        short_rows=3,
        busy_steps=3,
        prefill_calls=1,
    )
    arrivals = [random_arrival(generator, config.prefill_chunk) for _ in range(90)]
    scheduler, device = run_all(config, arrivals, margin=16)
    # What is to be attacked took place.
    assert scheduler.cache is not None
    counts = scheduler.cache.counts
    assert counts.hits > 0.05 * counts.queries
    assert (scheduler.num_swaps > 2) == (swap > 0 and kinds != "streaming")
    assert kinds == "streaming" or counts.evicted_entries > 20
    assert kinds == "retrieval" or counts.evicted_windows > 10
    assert any(kind == "prefill" and len(ids) > 1 for kind, ids in device.calls)
    assert_all_free(scheduler)


@pytest.mark.parametrize("kinds", ["both", "retrieval"])
def test_a_long_run_of_chats_that_outgrow_the_pool(kinds: str):
    """Short prompts and long answers: somebody leaves all the time, also while prompts are read."""
    generator = random.Random(kinds)
    config = make_settings(
        max_num_seqs=5,
        page=4,
        pages_per_chunk=3,
        steps_per_call=3,
        sink=6,
        local=10,
        prefill_local=20,
        kinds=kinds,
        spare=(0.05, 1.5),
        swap=6.0,
        short=0.5,
        short_rows=2,
        busy_steps=2,
        prefill_calls=2,
    )
    arrivals = []
    for _ in range(60):
        shared = generator.choice([0, 12, 24, 36, generator.randrange(60)])
        arrival = random_arrival(generator, config.prefill_chunk)
        arrivals.append(
            replace(
                arrival,
                delay=generator.choice([0, 0, 4]),
                shared=shared,
                max_tokens=120,
                stop=generator.randrange(60, 200),
            )
        )
    scheduler, _ = run_all(config, arrivals, margin=4)
    assert scheduler.num_swaps > 20
    assert scheduler.cache is not None and scheduler.cache.counts.hits > 0
    assert_all_free(scheduler)
