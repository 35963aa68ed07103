"""Ops on arrays: the call, its arguments, and the values with which its result is compared."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from bench.kernels.arrays import layer, normal, selection, weights
from bench.kernels.compare import compare_rows, compare_selections, compare_written
from bench.kernels.sizes import dense, first_of_window
from bench.measure import is_gpu
from pallas_kernels import LayerKV, PagedKV, Selection, dequantize, selection_width
from pallas_kernels.core.paging import is_visible, pools
from pallas_kernels.core.sealing import keys_of
from pallas_kernels.core.workloads import Product, Workload

type References = list[tuple[str, Callable[[Any, Any], Any]]]


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


def decode_case(w: Workload, calls: int, sets: int, *, is_dense: bool) -> Case:
    """Returns one new token per sequence, over the selected pages or all of them."""
    w = dense(w) if is_dense else w
    kv, tables = layer(w, sets, first_of_window(w, w.context - 1, w.local))
    lengths, rng = jnp.full(w.batch, w.context, jnp.int32), np.random.default_rng(1)
    own = [
        (
            normal(w, 10 + i, w.batch, w.num_heads, w.head_dim),
            tables[i % sets],
            None if is_dense else selection(w, rng),
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


def prefill_case(w: Workload, calls: int, sets: int, *, is_dense: bool) -> Case:
    """Returns the last chunk of a context.

    It must reach past the page in which it begins: all tokens before it are then in pages, and nothing is read from the
    tail, which holds other tokens than the chunk's.
    """
    w = dense(w) if is_dense else w
    start = w.context - w.chunk
    assert start % w.page_size + w.chunk > w.page_size
    kv, tables = layer(w, sets, first_of_window(w, start, w.prefill_local))
    shape = (w.batch, w.chunk, w.num_kv_heads, w.head_dim)
    own = [
        (
            normal(w, 10 + 3 * i, w.batch, w.chunk, w.num_heads, w.head_dim),
            *(normal(w, 11 + 3 * i + j, *shape) for j in range(2)),
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
    references = [("rows", partial(attended_rows, w, rows))]
    return Case(
        call, kv, own, references, is_writing=False, compare=lambda actual, rows_: compare_rows(actual[:1, rows], rows_)
    )


def attended_rows(w: Workload, rows: np.ndarray, kv: LayerKV, own: Any) -> jax.Array:
    """Returns prefill's output [1, rows, N, H] float32 of some rows of the first sequence, from all keys at once."""
    q, k, v, tables = own
    start = w.context - w.chunk
    query, key = jnp.asarray(start + rows)[:, None], jnp.arange(w.context)
    outputs = []
    for name, pool, table, heads in pools(kv, tables):
        visible = is_visible(query, key, *((w.sink, w.prefill_local) if name == "streaming" else (None, None)))

        def joined(held: jax.Array, new: jax.Array, heads: slice = heads) -> jax.Array:
            old = jnp.swapaxes(held, 1, 2).reshape(-1, *held.shape[1::2])[:start]
            return jnp.concatenate([old, new[0, :, heads].astype(jnp.float32)])

        pages = jax.tree.map(lambda x, table=table: x[table[0]], pool)
        keys, values = joined(keys_of(pages, jnp.float32), k), joined(dequantize(pages.v, jnp.float32), v)
        queries = q[0, rows].astype(jnp.float32).reshape(len(rows), w.num_kv_heads, w.group, w.head_dim)[:, heads]
        scores = jnp.einsum("tkgh,skh->kgts", queries, keys, precision="highest") * w.head_dim**-0.5
        weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
        outputs.append(jnp.einsum("kgts,skh->tkgh", weights, values, precision="highest"))
    return jnp.concatenate(outputs, axis=1).reshape(1, len(rows), w.num_heads, w.head_dim)


