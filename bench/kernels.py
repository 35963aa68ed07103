"""Times of the ops: `python -m bench.kernels [--op OP] [--implementation NAME] [--workload NAME] [--out FILE]`.

Values are checked against the reference before anything is timed. One line a result; JSON lines go to ``--out``.
"""

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from bench.measure import result, timings, write
from pallas_kernels import LayerKV, PagedKV, PageTables, quantize, selection_width
from pallas_kernels.core.paging import streaming_page_count
from pallas_kernels.core.workloads import SERVING, Workload

TOLERANCE = 3e-2
"""Of attention outputs in bfloat16, whose values are averages of standard normal ones."""
REFERENCE_TOKENS = 8192
"""Up to this context values are checked: the references of selection and writing are loops in numpy."""


class Case(NamedTuple):
    """An op on arrays: ``call(implementation, *args)``, and what it moves and computes."""

    call: Callable[..., Any]
    args: tuple[Any, ...]
    bytes_read: int
    flops: int


def _elements(w: Workload, pages: int, heads: int, bits: int | None, key: jax.Array) -> Any:
    x = jax.random.normal(key, (pages, heads, w.page_size, w.head_dim), w.dtype)
    return x if bits is None else quantize(x, bits)


def layer(w: Workload) -> tuple[LayerKV, PageTables]:
    """Returns random pools of a layer and permuted page tables."""
    keys = jax.random.split(jax.random.key(0), 6)
    pages = w.batch * w.max_pages
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.permutation(pages).reshape(w.batch, -1).astype(np.int32))
    statistics = []
    if w.retrieval:
        shape = (pages, w.retrieval, w.page_size // w.sub_page_size, w.head_dim)
        middle = jax.random.normal(keys[4], shape, w.dtype)
        statistics = [middle - 1, middle + 1]
    pools = [
        PagedKV(*(_elements(w, pages, heads, bits, key) for bits, key in zip(w.bits, pair, strict=True)), *extra)
        if heads
        else None
        for heads, pair, extra in ((w.retrieval, keys[:2], statistics), (w.streaming, keys[2:4], []))
    ]
    return LayerKV(*pools), PageTables(table, table)


def _token_bytes(w: Workload) -> int:
    """Returns the bytes of one token's key and value of one KV head, scales and zeros included."""
    dtype = jnp.dtype(w.dtype).itemsize
    return sum(w.head_dim * dtype if bits is None else w.head_dim * bits // 8 + 8 for bits in w.bits)


def decode_attention(w: Workload, *, is_dense: bool) -> Case:
    """Returns one new token a sequence, over the selected pages or all of them."""
    kv, tables = layer(w)
    q = jax.random.normal(jax.random.key(1), (w.batch, w.num_heads, w.head_dim), w.dtype)
    lengths = jnp.full(w.batch, w.context, jnp.int32)
    chosen = w.max_pages if is_dense else min(w.num_selected, w.max_pages)
    spread = np.linspace(0, w.max_pages - 1, chosen).astype(np.int32)
    selected = jnp.broadcast_to(jnp.asarray(np.unique(spread)), (w.batch, w.retrieval, np.unique(spread).size))
    window = streaming_page_count(w.sink, w.local, w.page_size)
    tokens = w.batch * (w.retrieval * chosen + w.streaming * window) * w.page_size
    op = partial(pallas_kernels.decode_attention, sink=w.sink, local=w.local)
    return Case(op, (q, kv, tables, lengths, None if is_dense else selected), tokens * _token_bytes(w), 0)


def prefill_attention(w: Workload) -> Case:
    """Returns the last chunk of a context."""
    kv, tables = layer(w)
    shape = (w.batch, w.chunk, w.num_kv_heads, w.head_dim)
    k, v = (jax.random.normal(jax.random.key(seed), shape, w.dtype) for seed in (2, 3))
    q = jax.random.normal(jax.random.key(4), (w.batch, w.chunk, w.num_heads, w.head_dim), w.dtype)
    start = w.context - w.chunk
    visible = w.retrieval * (start + w.chunk / 2) + w.streaming * min(w.sink + w.prefill_local, start + w.chunk / 2)
    flops = int(4 * w.batch * w.chunk * w.group * w.head_dim * visible)
    op = partial(pallas_kernels.prefill_attention, sink=w.sink, local=w.prefill_local)
    starts, counts = jnp.full(w.batch, start, jnp.int32), jnp.full(w.batch, w.chunk, jnp.int32)
    return Case(op, (q, k, v, kv, tables, starts, counts), 0, flops)


def page_select(w: Workload) -> Case:
    """Returns a selection for every sequence."""
    kv, tables = layer(w)
    assert kv.retrieval is not None
    q = jax.random.normal(jax.random.key(1), (w.batch, w.retrieval * w.group, w.head_dim), w.dtype)
    width = selection_width(w.num_selected, w.interval, w.page_size)
    previous = jnp.full((w.batch, w.retrieval, width), -1, jnp.int32)
    options = {"num_selected": w.num_selected, "interval": w.interval, "sink_pages": -(-w.sink // w.page_size)}
    op = partial(pallas_kernels.page_select, **options)
    subs = w.batch * w.max_pages * (w.page_size // w.sub_page_size) * w.retrieval
    moved = 2 * subs * w.head_dim * jnp.dtype(w.dtype).itemsize
    lengths, is_refresh = jnp.full(w.batch, w.context, jnp.int32), jnp.ones(w.batch, bool)
    return Case(op, (q, kv.retrieval, tables.retrieval, lengths, previous, is_refresh), moved, 0)


CASES: dict[str, Callable[[Workload], Case]] = {
    "decode_attention": partial(decode_attention, is_dense=False),
    "decode_dense": partial(decode_attention, is_dense=True),
    "page_select": page_select,
    "prefill_attention": prefill_attention,
}


def check(case: Case, implementation: str) -> None:
    """Raises AssertionError if an implementation's values are not the reference's."""
    expected, actual = (case.call(*case.args, implementation=name) for name in ("reference", implementation))
    np.testing.assert_allclose(np.asarray(actual, np.float32), np.asarray(expected, np.float32), atol=TOLERANCE)


def main() -> None:
    """Checks and times what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=tuple(CASES), action="append")
    parser.add_argument("--workload", choices=tuple(SERVING), action="append")
    parser.add_argument("--implementation", default="xla")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--out", type=Path, help="JSON lines are appended to this file")
    args = parser.parse_args()
    with args.out.open("a", encoding="utf-8") if args.out else nullcontext() as file:
        for workload in args.workload or SERVING:
            for op in args.op or CASES:
                w = SERVING[workload]
                if op == "page_select" and w.num_selected >= w.max_pages:
                    continue  # nothing to select: every page is read
                case = CASES[op](w)
                if w.context <= REFERENCE_TOKENS:
                    check(case, args.implementation)
                call = jax.jit(partial(case.call, implementation=args.implementation))
                seconds = timings(lambda call=call, case=case: call(*case.args), args.repeats)
                labels = {"op": op, "implementation": args.implementation, "workload": workload}
                labels["is_checked"] = w.context <= REFERENCE_TOKENS
                write(result(seconds, bytes_read=case.bytes_read, flops=case.flops, **labels), file)


if __name__ == "__main__":
    main()
