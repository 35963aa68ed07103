"""A device of plain arrays for tests of scheduling: every page holds a number per token, and every read is checked."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from lserve_jax.config.attention import AttentionConfig
from lserve_jax.config.pages import visible_pages
from lserve_jax.config.sizes import PoolSizes, Sizes
from lserve_jax.engine.plans import Decode, Plan, Prefill, Swap
from lserve_jax.engine.pools import PagePool
from lserve_jax.engine.prefix_cache import PrefixCache
from lserve_jax.engine.request import Request, Sequence, Status
from lserve_jax.engine.scheduler import Scheduler, Turns

STOP, TOKEN = 99, 7
POISON = 0


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
    swap: int = 0
    turns: Turns = field(default_factory=lambda: Turns(short_chunk=16))
    has_prefix_cache: bool = True

    @property
    def sizes(self) -> Sizes:
        return Sizes(
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            prefill_chunk=self.prefill_chunk,
            steps_per_call=self.steps_per_call,
        )

    @property
    def attention(self) -> AttentionConfig:
        return AttentionConfig(
            token_budget=None,
            page_size=self.page_size,
            sub_page_size=self.page_size,
            sink=self.sink,
            local=self.local,
            prefill_local=self.prefill_local,
        )

    def scheduler(self) -> Scheduler:
        pools = PoolSizes(retrieval=self.retrieval_pages, streaming=self.streaming_pages, swap=self.swap)
        return Scheduler(self.sizes, self.attention, pools, turns=self.turns, has_prefix_cache=self.has_prefix_cache)


@dataclass(frozen=True, kw_only=True)
class MaxTokens:
    max_tokens: int
    stop_token_ids: tuple[int, ...] = ()
    is_stepwise: bool = False


def make_request(request_id: int, prompt: int | Iterable[int], max_tokens: int, **fields: Any) -> Request:
    """A prompt of so many tokens that no other request has, or of these tokens."""
    tokens = (1000 + request_id,) * prompt if isinstance(prompt, int) else tuple(prompt)
    limits = MaxTokens(max_tokens=max_tokens, is_stepwise=fields.pop("is_stepwise", False))
    return Request(id=request_id, prompt=tokens, sampling=limits, **fields)


class Contents:
    """What a run of each sequence alone would write at each of its positions: a number that stands for all before it.

    Whole chunks of prompts that may be cached are written alike by all that begin alike and have the same salt. Nobody
    but the sequence itself may ever read anything else.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.known: dict[int, tuple[int, list[int]]] = {}

    def of(self, sequence: Sequence) -> np.ndarray:
        request, number = sequence.request, sequence.number
        chunk = self.scheduler.sizes.prefill_chunk
        is_short = sequence.prompt_length <= self.scheduler.turns.short_chunk
        is_shared = self.scheduler.cache is not None and request.is_cacheable and not is_short
        shared = sequence.prompt_length // chunk * chunk if is_shared else 0
        state, values = self.known.get(number, (hash(request.salt), []))
        for position in range(len(values), len(sequence.tokens)):
            state = hash((state, sequence.tokens[position]))
            values.append(state if position < shared else hash((state, number)))
        self.known[number] = state, values
        return np.array(values, np.int64)


