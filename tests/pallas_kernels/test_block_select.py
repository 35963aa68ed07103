"""`block_select`: which blocks of the history a tile of queries lists, and their means in `prefill_attention`."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.typing import NDArray

from pallas_kernels import BlockList, BlockMeans, PageTables, Walk, block_select
from pallas_kernels.core.workloads import Workload
from tests.pallas_kernels.cases import (
    STORAGE,
    Cache,
    assert_close,
    assert_same_bits,
    dense_attention,
    filled_cache,
    implementations,
    jitted,
    random_tokens,
)

each_implementation = pytest.mark.parametrize("implementation", implementations("block_select"))

WORKLOAD = Workload(
    batch=4,
    context=432,
    retrieval=2,
    streaming=1,
    group=3,
    head_dim=32,
    page_size=8,
    sub_page_size=4,
    dtype="float32",
    sink=5,
    local=20,
    prefill_local=20,
    has_means=True,
)
TOKENS = 48
STARTS = np.array([336, 77, 0, 240], np.int32)
COUNTS = np.array([48, 41, 48, 0], np.int32)
ENDS = np.array([600, 118, 48, 240], np.int32)
RULE: dict[str, Any] = {"queries": 16, "keys": 24, "threshold": 0.3, "sink": 10, "local": 40, "last": 0, "least": 0}


class Chunk:
    """A chunk of every sequence, written to a cache that holds the tokens before it, all of them random.

    Keys have a part that neighbours share, so that blocks differ; queries look for it.
    """

    def __init__(self, workload: Workload, rng: np.random.Generator, starts: Any = STARTS, counts: Any = COUNTS):
        self.workload, self.starts, self.counts = workload, starts, counts
        slots = workload.max_pages * workload.page_size
        topics = rng.normal(size=(workload.batch, -(-slots // 24), workload.num_kv_heads, workload.head_dim))
        k = random_tokens(workload, rng, slots) + 2 * np.repeat(topics, 24, axis=1)[:, :slots]
        k = k.astype(jnp.dtype(workload.dtype))
        held = filled_cache(workload, rng, starts, window=workload.prefill_local, k=k)
        self.q = (2 * random_tokens(workload, rng, TOKENS, workload.num_heads)).astype(jnp.dtype(workload.dtype))
        self.k, self.v = (random_tokens(workload, rng, TOKENS) for _ in range(2))
        for b, count in enumerate(counts):
            self.k[b, count:] = self.v[b, count:] = np.nan
        kv = jitted("kv_write")(self.k, self.v, held.kv, held.tables, starts, counts)
        self.cache: Cache = held._replace(kv=kv)

    @property
    def retrieval(self) -> NDArray[Any]:
        """Queries of the retrieval heads."""
        return self.q[:, :, : self.workload.retrieval * self.workload.group]

    def select(self, implementation: str, table: Any = None, ends: Any = ENDS, **options: Any) -> BlockList:
        """Lists by the rule."""
        table = self.cache.tables.retrieval if table is None else table
        arrays = (self.retrieval, self.cache.kv.retrieval, table, self.starts, self.counts, ends)
        return jitted("block_select", implementation)(*arrays, **{**RULE, **options})

    def attend(self, walk: BlockList | None, implementation: str = "xla", kv: Any = None) -> list[NDArray[Any]]:
        """Outputs of the retrieval heads, of the real rows of each sequence."""
        out = jitted("prefill_attention", implementation)(
            *(self.q, self.k, self.v, kv or self.cache.kv, self.cache.tables, self.starts, self.counts),
            sink=self.workload.sink,
            local=self.workload.prefill_local,
            walk=None if walk is None else Walk(retrieval=walk),
        )
        assert np.isfinite(np.asarray(out, np.float32)).all()
        heads = self.retrieval.shape[2]
        return [np.asarray(out[b, :count, :heads], np.float32) for b, count in enumerate(self.counts)]


def density(lists: BlockList) -> float:
    """The share of listed blocks in the first sequence's tiles, whose history has 14 blocks."""
    return float((np.asarray(lists.blocks[0]) >= 0).mean() * lists.blocks.shape[-1] / 14)


