"""The ops under ``jax_enable_x64``: the bits of any other program, and nothing of 64 bits on the way."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import BlockList, BlockMeans, PageTables, Selection, Walk, visible_walk
from pallas_kernels.core.dtypes import narrowed
from pallas_kernels.core.workloads import TINY, Workload
from tests import x64
from tests.pallas_kernels.cases import (
    MATRICES,
    NOT_FOR_JIT,
    STORAGE,
    TABLES,
    assert_same_bits,
    filled_cache,
    jitted,
    random_matrix,
    random_tokens,
)

RUNNING = [(op, name) for op, table in TABLES.items() for name in table if name != "mosaic_gpu"]
TRACED = [row for row in RUNNING if row not in NOT_FOR_JIT]


BLOCKS = {"queries": 16, "keys": 16, "threshold": 0.5, "sink": 5, "local": 7, "last": 3, "least": 4}


def _call(op: str, workload: Workload) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments and options of an op, every integer int32 and every number of at most 32 bits."""
    rng = np.random.default_rng(0)
    cache = filled_cache(replace(workload, has_means=op == "block_select"), rng, [96, 17, 0, 64])
    q, k = (
        random_tokens(workload, rng, workload.chunk, heads) for heads in (workload.num_heads, workload.num_kv_heads)
    )
    starts, counts = cache.lengths // 2, cache.lengths // 4
    window = {"sink": workload.sink, "local": workload.local}
    previous = Selection.empty(workload.batch, workload.retrieval, 5)
    queries = q[:, 0, : workload.retrieval * workload.group]
    pages, table = cache.kv.retrieval, cache.tables.retrieval
    matrix = {8: "int8-inputs", 4: "int4-groups", None: "int8-offsets"}[workload.bits[0]]
    selection = {"num_selected": 4, "interval": 4, "sink_pages": 1, "memory": 0.5}
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
        "kv_write": ((k, k, cache.kv, cache.tables, starts, counts), {}),
        "prefill_attention": ((q, k, k, cache.kv, cache.tables, starts, counts), window),
        "block_select": ((q[:, :, : queries.shape[1]], pages, table, starts, counts, cache.lengths), BLOCKS),
        "page_select": ((queries, pages, table, cache.lengths, previous, cache.lengths > 0), selection),
        "decode_attention": ((q[:, 0], cache.kv, cache.tables, cache.lengths, None), window),
        "quantized_matmul": ((q[0].reshape(-1, 32), random_matrix(rng, 9, 32, **MATRICES[matrix])), {}),
    }
    return calls[op]


@pytest.mark.parametrize("storage", [name for name in STORAGE if name != "bfloat16"])  # programs as the last one's
@pytest.mark.parametrize(("op", "implementation"), RUNNING)
def test_an_op_returns_the_same_bits(op: str, implementation: str, storage: str):
    arguments, options = _call(op, replace(TINY["mixed"], **STORAGE[storage]))
    without, within = x64.both(lambda: jitted(op, implementation)(*arguments, **options))
    assert_same_bits(within, without)


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize(("op", "implementation"), TRACED)
def test_no_equation_of_an_op_has_64_bits(op: str, implementation: str, storage: str):
    arguments, options = _call(op, replace(TINY["mixed"], **STORAGE[storage]))
    run = partial(getattr(pallas_kernels, op), implementation=implementation, **options)
    assert x64.wide(x64.traced(run, *arguments)) == set()