def select_case(w: Workload, calls: int, sets: int) -> Case:
    """Returns a selection for every sequence."""
    w = replace(w, streaming=0)
    kv, tables = layer(w, sets, 0, has_tokens=False, has_statistics=True)
    width = selection_width(w.num_selected, w.interval, w.page_size)
    previous = Selection.empty(w.batch, w.retrieval, width)
    lengths, is_refresh = jnp.full(w.batch, w.context, jnp.int32), jnp.ones(w.batch, bool)
    own = [
        (normal(w, 10 + i, w.batch, w.num_heads, w.head_dim), tables[i % sets].retrieval, previous)
        for i in range(calls)
    ]

    def call(pages: PagedKV, own: Any, *, implementation: str) -> Selection:
        q, table, previous = own
        return pallas_kernels.page_select(
            *(q, pages, table, lengths, previous, is_refresh),
            num_selected=w.num_selected,
            interval=w.interval,
            sink_pages=1,
            memory=0.6,
            implementation=implementation,
        )

    references = _references(call, is_affordable=w.batch * w.retrieval * w.max_pages <= 4096, is_looped=True)
    return Case(call, kv.retrieval, own, references, is_writing=False, compare=compare_selections)


def write_case(w: Workload, calls: int, sets: int, *, is_decode: bool) -> Case:
    """Returns a token of each sequence, or a chunk, at another place in every call."""
    tokens = 1 if is_decode else w.chunk
    kv, tables = layer(w, sets, 0, has_statistics=True)
    shape = (w.batch, tokens, w.num_kv_heads, w.head_dim)
    counts = jnp.full(w.batch, tokens, jnp.int32)
    own = [
        (
            *(normal(w, 10 + 2 * i + j, *shape) for j in range(2)),
            tables[i % sets],
            jnp.full(w.batch, w.context - tokens * (1 + i % (w.context // tokens)), jnp.int32),
        )
        for i in range(calls)
    ]

    def call(kv: LayerKV, own: Any, *, implementation: str) -> LayerKV:
        k, v, tables, starts = own
        return pallas_kernels.kv_write(k, v, kv, tables, starts, counts, implementation=implementation)

    _, _, first_tables, first_starts = own[0]
    span = range(int(first_starts[0]), int(first_starts[0]) + tokens)

    def compare(actual: LayerKV, expected: LayerKV) -> None:
        compare_written(actual, expected, first_tables, span)

    is_affordable = w.batch * tokens <= 100 and w.batch * w.context <= 2**18
    references = _references(call, is_affordable=is_affordable, is_looped=True)
    return Case(call, kv, own, references, is_writing=True, compare=compare)


def product_case(w: Product, calls: int, sets: int) -> Case:
    """Returns the rows of a decode step times one of some matrices."""
    matrices = [weights(w, i) for i in range(sets)]
    own = [(normal(w, 10 + i, w.batch, w.inputs), matrices[i % sets]) for i in range(calls)]

    def call(_: None, own: Any, *, implementation: str) -> jax.Array:
        return pallas_kernels.quantized_matmul(*own, implementation=implementation)

    references = _references(call, is_affordable=w.outputs * w.inputs <= (2**30 if is_gpu() else 2**25))
    return Case(call, None, own, references, is_writing=False, compare=compare_rows)


def _references(call: Callable[..., Any], *, is_affordable: bool, is_looped: bool = False) -> References:
    """Returns the specification if it is affordable, or else the implementation for any device."""
    if is_affordable and is_looped:
        return [("reference", partial(_looped, call))]
    name = "reference" if is_affordable else "xla"
    return [(name, partial(evaluated, call, name))]


def evaluated(call: Callable[..., Any], implementation: str, shared: Any, own: Any) -> Any:
    return jax.jit(partial(call, implementation=implementation))(shared, own)


def _looped(call: Callable[..., Any], shared: Any, own: Any) -> Any:
    """Returns the result of a reference that is a loop in numpy, which would fetch single numbers from the device."""
    return call(*jax.device_get((shared, own)), implementation="reference")
