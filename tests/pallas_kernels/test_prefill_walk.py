"""The walk of `prefill_attention`: which blocks of the history are visited, as ranges and as lists."""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.typing import NDArray

from pallas_kernels import (
    NO_PAGE,
    BlockList,
    BlockRanges,
    LayerKV,
    PagedKV,
    PageTables,
    Walk,
    prefill_attention,
    visible_walk,
)
from pallas_kernels.core.workloads import TINY, Workload
from pallas_kernels.prefill_attention import xla
from tests.pallas_kernels.cases import (
    STORAGE,
    Cache,
    assert_close,
    assert_same_bits,
    dense_attention,
    empty_cache,
    filled_cache,
    implementations,
    jitted,
    mask,
    random_tokens,
)

each_implementation = pytest.mark.parametrize("implementation", implementations("prefill_attention"))
each_form = pytest.mark.parametrize("form", ["ranges", "list"])

TOKENS, QUERIES, KEYS = 40, 16, 32
"""Three blocks of queries, the last one half full; blocks of two pages."""
STARTS = np.array([0, 37, 64, 150, 11, 161], np.int32)
COUNTS = np.array([40, 9, 17, 33, 0, 40], np.int32)
OWN = np.array([0, 32, 64, 150, 0, 161], np.int32)
"""What is always visited: the chunks, and the page in which the second one begins and ends."""
WORKLOAD = replace(TINY["mixed"], batch=6, context=208)
BLOCKS = -(-WORKLOAD.context // KEYS)

type Visited = NDArray[np.bool_]
"""[B, K, query blocks, key blocks]."""


def random_visited(rng: np.random.Generator, form: str, heads: int, query_blocks: int = 3) -> Visited:
    """Blocks of the history, ranges of them for ranges; a sixth of all query blocks visits none."""
    shape = (len(STARTS), heads, query_blocks)
    sinks, low, high = np.sort(rng.integers(0, BLOCKS + 1, (3, *shape)), axis=0)[..., None]
    block = np.arange(BLOCKS)
    visited = (block < sinks) | ((block >= low) & (block < high))
    if form == "list":
        visited = rng.random((*shape, BLOCKS)) < 0.5
    return visited & (rng.random((*shape, 1)) > 1 / 6) & (block * KEYS < STARTS[:, None, None, None])


def as_ranges(visited: Visited, keys: int = KEYS) -> BlockRanges:
    """Ranges that visit just these blocks, which must be at most two runs, one of them at the start if both are."""
    blocks = visited.shape[-1]
    sinks = np.argmin(np.append(visited, np.zeros((*visited.shape[:-1], 1), bool), axis=-1), axis=-1)
    rest = visited & (np.arange(blocks) >= sinks[..., None])
    low = np.where(rest.any(-1), rest.argmax(-1), sinks)
    high = low + rest.sum(-1)
    sinks, low, high = (jnp.asarray(x, jnp.int32) for x in (sinks, low, high))
    return BlockRanges(sinks=sinks, low=low, high=high, queries=QUERIES, keys=keys)


def as_list(visited: Visited, queries: int = QUERIES, keys: int = KEYS, width: int | None = None) -> BlockList:
    """Lists of just these blocks, padded with -1."""
    lists = np.full((*visited.shape[:-1], width or visited.shape[-1]), -1, np.int32)
    for at in np.ndindex(*visited.shape[:-1]):
        [blocks] = np.nonzero(visited[at])
        lists[at][: len(blocks)] = blocks
    return BlockList(blocks=jnp.asarray(lists), queries=queries, keys=keys)


FORMS: dict[str, Callable[[Visited], BlockRanges | BlockList]] = {"ranges": as_ranges, "list": as_list}


class Chunk:
    """A chunk of every sequence of a batch, written to a cache that holds the tokens before it."""

    def __init__(self, workload: Workload, rng: np.random.Generator, tokens: int = TOKENS):
        self.workload = workload
        before = filled_cache(workload, rng, STARTS, window=workload.prefill_local)
        self.q = random_tokens(workload, rng, tokens, workload.num_heads)
        self.k, self.v = (random_tokens(workload, rng, tokens) for _ in range(2))
        for b, count in enumerate(COUNTS):
            self.k[b, count:] = self.v[b, count:] = np.nan
        self.cache = before._replace(kv=jitted("kv_write")(self.k, self.v, before.kv, before.tables, STARTS, COUNTS))

    def attend(
        self, implementation: str, walk: Walk | None, kv: LayerKV | None = None, tables: PageTables | None = None
    ) -> NDArray[Any]:
        """Outputs of the real rows, joined; all rows must be finite."""
        out = jitted("prefill_attention", implementation)(
            *(self.q, self.k, self.v, kv or self.cache.kv, tables or self.cache.tables, STARTS, COUNTS),
            sink=self.workload.sink,
            local=self.workload.prefill_local,
            walk=walk,
        )
        assert np.isfinite(np.asarray(out, np.float32)).all()
        return np.concatenate([np.asarray(out[b, :count]) for b, count in enumerate(COUNTS)])

    def visible_walk(self, **sizes: int) -> Walk:
        """The walk that is taken without one."""
        starts, counts = jnp.asarray(STARTS), jnp.asarray(COUNTS)
        workload = self.workload
        return visible_walk(
            self.cache.kv,
            starts,
            counts,
            tokens=self.q.shape[1],
            sink=workload.sink,
            local=workload.prefill_local,
            **sizes,
        )

    def defined(self, visited: Visited) -> NDArray[Any]:
        """The op's definition in float64: visible keys of visited blocks, and those from `OWN` on."""
        expected = []
        for b, (start, count) in enumerate(zip(STARTS, COUNTS, strict=True)):
            k, v = (
                np.concatenate([old[b, :start], new[b, :count]])
                for old, new in ((self.cache.k, self.k), (self.cache.v, self.v))
            )
            visible = mask(self.workload, start + np.arange(count), start + count, self.workload.prefill_local)
            rows, keys = np.arange(count) // QUERIES, np.arange(start) // KEYS
            visible[:, :, :start] &= visited[b][:, rows][:, :, keys] | (np.arange(start) >= OWN[b])
            expected.append(dense_attention(self.q[b, :count], k, v, visible))
        return np.concatenate(expected)

    def poisoned(self, visited: Visited) -> tuple[LayerKV, PageTables]:
        """The cache with NaN in all pages that a head does not visit; pages that no head visits are not held."""
        pages = visited.any(axis=2).repeat(KEYS // self.workload.page_size, axis=-1)[..., : self.workload.max_pages]
        split, kv, tables = self.workload.retrieval, self.cache.kv, self.cache.tables
        retrieval = poison(kv.retrieval, tables.retrieval, pages[:, :split])
        streaming = poison(kv.streaming, tables.streaming, pages[:, split:])
        return kv._replace(retrieval=retrieval[0], streaming=streaming[0]), tables._replace(
            retrieval=retrieval[1], streaming=streaming[1]
        )


def poison(pool: Any, table: Any, visited: NDArray[np.bool_]) -> tuple[PagedKV, NDArray[np.int32]]:
    """A pool and its page table, spoilt where a head [K] does not visit a page, by visited [B, K, pages]."""
    b, head, page = np.nonzero(~visited & (table >= 0)[:, None])
    at = (table[b, page], head)
    spoilt = jax.tree.map(lambda x: jnp.asarray(x).at[at].set(255 if x.dtype == jnp.uint8 else jnp.nan), pool)
    return spoilt, np.where(visited.any(axis=1), table, NO_PAGE)


def split(visited: Visited, form: str) -> Walk:
    return Walk(FORMS[form](visited[:, : WORKLOAD.retrieval]), FORMS[form](visited[:, WORKLOAD.retrieval :]))


@each_form
@pytest.mark.parametrize("implementation", ["reference", *implementations("prefill_attention")])
def test_visited_blocks_and_no_others_are_seen(implementation: str, form: str, rng: np.random.Generator):
    """Ragged batches, empty walks, walks that differ by head and query block: against the definition in float64.

    Pages that a head does not visit hold NaN for it, those that no head visits are not held.
    """
    chunk = Chunk(WORKLOAD, rng)
    for _ in range(3):
        visited = random_visited(rng, form, WORKLOAD.num_kv_heads)
        assert (~visited.any(-1)).any() and len({visited[3, head].tobytes() for head in range(3)}) == 3
        out = chunk.attend(implementation, split(visited, form), *chunk.poisoned(visited))
        assert_close(out, chunk.defined(visited), "float32")


@each_form
@each_implementation
@pytest.mark.parametrize("storage", STORAGE)
def test_quantised_history_equals_the_reference(implementation: str, storage: str, form: str, rng: np.random.Generator):
    workload = replace(WORKLOAD, **STORAGE[storage])
    chunk = Chunk(workload, rng)
    visited = random_visited(rng, form, workload.num_kv_heads)
    poisoned = chunk.poisoned(visited)
    out, expected = (chunk.attend(name, split(visited, form), *poisoned) for name in (implementation, "reference"))
    assert_close(out, expected, workload.dtype)


@each_implementation
@pytest.mark.parametrize("given", ["retrieval", "streaming"])
def test_a_head_class_without_a_walk_does_as_without_one(implementation: str, given: str, rng: np.random.Generator):
    """Its outputs have the same bits, whatever the blocks of the other class."""
    chunk = Chunk(WORKLOAD, rng)
    walk = split(random_visited(rng, "list", WORKLOAD.num_kv_heads), "list")
    alone = Walk(**{given: getattr(walk, given)})
    out, whole = chunk.attend(implementation, alone), chunk.attend(implementation, None)
    first = WORKLOAD.retrieval * WORKLOAD.group
    mine, others = slice(0, first), slice(first, None)
    if given == "streaming":
        mine, others = others, mine
    assert_same_bits(out[:, others], whole[:, others])
    assert (out[:, mine] != whole[:, mine]).any()


@pytest.mark.slow
@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("tokens", [TOKENS, 300])
def test_all_blocks_give_the_same_bits_as_no_walk(tokens: int, storage: str, rng: np.random.Generator):
    """The default walk, and lists of all blocks that there are, with spare room: in `xla`'s own sizes of blocks."""
    chunk = Chunk(replace(WORKLOAD, **STORAGE[storage]), rng, tokens)
    expected, walk = chunk.attend("xla", None), chunk.visible_walk()
    assert_same_bits(chunk.attend("xla", walk), expected)

    def all_blocks(ranges: BlockRanges | BlockList | None) -> BlockList:
        assert isinstance(ranges, BlockRanges)
        blocks = -(-WORKLOAD.context // ranges.keys)
        visited = np.ones((*ranges.high.shape, blocks), bool)
        return as_list(visited, ranges.queries, ranges.keys, width=blocks + 2)

    assert_same_bits(chunk.attend("xla", Walk(*map(all_blocks, walk))), expected)


@each_implementation
def test_a_sequence_of_a_ragged_batch_equals_the_same_sequence_alone(implementation: str, rng: np.random.Generator):
    chunk = Chunk(WORKLOAD, rng)
    walk = split(random_visited(rng, "list", WORKLOAD.num_kv_heads), "list")
    attend = partial(jitted("prefill_attention", implementation), sink=5, local=30)
    alone = []
    for b, count in enumerate(COUNTS):
        row, cache = slice(b, b + 1), chunk.cache.alone(b)
        arrays = (chunk.q[row], chunk.k[row], chunk.v[row], cache.kv, cache.tables, STARTS[row], COUNTS[row])
        out = attend(*arrays, walk=jax.tree.map(lambda x, row=row: x[row], walk))
        alone.append(np.asarray(out[0, :count]))
    assert_same_bits(chunk.attend(implementation, walk), np.concatenate(alone))


@each_form
@each_implementation
def test_blocks_behind_the_history_mean_nothing(implementation: str, form: str, rng: np.random.Generator):
    """Nor does what is said of blocks of queries behind the counts, or ``high`` below ``low``."""
    chunk = Chunk(WORKLOAD, rng)
    visited = random_visited(rng, "ranges", WORKLOAD.num_kv_heads)
    expected = chunk.attend(implementation, split(visited, form))
    block, row = np.arange(BLOCKS), np.arange(3) * QUERIES
    is_behind = (block * KEYS >= STARTS[:, None, None, None]) | (row >= COUNTS[:, None])[:, None, :, None]
    more = visited | is_behind
    if form == "list":
        assert_same_bits(chunk.attend(implementation, split(more, form)), expected)
        return

    def reach(ranges: Any) -> BlockRanges:
        is_last = ranges.high * KEYS >= STARTS[:, None, None]
        is_empty = ranges.high == ranges.low
        low = jnp.where(is_empty, ranges.low + 2, ranges.low)
        return replace(ranges, low=low, high=jnp.where(is_last & ~is_empty, 2**30, ranges.high))

    assert_same_bits(chunk.attend(implementation, Walk(*map(reach, split(visited, form)))), expected)


@each_implementation
def test_queries_that_visit_no_history_see_the_chunk(implementation: str, rng: np.random.Generator):
    """As if each sequence began with it, but for the window's positions: all heads retrieve.

    The second one also sees the tokens before it in the page in which it begins and ends.
    """
    workload = replace(WORKLOAD, retrieval=3, streaming=0)
    chunk = Chunk(workload, rng)
    nothing = np.zeros((len(STARTS), 3, 3, BLOCKS), bool)
    arrays = (chunk.q, chunk.k, chunk.v, chunk.cache.kv, chunk.cache.tables)
    fresh = jitted("prefill_attention", implementation)(
        *arrays, np.zeros_like(STARTS), COUNTS, sink=1, local=1, has_history=False
    )
    expected = np.concatenate([np.asarray(fresh[b, :count]) for b, count in enumerate(COUNTS)])
    is_all_own = (OWN == STARTS).repeat(COUNTS)
    assert 0 < (~is_all_own).sum() < len(expected)
    for form in FORMS.values():
        out = chunk.attend(implementation, Walk(form(nothing)))
        assert_close(out[is_all_own], expected[is_all_own], "float32")
        assert_close(out, chunk.defined(nothing), "float32")


@each_form
def test_only_visited_blocks_are_read(form: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch):
    """Counts what `xla` takes from the pages: keys and values of each visited block of queries that exist."""
    chunk = Chunk(WORKLOAD, rng)
    visited = random_visited(rng, form, WORKLOAD.num_kv_heads)
    reads: list[None] = []

    def counting(original: Callable[..., Any], *arguments: Any) -> Any:
        jax.debug.callback(lambda: reads.append(None))
        return original(*arguments)

    for name in ("keys_of", "dequantize"):
        monkeypatch.setattr(xla, name, partial(counting, getattr(xla, name)))
    jitted_before: Any = xla.prefill_attention
    traced_anew: Any = jax.jit(partial(jitted_before.__wrapped__, sink=5, local=30))
    arrays = (chunk.q, chunk.k, chunk.v, chunk.cache.kv, chunk.cache.tables, STARTS, COUNTS)
    for walk, blocks in ((split(visited, form), visited), (Walk(*(as_list(x) for x in two(~visited))), ~visited)):
        reads.clear()
        jax.block_until_ready(traced_anew(*arrays, walk=walk))
        jax.effects_barrier()
        is_row = (np.arange(3) * QUERIES < COUNTS[:, None])[:, None, :, None]
        is_history = np.arange(BLOCKS) * KEYS < OWN[:, None, None, None]
        assert len(reads) == 2 * (blocks & is_row & is_history).sum()


def two(visited: Visited) -> tuple[Visited, Visited]:
    return visited[:, : WORKLOAD.retrieval], visited[:, WORKLOAD.retrieval :]


PROMPT = Workload(
    context=1088, retrieval=1, streaming=1, group=2, head_dim=8, dtype="float32", sink=100, local=77, prefill_local=300
)


@each_implementation
@pytest.mark.parametrize(("size", "queries", "keys"), [(128, 64, 64), (512, 96, 192)])
def test_every_chunk_and_block_size_gives_dense_attention_with_the_default_walk(
    implementation: str, size: int, queries: int, keys: int, rng: np.random.Generator
):
    """Chunks end inside blocks of queries, of keys, and inside pages."""
    prompt = 1050
    q = random_tokens(PROMPT, rng, prompt, PROMPT.num_heads)
    k, v = (random_tokens(PROMPT, rng, prompt) for _ in range(2))
    expected = dense_attention(q[0], k[0], v[0], mask(PROMPT, np.arange(prompt), prompt, PROMPT.prefill_local))
    cache: Cache = empty_cache(PROMPT, rng)
    window: dict[str, Any] = {"sink": PROMPT.sink, "local": PROMPT.prefill_local}
    out = []
    for start in range(0, prompt, size):
        count = min(size, prompt - start)
        padding = ((0, 0), (0, size - count), (0, 0), (0, 0))
        rows = [np.pad(x[:, start : start + count], padding) for x in (q, k, v)]
        at = (jnp.array([start], jnp.int32), jnp.array([count], jnp.int32))
        cache = cache._replace(kv=jitted("kv_write")(*rows[1:], cache.kv, cache.tables, *at))
        walk = visible_walk(cache.kv, *at, tokens=size, queries=queries, keys=keys, **window)
        attend = jitted("prefill_attention", implementation)
        out.append(np.asarray(attend(*rows, cache.kv, cache.tables, *at, walk=walk, **window)[0, :count]))
    assert_close(np.concatenate(out), expected, "float32")


@each_implementation
def test_without_history_a_walk_changes_nothing(implementation: str, rng: np.random.Generator):
    chunk = Chunk(WORKLOAD, rng)
    walk = split(random_visited(rng, "list", WORKLOAD.num_kv_heads), "list")
    arguments = (chunk.q, chunk.k, chunk.v, chunk.cache.kv, chunk.cache.tables, np.zeros_like(STARTS), COUNTS)
    attend = partial(jitted("prefill_attention", implementation), sink=5, local=30, has_history=False)
    assert_same_bits(attend(*arguments, walk=walk), attend(*arguments))


def test_a_walk_that_does_not_fit_is_the_callers_mistake(rng: np.random.Generator):
    chunk = Chunk(WORKLOAD, rng)
    walk = chunk.visible_walk(queries=QUERIES, keys=KEYS)
    lists = split(random_visited(rng, "list", 3), "list")
    assert isinstance(walk.retrieval, BlockRanges) and isinstance(lists.retrieval, BlockList)
    arrays: Any = (chunk.q, chunk.k, chunk.v, chunk.cache.kv, chunk.cache.tables, STARTS, COUNTS)
    for wrong, message in (
        (Walk(walk.streaming), "walk.retrieval must be int32 [6, 2, 3], got int32 [6, 1, 3]"),
        (Walk(replace(walk.retrieval, queries=20)), "walk.retrieval must be int32 [6, 2, 2], got int32 [6, 2, 3]"),
        (Walk(replace(lists.retrieval, blocks=lists.retrieval.blocks[..., :0])), "[6, 2, 3, 'n >= 1'], got int32"),
        (Walk(replace(lists.retrieval, blocks=lists.retrieval.blocks[..., 0])), "[6, 2, 3, 'n >= 1'], got int32"),
        (Walk(jax.tree.map(lambda x: x.astype(jnp.int16), walk.retrieval)), "got int16 [6, 2, 3]"),
        (Walk(replace(walk.retrieval, keys=24)), "keys=24 a multiple of the page size 16"),
        (Walk(replace(walk.retrieval, queries=0)), "walk.retrieval: queries=0 must be positive"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            prefill_attention(*arrays, sink=5, local=30, walk=wrong)
    arrays = (*arrays[:3], chunk.cache.kv._replace(streaming=None), *arrays[4:])
    with pytest.raises(ValueError, match=r"^walk\.streaming must be None: the layer has no streaming heads"):
        prefill_attention(*arrays, sink=5, local=30, walk=walk)