def test_no_equation_of_other_forms_of_the_ops_has_64_bits():
    """Steps of one token, slots that are the rows, walks, means, no memory: what the cases above leave out."""
    (k, v, kv, tables, starts, counts), _ = _call("kv_write", TINY["mixed"])
    write = pallas_kernels.kv_write
    assert x64.wide(x64.traced(write, k[:, :1], v[:, :1], kv, tables, starts, counts)) == set()
    for op in ("kv_write", "prefill_attention", "decode_attention"):
        arguments, options = _call(op, TINY["mixed"])
        arguments = tuple(x._replace(slots=None) if isinstance(x, PageTables) else x for x in arguments)
        assert x64.wide(x64.traced(partial(getattr(pallas_kernels, op), **options), *arguments)) == set()
    selecting, options = _call("page_select", TINY["mixed"])
    select = partial(pallas_kernels.page_select, **options | {"memory": 0.0}, reduction="mean", spread=0.5)
    assert x64.wide(x64.traced(select, *selecting)) == set()
    attending, window = _call("prefill_attention", TINY["mixed"])

    def with_walk(*arguments: Any, implementation: str) -> jax.Array:
        walk = visible_walk(arguments[3], *arguments[5:], tokens=arguments[0].shape[1], **window)
        means = BlockMeans(*(jnp.zeros((4, 2, 6, 8), jnp.float32) for _ in range(2)))
        listed = BlockList(blocks=jnp.zeros((4, 2, 2, 3), jnp.int32), means=means, queries=16, keys=16)
        walk = Walk(retrieval=listed, streaming=walk.streaming)
        return pallas_kernels.prefill_attention(*arguments, **window, walk=walk, implementation=implementation)

    for name in ("xla", "reference"):
        assert x64.wide(x64.traced(partial(with_walk, implementation=name), *attending)) == set()


def test_the_search_for_64_bits_finds_them():
    """It looks into branches, loops and calls; a Python number that an array takes in is none."""
    held = np.zeros(3, np.float32)
    assert x64.wide(x64.traced(lambda x: jnp.where(x > 0, x * 2, 1.5), held)) == set()
    for function in (
        lambda x: x * jnp.zeros(3).astype(x.dtype),
        lambda x: jax.lax.cond(x[0] > 0, lambda: x[jnp.argmax(x)], lambda: x[0]),
        lambda x: jax.lax.fori_loop(0, 3, lambda i, y: y + i.astype(y.dtype), x),
        jax.jit(lambda x: x[jnp.sum(x > 0)]),
    ):
        assert x64.wide(x64.traced(function, held)) != set()


@pytest.mark.parametrize(("op", "implementation"), RUNNING)
def test_arrays_of_64_bits_are_taken_as_those_of_32(op: str, implementation: str):
    """What a program under the flag makes: int64 where no dtype is given, and float64."""
    arguments, options = _call(op, TINY["mixed"])

    def widened(x: Any) -> jax.Array:
        x = jnp.asarray(x)
        return x.astype({"int32": "int64", "float32": "float64"}.get(str(x.dtype), x.dtype))

    expected = jitted(op, implementation)(*arguments, **options)
    with x64.enabled():
        wide = jax.tree.map(widened, arguments)
        expected_dtypes = {"float64"} if op == "quantized_matmul" else {"int64", "float64"}  # codes have 8 bits
        assert expected_dtypes <= {str(x.dtype) for x in jax.tree.leaves(wide)}
        assert_same_bits(jitted(op, implementation)(*wide, **options), expected)


def test_a_walk_of_64_bits_is_taken_as_one_of_32():
    arguments, window = _call("prefill_attention", TINY["mixed"])
    narrow, wide = (np.array([[[[0, 2]] * 2] * 2] * 4, dtype) for dtype in (np.int32, np.int64))
    walks = [Walk(retrieval=BlockList(blocks=jnp.asarray(narrow), queries=16, keys=16))]
    with x64.enabled():
        walks.append(Walk(retrieval=BlockList(blocks=jnp.asarray(wide), queries=16, keys=16)))
        results = [pallas_kernels.prefill_attention(*arguments, **window, walk=walk) for walk in walks]
    assert_same_bits(results[1], results[0])


def test_what_is_no_array_of_64_bits_stays_as_it_is():
    with x64.enabled():
        tree = {"a": jnp.int64(3), "b": np.arange(2), "c": 5, "d": "max", "e": None, "f": jnp.ones(2, jnp.bfloat16)}
        kept = narrowed(tree)
    assert kept["f"] is tree["f"]
    assert (kept["a"].dtype, kept["b"].dtype) == (np.int32, np.int32)
    assert (kept["c"], kept["d"], kept["e"]) == (5, "max", None)
