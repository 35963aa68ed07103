"""Times of the ops: `python -m bench.kernels [--op OP] [--implementation NAME] [--workload NAME] [--out FILE]`.

Values are checked before anything is timed. What is timed is a chain: one program that calls the op many times, one
after the other, on different arguments. One line a result; JSON lines go to ``--out``, where what is there already is
not done again. bench/README.md says what the fields mean.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from bench.measure import (
    L2_BYTES,
    Launch,
    Limits,
    Log,
    device_limits,
    free_memory,
    is_gpu,
    kernel_times,
    launches,
    result,
    sampled,
    show,
    starting_seconds,
)
from pallas_kernels import NO_PAGE, LayerKV, PagedKV, PageTables, QuantizedArray, dequantize, quantize, selection_width
from pallas_kernels.core.dispatch import NAMES
from pallas_kernels.core.paging import is_visible, pools
from pallas_kernels.core.workloads import BATCHED, PREFILL, SERVING, TINY, Bits, Workload

TOLERANCE = 3e-2
"""Greatest error of an output row (of one token and head), relative to its norm: bfloat16 leaves a tenth of it."""
_LONGEST_CHAIN = 40
_LONGEST_CHAIN_OF_XLA = 4
"""Calls of a chain; XLA compiles each of them anew."""
_CHAIN_SECONDS, _LAUNCH_SECONDS = 1.5e-4, 3e-6
"""What a chain on a GPU should take at least, since starting it takes Python some 20 µs; and a launch, about."""
_DISTINCT_PAGES = 1021
"""Pages of random numbers, which repeat in larger pools: a prime, so that no table is in step with it."""
_SHARE_OF_MEMORY = 0.8
_SMALL = 2**18
"""Elements of an array that the host may make."""


type References = list[tuple[str, Callable[[Any, Any], Any]]]


class Sizes(NamedTuple):
    """What one call of an op moves and computes at least, and what it may touch.

    Attributes:
      moved: bytes read and written.
      flops: floating-point operations of matrix products.
      pools: bytes of the pools that one set of page tables reaches.
      own: bytes of the arguments that every call has for itself, and of its results.
    """

    moved: int
    flops: int
    pools: int
    own: int


class Case(NamedTuple):
    """An op on arrays: ``call(shared, own, implementation=...)`` for each of the arguments ``own``.

    Attributes:
      call: the op. One that writes returns the next call's ``shared``.
      shared: what all calls use.
      own: the arguments of each call.
      references: what values are checked against, best first: a name and a function of (shared, own) that returns
        what the op should.
      is_writing: whether it updates ``shared``.
      compare: raises AssertionError on two results that differ.
    """

    call: Callable[..., Any]
    shared: Any
    own: list[Any]
    references: References
    is_writing: bool
    compare: Callable[[Any, Any], None]


def dense(w: Workload) -> Workload:
    """Returns a workload with retrieval heads only."""
    return replace(w, retrieval=w.num_kv_heads, streaming=0)


# Sizes.


def _stored_bytes(w: Workload, by_retrieval: int, by_streaming: int) -> int:
    """Returns the bytes of so many tokens' keys and values, one KV head each, scales and zeros included."""
    return sum(
        tokens * sum(w.head_dim * _width(w) if bits is None else w.head_dim * bits // 8 + 8 for bits in both)
        for tokens, both in zip((by_retrieval, by_streaming), w.bits_by_class, strict=True)
    )


def _width(w: Workload) -> int:
    return jnp.dtype(w.dtype).itemsize


def _statistics_bytes(w: Workload, tokens: int) -> int:
    """Returns the bytes of the key statistics of so many tokens, of one KV head."""
    return 2 * -(-tokens // w.sub_page_size) * w.head_dim * _width(w)


def _held(w: Workload, first: int) -> int:
    """Returns the pages that streaming heads hold: those of the sink, and from that of a position on."""
    return min(w.max_pages, -(-w.sink // w.page_size) + w.max_pages - first // w.page_size)


def _first_of_window(w: Workload, query: int, local: int) -> int:
    return max(query - local + 1, 0)


def _decode_sizes(w: Workload, *, is_dense: bool) -> Sizes:
    w = dense(w) if is_dense else w
    tokens = w.context if is_dense else min(w.num_selected * w.page_size, w.context)
    window = min(w.context, w.sink + w.local)
    by_retrieval, by_streaming = w.batch * w.retrieval * tokens, w.batch * w.streaming * window
    vectors = 2 * w.batch * w.num_heads * w.head_dim * _width(w)
    flops = 4 * (by_retrieval + by_streaming) * w.group * w.head_dim
    pool = _pool_bytes(w, _first_of_window(w, w.context - 1, w.local))
    return Sizes(_stored_bytes(w, by_retrieval, by_streaming) + vectors, flops, pool, vectors)


def _pool_bytes(w: Workload, first: int) -> int:
    """Returns the bytes of a layer's keys and values; streaming heads hold the sink and what follows a position."""
    tokens = w.batch * w.page_size
    return _stored_bytes(w, tokens * w.retrieval * w.max_pages, tokens * w.streaming * _held(w, first))


def _visible(w: Workload) -> tuple[int, int]:
    """Returns the keys that all queries of a chunk see together, of one retrieval and of one streaming head."""
    keys = np.arange(w.context - w.chunk, w.context, dtype=np.int64) + 1
    return int(keys.sum()), int(np.minimum(keys, w.sink + w.prefill_local).sum())


def _prefill_sizes(w: Workload, *, is_dense: bool) -> Sizes:
    w = dense(w) if is_dense else w
    by_retrieval, by_streaming = _visible(w)
    flops = 4 * w.batch * (w.retrieval * by_retrieval + w.streaming * by_streaming) * w.group * w.head_dim
    start = w.context - w.chunk
    windows = w.batch * w.streaming * min(start, w.sink + w.prefill_local)
    history = _stored_bytes(w, w.batch * w.retrieval * start, windows)
    rows = w.batch * w.chunk * (2 * w.num_heads + 2 * w.num_kv_heads) * w.head_dim * _width(w)
    return Sizes(rows + history, flops, _pool_bytes(w, _first_of_window(w, start, w.prefill_local)), rows)


def _select_sizes(w: Workload) -> Sizes:
    moved = w.batch * w.retrieval * _statistics_bytes(w, w.context)
    queries = w.batch * w.retrieval * w.group * w.head_dim * _width(w)
    subs = w.batch * w.retrieval * -(-w.context // w.sub_page_size)
    return Sizes(moved + queries, 4 * subs * w.group * w.head_dim, moved, queries)


def _is_rotated(w: Workload) -> bool:
    return w.bits[0] == 4


def _write_sizes(w: Workload, tokens: int) -> Sizes:
    rows = w.batch * tokens * (2 * w.num_kv_heads + _is_rotated(w) * w.retrieval) * w.head_dim * _width(w)
    written = w.batch * tokens * _stored_bytes(w, w.retrieval, w.streaming)
    statistics = w.batch * w.retrieval * _statistics_bytes(w, tokens)
    merged = statistics if tokens == 1 else 0  # a token merges into what its sub-page has
    held = _stored_bytes(w, w.retrieval * w.context, w.streaming * w.max_pages * w.page_size)
    pool = w.batch * (held + w.retrieval * _statistics_bytes(w, w.context))
    return Sizes(rows + written + statistics + merged, 0, pool, rows)


# Arrays.


def _pool(
    w: Workload, heads: int, bits: Bits, pages: int, seed: int, *, has_tokens: bool, has_statistics: bool
) -> PagedKV | None:
    """Returns a pool of random numbers, the statistics those of its keys."""
    if not heads:
        return None
    distinct = min(pages, _DISTINCT_PAGES)
    index = jnp.arange(pages, dtype=jnp.int32) % distinct
    shape = (distinct, heads, w.page_size, w.head_dim)
    keys = _normal(w, 2 * seed, *shape)

    @jax.jit
    def spread(tree: Any, index: jax.Array) -> Any:
        return tree if distinct == pages else jax.tree.map(lambda x: x[index], tree)

    @jax.jit
    def statistics(keys: jax.Array, index: jax.Array) -> list[jax.Array]:
        subs = keys.reshape(*shape[:2], -1, w.sub_page_size, w.head_dim)
        return spread([jnp.min(subs, axis=3), jnp.max(subs, axis=3)], index)

    bounds = statistics(keys, index) if has_statistics else []
    if not has_tokens:  # nothing but its shape is used
        stored = jnp.zeros((1, heads, w.page_size, w.head_dim), w.dtype)
        return PagedKV(stored, stored, *bounds)
    both = zip((keys, _normal(w, 2 * seed + 1, *shape)), bits, strict=True)
    return PagedKV(*(spread(x if bits is None else quantize(x, bits), index) for x, bits in both), *bounds)


def _layer(
    w: Workload, sets: int, first: int, *, has_tokens: bool = True, has_statistics: bool = False
) -> tuple[LayerKV, list[PageTables]]:
    """Returns the pools of a layer, and page tables that share no page.

    Args:
      w: the workload.
      sets: page tables.
      first: streaming heads hold the pages of the sink and those from this position on.
      has_tokens: whether keys and values are needed.
      has_statistics: whether key statistics are needed.
    """
    rng = np.random.default_rng(0)
    logical = np.arange(w.max_pages)
    is_held = (logical * w.page_size < w.sink) | (logical >= first // w.page_size)

    def tables(held: np.ndarray) -> np.ndarray:
        shape = (sets, w.batch, int(held.sum()))
        found = np.full((sets, w.batch, w.max_pages), NO_PAGE, np.int32)
        found[:, :, held] = rng.permutation(math.prod(shape)).reshape(shape)
        return found

    retrieval, streaming = tables(np.ones_like(is_held)), tables(is_held)
    bits = w.bits_by_class
    kv = LayerKV(
        _pool(w, w.retrieval, bits[0], retrieval.size, 1, has_tokens=has_tokens, has_statistics=has_statistics),
        _pool(w, w.streaming, bits[1], int((streaming >= 0).sum()), 2, has_tokens=has_tokens, has_statistics=False),
    )
    return kv, [PageTables(jnp.asarray(a), jnp.asarray(b)) for a, b in zip(retrieval, streaming, strict=True)]


def _normal(w: Workload, seed: int, *shape: int) -> jax.Array:
    """Returns normal numbers: small arrays from the host, since JAX would compile a program for each shape."""
    if math.prod(shape) <= _SMALL:
        return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32).astype(jnp.dtype(w.dtype)))
    return jax.random.normal(jax.random.key(seed), shape, w.dtype)


def _selection(w: Workload, rng: np.random.Generator) -> jax.Array:
    """Returns random pages for each sequence and head, the first and the newest among them."""
    order = rng.random((w.batch, w.retrieval, w.max_pages), np.float32)
    order[..., [0, -1]] = -1
    count = min(w.num_selected, w.max_pages)
    return jnp.asarray(np.sort(np.argpartition(order, count - 1)[..., :count]).astype(np.int32))


def _decode_case(w: Workload, calls: int, sets: int, *, is_dense: bool) -> Case:
    """Returns one new token a sequence, over the selected pages or all of them."""
    w = dense(w) if is_dense else w
    kv, tables = _layer(w, sets, _first_of_window(w, w.context - 1, w.local))
    lengths, rng = jnp.full(w.batch, w.context, jnp.int32), np.random.default_rng(1)
    own = [
        (
            _normal(w, 10 + i, w.batch, w.num_heads, w.head_dim),
            tables[i % sets],
            None if is_dense else _selection(w, rng),
        )
        for i in range(calls)
    ]

    def call(kv: LayerKV, own: Any, *, implementation: str) -> jax.Array:
        q, tables, selected = own
        return pallas_kernels.decode_attention(
            q, kv, tables, lengths, selected, sink=w.sink, local=w.local, implementation=implementation
        )

    elements = w.batch * w.context * w.num_kv_heads * w.head_dim * sets
    references = _references(call, is_affordable=elements <= (2**29 if is_gpu() else 2**25))
    return Case(call, kv, own, references, is_writing=False, compare=compare_rows)


def _prefill_case(w: Workload, calls: int, sets: int, *, is_dense: bool) -> Case:
    """Returns the last chunk of a context."""
    w = dense(w) if is_dense else w
    start = w.context - w.chunk
    kv, tables = _layer(w, sets, _first_of_window(w, start, w.prefill_local))
    shape = (w.batch, w.chunk, w.num_kv_heads, w.head_dim)
    own = [
        (
            _normal(w, 10 + 3 * i, w.batch, w.chunk, w.num_heads, w.head_dim),
            *(_normal(w, 11 + 3 * i + j, *shape) for j in range(2)),
            tables[i % sets],
        )
        for i in range(calls)
    ]
    starts, counts = jnp.full(w.batch, start, jnp.int32), jnp.full(w.batch, w.chunk, jnp.int32)

    def call(kv: LayerKV, own: Any, *, implementation: str) -> jax.Array:
        q, k, v, tables = own
        return pallas_kernels.prefill_attention(
            *(q, k, v, kv, tables, starts, counts), sink=w.sink, local=w.prefill_local, implementation=implementation
        )

    rows = np.unique(np.linspace(0, w.chunk - 1, 16).astype(np.int32))
    scores = w.batch * w.num_heads * w.chunk * (w.context + w.chunk)
    if scores <= 2**24:
        references = _references(call, is_affordable=True)
        return Case(call, kv, own, references, is_writing=False, compare=compare_rows)
    references = [("rows", partial(_attended_rows, w, rows))]
    return Case(
        call, kv, own, references, is_writing=False, compare=lambda actual, rows_: compare_rows(actual[:1, rows], rows_)
    )


def _attended_rows(w: Workload, rows: np.ndarray, kv: LayerKV, own: Any) -> jax.Array:
    """Returns prefill's output [1, rows, N, H] float32 of some rows of the first sequence, from all keys at once."""
    q, k, v, tables = own
    start = w.context - w.chunk
    query, key = jnp.asarray(start + rows)[:, None], jnp.arange(w.context)
    outputs = []
    for name, pool, table, heads in pools(kv, tables):
        visible = is_visible(query, key, *((w.sink, w.prefill_local) if name == "streaming" else (None, None)))

        def joined(stored: Any, new: jax.Array, table: jax.Array = table, heads: slice = heads) -> jax.Array:
            held = dequantize(jax.tree.map(lambda x: x[table[0]], stored), jnp.float32)
            old = jnp.swapaxes(held, 1, 2).reshape(-1, *held.shape[1::2])[:start]
            return jnp.concatenate([old, new[0, :, heads].astype(jnp.float32)])

        keys, values = joined(pool.k, k), joined(pool.v, v)
        queries = q[0, rows].astype(jnp.float32).reshape(len(rows), w.num_kv_heads, w.group, w.head_dim)[:, heads]
        scores = jnp.einsum("tkgh,skh->kgts", queries, keys, precision="highest") * w.head_dim**-0.5
        weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
        outputs.append(jnp.einsum("kgts,skh->tkgh", weights, values, precision="highest"))
    return jnp.concatenate(outputs, axis=1).reshape(1, len(rows), w.num_heads, w.head_dim)


def _select_case(w: Workload, calls: int, sets: int) -> Case:
    """Returns a selection for every sequence."""
    w = replace(w, streaming=0)
    kv, tables = _layer(w, sets, 0, has_tokens=False, has_statistics=True)
    width = selection_width(w.num_selected, w.interval, w.page_size)
    previous = jnp.full((w.batch, w.retrieval, width), NO_PAGE, jnp.int32)
    lengths, is_refresh = jnp.full(w.batch, w.context, jnp.int32), jnp.ones(w.batch, bool)
    own = [
        (_normal(w, 10 + i, w.batch, w.num_heads, w.head_dim), tables[i % sets].retrieval, previous)
        for i in range(calls)
    ]

    def call(pages: PagedKV, own: Any, *, implementation: str) -> jax.Array:
        q, table, previous = own
        return pallas_kernels.page_select(
            *(q, pages, table, lengths, previous, is_refresh),
            num_selected=w.num_selected,
            interval=w.interval,
            sink_pages=1,
            implementation=implementation,
        )

    references = _references(call, is_affordable=w.batch * w.retrieval * w.max_pages <= 4096, is_looped=True)
    return Case(call, kv.retrieval, own, references, is_writing=False, compare=_compare_lists)


def _write_case(w: Workload, calls: int, sets: int, *, is_decode: bool) -> Case:
    """Returns a token of each sequence, or a chunk, at another place in every call."""
    tokens = 1 if is_decode else w.chunk
    kv, tables = _layer(w, sets, 0, has_statistics=True)
    shape = (w.batch, tokens, w.num_kv_heads, w.head_dim)
    counts = jnp.full(w.batch, tokens, jnp.int32)
    own = [
        (
            *(_normal(w, 10 + 2 * i + j, *shape) for j in range(2)),
            tables[i % sets],
            jnp.full(w.batch, w.context - tokens * (1 + i % (w.context // tokens)), jnp.int32),
        )
        for i in range(calls)
    ]

    def call(kv: LayerKV, own: Any, *, implementation: str) -> LayerKV:
        k, v, tables, starts = own
        # As the engine does: statistics then bound other keys than the rotated ones that 4-bit pages hold.
        bounded = v if _is_rotated(w) else None
        return pallas_kernels.kv_write(
            k, v, kv, tables, starts, counts, k_bounded=bounded, implementation=implementation
        )

    first = own[0]
    pages = np.arange(int(first[3][0]) // w.page_size, -(-(int(first[3][0]) + tokens) // w.page_size))

    def compare(actual: LayerKV, expected: LayerKV) -> None:
        for name in ("retrieval", "streaming"):
            touched = np.unique(np.asarray(getattr(first[2], name))[:, pages])
            for field in PagedKV._fields:
                both = [getattr(getattr(kv, name), field, None) for kv in (actual, expected)]
                if both[0] is not None:
                    _compare_stored(*(jax.tree.map(lambda x: x[touched], x) for x in both))  # noqa: B023

    is_affordable = w.batch * tokens <= 100 and w.batch * w.context <= 2**18
    references = _references(call, is_affordable=is_affordable, is_looped=True)
    return Case(call, kv, own, references, is_writing=True, compare=compare)


def _references(call: Callable[..., Any], *, is_affordable: bool, is_looped: bool = False) -> References:
    """Returns the specification where it is affordable, else the implementation for any device."""
    if is_affordable and is_looped:
        return [("reference", partial(_looped, call))]
    name = "reference" if is_affordable else "xla"
    return [(name, partial(_evaluated, call, name))]


def _evaluated(call: Callable[..., Any], implementation: str, shared: Any, own: Any) -> Any:
    return jax.jit(partial(call, implementation=implementation))(shared, own)


def _looped(call: Callable[..., Any], shared: Any, own: Any) -> Any:
    """Returns the reference's result where that is a loop in numpy, which would fetch number after number."""
    return call(*jax.device_get((shared, own)), implementation="reference")


def compare_rows(actual: Any, expected: Any) -> None:
    """Raises AssertionError if a row [..., H] of attention outputs is wrong."""
    actual, expected = (np.asarray(x, np.float32) for x in (actual, expected))
    error = np.linalg.norm(actual - expected, axis=-1) / np.maximum(np.linalg.norm(expected, axis=-1), 1e-6)
    assert not np.isnan(actual).any(), "NaN in the output"
    assert float(error.max()) <= TOLERANCE, f"a row's relative error is {float(error.max()):.4f}, over {TOLERANCE}"


def _compare_lists(actual: Any, expected: Any) -> None:
    """Page lists may differ where scores are equal but for rounding."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    different = sum(
        len(set(mine) ^ set(theirs)) // 2
        for mine, theirs in zip(*(x.reshape(-1, x.shape[-1]) for x in (actual, expected)), strict=True)
    )
    assert (np.diff(np.where(actual < 0, 2**30, actual), axis=-1) >= 0).all(), "a page list is not in order"
    assert different <= max(1, expected.size // 1000), f"{different} of {expected.size} pages differ"


def _compare_stored(actual: Any, expected: Any) -> None:
    """Codes may differ by one where the quotient is halfway but for rounding."""
    wide = [np.asarray(dequantize(x, jnp.float32)) for x in (actual, expected)]
    steps = np.asarray(expected.scale)[..., None] * 1.01 if isinstance(expected, QuantizedArray) else 0.0
    difference = np.abs(wide[0] - wide[1])
    assert not np.isnan(wide[0]).any(), "NaN in a page"
    assert (difference <= steps).all(), f"stored numbers differ by {float(difference.max()):.4g}"
    assert (difference > 0.0).mean() < 0.01, f"{(difference > 0).mean():.1%} of the stored numbers differ"


# Ops.


class Op(NamedTuple):
    """An op as it is measured: what a call moves, and how its arrays are made for some calls and sets of tables."""

    sizes: Callable[[Workload], Sizes]
    case: Callable[[Workload, int, int], Case]


OPS: dict[str, Op] = {
    "decode_attention": Op(partial(_decode_sizes, is_dense=False), partial(_decode_case, is_dense=False)),
    "decode_dense": Op(partial(_decode_sizes, is_dense=True), partial(_decode_case, is_dense=True)),
    "page_select": Op(_select_sizes, _select_case),
    "kv_write_decode": Op(partial(_write_sizes, tokens=1), partial(_write_case, is_decode=True)),
    "kv_write_prefill": Op(lambda w: _write_sizes(w, w.chunk), partial(_write_case, is_decode=False)),
    "prefill_attention": Op(partial(_prefill_sizes, is_dense=False), partial(_prefill_case, is_dense=False)),
    "prefill_dense": Op(partial(_prefill_sizes, is_dense=True), partial(_prefill_case, is_dense=True)),
}
WORKLOADS = SERVING | BATCHED | PREFILL | {f"tiny_{name}": w for name, w in TINY.items()}


def inapplicable(op: str, w: Workload) -> str | None:
    """Returns why an op is not measured on a workload, if it is not."""
    if op in ("decode_attention", "page_select"):
        if not w.retrieval:
            return "no head selects pages"
        if w.num_selected >= w.max_pages:
            return "every page would be selected: see decode_dense"
    return None


def rotation(sizes: Sizes, *, longest: int = _LONGEST_CHAIN, memory: int | None = None) -> tuple[int, int]:
    """Returns the calls of a chain and the sets of page tables that keep the cache of the device cold, if they can.

    Raises:
      MemoryError: if not even one call fits.
    """
    cold = 2 * L2_BYTES if is_gpu() else 0
    busy = math.ceil(_CHAIN_SECONDS / (_LAUNCH_SECONDS + sizes.moved / 4e12 + sizes.flops / 8e14)) if is_gpu() else 0
    room = int((free_memory() if memory is None else memory) * _SHARE_OF_MEMORY)
    if sizes.pools + 2 * sizes.own > room:
        raise MemoryError(f"it needs {sizes.pools + 2 * sizes.own:.3g} bytes, {room:.3g} are free")
    fitting = (room - sizes.pools) // max(2 * sizes.own, 1)
    calls = min(max(2, busy, -(-cold // sizes.moved)), longest, fitting)
    sets = min(calls, -(-cold // sizes.pools), (room - 2 * sizes.own * calls) // sizes.pools)
    return calls, max(1, sets)


def check(case: Case, implementation: str) -> str:
    """Returns what the values of an implementation were compared with, "nothing" if there is nothing else.

    Raises:
      AssertionError: if they differ.
    """
    found = [(name, expected) for name, expected in case.references if name != implementation]
    if not found:
        return "nothing"
    name, expected = found[0]
    actual = jax.block_until_ready(_evaluated(case.call, implementation, case.shared, case.own[0]))
    case.compare(actual, expected(case.shared, case.own[0]))
    return name


def chain(case: Case, implementation: str) -> Callable[[], Any]:
    """Returns a function that starts all calls of a case in one compiled program, and returns their results.

    On a GPU the program is launched kernel by kernel: as a graph, independent calls might run side by side.
    """

    leaves, structure = jax.tree.flatten(case.own)
    distinct = {id(leaf): leaf for leaf in leaves}  # to start a program costs by the argument
    places = [list(distinct).index(id(leaf)) for leaf in leaves]
    values = list(distinct.values())

    def calls(shared: Any, values: list[Any]) -> Any:
        results = []
        for arguments in jax.tree.unflatten(structure, [values[i] for i in places]):
            value = case.call(shared, arguments, implementation=implementation)
            shared = value if case.is_writing else shared
            results.append(value)
        return shared if case.is_writing else results

    lowered = jax.jit(calls, donate_argnums=0 if case.is_writing else ()).lower(case.shared, values)
    program = lowered.compile(compiler_options={"xla_gpu_enable_command_buffer": ""} if is_gpu() else None)
    if not case.is_writing:
        return lambda: program(case.shared, values)
    state = [case.shared]

    def write() -> Any:
        state[0] = program(state[0], values)
        return state[0]

    return write


class Measurement(NamedTuple):
    """What measuring one case gave: seconds a call, and how they came about."""

    seconds: np.ndarray
    labels: dict[str, Any]
    found: list[Launch]


def measure(
    op: str, w: Workload, implementation: str, *, repeats: int = 30, overrides: Any = None, has_kernels: bool = False
) -> Measurement:
    """Checks and times one op.

    Args:
      op: a name of `OPS`.
      w: the workload.
      implementation: the op's implementation.
      repeats: samples.
      overrides: launch configurations to use (`bench.measure.launches`).
      has_kernels: whether the GPU's own times of each kernel are wanted.

    Raises:
      NotImplementedError: if the implementation refuses.
      AssertionError: if values are wrong.
      MemoryError: if the workload does not fit.
    """
    sizes = OPS[op].sizes(w)
    calls, sets = rotation(sizes, longest=_LONGEST_CHAIN if implementation == "mosaic_gpu" else _LONGEST_CHAIN_OF_XLA)
    case = OPS[op].case(w, calls, sets)
    with launches(overrides) as found:
        checked_against = check(case, implementation)
        run = chain(case, implementation)
    labels: dict[str, Any] = {
        "config": asdict(found[0].chosen) if found else None,
        "checked_against": checked_against,
        "calls": calls,
        "is_cold": is_gpu() and min(calls * sizes.moved, sets * sizes.pools) >= 2 * L2_BYTES,
    }
    if has_kernels:
        try:
            labels["kernels_us"] = kernel_times(run, calls)
        except (RuntimeError, AttributeError) as error:
            labels["kernels_us"] = f"{type(error).__name__}: {error}"
    seconds = sampled(run, repeats) / calls
    labels["host_us"] = round(starting_seconds(run) / calls * 1e6, 3)
    return Measurement(seconds, labels, found)


# What is run.


class Task(NamedTuple):
    """One line of the results to be."""

    op: str
    implementation: str
    workload: str

    @property
    def key(self) -> list[str]:
        """The key in the log."""
        return ["kernel", *self]


_TARGETS: tuple[tuple[str, str], ...] = (
    *(("decode_attention", f"llama3_8b_128k_b8{bits}") for bits in ("", "_int8", "_int4")),
    *(("decode_dense", f"llama3_8b_32k_b8{bits}") for bits in ("", "_int8", "_int4")),
    ("page_select", "llama3_8b_128k"),
    ("page_select", "llama3_8b_128k_b8"),
    ("kv_write_decode", "llama3_8b_128k_int8"),
    ("kv_write_prefill", "llama3_8b_128k_chunk8k_int8"),
    ("prefill_dense", "llama3_8b_32k_whole"),
    ("prefill_attention", "llama3_8b_32k_whole"),
    ("prefill_dense", "llama3_8b_128k_chunk8k"),
    ("prefill_attention", "llama3_8b_128k_chunk8k"),
    ("prefill_attention", "llama3_8b_128k_chunk8k_int8"),
    ("decode_attention", "llama3_8b_128k_int8"),
    ("decode_dense", "llama3_8b_128k_int8"),
    ("prefill_dense", "llama3_8b_128k_whole"),
)
"""The rows of the targets, worst informed first."""


def _full() -> Iterator[tuple[str, str]]:
    yield from _TARGETS
    for context in (128, 32, 256, 512, 64, 8):
        for batch in ("", "_b8", "_b32"):
            for bits in ("_int8", "", "_int4"):
                name = f"llama3_8b_{context}k{batch}{bits}"
                yield from ((op, name) for op in ("decode_attention", "decode_dense", "page_select", "kv_write_decode"))
    for name in ("llama2_7b_64k_int8", "llama2_7b_16k_b8", "llama2_7b_64k_b32_int4", "smollm2_135m_8k"):
        yield from ((op, name) for op in ("decode_attention", "decode_dense", "page_select", "kv_write_decode"))
    for name in ("8k_chunk2k", "64k_chunk8k", "256k_chunk8k", "128k_chunk2k"):
        for bits in ("", "_int8", "_int4"):
            yield from ((op, f"llama3_8b_{name}{bits}") for op in ("prefill_attention", "kv_write_prefill"))
    yield from ((op, "smollm2_135m_8k_chunk2k") for op in ("prefill_attention", "prefill_dense", "kv_write_prefill"))
    yield from (("kv_write_prefill", f"llama3_8b_128k{bits}") for bits in ("", "_int8", "_int4"))  # of 512 tokens


WORKLOAD_SETS: dict[str, tuple[tuple[str, str], ...]] = {
    "targets": _TARGETS,
    "full": tuple(dict.fromkeys(_full())),
    "tiny": tuple((op, "tiny_mixed") for op in OPS if op not in ("decode_dense", "kv_write_decode", "prefill_dense")),
}


def tasks(workload_set: str, implementations: list[str] | None = None) -> list[Task]:
    """Returns what a set measures, the rows of the targets first."""
    pairs = WORKLOAD_SETS[workload_set]
    if implementations:
        return [Task(op, name, workload) for name in implementations for op, workload in pairs]
    if workload_set == "tiny":
        return [Task(op, "xla", workload) for op, workload in pairs]
    # Of XLA what takes it no minutes.
    by_xla = [pair for pair in pairs if pair in _TARGETS and pair[0] not in ("prefill_attention", "prefill_dense")]
    found = [("mosaic_gpu", pairs[: len(_TARGETS)]), ("xla", by_xla), ("mosaic_gpu", pairs[len(_TARGETS) :])]
    return [Task(op, name, workload) for name, some in found for op, workload in some]


def perform(task: Task, limits: Limits, repeats: int, *, has_kernels: bool = False) -> dict[str, Any]:
    """Returns the line of a task: a result, or why there is none."""
    labels = task._asdict()
    w = WORKLOADS[task.workload]
    if reason := inapplicable(task.op, w):
        return {"kind": "skip", **labels, "reason": reason}
    try:
        found = measure(task.op, w, task.implementation, repeats=repeats, has_kernels=has_kernels)
    except MemoryError as error:
        return {"kind": "skip", **labels, "reason": str(error)}
    except NotImplementedError as error:
        return {"kind": "refusal", **labels, "reason": str(error)}
    except Exception as error:  # noqa: BLE001  what else a kernel can do must not cost the other results
        reason = f"{type(error).__name__}: {error}".split("\n")[0][:300]
        return {"kind": "wrong" if isinstance(error, AssertionError) else "error", **labels, "reason": reason}
    sizes = OPS[task.op].sizes(w)
    return {
        "kind": "kernel",
        **result(found.seconds, limits, bytes_moved=sizes.moved, flops=sizes.flops, **labels, **found.labels),
    }


def main(arguments: list[str] | None = None) -> None:
    """Checks and times what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=tuple(OPS), action="append", help="instead of a set; repeatable")
    parser.add_argument("--workload", choices=tuple(WORKLOADS), action="append", metavar="NAME", help="repeatable")
    parser.add_argument("--implementation", choices=NAMES, action="append", help="repeatable")
    parser.add_argument("--workload-set", choices=tuple(WORKLOAD_SETS), default="tiny")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--kernel-times", action="store_true", help="also what CUPTI says of each kernel")
    parser.add_argument("--list", action="store_true", help="print the tasks and what limits them, and run nothing")
    parser.add_argument("--out", type=Path, help="JSON lines are appended to this file")
    args = parser.parse_args(arguments)
    if args.op or args.workload:
        pairs = [(op, workload) for workload in args.workload or SERVING for op in args.op or OPS]
        chosen = [Task(op, name, workload) for name in args.implementation or ["xla"] for op, workload in pairs]
    else:
        chosen = tasks(args.workload_set, args.implementation)
    if args.list:
        for task in chosen:
            sizes = OPS[task.op].sizes(WORKLOADS[task.workload])
            print(json.dumps({**task._asdict(), "bytes": sizes.moved, "flops": sizes.flops}))
        return
    log = Log(args.out)
    limits = device_limits(log.lines())
    for task in chosen:
        if log.begin(task.key):
            line = perform(task, limits, args.repeats, has_kernels=args.kernel_times)
            log.end(task.key, line)
            show(line)


if __name__ == "__main__":
    main()
