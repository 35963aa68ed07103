from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from lserve_jax.config.pages import most_streaming_pages, retrieval_pages, visible_pages
from lserve_jax.engine.allocator import PageAllocator, stack_tables
from lserve_jax.engine.pools import PagePool
from lserve_jax.engine.prefix_cache import PrefixCache
from lserve_jax.engine.request import Request, Sequence

PROMPTS = (1, 63, 64, 65, 100, 127, 128, 129, 200, 256, 257, 300, 384, 385, 448, 449, 512, 1000)


@dataclass(frozen=True, kw_only=True)
class MaxTokens:
    max_tokens: int
    stop_token_ids: tuple[int, ...] = ()
    is_stepwise: bool = False


@dataclass(frozen=True, kw_only=True)
class Windows:
    sink: int
    local: int
    prefill_local: int
    page_size: int

    @property
    def prefill_window(self) -> int:
        return max(self.prefill_local, self.local)


DEFAULT = Windows(sink=128, local=256, prefill_local=8192, page_size=64)
ODD = Windows(sink=100, local=77, prefill_local=150, page_size=16)
NARROW_PREFILL = Windows(sink=33, local=200, prefill_local=50, page_size=16)
NO_SINK = Windows(sink=0, local=1, prefill_local=1, page_size=16)
LONG_SINK = Windows(sink=700, local=65, prefill_local=65, page_size=64)


def make_sequence(prompt: int, max_tokens: int, page_size: int, request_id: int = 0) -> Sequence:
    request = Request(id=request_id, prompt=(7,) * prompt, sampling=MaxTokens(max_tokens=max_tokens))
    return Sequence.from_request(request, max_model_len=1_000_000, page_size=page_size)


def make_allocator(windows: Windows, *, retrieval: int = 500, streaming: int = 500) -> PageAllocator:
    return PageAllocator(
        retrieval=PagePool(retrieval, keeps_all=True),
        streaming=PagePool(streaming, keeps_all=False),
        sink=windows.sink,
        page_size=windows.page_size,
    )


def seen_keys(query: int, sink: int, local: int) -> np.ndarray:
    """Section 2 of the algorithm, word by word."""
    return np.array([j for j in range(query + 1) if j <= query and (j > query - local or j < sink)])


def held(table: np.ndarray) -> set[int]:
    return set(np.flatnonzero(table >= 0).tolist())


