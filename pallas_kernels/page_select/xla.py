"""`page_select` for any device: two small products per block of pages, then one top-k over page scores.

With s the spread, the score of one channel is ``(q + s·|q|)/2 · k_max + (q − s·|q|)/2 · k_min`` whatever the sign of q,
so the sum over channels is two matrix products, with no intermediate of [G, subs, H].
"""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.core.paging import NO_PAGE, PagedKV, div_down, div_up, take

_SUBS_PER_BLOCK = 1024


_OPTIONS = ("num_selected", "interval", "sink_pages", "reduction", "spread", "has_lookahead")


@partial(jax.jit, static_argnames=_OPTIONS)  # traced once for all layers alike
def page_select(
    q: jax.Array,
    pages: PagedKV,
    table: jax.Array,
    lengths: jax.Array,
    previous: jax.Array,
    is_refresh: jax.Array,
    *,
    num_selected: int,
    interval: int,
    sink_pages: int,
    reduction: str,
    spread: float,
    has_lookahead: bool,
) -> jax.Array:
    """Returns what `pallas_kernels.page_select` defines."""
    page_size, max_pages = pages.page_size, table.shape[1]
    logical = jnp.arange(max_pages, dtype=jnp.int32)

    def select(b: jax.Array) -> jax.Array:
        """Scores and selects the pages of sequence b."""
        length = take(lengths, b)
        first_recent, count = div_down(jnp.maximum(length - interval, 0), page_size), div_up(length, page_size)
        is_forced = (logical < sink_pages) | (logical >= first_recent)
        scores, ends = _page_scores(take(q, b), pages, take(table, b), length, reduction, spread)
        if has_lookahead:
            scores = jnp.maximum(scores, jnp.pad(ends[:, :-1], ((0, 0), (1, 0)), constant_values=-jnp.inf))
        scores = jnp.where(is_forced, jnp.inf, scores)
        scores = jnp.where(logical < count, scores, -jnp.inf)
        best, chosen = jax.lax.top_k(scores, min(num_selected, max_pages))
        return jnp.where(best > -jnp.inf, chosen.astype(jnp.int32), max_pages)

    def every_page(b: jax.Array) -> jax.Array:
        """Selects all pages, without scores: there are at most as many as may be selected."""
        index = jnp.arange(min(num_selected, max_pages), dtype=jnp.int32)
        index = jnp.where(index * page_size < take(lengths, b), index, max_pages)
        return jnp.broadcast_to(index, (pages.num_kv_heads, index.size))

    def refreshed(b: jax.Array) -> jax.Array:
        length = take(lengths, b)
        chosen = jax.lax.cond(length > num_selected * page_size, select, every_page, b)
        reserve = div_up(length, page_size) + jnp.arange(previous.shape[2] - num_selected, dtype=jnp.int32)
        reserve = jnp.where(reserve * page_size < length + interval - 1, reserve, max_pages)
        reserve = jnp.broadcast_to(reserve, (pages.num_kv_heads, reserve.size))
        ordered = jnp.sort(jnp.concatenate([chosen, reserve], axis=1), axis=1)
        ordered = jnp.pad(ordered, ((0, 0), (0, previous.shape[2] - ordered.shape[1])), constant_values=max_pages)
        return jnp.where(ordered < max_pages, ordered, NO_PAGE)

    def sequence(b: jax.Array) -> jax.Array:
        is_due = take(is_refresh, b) & (take(lengths, b) > 0)
        return jax.lax.cond(is_due, refreshed, lambda b: take(previous, b), b)

    return jax.lax.map(sequence, jnp.arange(q.shape[0], dtype=jnp.int32))


def _page_scores(
    q: jax.Array, pages: PagedKV, table: jax.Array, length: jax.Array, reduction: str, spread: float
) -> tuple[jax.Array, jax.Array]:
    """Returns the scores [K, max_pages] float32 of sealed pages and of their last sub-pages; of others, anything."""
    k_min, k_max = pages.k_min, pages.k_max
    assert k_min is not None and k_max is not None
    heads, subs, head_dim = k_min.shape[1:]
    max_pages = table.size
    block = min(max(_SUBS_PER_BLOCK // subs, 1), max_pages)
    table = jnp.pad(table, (0, -table.size % block), constant_values=NO_PAGE)
    queries = q.astype(jnp.float32).reshape(heads, -1, head_dim)
    on_high, on_low = ((queries + sign * spread * jnp.abs(queries)) / 2 for sign in (1, -1))

    def score_block(index: jax.Array, scores: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        physical = jnp.maximum(jax.lax.dynamic_slice_in_dim(table, index * block, block), 0)
        high, low = (take(x, physical, jnp.arange(heads, dtype=jnp.int32)[:, None]) for x in (k_max, k_min))
        bounds = _product(on_high, high) + _product(on_low, low)
        over_group = jnp.max if reduction == "max" else jnp.mean
        found = (over_group(x, axis=1) for x in (jnp.max(bounds, axis=-1), bounds[..., -1]))
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(old, new, index * block, axis=1)
            for old, new in zip(scores, found, strict=True)
        )

    blocks = div_up(length, pages.page_size * block)
    nothing = jnp.full((heads, table.size), -jnp.inf, jnp.float32)
    scores, ends = jax.lax.fori_loop(0, blocks, score_block, (nothing, nothing))
    return scores[:, :max_pages], ends[:, :max_pages]


def _product(queries: jax.Array, keys: jax.Array) -> jax.Array:
    """Returns the products [K, G, P, S] float32 of float32 queries [K, G, H] and keys [K, P, S, H].

    With bfloat16 keys, each query is split into two bfloat16 numbers. This is exact to 2^-17, needs no float32 copy of
    the keys, and is several times as fast on CPUs that multiply bfloat16 matrices.
    """
    if keys.dtype == jnp.bfloat16:
        # Not a conversion to bfloat16 and back, which XLA may remove.
        upper = jax.lax.reduce_precision(queries, exponent_bits=8, mantissa_bits=7)
        queries = jnp.concatenate([upper, queries - upper], axis=1).astype(jnp.bfloat16)
    else:
        keys = keys.astype(jnp.float32)
    rows = keys.reshape(keys.shape[0], -1, keys.shape[-1])
    products = jnp.einsum("kgh,knh->kgn", queries, rows, precision="highest", preferred_element_type=jnp.float32)
    if keys.dtype == jnp.bfloat16:
        products = products[:, : products.shape[1] // 2] + products[:, products.shape[1] // 2 :]
    return products.reshape(*products.shape[:2], *keys.shape[1:3])