class Memory:
    """Physical pages of one pool. A page that is taken holds nothing until it is written."""

    def __init__(self, pool: PagePool, page_size: int) -> None:
        self.pool = pool
        self.page_size = page_size
        self.values = np.full((pool.num_pages, page_size), POISON, np.int64)
        take = pool.take

        def take_poisoned(count: int) -> list[int]:
            pages = take(count)
            self.values[pages] = POISON
            return pages

        setattr(pool, "take", take_poisoned)  # noqa: B010 - the pool is watched, not replaced

    def write(self, table: np.ndarray, start: int, values: np.ndarray) -> None:
        positions = np.arange(start, start + len(values))
        pages = table[positions // self.page_size]
        assert (pages >= 0).all(), f"no page to write to: {table}, from {start}"
        assert (self.pool._holders[pages] == 1).all(), "a shared page is written"
        self.values[pages, positions % self.page_size] = values

    def check(self, table: np.ndarray, logical: np.ndarray, expected: np.ndarray) -> None:
        """These logical pages hold what is expected of all their tokens, of which there are `len(expected)`."""
        assert (table[logical] >= 0).all(), f"a page to be read is not held: {table}, {logical}"
        positions = (logical[:, None] * self.page_size + np.arange(self.page_size)).ravel()
        positions = positions[positions < len(expected)]
        found = self.values[table[positions // self.page_size], positions % self.page_size]
        np.testing.assert_array_equal(found, expected[positions])

    def poison_free(self) -> None:
        self.values[self.pool._free] = POISON


class Device:
    """Generates TOKEN until, for a request in `stops`, as many tokens are generated: that token is STOP.

    It checks after each plan what every call reads and writes, the counts of pages, and the rules of scheduling.
    """

    def __init__(self, scheduler: Scheduler, stops: dict[int, int] | None = None) -> None:
        self.scheduler = scheduler
        self.stops = stops or {}
        self.calls: list[tuple[str, tuple[int, ...]]] = []
        self.contents = Contents(scheduler)
        page = scheduler.attention.page_size
        self.memories = {name: Memory(pool, page) for name, pool in scheduler.allocator.pools}
        self.selected: list[Any] = [None] * scheduler.sizes.max_num_seqs
        self.prefills = 0  # while somebody decodes, since the last decode call
        self.has_passed = False
        self.passed: set[int] = set()  # requests that passed one that was being read, or shared its call
        self.num_steps = self.num_chunks = 0

    # Running plans.

    def step(self) -> Plan | None:
        scheduler = self.scheduler
        before = list(scheduler.waiting), list(scheduler.running), list(scheduler.swapped)
        reading = [one for one in before[1] if one.status is Status.PREFILLING]
        decoding = [one for one in before[1] if one.status is Status.DECODING]
        can_run = [scheduler.room.may_run(before[1], one, scheduler._hit(one).retrieval) for one in before[0]]
        plan = scheduler.schedule()
        check_counts(scheduler)
        admitted = [one for one in before[0] if one not in scheduler.waiting]
        assert not (admitted and before[2]), "somebody new starts before those who left come back"
        for one in admitted[:1]:
            assert all(can_run[: before[0].index(one) + 1]), "it overtakes one that waits for pages"
        if isinstance(plan, Swap):
            assert not admitted
            self.swap(plan, before[1])
        elif isinstance(plan, Prefill):
            self.check_turn(plan, before[0], reading, decoding, admitted)
            self.prefill(plan)
        elif isinstance(plan, Decode):
            assert not admitted
            self.prefills = 0
            self.decode(plan, bool(before[0] or before[2] or reading))
        self.check()
        return plan

    def check(self) -> None:
        check_counts(self.scheduler)
        for memory in self.memories.values():
            memory.poison_free()

    def run(self, max_calls: int = 10_000) -> None:
        for _ in range(max_calls):
            if self.step() is None:
                return
        raise AssertionError(f"not idle after {max_calls} calls")

    def check_turn(
        self,
        plan: Prefill,
        waiting: list[Sequence],
        reading: list[Sequence],
        decoding: list[Sequence],
        admitted: list[Sequence],
    ) -> None:
        turns, first = self.scheduler.turns, plan.chunks[0].sequence
        self.prefills += bool(decoding)
        assert self.prefills <= turns.prefill_calls, "streams wait for more prefill calls than they should"
        if not reading:
            assert first is waiting[0]
        elif first in reading:
            assert first is min(reading, key=lambda one: one.rank)
        is_passing = bool(reading) and first not in reading
        if is_passing:
            assert plan.chunks[0].is_last, "it passes, and needs more than one call"
            assert not self.has_passed, "two pass in a row"
        self.has_passed = is_passing
        self.passed |= {one.request.id for one in admitted if reading or one is not first}
        assert {one.number for one in admitted} <= {chunk.sequence.number for chunk in plan.chunks}
        assert len(plan.chunks) <= turns.short_rows
        if len(plan.chunks) > 1:
            assert all(chunk.sequence.prompt_length <= turns.short_chunk for chunk in plan.chunks)
            assert all(chunk.sequence.request.is_cacheable for chunk in plan.chunks)

    def prefill(self, plan: Prefill) -> None:
        self.calls.append(("prefill", tuple(chunk.sequence.request.id for chunk in plan.chunks)))
        sizes, attention = self.scheduler.sizes, self.scheduler.attention
        for chunk in plan.chunks:
            assert chunk.start == chunk.sequence.num_cached
            assert chunk.start % sizes.prefill_chunk == 0, "off the grid of chunks"
            assert chunk.count == min(sizes.prefill_chunk, chunk.sequence.prompt_length - chunk.start)
            self.run_call(chunk.sequence, chunk.count, chunk.count, attention.prefill_local)
        for chunk in plan.chunks:
            self.num_chunks += 1
            if chunk.is_last:
                token, reason = self.next_token(chunk.sequence, len(chunk.sequence.tokens))
                self.scheduler.record_prefill(chunk, token, reason)
            else:
                self.scheduler.record_prefill(chunk)

    def decode(self, plan: Decode, is_busy: bool) -> None:
        self.calls.append(("decode", tuple(sequence.request.id for sequence in plan.sequences)))
        sizes, turns = self.scheduler.sizes, self.scheduler.turns
        assert set(plan.sequences) == {one for one in self.scheduler.running if one.status is Status.DECODING}
        most = min(sizes.steps_per_call, turns.busy_steps or sizes.steps_per_call) if is_busy else sizes.steps_per_call
        assert plan.num_steps == max(plan.limits)
        for sequence, limit in zip(plan.sequences, plan.limits, strict=True):
            is_stepwise = sequence.request.sampling.is_stepwise
            assert limit == (1 if is_stepwise else min(most, sequence.remaining))
            assert sequence.num_cached == len(sequence.tokens) - 1
            assert sequence.slot is not None
            if sequence.decode_steps:
                assert self.selected[sequence.slot] == (sequence.number, sequence.decode_steps)
        for sequence, limit in zip(plan.sequences, plan.limits, strict=True):
            slot = sequence.slot
            assert slot is not None
            tokens: list[int] = []
            reason = None
            while len(tokens) < limit and reason is None:
                token, reason = self.next_token(sequence, len(sequence.tokens) + len(tokens))
                tokens.append(token)
            self.run_call(sequence, limit, len(tokens), self.scheduler.attention.local, tuple(tokens))
            self.num_steps += len(tokens)
            self.scheduler.record_decode(sequence, tokens, reason)
            self.selected[slot] = sequence.number, sequence.decode_steps

    def run_call(
        self, sequence: Sequence, reserved: int, count: int, window: int, tokens: tuple[int, ...] = ()
    ) -> None:
        """Checks what a call reads of the cache, and writes what it adds."""
        config, start = self.scheduler.attention, sequence.num_cached
        expected = self.contents.of(sequence)
        for name, memory in self.memories.items():
            table = getattr(sequence, f"{name}_table")
            reach = start + reserved if name == "retrieval" else window
            seen = visible_pages(
                start, reserved, sink=config.sink, window=reach, page_size=config.page_size, num_pages=table.size
            )
            memory.check(table, np.flatnonzero(seen), expected[:start])
        if tokens:
            sequence.tokens += tokens
            expected = self.contents.of(sequence)
            del sequence.tokens[-len(tokens) :]
        for name, memory in self.memories.items():
            memory.write(getattr(sequence, f"{name}_table"), start, expected[start : start + count])

    def swap(self, plan: Swap, running: list[Sequence]) -> None:
        """Moves pages as `Engine._swap` does."""
        sequence, left = plan.sequence, plan.sequence.swapped
        assert left is not None
        assert len(plan.retrieval) + plan.num_shared == left.retrieval.size
        assert len(plan.streaming) == left.streaming.size
        if plan.is_out:
            assert sequence.rank == max(one.rank for one in running) and len(running) > 1
            copies = {name: memory.values[list(getattr(plan, name))].copy() for name, memory in self.memories.items()}
            left.pages = copies, self.selected[plan.slot]
            self.selected[plan.slot] = None
        else:
            copies, selected = left.pages
            for name, memory in self.memories.items():
                pages = list(getattr(plan, name))
                assert (memory.pool._holders[pages] == 1).all(), "a shared page is written"
                memory.values[pages] = copies[name][plan.num_shared if name == "retrieval" else 0 :]
            self.selected[plan.slot] = selected
            sequence.swapped = None

    def next_token(self, sequence: Sequence, length: int) -> tuple[int, str | None]:
        is_stop = self.stops.get(sequence.request.id) == length + 1 - sequence.prompt_length
        return (STOP, "stop") if is_stop else (TOKEN, None)


def check_counts(scheduler: Scheduler) -> None:
    """Every page is held by exactly those that name it, and every sequence is where its status says."""
    cache = scheduler.cache
    for name, pool in scheduler.allocator.pools:
        tables = [getattr(one, f"{name}_table") for one in scheduler.running]
        cached = cached_pages(cache, name) if cache is not None else []
        by_cache = np.bincount(np.array(cached, int), minlength=pool.num_pages)
        by_tables = np.bincount(
            np.concatenate([[], *[t[t >= 0] for t in tables]]).astype(int), minlength=pool.num_pages
        )
        np.testing.assert_array_equal(pool._holders, by_tables + by_cache)
        np.testing.assert_array_equal(pool._cached, by_cache)
        assert sorted(pool._free) == np.flatnonzero(by_tables + by_cache == 0).tolist()
        for table in tables:
            assert len(set(table[table >= 0].tolist())) == (table >= 0).sum()
    for sequence in scheduler._live.values():
        digests = sequence.prefix.digests or ()
        chunks = [cache._entries.get(digest) if cache is not None else None for digest in digests]
        for before, entry in pairwise([None, *chunks]):
            assert entry is None or entry.parent is before, "a chunk does not follow the one before it"
    running, swapped, waiting = scheduler.running, scheduler.swapped, scheduler.waiting
    slots = [-1 if one.slot is None else one.slot for one in running]
    assert sorted([*slots, *scheduler._free_slots]) == list(range(scheduler.sizes.max_num_seqs))
    assert sorted(one.request.id for one in [*running, *swapped, *waiting]) == sorted(scheduler._live)
    assert {one.status for one in running} <= {Status.PREFILLING, Status.DECODING}
    assert {one.status for one in swapped} <= {Status.SWAPPED}
    assert {one.status for one in waiting} <= {Status.WAITING}
    for queue in (swapped, waiting):
        assert [one.rank for one in queue] == sorted(one.rank for one in queue)
        assert all((one.retrieval_table < 0).all() and (one.streaming_table < 0).all() for one in queue)
    assert len(running) + len(swapped) <= scheduler.sizes.max_num_seqs
    if swapped:
        assert max((one.rank for one in running), default=swapped[0].rank) <= swapped[0].rank
        assert sum(one.swapped.retrieval.size for one in swapped if one.swapped) <= scheduler.room.swap


def cached_pages(cache: PrefixCache, name: str) -> list[int]:
    if name == "streaming":
        return [page for entry in cache._windows.values() for page in (entry.window or {}).values()]
    for digest, entry in cache._entries.items():
        assert entry.digest == digest
        assert entry.children == sum(other.parent is entry for other in cache._entries.values())
        assert entry.parent is None or cache._entries.get(entry.parent.digest) is entry.parent
    return [page for entry in cache._entries.values() for page in entry.retrieval]


def assert_nothing_leaks(scheduler: Scheduler) -> None:
    """All pages are free or evictable, and free when the cache is empty."""
    assert scheduler.is_idle
    assert scheduler.schedule() is None
    check_counts(scheduler)
    assert not (scheduler.waiting or scheduler.running or scheduler.swapped)
    for _, pool in scheduler.allocator.pools:
        assert pool.num_free + pool.num_evictable == pool.num_pages
    assert scheduler.num_free_slots == scheduler.sizes.max_num_seqs


def assert_all_free(scheduler: Scheduler) -> None:
    assert_nothing_leaks(scheduler)
    scheduler.forget_pages()
    assert all(pool.num_free == pool.num_pages for _, pool in scheduler.allocator.pools)
    assert scheduler.cache is None or (scheduler.cache.num_entries, scheduler.cache.num_windows) == (0, 0)