@each_implementation
@pytest.mark.parametrize("storage", ["float32", "bfloat16", "bfloat16-int8-int4"])
@pytest.mark.parametrize("options", [{}, {"threshold": None}, {"keys": 8, "queries": 32}, {"last": 20, "least": 90}])
def test_lists_and_means_are_those_of_the_reference(
    implementation: str, storage: str, options: dict[str, Any], rng: np.random.Generator
):
    """Chunks that begin inside pages and blocks, end inside tiles, have no history, or no token."""
    chunk = Chunk(replace(WORKLOAD, **STORAGE[storage]), rng)
    found, expected = (chunk.select(name, **options) for name in (implementation, "reference"))
    np.testing.assert_array_equal(found.blocks, expected.blocks)
    assert found.means is not None and expected.means is not None
    for mine, theirs in zip(found.means, expected.means, strict=True):
        assert_close(mine, theirs, "float32" if storage == "float32" else "bfloat16")
    assert (found.queries, found.keys) == (expected.queries, expected.keys)


@each_implementation
def test_a_list_has_the_blocks_of_the_definition(implementation: str, rng: np.random.Generator):
    """Computed here from the keys themselves, in float64."""
    chunk = Chunk(WORKLOAD, rng)
    lists = np.asarray(chunk.select(implementation).blocks)
    assert 0.2 < density(chunk.select(implementation)) < 0.9
    kept = chunk.cache.k[0, :336].astype(np.float64).reshape(14, 24, 3, 32).mean(axis=1)
    for tile in range(3):
        first = 336 + tile * 16
        for head in range(2):
            q = chunk.q[0, tile * 16 : (tile + 1) * 16, head * 3 : (head + 1) * 3].astype(np.float64)
            keys = [kept[:, head]]
            if first >= 360:  # the chunk's own first block takes part in the comparison
                keys.append(chunk.k[0, :24, head].astype(np.float64).mean(axis=0)[None])
            scores = np.einsum("rgh,nh->rgn", q, np.concatenate(keys)) / np.sqrt(32)
            mass = np.exp(scores - scores.max()).sum(axis=(0, 1))
            by_score = set(np.nonzero(mass >= 0.3 * mass.max())[0].tolist()) - {14}
            forced = {0} | {block for block in range(14) if (block + 1) * 24 > first - 40}
            found = lists[0, head, tile]
            assert found[found >= 0].tolist() == sorted(by_score | forced)
            assert (np.diff(found[found >= 0]) > 0).all() and (found[len(by_score | forced) :] == -1).all()


@each_implementation
def test_tiles_without_tokens_and_sequences_without_history_list_nothing(implementation: str, rng: np.random.Generator):
    lists = np.asarray(Chunk(WORKLOAD, rng).select(implementation).blocks)
    assert (lists[2:] == -1).all()
    assert (lists[1, :, :3] >= 0).any(axis=-1).all()


@each_implementation
def test_the_last_queries_and_early_ones_list_everything(implementation: str, rng: np.random.Generator):
    chunk = Chunk(WORKLOAD, rng)
    ends = np.array([336 + 40, 118, 48, 240], np.int32)
    whole = np.arange(18) < 14
    found = np.asarray(chunk.select(implementation, ends=ends, last=9).blocks) >= 0
    assert not (found[0, :, 0] == whole).all() and (found[0, :, 1:] == whole).all()  # tokens 367 … 375
    found = np.asarray(chunk.select(implementation, least=353).blocks) >= 0
    assert (found[0, :, :2] == whole).all() and not (found[0, :, 2] == whole).all()


@each_implementation
def test_without_last_tokens_a_last_tile_that_is_not_full_reads_like_the_others(
    implementation: str, rng: np.random.Generator
):
    chunk = Chunk(WORKLOAD, rng)
    ends = np.array([384, 118, 48, 240], np.int32)  # the second prompt ends with its chunk, inside of a tile
    found, other = (chunk.select(implementation, ends=x, last=0).blocks for x in (ends, ENDS + 1000))
    np.testing.assert_array_equal(found, other)
    some = np.asarray(chunk.select(implementation, ends=ends, last=1).blocks) >= 0
    assert (some[1, :, 2, :4]).all() and not (np.asarray(found)[0, :, 2, :14] >= 0).all()


