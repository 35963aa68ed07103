"""Hopper's kernels under ``jax_enable_x64``: traced as without it, lowered for a GPU, interpreted to the same bits."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import LayerKV, Selection
from pallas_kernels.core.workloads import Workload
from tests import x64
from tests.pallas_kernels import hopper
from tests.pallas_kernels.cases import Cache, assert_same_bits, filled_cache, random_tokens

SMALL = Workload(
    batch=2,
    context=128,
    chunk=64,
    retrieval=1,
    streaming=1,
    group=2,
    head_dim=64,
    page_size=32,
    sub_page_size=16,
    bits=(8, 4),
    sink=32,
    local=40,
    num_selected=3,
    interval=1,
)
CALLS = ("kv_write of a step", "kv_write of a chunk", "prefill_attention", "page_select", "decode_attention")
QUICK = ("kv_write of a step", "page_select")


def _call(name: str) -> tuple[Any, tuple[Any, ...]]:
    """A kernel as a function, and its arguments."""
    rng = np.random.default_rng(0)
    cache = _whole_windows(filled_cache(SMALL, rng, [100, 33]))
    q, k = (random_tokens(SMALL, rng, SMALL.chunk, heads) for heads in (SMALL.num_heads, SMALL.num_kv_heads))
    starts, lengths, one = cache.lengths // 3, cache.lengths, np.ones(2, np.int32)
    window = {"sink": SMALL.sink, "local": SMALL.local}
    previous = Selection.empty(2, 1, SMALL.num_selected)
    chosen = {"num_selected": SMALL.num_selected, "interval": SMALL.interval, "sink_pages": 1, "memory": 0.5}
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
        "kv_write of a step": ((k[:, :1], k[:, :1], cache.kv, cache.tables, starts, one), {}),
        "kv_write of a chunk": ((k, k, cache.kv, cache.tables, starts, starts), {}),
        "prefill_attention": ((q, k, k, cache.kv, cache.tables, starts, starts), window),
        "page_select": (
            (q[:, 0, :2], cache.kv.retrieval, cache.tables.retrieval, lengths, previous, lengths > 0),
            chosen,
        ),
        "decode_attention": ((q[:, 0], cache.kv, cache.tables, lengths, None), window),
    }
    arguments, options = calls[name]
    op = getattr(pallas_kernels, name.split(maxsplit=1)[0])
    return partial(op, implementation="mosaic_gpu", **options), jax.tree.map(jnp.asarray, arguments)


def _whole_windows(cache: Cache) -> Cache:
    """The cache with a number of pages that `page_select` copies in whole windows."""

    def padded(x: jax.Array) -> jax.Array:
        return jnp.pad(x, [(0, -x.shape[0] % 8)] + [(0, 0)] * (x.ndim - 1))

    return cache._replace(kv=LayerKV(*jax.tree.map(padded, tuple(cache.kv))))


@contextmanager
def _flag(is_set: bool) -> Iterator[None]:
    if not is_set:
        yield
        return
    with x64.enabled():
        yield


@pytest.mark.parametrize("name", CALLS)
def test_a_kernel_is_traced_as_without_the_flag_and_lowered(name: str):
    run, arguments = _call(name)
    programs = []
    for is_set in (False, True):
        with _flag(is_set), hopper.on_h200():
            traced = jax.jit(run).trace(*arguments)
            programs.append(re.sub(r"0x[0-9a-f]+", "", str(traced.jaxpr)))
            assert x64.wide(traced.jaxpr) == set()
            assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()
    assert programs[0] == programs[1]


# The interpreter takes long for the others. They pass too (-m sweep), and the traces above are equal for all.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.sweep) for name in CALLS]
)
def test_a_kernel_gives_the_same_bits(name: str):
    run, arguments = _call(name)
    without, within = x64.both(lambda: hopper.evaluate(run, *arguments))
    assert_same_bits(within, without)
