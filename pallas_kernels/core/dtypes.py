"""The widths that ops compute in: 32 bits at most, whether or not a program sets ``jax_enable_x64``."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ZERO = np.int32(0)
"""A number for places where a plain 0 would become int64: an index beside others that are int32."""

_NARROW = {jnp.dtype(f"{kind}64"): jnp.dtype(f"{kind}32") for kind in ("int", "uint", "float")}


def narrowed[T](tree: T) -> T:
    """Returns a pytree whose arrays of 64-bit numbers have become 32-bit ones; everything else stays as it is.

    JAX does the same with every array, unless a program sets ``jax_enable_x64``. There, ``jnp.array([5])`` is int64 and
    ``jnp.zeros(3)`` float64; with this function, an op returns the same bits for them as in any other program.
    """

    def leaf(x: Any) -> Any:
        dtype = _NARROW.get(x.dtype) if isinstance(x, (jax.Array, np.ndarray, np.generic)) else None
        return x if dtype is None else x.astype(dtype)

    return jax.tree.map(leaf, tree)


def counted_loop[T](count: int, body: Callable[[jax.Array, T], T], start: T) -> T:
    """Returns ``start`` after ``body(index, value)`` for each int32 index from 0 to ``count - 1``.

    `jax.lax.fori_loop` does the same, but its index is int64 under ``jax_enable_x64`` if the count is known.
    """

    def step(carry: tuple[Any, T], _: None) -> tuple[tuple[Any, T], None]:
        index, value = carry
        return (index + 1, body(index, value)), None

    return jax.lax.scan(step, (ZERO, start), None, length=count)[0][1]
