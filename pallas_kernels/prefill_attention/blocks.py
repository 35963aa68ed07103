"""Which key blocks a block of queries visits: a causal range, or sink blocks and window blocks."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


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
    high = jnp.maximum(-(-(end - keys.first) // keys.block), 0)
    if window.local is None or window.sink is None:
        return jnp.zeros_like(high), jnp.zeros_like(high), high
    sinks = jnp.clip(-(-(window.sink - keys.first) // keys.block), 0, high)
    oldest = position - window.local + 1
    low = jnp.where(oldest < end, jnp.clip((oldest - keys.first) // keys.block, sinks, high), high)
    return sinks, low, high