class Memory:
    """Physical pages of one pool, holding the (owner, position) of the token that was last written to each row."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.page_size = page_size
        self.tokens = np.full((num_pages, page_size, 2), -1)

    def write(self, table: np.ndarray, owner: int, position: int) -> None:
        page = table[position // self.page_size]
        assert page >= 0, f"position {position} has no page to go to"
        self.tokens[page, position % self.page_size] = owner, position

    def check_reads(self, table: np.ndarray, owner: int, positions: np.ndarray) -> None:
        """Each of `positions` is found through the table, with nothing written over it."""
        pages = table[positions // self.page_size]
        assert (pages >= 0).all(), f"a visible page is not held: {table}, {positions}"
        read = self.tokens[pages, positions % self.page_size]
        np.testing.assert_array_equal(read[:, 0], owner)
        np.testing.assert_array_equal(read[:, 1], positions)


class Device:
    """Runs calls on sequences as the kernels do, token by token, and checks that every key to be seen is there."""

    def __init__(self, windows: Windows, allocator: PageAllocator) -> None:
        self.windows = windows
        self.allocator = allocator
        assert allocator.retrieval is not None and allocator.streaming is not None
        self.retrieval = Memory(allocator.retrieval.num_pages, windows.page_size)
        self.streaming = Memory(allocator.streaming.num_pages, windows.page_size)

    def run(self, sequence: Sequence, start: int, count: int, local: int) -> None:
        """The queries' own window is `local`; the pages kept for them may be those of a longer one."""
        owner = sequence.request.id
        for position in range(start, start + count):
            self.retrieval.write(sequence.retrieval_table, owner, position)
            self.streaming.write(sequence.streaming_table, owner, position)
            keys = seen_keys(position, self.windows.sink, local)
            self.streaming.check_reads(sequence.streaming_table, owner, keys)
        self.retrieval.check_reads(sequence.retrieval_table, owner, np.arange(start + count))
        sequence.num_cached = start + count

    def prefill(self, sequence: Sequence, count: int) -> bool:
        windows, start = self.windows, sequence.num_cached
        if not self.allocator.reserve(sequence, start, count, windows.prefill_window):
            return False
        self.run(sequence, start, count, windows.prefill_local)
        is_last = start + count == sequence.prompt_length
        self.allocator.release_unseen(sequence, start + count, windows.local if is_last else windows.prefill_window)
        return True

    def decode(self, sequence: Sequence, num_steps: int, num_done: int | None = None) -> bool:
        """A call that reserved `num_steps` steps and ended after `num_done` of them."""
        start = sequence.num_cached
        if not self.allocator.reserve(sequence, start, num_steps, self.windows.local):
            return False
        self.run(sequence, start, num_steps if num_done is None else num_done, self.windows.local)
        self.allocator.release_unseen(sequence, sequence.num_cached, self.windows.local)
        return True


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("windows", [DEFAULT, ODD, NARROW_PREFILL, NO_SINK, LONG_SINK], ids=str)
def test_a_streaming_head_sees_exactly_its_sink_and_window_over_300_decode_steps(windows: Windows, prompt: int):
    sequence = make_sequence(prompt, 301, windows.page_size)
    allocator = make_allocator(windows)
    device = Device(windows, allocator)
    while sequence.num_cached < prompt:
        assert device.prefill(sequence, min(192, prompt - sequence.num_cached))
    most = -(-windows.sink // windows.page_size) + -(-windows.local // windows.page_size) + 1
    for _ in range(300):
        assert device.decode(sequence, 1)
        query = sequence.num_cached
        # No page that nobody will see again is kept: what is held are the pages of the keys that the next query sees.
        wanted = {int(j) // windows.page_size for j in seen_keys(query, windows.sink, windows.local)}
        if query % windows.page_size == 0:
            wanted.remove(query // windows.page_size)  # not begun
        assert held(sequence.streaming_table) == wanted
        assert len(held(sequence.streaming_table)) <= most
        assert held(sequence.retrieval_table) == set(range(retrieval_pages(query, windows.page_size)))
    allocator.free(sequence)
    assert allocator.retrieval is not None and allocator.retrieval.num_free == allocator.retrieval.num_pages
    assert allocator.streaming is not None and allocator.streaming.num_free == allocator.streaming.num_pages


def test_a_decoding_sequence_holds_seven_streaming_pages_at_the_defaults():
    sequence = make_sequence(5000, 301, DEFAULT.page_size)
    device = Device(DEFAULT, make_allocator(DEFAULT))
    while sequence.num_cached < 5000:
        assert device.prefill(sequence, min(1000, 5000 - sequence.num_cached))
    most = 0
    for _ in range(130):
        assert device.allocator.reserve(sequence, sequence.num_cached, 1, DEFAULT.local)
        most = max(most, len(held(sequence.streaming_table)))
        sequence.num_cached += 1
        device.allocator.release_unseen(sequence, sequence.num_cached, DEFAULT.local)
    assert most == 7 == most_streaming_pages(DEFAULT.sink, DEFAULT.local, 1, DEFAULT.page_size)


def test_a_prefill_keeps_its_own_window_and_shrinks_to_the_decode_window_at_its_end():
    windows = Windows(sink=128, local=256, prefill_local=1024, page_size=64)
    sequence = make_sequence(4096, 10, windows.page_size)
    device = Device(windows, make_allocator(windows))
    for _ in range(7):
        assert device.prefill(sequence, 512)
    # Position 3584 sees keys from 2561 on, which begins inside page 40.
    assert held(sequence.streaming_table) == {0, 1, *range(40, 56)}
    assert device.prefill(sequence, 512)
    assert held(sequence.streaming_table) == {0, 1, *range(60, 64)}


def test_a_prefill_window_shorter_than_the_decode_window_still_leaves_what_decode_sees():
    windows = Windows(sink=16, local=256, prefill_local=16, page_size=16)
    sequence = make_sequence(512, 10, windows.page_size)
    device = Device(windows, make_allocator(windows))
    for _ in range(16):
        assert device.prefill(sequence, 32)
    assert held(sequence.streaming_table) == {0, *range(16, 32)}
    assert device.decode(sequence, 1)


@given(sink=st.integers(0, 70), window=st.integers(1, 70), in_flight=st.integers(1, 20), page_size=st.integers(1, 20))
def test_the_worst_case_of_streaming_pages_is_tight(sink: int, window: int, in_flight: int, page_size: int):
    def touched(start: int) -> int:
        queries = range(start, start + in_flight)
        return len(
            {j // page_size for i in queries for j in (*range(min(sink, i + 1)), *range(max(0, i - window + 1), i + 1))}
        )

    # From this start on the window has left the sink's pages, and one page further every alignment has occurred.
    last = sink + window + 2 * page_size
    assert max(map(touched, range(last + 1))) == most_streaming_pages(sink, window, in_flight, page_size)


@given(
    start=st.integers(0, 150),
    count=st.integers(1, 60),
    sink=st.integers(0, 80),
    window=st.integers(1, 80),
    page_size=st.integers(1, 33),
)
def test_visible_pages_are_those_of_the_keys_that_some_query_sees(
    start: int, count: int, sink: int, window: int, page_size: int
):
    pages = visible_pages(start, count, sink=sink, window=window, page_size=page_size, num_pages=250)
    queries = range(start, start + count)
    assert set(np.flatnonzero(pages)) == {int(j) // page_size for i in queries for j in seen_keys(i, sink, window)}


@pytest.mark.parametrize(("length", "pages"), [(0, 0), (1, 1), (63, 1), (64, 1), (65, 2), (1_000_000, 15625)])
def test_retrieval_pages_round_up(length: int, pages: int):
    assert retrieval_pages(length, 64) == pages


@pytest.mark.parametrize(("retrieval", "streaming"), [(5, 500), (500, 5)])
def test_a_reservation_that_a_pool_cannot_serve_changes_nothing(retrieval: int, streaming: int):
    allocator = make_allocator(DEFAULT, retrieval=retrieval, streaming=streaming)
    first, second = make_sequence(200, 10, 64), make_sequence(200, 10, 64)
    assert allocator.reserve(first, 0, 200, DEFAULT.prefill_window)
    before = [first.retrieval_table.copy(), first.streaming_table.copy()]
    free = allocator.retrieval.num_free, allocator.streaming.num_free  # type: ignore[union-attr]
    assert not allocator.reserve(second, 0, 200, DEFAULT.prefill_window)
    assert free == (allocator.retrieval.num_free, allocator.streaming.num_free)  # type: ignore[union-attr]
    assert not held(second.retrieval_table)
    assert not held(second.streaming_table)
    np.testing.assert_array_equal(before, [first.retrieval_table, first.streaming_table])
    allocator.free(first)
    assert allocator.reserve(second, 0, 200, DEFAULT.prefill_window)


def test_a_reservation_may_use_the_pages_that_it_gives_back_itself():
    windows = Windows(sink=16, local=32, prefill_local=32, page_size=16)
    sequence = make_sequence(160, 1, 16)
    allocator = make_allocator(windows, streaming=4)
    for start in range(0, 160, 16):
        assert allocator.reserve(sequence, start, 16, 32), start
    assert allocator.streaming is not None and allocator.streaming.num_free == 0


def test_pages_reserved_for_steps_that_were_not_run_go_back():
    windows = Windows(sink=16, local=32, prefill_local=32, page_size=16)
    device = Device(windows, make_allocator(windows))
    sequence = make_sequence(30, 100, 16)
    assert device.prefill(sequence, 30)
    assert device.decode(sequence, 64, num_done=1)
    assert held(sequence.retrieval_table) == held(sequence.streaming_table) == {0, 1}


def test_a_model_without_heads_of_a_kind_holds_no_pages_of_that_kind():
    sequence = make_sequence(200, 10, 64)
    allocator = PageAllocator(retrieval=PagePool(10, keeps_all=True), streaming=None, sink=128, page_size=64)
    assert allocator.reserve(sequence, 0, 200, 256)
    assert held(sequence.retrieval_table) == {0, 1, 2, 3}
    assert not held(sequence.streaming_table)
    allocator.free(sequence)
    allocator = PageAllocator(retrieval=None, streaming=PagePool(10, keeps_all=False), sink=128, page_size=64)
    assert allocator.reserve(sequence, 0, 200, 256)
    assert held(sequence.streaming_table) == {0, 1, 2, 3}
    assert not held(sequence.retrieval_table)


def test_stacked_tables_have_a_row_a_slot_and_are_copies():
    allocator = make_allocator(DEFAULT)
    sequence = make_sequence(100, 10, 64)
    sequence.slot = 2
    assert allocator.reserve(sequence, 0, 100, 256)
    retrieval, streaming = stack_tables([sequence], max_num_seqs=4, num_pages=6)
    assert retrieval.shape == streaming.shape == (4, 6)
    assert retrieval.dtype == streaming.dtype == np.int32
    expected = np.full((4, 6), -1)
    expected[2, :2] = sequence.retrieval_table
    allocator.free(sequence)
    np.testing.assert_array_equal(retrieval, expected)
    assert held(streaming[2]) == {0, 1}


# --- pages that several hold ------------------------------------------------------------------------------------------


def make_sharing(windows: Windows, *, retrieval: int = 40, streaming: int = 40) -> tuple[PageAllocator, PrefixCache]:
    pools = PagePool(retrieval, keeps_all=True), PagePool(streaming, keeps_all=False)
    cache = PrefixCache(32, *pools)
    allocator = PageAllocator(
        retrieval=pools[0], streaming=pools[1], sink=windows.sink, page_size=windows.page_size, cache=cache
    )
    return allocator, cache


SMALL = Windows(sink=8, local=16, prefill_local=16, page_size=8)


def test_a_window_is_what_the_next_query_sees_of_the_tokens_before_it():
    allocator, _ = make_sharing(SMALL)
    sequence = make_sequence(100, 10, 8)
    assert allocator.reserve(sequence, 0, 64, 16)
    # Position 64 sees keys from 49 on, which begins inside page 6, and the sink's page.
    window = allocator.window(sequence, 64, 16)
    assert window == {page: sequence.streaming_table[page] for page in (0, 6, 7)}
    assert set(allocator.window(sequence, 64, 18)) == {0, 5, 6, 7}
    allocator.release_unseen(sequence, 64, 16)
    assert allocator.window(sequence, 64, 16) == window
    with pytest.raises(AssertionError, match="a window is kept before its pages are given back"):
        allocator.window(sequence, 64, 40)


def test_shared_pages_are_those_of_the_cache_and_stay_when_the_sequence_goes():
    allocator, cache = make_sharing(SMALL)
    first, second = make_sequence(100, 10, 8), make_sequence(100, 10, 8, request_id=1)
    assert allocator.reserve(first, 0, 32, 16)
    entry = cache.insert(b"0", None, first.retrieval_table[:4].tolist())
    cache.keep_window(entry, allocator.window(first, 32, 16))
    allocator.free(first)
    pools = [pool for _, pool in allocator.pools]
    assert [pool.num_evictable for pool in pools] == [4, 3]
    allocator.share(second, entry.retrieval, entry.window or {})
    assert held(second.retrieval_table) == {0, 1, 2, 3}
    assert held(second.streaming_table) == {0, 2, 3}
    assert tuple(second.retrieval_table[:4].tolist()) == entry.retrieval
    assert [pool.num_evictable for pool in pools] == [0, 0]
    with pytest.raises(AssertionError, match="these pages would be lost"):
        allocator.share(second, entry.retrieval, {})
    allocator.retrieval.give_back(entry.retrieval)  # type: ignore[union-attr]
    allocator.free(second)
    assert [pool.num_free + pool.num_evictable for pool in pools] == [40, 40]


def test_adopted_pages_replace_those_of_the_sequence():
    allocator, cache = make_sharing(SMALL)
    assert allocator.retrieval is not None
    first, second = make_sequence(100, 10, 8), make_sequence(100, 10, 8, request_id=1)
    for sequence in (first, second):
        assert allocator.reserve(sequence, 0, 64, 16)
    entry = cache.insert(b"1", None, first.retrieval_table[4:8].tolist())
    allocator.adopt(first, entry, 4)  # its own: nothing changes
    allocator.adopt(second, entry, 4)
    assert second.retrieval_table[4:8].tolist() == first.retrieval_table[4:8].tolist()
    assert set(second.retrieval_table[:4].tolist()).isdisjoint(first.retrieval_table[:4].tolist())
    assert allocator.retrieval.num_free == 40 - 12
    for sequence in (first, second):
        allocator.free(sequence)
    assert (allocator.retrieval.num_free, allocator.retrieval.num_evictable) == (36, 4)


def test_a_reservation_takes_pages_from_the_cache_and_only_as_many_as_it_needs():
    allocator, cache = make_sharing(SMALL, retrieval=12, streaming=12)
    first, second = make_sequence(100, 10, 8), make_sequence(100, 10, 8, request_id=1)
    assert allocator.reserve(first, 0, 64, 16)
    parent = None
    for number in (0, 1):
        pages = first.retrieval_table[4 * number : 4 * number + 4].tolist()
        parent = cache.insert(bytes([number]), parent, pages)
        cache.keep_window(parent, allocator.window(first, 32 * (number + 1), 16))
    allocator.free(first)
    for count, entries in ((32, 2), (33, 1), (64, 1), (65, 0), (96, 0)):
        assert allocator.reserve(second, 0, count, 16), count
        assert cache.num_entries == entries, count
    third = make_sequence(8, 10, 8, request_id=2)
    assert not allocator.reserve(third, 0, 8, 16)


def test_pages_for_one_that_comes_back_are_taken_where_it_had_them():
    allocator, _ = make_sharing(SMALL)
    sequence = make_sequence(100, 10, 8)
    allocator.take_for(sequence, np.arange(3, 9), np.array([0, 7, 8]))
    assert held(sequence.retrieval_table) == set(range(3, 9))
    assert held(sequence.streaming_table) == {0, 7, 8}


class AllocatorMachine(RuleBasedStateMachine):
    """Sequences come, prefill, decode and leave in any order, on pools that are often too small."""

    sequences = Bundle("sequences")

    def __init__(self) -> None:
        super().__init__()
        self.windows = Windows(sink=20, local=27, prefill_local=50, page_size=8)
        self.allocator = make_allocator(self.windows, retrieval=40, streaming=24)
        self.device = Device(self.windows, self.allocator)
        self.live: list[Sequence] = []
        self.count = 0

    @rule(target=sequences, prompt=st.integers(1, 150))
    def arrive(self, prompt: int) -> Sequence:
        self.count += 1
        sequence = make_sequence(prompt, 200, self.windows.page_size, request_id=self.count)
        self.live.append(sequence)
        return sequence

    @precondition(lambda self: self.live)
    @rule(sequence=sequences, size=st.integers(1, 40), done=st.integers(1, 40))
    def run(self, sequence: Sequence, size: int, done: int) -> None:
        left = sequence.prompt_length - sequence.num_cached
        before = sequence.retrieval_table.copy(), sequence.streaming_table.copy()
        if left > 0:
            is_run = self.device.prefill(sequence, min(size, left))
        elif sequence.num_cached + size < sequence.max_length:
            is_run = self.device.decode(sequence, size, min(size, done))
        else:
            return
        if not is_run:
            np.testing.assert_array_equal(before[0], sequence.retrieval_table)
            np.testing.assert_array_equal(before[1], sequence.streaming_table)

    @rule(sequence=consumes(sequences))
    def leave(self, sequence: Sequence) -> None:
        self.allocator.free(sequence)
        self.live.remove(sequence)

    @invariant()
    def every_page_is_free_or_held_once(self) -> None:
        for pool, tables in (
            (self.allocator.retrieval, [sequence.retrieval_table for sequence in self.live]),
            (self.allocator.streaming, [sequence.streaming_table for sequence in self.live]),
        ):
            assert pool is not None
            owned = [page for table in tables for page in table[table >= 0].tolist()]
            assert len(set(owned)) == len(owned)
            assert len(owned) + pool.num_free == pool.num_pages
            # What the free list holds is all the rest: taking it must not touch an owned page.
            rest = pool.take(pool.num_free)
            assert set(rest) | set(owned) == set(range(pool.num_pages))
            pool.give_back(reversed(rest))

    @invariant()
    def no_page_is_held_that_no_query_to_come_can_see(self) -> None:
        windows = self.windows
        for sequence in self.live:
            is_decoding = sequence.num_cached >= sequence.prompt_length
            local = windows.local if is_decoding else windows.prefill_window
            to_come = seen_keys(sequence.num_cached, windows.sink, local)
            assert held(sequence.streaming_table) <= {int(j) // windows.page_size for j in to_come}


AllocatorMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_random_arrivals_and_departures_never_share_leak_or_lose_a_page = AllocatorMachine.TestCase
