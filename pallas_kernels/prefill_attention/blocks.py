"""Which key blocks a block of queries visits: a causal range, or sink blocks and window blocks."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.core.paging import div_down, div_up


class Window(NamedTuple):
    """What a query sees beside causality: everything, or the sink and the local window."""

    sink: int | None
    local: int | None


class KeyRange(NamedTuple):
    """Keys at positions ``first … end − 1``, in blocks of ``block`` from the first."""

    first: jax.Array | int
    end: jax.Array
    block: int


def visible_blocks(
    position: jax.Array, queries: int, keys: KeyRange, window: Window
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (s, low, high): ``queries`` queries from ``position`` on see key blocks 0 … s − 1 and low … high − 1.

    Every block in the ranges holds a key that one of the queries sees, and no other block does.
    """
    end = jnp.minimum(keys.end, position + queries)
    high = div_up(jnp.maximum(end - keys.first, 0), keys.block)
    if window.local is None or window.sink is None:
        return jnp.zeros_like(high), jnp.zeros_like(high), high
    sinks = jnp.minimum(div_up(jnp.maximum(window.sink - keys.first, 0), keys.block), high)
    oldest = position - window.local + 1
    low = jnp.where(
        oldest < end, jnp.clip(div_down(jnp.maximum(oldest - keys.first, 0), keys.block), sinks, high), high
    )
    return sinks, low, high