@each_implementation
def test_pages_that_are_not_held_are_not_ranked(implementation: str, rng: np.random.Generator):
    chunk = Chunk(WORKLOAD, rng)
    table = np.array(chunk.cache.tables.retrieval)
    listed = np.asarray(chunk.select(implementation).blocks[0, 0, 0])
    lost = int(listed[listed > 0][0])
    table[0, lost * 3 + 1] = -1
    found = chunk.select(implementation, table=table)
    assert lost not in np.asarray(found.blocks[0, 0, 0]) and found.means is not None
    assert (np.asarray(found.means.k[0, :, lost]) == 0).all()
    np.testing.assert_array_equal(found.blocks, chunk.select("reference", table=table).blocks)


@each_implementation
def test_lists_do_not_depend_on_how_the_prompt_is_split(implementation: str, rng: np.random.Generator):
    """A tile of a later chunk lists, of an earlier chunk's history, what it lists when it is part of that chunk."""
    workload = replace(WORKLOAD, batch=1)
    whole = Chunk(workload, rng, np.array([240], np.int32), np.array([48], np.int32))
    one = whole.select(implementation, ends=np.array([600], np.int32), local=0)
    assert whole.cache.kv.retrieval is not None
    part = jitted("block_select", implementation)(
        *(whole.retrieval[:, 32:], whole.cache.kv.retrieval, whole.cache.tables.retrieval),
        *(np.array([272], np.int32), np.array([16], np.int32), np.array([600], np.int32)),
        **{**RULE, "local": 0},
    )
    mine, theirs = (np.asarray(lists) for lists in (part.blocks[0, :, 0], one.blocks[0, :, 2]))
    for head in range(2):
        before = mine[head][(mine[head] >= 0) & (mine[head] < 10)]
        assert before.tolist() == theirs[head][theirs[head] >= 0].tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keys": 12}, "keys=12 a multiple of the page size 8"),
        ({"threshold": 0.0}, "threshold=0.0 must be above 0"),
        ({"last": -1}, "last=-1 must not be negative"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str, rng: np.random.Generator):
    with pytest.raises(ValueError, match=message):
        Chunk(WORKLOAD, rng).select("xla", **options)


def test_a_pool_without_means_is_refused_where_they_are_needed(rng: np.random.Generator):
    chunk = Chunk(replace(WORKLOAD, has_means=False), rng)
    pool = chunk.cache.kv.retrieval
    assert pool is not None
    arrays = (chunk.retrieval, pool, jnp.asarray(chunk.cache.tables.retrieval), STARTS, COUNTS, ENDS)
    with pytest.raises(ValueError, match="no means"):
        block_select(*map(jnp.asarray, arrays[:1]), pool, *map(jnp.asarray, arrays[2:]), **RULE)  # type: ignore[misc]
    lists = jitted("block_select")(*arrays, **{**RULE, "threshold": None, "has_means": False})
    assert lists.means is None and (np.asarray(lists.blocks[0]) >= 0).any()


# --- the means in attention -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", STORAGE)
def test_attention_with_means_is_that_of_the_reference(storage: str, rng: np.random.Generator):
    workload = replace(WORKLOAD, **STORAGE[storage])
    chunk = Chunk(workload, rng)
    lists = chunk.select("xla")
    for mine, theirs in zip(chunk.attend(lists), chunk.attend(lists, "reference"), strict=True):
        assert_close(mine, theirs, workload.dtype)


