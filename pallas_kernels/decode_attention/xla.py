"""`decode_attention` for any device: sequence by sequence, a few pages at a time, online softmax in float32.

The trip counts are data: a sequence costs what it reads, an empty slot costs nothing, and longer contexts need no new
compilation.
"""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.core.online_softmax import OnlineSoftmax
from pallas_kernels.core.paging import (
    NO_PAGE,
    LayerKV,
    PagedKV,
    PageTables,
    Tail,
    div_up,
    is_visible,
    newest_page,
    pools,
    slots_of,
    streaming_pages,
    take,
)
from pallas_kernels.core.quantization import dequantize
from pallas_kernels.core.sealing import keys_of

_TOKENS_PER_BLOCK = 512


@partial(jax.jit, static_argnames=("sink", "local", "pages_per_block"))  # traced once for all layers alike
def decode_attention(
    q: jax.Array,
    kv: LayerKV,
    tables: PageTables,
    lengths: jax.Array,
    selected: jax.Array | None,
    *,
    sink: int,
    local: int,
    pages_per_block: int | None = None,
) -> jax.Array:
    """Returns what `pallas_kernels.decode_attention` defines; ``pages_per_block`` changes speed and rounding only."""
    num_heads = sum(pool.num_kv_heads for _, pool, _, _ in pools(kv, tables))
    grouped = q.reshape(q.shape[0], num_heads, -1, q.shape[-1])
    slots, outputs = slots_of(tables, q.shape[0]), []
    for name, pool, table, heads in pools(kv, tables):
        if name == "streaming":
            logical = streaming_pages(lengths, sink, local, pool.page_size)[:, None]
            window = (sink, local)
        else:
            every = jnp.arange(table.shape[1], dtype=jnp.int32)[None, None]
            logical = jnp.broadcast_to(every, (q.shape[0], 1, every.size)) if selected is None else selected
            window = (None, None)
        open_pages = Tail(*(x[:, heads] for x in kv.tail)), slots
        outputs.append(_attend(grouped[:, heads], pool, table, open_pages, logical, lengths, window, pages_per_block))
    return jnp.concatenate(outputs, axis=1).reshape(q.shape).astype(q.dtype)


def _attend(
    q: jax.Array,
    pool: PagedKV,
    table: jax.Array,
    open_pages: tuple[Tail, jax.Array],
    logical: jax.Array,
    lengths: jax.Array,
    window: tuple[int | None, int | None],
    pages_per_block: int | None,
) -> jax.Array:
    """Returns [B, K, G, H] float32 for q of that shape, reading logical pages [B, K or 1, n] (ascending, -1 last)."""
    batch, heads, group, head_dim = q.shape
    page_size = pool.page_size
    scale = head_dim**-0.5
    block = pages_per_block or max(_TOKENS_PER_BLOCK // page_size, 1)
    logical = jnp.where(logical * page_size < lengths[:, None, None], logical, NO_PAGE)
    counts = jnp.max(jnp.sum(logical >= 0, axis=-1, dtype=jnp.int32), axis=-1)
    logical = jnp.pad(logical, ((0, 0), (0, 0), (0, -logical.shape[-1] % block)), constant_values=NO_PAGE)

    def attend_sequence(b: jax.Array) -> jax.Array:
        queries, length = take(q, b).astype(jnp.float32), take(lengths, b)
        tail, slots = open_pages
        newest = Tail(*(take(x, take(slots, b)) for x in tail))
        open_page = newest_page(length, page_size)

        def attend_block(index: jax.Array, state: OnlineSoftmax) -> OnlineSoftmax:
            pages = jax.lax.dynamic_slice_in_dim(take(logical, b), index * block, block, axis=1)
            physical = jnp.where(pages >= 0, take(table, b, jnp.maximum(pages, 0)), NO_PAGE)
            positions = (pages[..., None] * page_size + jnp.arange(page_size, dtype=jnp.int32)).reshape(
                pages.shape[0], -1
            )
            is_held = jnp.repeat(physical >= 0, page_size, axis=-1)
            visible = is_held & is_visible(length - 1, positions, *window)
            k, v = _gather(pool, physical, pages == open_page, newest)
            scores = jnp.einsum("kgh,ksh->kgs", queries, k, precision="highest")
            return state.add(scores, jnp.where(visible[..., None], v, 0.0), scale=scale, visible=visible[:, None])

        blocks = div_up(take(counts, b), block)
        return jax.lax.fori_loop(0, blocks, attend_block, OnlineSoftmax.start((heads, group), head_dim)).finish()

    return jax.lax.map(attend_sequence, jnp.arange(batch, dtype=jnp.int32))


def _gather(pool: PagedKV, physical: jax.Array, is_open: jax.Array, newest: Tail) -> tuple[jax.Array, jax.Array]:
    """Returns keys and values [K, n · page_size, H] float32 of physical pages [K or 1, n], or of the open page."""
    heads = pool.num_kv_heads
    index = (jnp.maximum(physical, 0), jnp.arange(heads, dtype=jnp.int32)[:, None])
    pages = jax.tree.map(lambda x: take(x, *index), pool)
    is_open = jax.lax.optimization_barrier(is_open)[..., None, None]  # else XLA computes it for each number
    found = []
    for rows, sealed in zip(newest, (keys_of(pages, jnp.float32), dequantize(pages.v, jnp.float32)), strict=True):
        tokens = jnp.where(is_open, rows[:, None].astype(jnp.float32), sealed)
        found.append(tokens.reshape(heads, -1, rows.shape[-1]))
    return found[0], found[1]
