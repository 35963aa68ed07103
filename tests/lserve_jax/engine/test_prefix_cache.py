"""What prompts that begin alike need not compute, and what is given up first when pages run out."""

import hashlib
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np
import pytest

from lserve_jax.engine.pools import PagePool
from lserve_jax.engine.prefix_cache import CacheCounts, Entry, Hit, PrefixCache
from lserve_jax.engine.request import Sequence
from tests.lserve_jax.engine.page_model import Device, Settings, assert_all_free, make_request

CHUNK, PAGE = 32, 8
KINDS = {
    "both": Settings(max_model_len=400, retrieval_pages=300, streaming_pages=200),
    "retrieval": Settings(max_model_len=400, retrieval_pages=300, streaming_pages=0),
    "streaming": Settings(max_model_len=400, retrieval_pages=0, streaming_pages=200),
}
ALL = pytest.mark.parametrize("kind", list(KINDS))
WORD = count(100)


def words(number: int) -> list[int]:
    """Tokens that no other text has."""
    return [next(WORD) for _ in range(number)]


class Server:
    """Runs one request after the other, and checks all that calls read."""

    def __init__(self, config: Settings) -> None:
        self.scheduler = config.scheduler()
        self.device = Device(self.scheduler)
        self.ids = count()

    @property
    def cache(self) -> PrefixCache:
        assert self.scheduler.cache is not None
        return self.scheduler.cache

    def run(self, prompt: list[int], max_tokens: int = 3, **fields: Any) -> Sequence:
        sequence = self.scheduler.add(make_request(next(self.ids), prompt, max_tokens, **fields))
        self.device.run()
        return sequence

    def chunks(self, prompt: list[int], **fields: Any) -> int:
        """How many chunks of a prompt are found; the others are computed."""
        before = self.device.num_chunks
        sequence = self.run(prompt, **fields)
        found, rest = divmod(sequence.prefix.num_hit, CHUNK)
        assert rest == 0
        assert self.device.num_chunks - before == -(-(len(prompt)) // CHUNK) - found
        return found


@ALL
def test_the_same_document_with_another_question(kind: str):
    server = Server(KINDS[kind])
    document = words(200)  # six whole chunks, and a bit
    assert server.chunks(document + words(30)) == 0
    assert [server.chunks(document + words(30)) for _ in range(3)] == [6, 6, 6]
    assert_all_free(server.scheduler)


@pytest.mark.parametrize(("kind", "found"), [("both", [0, 0, 6, 6]), ("retrieval", [0, 6, 6, 6])])
def test_a_long_question_leaves_its_document_where_no_window_is_kept_and_the_third_finds_one(
    kind: str, found: list[int]
):
    """The same holds for a system prompt: its second user marks the junction, at which the third goes on."""
    server = Server(KINDS[kind])
    document = words(200)
    assert [server.chunks(document + words(100)) for _ in range(4)] == found


@ALL
def test_the_next_turn_of_a_chat_finds_all_whole_chunks_of_the_last_prompt_and_no_generated_token(kind: str):
    server = Server(KINDS[kind])
    first = server.run(words(100), max_tokens=150)
    history = first.tokens + words(20)
    assert server.chunks(history) == 3
    second = server.run(history + words(30))
    assert second.prefix.num_hit == len(history) // CHUNK * CHUNK


@ALL
def test_an_edit_of_the_last_turn_goes_on_where_the_turn_began(kind: str):
    server = Server(KINDS[kind])
    history = words(150)
    server.run(history + words(30))  # windows after 4 and 5 chunks
    assert server.chunks(history + words(30)) == 4


@ALL
def test_another_salt_never_hits(kind: str):
    server = Server(KINDS[kind])
    prompt = words(200)
    server.run(prompt, salt=b"one")
    assert server.chunks(prompt, salt=b"two") == 0
    assert server.chunks(prompt) == 0
    assert server.chunks(prompt, salt=b"one") == 6
    assert server.chunks(prompt, is_cacheable=False) == 0
    assert server.chunks(words(1) + prompt[1:], salt=b"one") == 0


@ALL
def test_what_is_not_cacheable_is_not_entered(kind: str):
    server = Server(KINDS[kind])
    prompt = words(200)
    server.run(prompt, is_cacheable=False)
    assert (server.cache.num_entries, server.cache.num_windows) == (0, 0)
    assert server.cache.counts == CacheCounts()
    assert server.chunks(prompt) == 0


@ALL
@pytest.mark.parametrize(
    ("length", "again", "longer"), [(96, 2, 3), (97, 3, 3), (95, 2, 2), (64, 1, 2), (33, 1, 1), (32, 0, 1), (31, 0, 0)]
)
def test_the_last_token_of_a_prompt_is_always_computed(kind: str, length: int, again: int, longer: int):
    server = Server(KINDS[kind])
    prompt = words(length)
    assert server.chunks(prompt) == 0
    assert server.chunks(prompt) == again
    assert server.chunks(prompt + words(40)) == longer


def test_a_prompt_of_the_program_for_short_ones_is_not_entered():
    """It is as long as a chunk, but other rows of another program wrote it."""
    config = KINDS["both"]
    server = Server(replace(config, turns=replace(config.turns, short_chunk=CHUNK)))
    prompt = words(CHUNK)
    server.run(prompt)
    assert server.cache.num_entries == 0
    assert server.chunks(prompt + words(40)) == 0
    assert server.chunks(prompt + words(40)) == 1


def test_chunks_that_do_not_end_with_a_page_are_not_cached():
    server = Server(replace(KINDS["both"], prefill_chunk=30))
    assert server.scheduler.cache is None
    prompt = words(200)
    for _ in range(2):
        assert server.run(prompt).prefix.num_hit == 0
    assert Server(replace(KINDS["both"], has_prefix_cache=False)).scheduler.cache is None


@pytest.mark.parametrize("kind", ["both", "retrieval"])
def test_chunks_that_are_computed_again_take_no_more_pages(kind: str):
    server = Server(KINDS[kind])
    document = words(200)
    pool = server.scheduler.allocator.retrieval
    assert pool is not None
    for number in range(1, 5):
        server.run(document + words(100))
        assert server.cache.num_entries == 6 + 3 * number
        assert pool.num_evictable == (6 + 3 * number) * CHUNK // PAGE


def test_prompts_that_are_read_at_once_end_with_the_same_pages():
    """The second is read beside the first, chunk by chunk, as two do that came back from host memory."""
    scheduler, prompt = KINDS["both"].scheduler(), words(130)
    device = Device(scheduler)
    pool = scheduler.allocator.retrieval
    assert pool is not None
    pair = [scheduler.add(make_request(i, prompt, 40)) for i in range(2)]
    for sequence in pair:
        scheduler._admit(sequence, Hit())
    for number in range(4):
        for sequence in pair:
            chunk = scheduler._chunk(sequence)
            assert scheduler.allocator.reserve(sequence, chunk.start, chunk.count, 40)
            device.run_call(sequence, chunk.count, chunk.count, 40)
            scheduler.record_prefill(chunk)
            device.check()
        first, second = (one.retrieval_table[: 4 * number + 4].tolist() for one in pair)
        assert first == second
        assert pool.num_pages - pool.num_free == 4 * number + 4
    device.run()
    assert_all_free(scheduler)


def test_without_the_window_of_the_last_boundary_a_hit_is_only_shorter():
    server = Server(KINDS["both"])
    prompt = words(240)  # windows after 6 and 7 chunks
    server.run(prompt)
    streaming = server.scheduler.allocator.streaming
    assert streaming is not None
    assert server.cache.num_windows == 2
    last = next(entry for entry in server.cache._windows.values() if entry.children == 0)
    server.cache._drop_window(last)
    assert server.chunks(prompt + words(10)) == 6
    assert server.chunks(prompt + words(10)) == 7  # and that run has kept it again
    server.cache.evict(streaming, streaming.num_pages)
    assert server.cache.num_windows == 0
    assert server.cache.num_entries == 7
    assert server.chunks(prompt + words(10)) == 0
    assert server.chunks(prompt + words(10)) == 7
    assert_all_free(server.scheduler)


def test_counts_are_of_tokens():
    server = Server(KINDS["both"])
    prompt = words(200)
    server.run(prompt)
    server.run(prompt + words(5))
    assert (server.cache.counts.queries, server.cache.counts.hits) == (405, 192)


def test_a_full_pool_gives_up_the_document_that_nobody_asked_about_for_longest():
    config = replace(KINDS["both"], retrieval_pages=100)
    server = Server(config)
    documents = [words(200) for _ in range(5)]
    for document in documents[:4]:
        server.run(document)  # 24 pages each stay
    assert server.chunks(documents[0]) == 6
    server.run(documents[4])
    assert [server.chunks(document) for document in (documents[0], documents[3], documents[2])] == [6, 6, 6]
    assert server.chunks(documents[1]) < 6


# --- the cache alone --------------------------------------------------------------------------------------------------


def make_cache(retrieval: int = 40, streaming: int = 40) -> PrefixCache:
    return PrefixCache(
        4,
        PagePool(retrieval, keeps_all=True) if retrieval else None,
        PagePool(streaming, keeps_all=False) if streaming else None,
    )


def insert(cache: PrefixCache, name: str, parent: Entry | None = None, *, has_window: bool = False) -> Entry:
    """Enters a chunk of two pages whose sequence has gone."""
    assert cache.retrieval is not None and cache.streaming is not None
    pages = cache.retrieval.take(2)
    entry = cache.insert(name.encode(), parent, pages)
    cache.retrieval.give_back(pages)
    if has_window:
        window = cache.streaming.take(3)
        cache.keep_window(entry, dict(enumerate(window)))
        cache.streaming.give_back(window)
    return entry


def names(cache: PrefixCache) -> list[str]:
    return [digest.decode() for digest in cache._entries]


def test_digests_are_a_chain_that_begins_with_the_salt():
    cache = make_cache()
    tokens = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    first, second = cache.digests(tokens, b"salt")
    state = hashlib.sha256(b"salt").digest()
    for chunk, digest in (([1, 2, 3, 4], first), ([5, 6, 7, 8], second)):
        state = hashlib.sha256(state + np.array(chunk, "<i4").tobytes()).digest()
        assert state == digest
    assert cache.digests(tokens[:8], b"salt") == (first, second)
    assert cache.digests(tokens[:7], b"salt") == (first,)
    assert cache.digests(tokens[:3], b"salt") == ()
    others = [cache.digests(tokens, salt) for salt in (b"", b"sal", b"salt\0")]
    assert len({*others, (first, second)}) == 4
    # The same chunk after another one is another chunk.
    assert cache.digests([0, *tokens[1:]], b"salt")[1] != second


def test_leaves_go_first_and_of_these_the_least_recently_used():
    cache = make_cache()
    pool = cache.retrieval
    assert pool is not None
    root = insert(cache, "root")
    left, right = insert(cache, "left", root), insert(cache, "right", root)
    insert(cache, "left end", left)
    insert(cache, "right end", right)
    cache.use(Hit(3, 3, (root, left, cache._entries[b"left end"])), 12)
    gone = []
    while cache.num_entries:
        before = names(cache)
        free = pool.num_free
        cache.evict(pool, 1)
        assert pool.num_free == free + 2, "more went than was needed"
        gone += [name for name in before if name not in names(cache)]
    assert gone == ["right end", "right", "left end", "left", "root"]
    assert cache.counts.evicted_entries == 5


def test_many_pages_go_at_once_as_far_as_there_are_any():
    cache = make_cache(retrieval=12)
    pool = cache.retrieval
    assert pool is not None
    parent = None
    for number in range(6):
        parent = insert(cache, str(number), parent)
    cache.evict(pool, 7)
    assert set(names(cache)) == {"0", "1"}
    cache.evict(pool, 100)
    assert pool.num_free == 12


def test_a_document_goes_whole_before_a_later_one_loses_anything():
    cache = make_cache()
    pool = cache.retrieval
    assert pool is not None
    for document in ("old", "new"):
        parent = None
        for number in range(4):
            parent = insert(cache, f"{document} {number}", parent)
    cache.evict(pool, 6)
    assert set(names(cache)) == {"old 0", *(f"new {number}" for number in range(4))}
    cache.evict(pool, 4)
    assert set(names(cache)) == {f"new {number}" for number in range(3)}


def test_a_chunk_that_a_sequence_uses_stays_and_so_do_those_before_it():
    cache = make_cache()
    pool = cache.retrieval
    assert pool is not None
    root = insert(cache, "root")
    used = insert(cache, "used", root)
    insert(cache, "end", used)
    pool.share([*root.retrieval, *used.retrieval])
    cache.evict(pool, 100)
    assert set(names(cache)) == {"root", "used"}
    assert pool.num_evictable == 0


def test_windows_go_whole_and_their_chunks_stay():
    cache = make_cache()
    streaming = cache.streaming
    assert streaming is not None
    first = insert(cache, "first", has_window=True)
    second = insert(cache, "second", first, has_window=True)
    cache.use(Hit(1, 1, (first,)), 4)
    cache.evict(streaming, 1)
    assert (first.window is not None, second.window is None) == (True, True)
    assert streaming.num_free == 40 - 3
    assert cache.num_entries == 2
    assert (cache.counts.evicted_windows, cache.counts.evicted_entries) == (1, 0)


def test_a_page_of_two_windows_is_free_when_both_have_gone():
    cache = make_cache()
    streaming = cache.streaming
    assert streaming is not None
    first = insert(cache, "first")
    second = insert(cache, "second", first)
    pages = streaming.take(3)
    cache.keep_window(first, {0: pages[0], 1: pages[1]})
    cache.keep_window(second, {0: pages[0], 2: pages[2]})
    streaming.give_back(pages)
    assert streaming.num_evictable == 3
    cache.evict(streaming, 1)
    assert (first.window, streaming.num_free) == (None, 38)
    cache.evict(streaming, 1)
    assert (second.window, streaming.num_free) == (None, 40)


def test_a_window_that_running_sequences_hold_whole_is_not_given_up_for_nothing():
    cache = make_cache()
    streaming = cache.streaming
    assert streaming is not None
    held = insert(cache, "held", has_window=True)
    idle = insert(cache, "idle", has_window=True)
    streaming.share((held.window or {}).values())
    cache.evict(streaming, 100)
    assert (held.window is None, idle.window is None) == (False, True)


def test_an_evicted_chunk_takes_its_window_along():
    cache = make_cache()
    assert cache.retrieval is not None and cache.streaming is not None
    insert(cache, "one", has_window=True)
    cache.evict(cache.retrieval, 1)
    assert cache.num_windows == 0
    assert cache.streaming.num_free == 40


def test_an_entry_that_exists_keeps_its_own_pages_and_its_own_window():
    cache = make_cache()
    assert cache.retrieval is not None and cache.streaming is not None
    entry = insert(cache, "one", has_window=True)
    before = entry.retrieval, dict(entry.window or {})
    assert insert(cache, "one", has_window=True) is entry
    assert (entry.retrieval, entry.window) == before
    assert cache.retrieval.num_free == 40 - 2
    assert cache.streaming.num_free == 40 - 3


def test_a_match_ends_with_the_last_window_and_says_how_far_it_could_have_gone():
    cache = make_cache()
    parent, entries = None, []
    for number in range(5):
        parent = insert(cache, str(number), parent, has_window=number in (0, 2))
        entries.append(parent)
    digests = [str(number).encode() for number in range(5)]
    assert cache.match(digests, 21) == Hit(3, 5, tuple(entries[:3]))
    assert cache.match(digests, 20) == Hit(3, 4, tuple(entries[:3]))
    assert cache.match(digests, 12) == Hit(1, 2, tuple(entries[:1]))
    assert cache.match(digests, 4) == Hit()
    assert cache.match([b"x", *digests[1:]], 21) == Hit()
    assert cache.match([*digests[:3], b"x", digests[4]], 21) == Hit(3, 3, tuple(entries[:3]))
    cache.clear()
    assert cache.match(digests, 21) == Hit()
    assert (cache.num_entries, cache.num_windows) == (0, 0)
