from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lserve_jax.config.attention import AttentionConfig
from lserve_jax.config.pages import most_streaming_pages, visible_pages
from lserve_jax.config.sizes import PoolSizes, Sizes
from lserve_jax.engine.allocator import PagePool
from lserve_jax.engine.request import Request, Sequence, Status
from lserve_jax.engine.scheduler import Decode, Prefill, Scheduler


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a scheduler is made of; pages of 0 for a pool that no layer has."""

    max_model_len: int = 200
    max_num_seqs: int = 3
    prefill_chunk: int = 32
    steps_per_call: int = 8
    page_size: int = 8
    sink: int = 10
    local: int = 20
    prefill_local: int = 40
    retrieval_pages: int = 60
    streaming_pages: int = 40

    def scheduler(self) -> Scheduler:
        sizes = Sizes(
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            prefill_chunk=self.prefill_chunk,
            steps_per_call=self.steps_per_call,
        )
        attention = AttentionConfig(
            token_budget=None,
            page_size=self.page_size,
            sub_page_size=self.page_size,
            sink=self.sink,
            local=self.local,
            prefill_local=self.prefill_local,
        )
        pools = PoolSizes(retrieval=self.retrieval_pages, streaming=self.streaming_pages)
        return Scheduler(sizes, attention, pools)


CONFIG = Settings()
STOP, TOKEN = 99, 7


@dataclass(frozen=True, kw_only=True)
class MaxTokens:
    max_tokens: int
    stop_token_ids: tuple[int, ...] = ()
    is_stepwise: bool = False


def make_request(request_id: int, prompt: int, max_tokens: int) -> Request:
    return Request(id=request_id, prompt=(TOKEN,) * prompt, sampling=MaxTokens(max_tokens=max_tokens))


class Device:
    """Generates TOKEN until, for a request in `stops`, its total length is reached: that token is STOP."""

    def __init__(self, scheduler: Scheduler, stops: dict[int, int] | None = None) -> None:
        self.scheduler = scheduler
        self.stops = stops or {}
        self.calls: list[tuple[str, tuple[int, ...]]] = []
        self.written: dict[tuple[str, int, int], int] = {}  # (table, request, logical page) -> page

    def step(self) -> bool:
        plan = self.scheduler.schedule()
        self.check_slots()
        if isinstance(plan, Prefill):
            self.prefill(plan)
        elif isinstance(plan, Decode):
            self.decode(plan)
        return plan is not None

    def run(self, max_calls: int = 10_000) -> None:
        for _ in range(max_calls):
            if not self.step():
                return
        raise AssertionError(f"not idle after {max_calls} calls")

    def prefill(self, plan: Prefill) -> None:
        sequence = plan.sequence
        self.calls.append(("prefill", (sequence.request.id,)))
        assert plan.start == sequence.num_cached
        assert 1 <= plan.count <= self.scheduler.sizes.prefill_chunk
        self.check_pages(sequence, plan.count, self.scheduler.attention.prefill_local)
        if plan.is_last:
            token, reason = self.next_token(sequence, len(sequence.tokens))
            self.scheduler.record_prefill(plan, token, reason)
        else:
            self.scheduler.record_prefill(plan)

    def decode(self, plan: Decode) -> None:
        self.calls.append(("decode", tuple(sequence.request.id for sequence in plan.sequences)))
        sizes = self.scheduler.sizes
        assert plan.num_steps == min(sizes.steps_per_call, max(sequence.remaining for sequence in plan.sequences))
        for sequence, limit in zip(plan.sequences, plan.limits, strict=True):
            assert 1 <= limit <= sequence.remaining
            assert sequence.num_cached == len(sequence.tokens) - 1
            self.check_pages(sequence, limit, self.scheduler.attention.local)
            tokens: list[int] = []
            reason = None
            while len(tokens) < limit and reason is None:
                token, reason = self.next_token(sequence, len(sequence.tokens) + len(tokens))
                tokens.append(token)
            self.scheduler.record_decode(sequence, tokens, reason)

    def next_token(self, sequence: Sequence, length: int) -> tuple[int, str | None]:
        is_stop = self.stops.get(sequence.request.id) == length + 1 - sequence.prompt_length
        return (STOP, "stop") if is_stop else (TOKEN, None)

    def check_slots(self) -> None:
        slots = [sequence.slot for sequence in self.scheduler.running]
        assert len(set(slots)) == len(slots)
        assert set(slots) <= set(range(self.scheduler.sizes.max_num_seqs))

    def check_pages(self, sequence: Sequence, count: int, window: int) -> None:
        config, start = self.scheduler.attention, sequence.num_cached
        pools = {name: getattr(self.scheduler.allocator, name) for name in ("retrieval", "streaming")}
        num_pages = sequence.streaming_table.size
        seen = visible_pages(
            start, count, sink=config.sink, window=window, page_size=config.page_size, num_pages=num_pages
        )
        if pools["streaming"] is not None:
            self.check_unmoved("streaming", sequence, sequence.streaming_table, np.flatnonzero(seen))
        if pools["retrieval"] is not None:
            pages = np.arange(-(-(start + count) // config.page_size))
            self.check_unmoved("retrieval", sequence, sequence.retrieval_table, pages)
        for name, table in (("retrieval", "retrieval_table"), ("streaming", "streaming_table")):
            owned = np.concatenate([getattr(other, table) for other in self.scheduler.running])
            owned = owned[owned >= 0]
            assert len(set(owned.tolist())) == owned.size
            assert owned.size <= (0 if pools[name] is None else pools[name].num_pages)

    def check_unmoved(self, name: str, sequence: Sequence, table: np.ndarray, pages: np.ndarray) -> None:
        """The pages are held; those that hold cached tokens are the ones that the tokens were written to."""
        assert (table[pages] >= 0).all()
        for logical in pages.tolist():
            key = name, sequence.request.id, logical
            if logical * self.scheduler.attention.page_size < sequence.num_cached:
                assert table[logical] == self.written[key]
            self.written[key] = int(table[logical])


def assert_nothing_leaks(scheduler: Scheduler) -> None:
    assert scheduler.is_idle
    assert scheduler.schedule() is None
    for pool in (scheduler.allocator.retrieval, scheduler.allocator.streaming):
        assert pool is None or pool.num_free == pool.num_pages
    assert scheduler.num_free_slots == scheduler.sizes.max_num_seqs


CONFIGS = st.builds(
    lambda **overrides: replace(CONFIG, **overrides),
    max_num_seqs=st.integers(1, 5),
    prefill_chunk=st.integers(1, 70),
    steps_per_call=st.integers(1, 20),
    page_size=st.sampled_from([1, 4, 8, 16, 64]),
    sink=st.integers(0, 40),
    local=st.integers(1, 60),
    prefill_local=st.integers(1, 100),
    retrieval_pages=st.one_of(st.just(0), st.integers(200, 450)),
    streaming_pages=st.one_of(st.just(0), st.integers(200, 450)),
)
# (calls before it arrives, prompt, max_tokens, generated tokens at which it stops)
ARRIVALS = st.lists(
    st.tuples(st.integers(0, 6), st.integers(1, 200), st.integers(1, 60), st.integers(1, 80)), min_size=1, max_size=12
)


@settings(deadline=None)
@given(CONFIGS, ARRIVALS)
def test_random_arrivals_all_finish_in_fair_order_and_nothing_leaks(
    config: Settings, arrivals: list[tuple[int, int, int, int]]
):
    scheduler = config.scheduler()
    device = Device(scheduler, {index: stop for index, (_, _, _, stop) in enumerate(arrivals)})
    sequences = []
    for index, (delay, prompt, max_tokens, _) in enumerate(arrivals):
        for _ in range(delay):
            device.step()
        sequences.append(scheduler.add(make_request(index, prompt, max_tokens)))
    device.run()
    assert_nothing_leaks(scheduler)
    for sequence, (_, prompt, max_tokens, stop) in zip(sequences, arrivals, strict=True):
        due = max(1, min(max_tokens, config.max_model_len - prompt))
        assert sequence.status is Status.FINISHED
        assert len(sequence.generated) == min(due, stop)
        assert sequence.finish_reason == ("stop" if stop <= due else "length")
        assert sequence.decode_steps == len(sequence.generated) - 1
        assert sequence.num_cached == len(sequence.tokens) - 1
    # First come, first served, and one prefill at a time.
    prefills = [ids[0] for kind, ids in device.calls if kind == "prefill"]
    assert prefills == sorted(prefills)
    assert set(prefills) == set(range(len(arrivals)))


@settings(deadline=None)
@given(CONFIGS, ARRIVALS, st.lists(st.tuples(st.integers(0, 40), st.integers(0, 12)), max_size=8))
def test_random_aborts_leak_nothing_and_stop_nobody_else(
    config: Settings, arrivals: list[tuple[int, int, int, int]], aborts: list[tuple[int, int]]
):
    scheduler = config.scheduler()
    device = Device(scheduler)
    sequences = [scheduler.add(make_request(i, prompt, tokens)) for i, (_, prompt, tokens, _) in enumerate(arrivals)]
    aborted = set()
    for delay, request_id in aborts:
        for _ in range(delay):
            device.step()
        if scheduler.abort(request_id):
            aborted.add(request_id)
            assert sequences[request_id].finish_reason == "abort"
    device.run()
    assert_nothing_leaks(scheduler)
    assert {i for i, sequence in enumerate(sequences) if sequence.finish_reason == "abort"} == aborted
    assert all(sequence.remaining == 0 for sequence in sequences if sequence.finish_reason == "length")


def test_prefills_come_before_decode_calls_and_decode_calls_hold_everyone():
    scheduler = CONFIG.scheduler()
    device = Device(scheduler)
    for request_id, prompt in enumerate((40, 10, 70, 5)):
        scheduler.add(make_request(request_id, prompt, 12))
    device.run()
    assert device.calls == [
        *[("prefill", (0,))] * 2,
        ("prefill", (1,)),
        *[("prefill", (2,))] * 3,
        *[("decode", (0, 1, 2))] * 2,
        ("prefill", (3,)),
        *[("decode", (3,))] * 2,
    ]


def test_a_short_request_does_not_overtake_one_that_waits_for_pages():
    scheduler = replace(CONFIG, retrieval_pages=25).scheduler()
    device = Device(scheduler)
    for request_id, prompt in enumerate((80, 150, 8)):
        scheduler.add(make_request(request_id, prompt, 20))
    device.run()
    kinds = [ids for kind, ids in device.calls if kind == "prefill"]
    assert kinds == [(0,)] * 3 + [(1,)] * 5 + [(2,)]
    assert ("decode", (0,)) in device.calls  # alone, though a slot was free


def test_admission_commits_the_pages_of_the_whole_generation():
    # Each request needs 5 pages in the end, but 2 at its start.
    scheduler = replace(CONFIG, retrieval_pages=9).scheduler()
    device = Device(scheduler)
    for request_id in range(2):
        scheduler.add(make_request(request_id, 9, 30))
    device.run()
    assert ("decode", (0, 1)) not in device.calls
    scheduler = replace(CONFIG, retrieval_pages=10).scheduler()
    device = Device(scheduler)
    for request_id in range(2):
        scheduler.add(make_request(request_id, 9, 30))
    device.run()
    assert ("decode", (0, 1)) in device.calls


def test_streaming_pages_of_the_prefill_window_are_uncommitted_when_the_prefill_ends():
    config = replace(CONFIG, max_model_len=1000, retrieval_pages=300, prefill_local=200)
    decode = most_streaming_pages(config.sink, config.local, config.steps_per_call, config.page_size)
    prefill = most_streaming_pages(config.sink, config.prefill_local, config.prefill_chunk, config.page_size)
    assert decode < prefill
    for missing, is_together in ((0, True), (1, False)):
        scheduler = replace(config, streaming_pages=decode + prefill - missing).scheduler()
        device = Device(scheduler)
        for request_id in range(2):
            scheduler.add(make_request(request_id, 900, 12))
        device.run()
        assert (("decode", (0, 1)) in device.calls) == is_together


def test_a_decode_call_has_as_many_steps_as_the_longest_to_go_and_no_more_than_configured():
    scheduler = CONFIG.scheduler()
    sequences = [scheduler.add(make_request(i, 5, tokens)) for i, tokens in enumerate((3, 6))]
    device = Device(scheduler)
    device.step()
    device.step()
    plan = scheduler.schedule()
    assert isinstance(plan, Decode)
    assert plan.sequences == tuple(sequences)
    assert plan.limits == (2, 5)
    assert plan.num_steps == 5
    scheduler = replace(CONFIG, steps_per_call=4).scheduler()
    scheduler.add(make_request(0, 5, 6))
    Device(scheduler).step()
    plan = scheduler.schedule()
    assert isinstance(plan, Decode)
    assert plan.num_steps == 4


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "generated"), [(195, 100, 5), (199, 100, 1), (200, 100, 1), (190, 10, 10)]
)
def test_generation_ends_with_length_where_the_context_does(prompt: int, max_tokens: int, generated: int):
    scheduler = CONFIG.scheduler()
    sequence = scheduler.add(make_request(0, prompt, max_tokens))
    Device(scheduler).run()
    assert len(sequence.generated) == generated
    assert sequence.finish_reason == "length"


def test_a_prompt_longer_than_the_context_is_refused_with_both_lengths():
    scheduler = CONFIG.scheduler()
    with pytest.raises(
        ValueError, match=r"^prompt has 201 tokens, but max_model_len is 200: shorten the prompt or raise"
    ):
        scheduler.add(make_request(0, 201, 1))
    assert_nothing_leaks(scheduler)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"retrieval_pages": 14},
            r"150 tokens and may grow to 200, which takes 25 retrieval pages of 8 tokens, but .* 14",
        ),
        (
            {"streaming_pages": 6},
            r"150 tokens and may grow to 200, which takes \d+ streaming pages of 8 tokens, but .* 6:",
        ),
    ],
)
def test_a_request_that_the_pools_cannot_hold_alone_is_refused(overrides: dict[str, int], message: str):
    scheduler = replace(CONFIG, **overrides).scheduler()
    with pytest.raises(ValueError, match=message):
        scheduler.add(make_request(0, 150, 100))
    assert_nothing_leaks(scheduler)


def test_an_id_may_be_used_again_only_after_its_request_has_finished():
    scheduler = CONFIG.scheduler()
    scheduler.add(make_request(5, 3, 2))
    with pytest.raises(ValueError, match=r"request 5: this id is in use"):
        scheduler.add(make_request(5, 3, 2))
    Device(scheduler).run()
    scheduler.add(make_request(5, 3, 2))


def test_a_request_can_be_aborted_waiting_prefilling_and_decoding():
    scheduler = replace(CONFIG, max_num_seqs=2).scheduler()
    device = Device(scheduler)
    sequences = [scheduler.add(make_request(i, 60, 50)) for i in range(3)]
    for _ in range(3):
        device.step()
    assert [sequence.status for sequence in sequences] == [Status.DECODING, Status.PREFILLING, Status.WAITING]
    assert [scheduler.abort(i) for i in range(3)] == [True] * 3
    assert [sequence.finish_reason for sequence in sequences] == ["abort"] * 3
    assert not scheduler.abort(0)
    assert_nothing_leaks(scheduler)


def test_bad_requests_and_configs_are_refused():
    with pytest.raises(ValueError, match=r"request 3: the prompt is empty"):
        make_request(3, 0, 1)
    with pytest.raises(ValueError, match=r"request 3: max_tokens must be at least 1, got 0"):
        make_request(3, 1, 0)
    with pytest.raises(ValueError, match=r"max_num_seqs=0 must be a whole .* from 1; prefill_chunk=-1 must be a whole"):
        Sizes(max_model_len=1, max_num_seqs=0, prefill_chunk=-1)
    with pytest.raises(ValueError, match=r"num_pages=0 must be a whole number from 1"):
        PagePool(0, keeps_all=True)