def test_a_mean_stands_for_its_keys_in_the_softmax(rng: np.random.Generator):
    """The whole softmax, in float64: listed and own keys, and one key of weight 24 per other block."""
    chunk = Chunk(WORKLOAD, rng)
    lists = chunk.select("xla")
    [out, *_] = chunk.attend(lists)
    for head in range(2):
        k, v = (x[0, :336, head].astype(np.float64) for x in (chunk.cache.k, chunk.cache.v))
        means = [x.reshape(14, 24, 32).mean(axis=1) for x in (k, v)]
        for tile in range(3):
            rows = slice(tile * 16, (tile + 1) * 16)
            listed = np.isin(np.arange(14), np.asarray(lists.blocks[0, head, tile]))
            own = np.arange(48) <= np.arange(48)[rows, None]
            visible = np.concatenate([np.broadcast_to(listed.repeat(24), (16, 336)), own], axis=1)
            keys = np.concatenate([k, chunk.k[0, :, head]])
            values = np.concatenate([v, chunk.v[0, :, head]])
            # A key of weight 24 is 24 keys.
            repeated = (np.broadcast_to((~listed).repeat(24), (16, 336)), *(mean.repeat(24, axis=0) for mean in means))
            expected = dense_attention(
                chunk.q[0, rows, head * 3 : (head + 1) * 3],
                np.concatenate([keys, repeated[1]])[:, None],
                np.concatenate([values, repeated[2]])[:, None],
                np.concatenate([visible, repeated[0]], axis=1)[None],
            )
            assert_close(out[rows, head * 3 : (head + 1) * 3], expected, "float32")


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_means_of_single_tokens_are_dense_attention(implementation: str, rng: np.random.Generator):
    """Every key is its own mean, whichever are listed."""
    chunk = Chunk(replace(WORKLOAD, page_size=1, sub_page_size=1), rng)
    chunk.q /= 2  # scores of the size for which the tolerance is meant
    lists = chunk.select("xla", keys=1, queries=16, local=0, sink=0, threshold=0.9)
    assert (np.asarray(lists.blocks[0]) >= 0).mean() < 0.2
    dense = chunk.attend(None, implementation)
    for mine, theirs in zip(chunk.attend(lists, implementation), dense, strict=True):
        assert_close(mine, theirs, "float32")


@pytest.mark.parametrize("storage", STORAGE)
def test_lists_of_all_blocks_give_the_same_bits_as_no_list(storage: str, rng: np.random.Generator):
    chunk = Chunk(replace(WORKLOAD, **STORAGE[storage]), rng)
    everything = chunk.select("xla", least=10_000, queries=48, keys=48)
    assert everything.means is not None
    assert_same_bits(chunk.attend(everything), chunk.attend(None))


def test_a_lower_threshold_lists_more_and_tends_to_dense_attention(rng: np.random.Generator):
    """Nested lists; the error falls, with means and without, and means are better throughout."""
    chunk = Chunk(WORKLOAD, rng)
    [dense, *_] = chunk.attend(None)
    before, errors = set[tuple[int, ...]](), []
    for threshold in (10.0, 0.9, 0.5, 0.2, 0.05, 1e-9):
        lists = chunk.select("xla", threshold=threshold)
        here = {(*at, int(block)) for *at, block in _entries(lists)}
        assert here >= before
        before = here
        alone = BlockList(blocks=lists.blocks, queries=lists.queries, keys=lists.keys)
        errors.append([float(np.abs(chunk.attend(walk)[0] - dense).mean()) for walk in (lists, alone)])
    with_means, without = np.transpose(errors)
    assert (np.diff(with_means) <= 0).all() and (np.diff(without) <= 0).all()
    assert (with_means[:-1] < without[:-1]).all() and with_means[-1] < 1e-6


def _entries(lists: BlockList) -> list[tuple[int, ...]]:
    blocks = np.asarray(lists.blocks)
    return [(*at[:-1], int(blocks[at])) for at in np.ndindex(*blocks.shape) if blocks[at] >= 0]


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_what_is_not_listed_is_not_read(implementation: str, rng: np.random.Generator):
    """NaN in its pages does not show, with means and without."""
    chunk = Chunk(WORKLOAD, rng)
    pool = chunk.cache.kv.retrieval
    assert pool is not None
    table, broken = np.asarray(chunk.cache.tables.retrieval), np.array(pool.k)
    lists = chunk.select("xla")
    for head in range(2):
        listed = np.unique(np.asarray(lists.blocks[0, head]))
        others = np.setdiff1d(np.arange(14), listed)
        assert others.size
        for block in others:
            broken[table[0, block * 3 : (block + 1) * 3], head] = np.nan
    kv = chunk.cache.kv._replace(retrieval=pool._replace(k=jnp.asarray(broken)))
    for walk in (lists, BlockList(blocks=lists.blocks, queries=lists.queries, keys=lists.keys)):
        assert_same_bits(chunk.attend(walk, implementation, kv)[0], chunk.attend(walk, implementation)[0])


