"""Pages move out of the cache and back bit by bit, only where they are asked to, and a sequence does not notice."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lserve_jax import HeadClasses, InferenceConfig, init_cache
from lserve_jax.engine.host_pages import HostPages, PageMover
from lserve_jax.runtime.cache import KVCache
from lserve_jax.runtime.pages import (
    BLOCK,
    PoolName,
    pools_of,
    read_pages,
    read_slot,
    slots_in,
    write_pages,
    write_slot,
)
from lserve_jax.runtime.programs import Programs
from lserve_jax.runtime.steps import decode_step
from pallas_kernels import NO_PAGE, PageTables
from tests import x64
from tests.lserve_jax.runtime.tiny_steps import Stepper, classes, tiny_config
from tests.pallas_kernels.cases import assert_same_bits, temporary_bytes

SHARES = {
    "0": None,
    "0.5, in each layer": classes((1, 0), (0, 1), num_retrieval=(1, 1)),
    "0.5, one layer of each": classes((0, 1), (0, 1), num_retrieval=(0, 2)),
    "0.75": classes((0, 1), (0, 1), num_retrieval=(0, 1)),
    "1": classes((0, 1), (0, 1), num_retrieval=(0, 0)),
}
STORED = ("float32", "bfloat16", "int8", "int4")
COUNTS = (0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 5)
RETRIEVAL, STREAMING = 83, 71  # the first is padded, where there are statistics


def config_of(share: str, kv_dtype: str) -> InferenceConfig:
    heads: HeadClasses | None = SHARES[share]
    return tiny_config("lserve", heads, kv_dtype=kv_dtype, token_budget=96, selector_interval=2)


def noisy(config: InferenceConfig, seed: int, slots: int = 3) -> KVCache:
    """A cache of any bits at all: not-a-numbers of every kind, too."""
    sizes = {"max_num_seqs": slots, "retrieval_pages": RETRIEVAL, "streaming_pages": STREAMING}
    rng = np.random.default_rng(seed)

    def noise(leaf: Any) -> jax.Array:
        raw = rng.integers(0, 256, leaf.size * leaf.dtype.itemsize, np.uint8)
        return jnp.asarray(raw.view(leaf.dtype).reshape(leaf.shape))

    return jax.tree.map(noise, jax.eval_shape(partial(init_cache, config, **sizes)))


def raw(tree: Any) -> list[bytes]:
    """Every bit of a pytree, as assert_same_bits does not see it: a NaN differs from another one."""
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


POOLS: tuple[PoolName, ...] = ("retrieval", "streaming")


def some_ids(cache: KVCache, count: int, seed: int, *, has_last: bool) -> dict[PoolName, list[int]]:
    """Random distinct pages of both pools, the last of each among them or not; none where no layer has the pool."""
    found: dict[PoolName, list[int]] = {}
    for pool in POOLS:
        leaves = jax.tree.leaves(pools_of(cache, pool))
        size = leaves[0].shape[0] if leaves else 0
        ids = np.random.default_rng(seed).permutation(max(size - 1, 0))[:count].tolist()
        found[pool] = [*ids[:-1], size - 1] if ids and has_last else ids
    return found


def expected_write(cache: KVCache, host: HostPages, ids: dict[PoolName, list[int]]) -> list[Any]:
    """What a write must make of a cache, by NumPy."""
    found = []
    for pool in POOLS:
        for leaf, new in zip(jax.tree.leaves(pools_of(cache, pool)), jax.tree.leaves(getattr(host, pool)), strict=True):
            expected = np.array(leaf)
            expected[ids[pool]] = new
            found.append(expected)
    return found


@pytest.mark.parametrize("kv_dtype", STORED)
@pytest.mark.parametrize("share", SHARES)
def test_pages_go_out_and_in_bit_by_bit_and_nothing_else_changes(share: str, kv_dtype: str):
    config = config_of(share, kv_dtype)
    programs = Programs()
    mover = PageMover(programs)
    source = noisy(config, 0)
    for seed, count in enumerate(COUNTS):
        taken = some_ids(source, count, seed, has_last=True)
        host = mover.read(source, taken["retrieval"], taken["streaming"])
        for pool, ids in taken.items():
            expected = jax.tree.map(lambda x, ids=ids: np.asarray(x)[ids], pools_of(source, pool))
            assert jax.tree.structure(getattr(host, pool)) == jax.tree.structure(expected)
            assert raw(getattr(host, pool)) == raw(expected)
        assert host.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(host))
        target = noisy(config, 1)
        to = some_ids(target, count, 100 + seed, has_last=False)  # the last is where -1 would wrap around to
        expected, selected = expected_write(target, host, to), raw([layer.selected for layer in target])
        written = mover.write(target, host, to["retrieval"], to["streaming"])
        assert raw([pools_of(written, pool) for pool in POOLS]) == raw(expected)
        assert raw([layer.selected for layer in written]) == selected
    names = {call.name for call in mover.calls(source) if "slot" not in call.name}
    assert set(programs.names) == names, "one program for each direction and pool"


@pytest.mark.parametrize("share", SHARES)
def test_the_rows_of_a_slot_go_out_and_in_and_those_of_others_stay(share: str):
    config = config_of(share, "int8")
    mover = PageMover(Programs())
    source, target = noisy(config, 0), noisy(config, 1)
    before, origin = (jax.tree.map(np.array, slots_in(cache)) for cache in (target, source))
    rows = mover.read_slot(source, 2)
    written = mover.write_slot(target, rows, 0)
    assert any(row.selected is not None for row in rows) == (share != "1")
    now = slots_in(written)
    assert jax.tree.structure(now) == jax.tree.structure(before)
    for new, old, other in zip(*map(jax.tree.leaves, (now, before, origin)), strict=True):
        np.testing.assert_array_equal(new[0], other[2])
        np.testing.assert_array_equal(new[1:], old[1:])


def _slow(*values: str) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("share", "kv_dtype"),
    [
        ("0.5, in each layer", "int4"),
        *(_slow(share, kv_dtype) for kv_dtype in STORED for share in ("0", "0.75", "1")),
        *(_slow("0.5, in each layer", kv_dtype) for kv_dtype in STORED[:-1]),
    ],
)
def test_a_sequence_that_moves_between_two_steps_gets_the_same_logits(share: str, kv_dtype: str):
    """It gets other pages, another slot, and a cache whose other pages are NaN; between two of its selections."""
    one = Stepper(config_of(share, kv_dtype), 20, slots=2)
    prompt = np.random.default_rng(3).integers(3, 128, 150).astype(np.int32)
    tokens = [7, 8, 9, 10, 11]

    def decode(cache: KVCache, slot: int, tables: PageTables, step: int) -> tuple[np.ndarray, KVCache]:
        values = np.zeros((3, 2), np.int32)
        values[:, slot] = tokens[step], len(prompt) + step + 1, step
        logits, cache = decode_step(one.params, cache, *values, tables, config=one.config)
        return np.asarray(logits)[slot], cache

    _, cache = one.prefill(one.cache(), prompt, 64)
    rows = []
    for step in range(len(tokens)):
        row, cache = decode(cache, 0, one.tables, step)
        rows.append(row)

    _, cache = one.prefill(one.cache(), prompt, 64)
    mover, held = PageMover(Programs()), -(-(len(prompt) + 3) // 16)
    for step in range(3):
        _, cache = decode(cache, 0, one.tables, step)
    old = [np.asarray(table[0, :held]).tolist() for table in one.tables[:2]]
    host, selections = mover.read(cache, *on_pools(cache, *old)), mover.read_slot(cache, 0)
    ids = np.random.default_rng(5).permutation(40).astype(np.int32)
    tables = PageTables(*(np.stack([np.full(20, NO_PAGE, np.int32), part]) for part in (ids[:20], ids[20:])))
    new = [table[1, :held].tolist() for table in tables[:2]]
    cache = mover.write(one.cache(), host, *on_pools(cache, *new))
    cache = mover.write_slot(cache, selections, 1)
    for step in range(3, len(tokens)):
        row, cache = decode(cache, 1, tables, step)
        assert np.isfinite(row).all()
        assert row.tobytes() == rows[step].tobytes()


def on_pools(cache: KVCache, retrieval: list[int], streaming: list[int]) -> tuple[list[int], list[int]]:
    """Ids of the pools that some layer has."""
    has = [any(pool is not None for pool in pools_of(cache, name)) for name in POOLS]
    return (retrieval if has[0] else []), (streaming if has[1] else [])


def test_ids_that_a_program_would_clip_or_drop_or_write_twice_are_faults():
    config = config_of("0.5, in each layer", "int8")
    mover, cache = PageMover(Programs()), noisy(config, 0)
    size = jax.tree.leaves(pools_of(cache, "retrieval"))[0].shape[0]
    for ids in ([size], [-1], [0, 1, -1]):
        with pytest.raises(AssertionError):
            mover.read(cache, ids, [])
        with pytest.raises(AssertionError):
            mover.write(cache, mover.read(cache, [0] * len(ids), []), ids, [])
    host = mover.read(cache, [1, 2, 3], [4])
    for retrieval, streaming in (([1, 2], [4]), ([1, 2, 2], [4]), ([1, 2, 3], []), ([1, 2, 3], [4, 5])):
        with pytest.raises(AssertionError):
            mover.write(cache, host, retrieval, streaming)
    mover.write(cache, host, [size - 1, 2, 3], [4])


def test_a_pool_that_no_layer_has_moves_no_page():
    config = config_of("0", "int8")
    mover, cache = PageMover(Programs()), noisy(config, 0)
    with pytest.raises(AssertionError):
        mover.read(cache, [], [0])
    host = mover.read(cache, [], [])
    assert host.nbytes == 0 and host.streaming == (None, None)
    before = raw(cache)
    assert raw(mover.write(cache, host, [], [])) == before


@pytest.mark.parametrize("kv_dtype", STORED)
def test_a_write_changes_the_cache_in_place(kv_dtype: str):
    """Temporaries as large as a pool, as a backend makes that computes in a wider type, would not fit on a GPU."""
    config = config_of("0.5, in each layer", kv_dtype)
    cache, ids = noisy(config, 0), np.arange(BLOCK, dtype=np.int32)
    for pool in POOLS:
        pages = read_pages(cache, ids, pool=pool)
        assert temporary_bytes(lambda *args, pool=pool: write_pages(*args, pool=pool), cache, pages, ids, updated=0) < (
            jax.tree.leaves(pools_of(cache, pool))[0].nbytes // 4
        )


@pytest.mark.parametrize("kv_dtype", STORED)
def test_under_x64_no_equation_has_64_bits_and_the_bits_are_the_same(kv_dtype: str):
    config, ids = config_of("0.5, in each layer", kv_dtype), np.array([3, -1, 70, 0, -1], np.int32)
    pages = read_pages(noisy(config, 2), ids, pool="streaming")
    rows = read_slot(noisy(config, 2), np.int32(1))
    for function, arguments in (
        (partial(read_pages, pool="retrieval"), (ids,)),
        (partial(write_pages, pool="streaming"), (pages, ids)),
        (read_slot, (np.int32(2),)),
        (write_slot, (rows, np.int32(2))),
    ):
        assert x64.wide(x64.traced(function, noisy(config, 0), *arguments)) == set()
        *given, at = arguments
        without, within = x64.both(lambda f=function, g=given, at=at: raw(f(noisy(config, 0), *g, at.astype(np.int64))))
        assert within == without


def test_the_programs_can_be_compiled_before_there_is_a_cache():
    config = config_of("0.5, in each layer", "int4")
    cache = noisy(config, 0)
    programs = Programs()
    mover = PageMover(programs)
    calls = mover.calls(jax.eval_shape(lambda: cache))
    assert [call.name for call in calls] == [
        *("read_retrieval_pages", "write_retrieval_pages", "read_streaming_pages", "write_streaming_pages"),
        *("read_slot", "write_slot"),
    ]
    programs.compile(calls)
    seconds = programs.compile_seconds
    host = mover.read(cache, [1, 2], [3])
    cache = mover.write(cache, host, [4, 5], [6])
    cache = mover.write_slot(cache, mover.read_slot(cache, 0), 1)
    assert programs.compile_seconds == seconds
    assert_same_bits(mover.read(cache, [4, 5], [6]), host)
