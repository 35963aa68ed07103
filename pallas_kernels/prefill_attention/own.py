"""The keys that a chunk reads beside its history: its own, and those of its open page before it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.core.paging import LayerKV, PageTables, div_down, slots_of, take


class OwnKeys(NamedTuple):
    """What a chunk reads unquantised. All tokens before come from pages.

    Attributes:
      k, v: [B, S, K, H] with S no less than T.
      starts: [B] int32 position of the first of them, at most the chunk's.
      counts: [B] int32 how many there are, up to the chunk's last token.
    """

    k: jax.Array
    v: jax.Array
    starts: jax.Array
    counts: jax.Array


def own_keys(
    k: jax.Array, v: jax.Array, kv: LayerKV, tables: PageTables, starts: jax.Array, counts: jax.Array
) -> OwnKeys:
    """Returns the chunk's keys and values [B, T, K, H], or those of the page in which it both begins and ends.

    That page is in the tail, with the tokens before the chunk: not yet sealed, or just now. A chunk that goes beyond
    has sealed the page in which it begins.
    """
    batch, tokens = k.shape[:2]
    size = kv.page_size
    first, ends = div_down(starts, size) * size, starts + counts
    is_in_tail = ends <= first + size
    rows, slots = max(tokens, size), slots_of(tables, batch)

    def either(chunk: jax.Array, tail: jax.Array) -> jax.Array:
        page = jnp.swapaxes(take(tail, slots), 1, 2).astype(chunk.dtype)
        page, chunk = (jnp.pad(x, ((0, 0), (0, rows - x.shape[1]), (0, 0), (0, 0))) for x in (page, chunk))
        return jnp.where(is_in_tail[:, None, None, None], page, chunk)

    own = jnp.where(is_in_tail, first, starts)
    return OwnKeys(either(k, kv.tail.k), either(v, kv.tail.v), own, ends - own)