def test_means_of_blocks_that_are_not_held_do_not_stand_in(rng: np.random.Generator):
    chunk = Chunk(WORKLOAD, rng)
    lists = chunk.select("xla")
    assert lists.means is not None
    tables, lost = np.array(chunk.cache.tables.retrieval), 5
    tables[0, lost * 3] = -1
    poisoned = BlockMeans(*(x.at[0, :, lost].set(jnp.nan) for x in lists.means))
    without = np.where(np.asarray(lists.blocks) == lost, 99, np.asarray(lists.blocks))
    ordered = np.sort(np.where(without < 0, 99, without), axis=-1)
    walk = BlockList(
        blocks=jnp.asarray(np.where(ordered == 99, -1, ordered)), means=poisoned, queries=lists.queries, keys=lists.keys
    )
    chunk.cache = chunk.cache._replace(tables=PageTables(tables, *chunk.cache.tables[1:]))
    for mine, theirs in zip(chunk.attend(walk), chunk.attend(walk, "reference"), strict=True):
        assert_close(mine, theirs, "float32")


@pytest.mark.parametrize("implementation", ["xla"])
def test_means_stand_in_for_blocks_of_streaming_heads_too(implementation: str, rng: np.random.Generator):
    """Whatever their window is: who gives means says what they stand for."""
    chunk = Chunk(WORKLOAD, rng)
    blocks = jnp.full((4, 1, 3, 18), -1, jnp.int32).at[0, 0, :, 0].set(5)
    means = BlockMeans(*(jnp.asarray(rng.normal(size=(4, 1, 18, 32)), jnp.float32) for _ in range(2)))
    walk = Walk(streaming=BlockList(blocks=blocks, means=means, queries=16, keys=24))
    tables = PageTables(chunk.cache.tables.retrieval, chunk.cache.tables.retrieval, chunk.cache.tables.slots)
    streaming = chunk.cache.kv.retrieval
    assert streaming is not None
    one = jax.tree.map(lambda x: x[:, :1], streaming)
    arrays = (chunk.q, chunk.k, chunk.v, chunk.cache.kv._replace(streaming=one), tables, STARTS, COUNTS)
    found, expected = (
        np.asarray(jitted("prefill_attention", name)(*arrays, sink=1, local=7, walk=walk))
        for name in (implementation, "reference")
    )
    for b, count in enumerate(COUNTS):
        assert_close(found[b, :count], expected[b, :count], "float32")


def test_means_of_some_blocks_stand_in_for_these_alone(rng: np.random.Generator):
    """Fewer means than whole blocks, and fewer than a step takes."""
    chunk = Chunk(WORKLOAD, rng)
    lists = chunk.select("xla", threshold=None, local=0)
    assert lists.means is not None
    walk = replace(lists, means=BlockMeans(*(x[:, :, :3] for x in lists.means)))
    for mine, theirs in zip(chunk.attend(walk), chunk.attend(walk, "reference"), strict=True):
        assert_close(mine, theirs, "float32")


def test_means_of_another_shape_are_refused(rng: np.random.Generator):
    chunk = Chunk(WORKLOAD, rng)
    lists = chunk.select("xla")
    assert lists.means is not None
    walk = replace(lists, means=BlockMeans(*(x[:, :1] for x in lists.means)))
    with pytest.raises(ValueError, match=r"walk.retrieval: means must be \[4, 2, 'n >= 1', 32\]"):
        chunk.attend(walk)
