"""Recall of page selection: the share of the true attention mass that lies in the pages read.

It computes dense attention scores in a separate program, so that generation without it costs no more.
"""

from functools import partial

import jax
import jax.numpy as jnp

from lserve_jax.config.inference import InferenceConfig, LayerKind
from lserve_jax.models.layerwise import run_model
from lserve_jax.models.llama import Params
from lserve_jax.runtime.attend import decode_attend
from lserve_jax.runtime.cache import KVCache, LayerCache
from pallas_kernels import LayerKV, PageTables
from pallas_kernels.core.dtypes import narrowed
from pallas_kernels.core.paging import div_up, newest_page, slots_of
from pallas_kernels.core.sealing import keys_of


@jax.jit
def attention_recall(
    q: jax.Array, kv: LayerKV, tables: PageTables, lengths: jax.Array, selected: jax.Array
) -> jax.Array:
    """Returns, for each sequence and KV head, the attention mass [B, K] float32 in the selected pages, 0 … 1.

    For the query heads n of KV head k and the sequence's last token:

        mass[b, k] = mean_n Σ_{j in selected pages} softmax_{j < lengths[b]}(q[b, n] · k[j] / sqrt(H))[j]

    NaN for an empty slot. Heads are computed one by one, so that only the scores [G, S] of one head are in memory.

    Args:
      q: [B, K · G, H] queries of the retrieval heads, after RoPE.
      kv: the layer's pools and tail.
      tables: its page tables and slots.
      lengths: [B] int32 tokens of each sequence, the current one included; 0 for an empty slot.
      selected: [B, K, n] int32 logical pages, padded with -1 (of what `pallas_kernels.page_select` returns).
    """
    q, kv, tables, lengths, selected = narrowed((q, kv, tables, lengths, selected))
    batch, heads = selected.shape[:2]
    pool, table, slots = kv.retrieval, jnp.asarray(tables.retrieval), slots_of(tables, batch)
    assert pool is not None
    grouped = q.reshape(batch, heads, -1, q.shape[-1])
    held = table.shape[1]

    def of_head(at: jax.Array) -> jax.Array:
        b, head = at // heads, at % heads
        pages = keys_of(jax.tree.map(lambda x: x[jnp.maximum(table[b], 0), head], pool), jnp.float32)
        is_open = jnp.arange(held, dtype=jnp.int32) == newest_page(lengths[b], pool.page_size)
        newest = kv.tail.k[slots[b], head].astype(jnp.float32)
        keys = jnp.where(is_open[:, None, None], newest, pages).reshape(-1, q.shape[-1])
        tokens = jnp.arange(keys.shape[0], dtype=jnp.int32)
        is_seen = tokens < lengths[b]
        scores = jnp.einsum("gh,sh->gs", grouped[b, head].astype(jnp.float32), keys, precision="highest")
        weights = jax.nn.softmax(jnp.where(is_seen, scores * q.shape[-1] ** -0.5, -jnp.inf), axis=-1)
        # The entry past the last page takes the padding.
        is_read = jnp.zeros(held + 1, bool).at[jnp.where(selected[b, head] < 0, held, selected[b, head])].set(True)
        is_read = jnp.repeat(is_read[:held], pool.page_size)
        return jnp.mean(jnp.sum(jnp.where(is_seen & is_read, weights, 0.0), axis=-1))

    mass = jax.lax.map(of_head, jnp.arange(batch * heads, dtype=jnp.int32)).reshape(batch, heads)
    return jnp.where(lengths[:, None] > 0, mass, jnp.nan)


@partial(jax.jit, static_argnames="config", donate_argnames="cache")
def recall_step(
    params: Params,
    cache: KVCache,
    tokens: jax.Array,
    lengths: jax.Array,
    decode_steps: jax.Array,
    tables: PageTables,
    *,
    config: InferenceConfig,
) -> tuple[jax.Array, KVCache]:
    """Returns the recall [L, B] float32 of a decode step, mean over retrieval heads, and the cache.

    NaN where nothing is selected: in layers without a selection, while all pages fit into it, and in empty slots. The
    arguments are those of `decode_step`. It may be called next with the returned cache and the same arguments, and
    gives the same result as without this call: it writes the same values again, and the selections are still those of
    the step before, so that nothing is forgotten twice.
    """
    arguments = (params, cache, tokens, lengths, decode_steps, tables)
    params, cache, tokens, lengths, decode_steps, tables = narrowed(arguments)
    inner = decode_attend(config, tables, lengths, decode_steps)

    def attend(
        kind: LayerKind, q: jax.Array, k: jax.Array, v: jax.Array, state: LayerCache
    ) -> tuple[jax.Array, tuple[LayerCache, jax.Array]]:
        out, after = inner(kind, q, k, v, state)
        # The step itself selects again, from what was remembered before.
        state = state._replace(kv=after.kv)
        nothing = jnp.full(lengths.shape, jnp.nan, jnp.float32)
        num_selected = kind.decode.num_selected
        if num_selected is None or after.selected is None or after.kv.retrieval is None:
            return out, (state, nothing)
        heads = kind.num_retrieval * (q.shape[2] // k.shape[2])
        mass = attention_recall(q[:, 0, :heads], after.kv, tables, lengths, after.selected.pages)
        held = div_up(lengths, config.attention.page_size)
        is_selecting = held > config.attention.budgets(held)
        return out, (state, jnp.where(is_selecting, jnp.mean(mass, axis=1), nothing))

    positions = jnp.maximum(lengths - 1, 0)[:, None]
    _, states = run_model(params, cache, tokens[:, None], positions, attend, config)
    return jnp.stack([recall for _, recall in states]), tuple(state for state, _ in states)
