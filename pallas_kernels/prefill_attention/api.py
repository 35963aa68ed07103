"""The public op `prefill_attention`."""

import jax

from pallas_kernels.core.dispatch import dispatch
from pallas_kernels.core.hopper import on_hopper
from pallas_kernels.core.paging import LayerKV, PageTables
from pallas_kernels.prefill_attention import reference, xla

IMPLEMENTATIONS = {
    "mosaic_gpu": on_hopper(__name__),
    "xla": xla.prefill_attention,
    "reference": reference.prefill_attention,
}


def prefill_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kv: LayerKV,
    tables: PageTables,
    starts: jax.Array,
    counts: jax.Array,
    *,
    sink: int,
    local: int,
    has_history: bool = True,
    implementation: str | None = None,
) -> jax.Array:
    """Returns attention outputs [B, T, N, H], in the dtype of ``q``, of a chunk of tokens (LServe 3.2 and 3.4).

    The chunk's own keys and values come from ``k`` and ``v``, unquantised; those before it from the pages. For the
    query at position ``p = starts[b] + t`` of query head n of KV head n // G:

        visible = {j <= p : retrieval or j > p − local or j < sink}
        out[b, t, n] = Σ_visible softmax(q[b, t, n] · key[j] / sqrt(H)) value[j]

    Rows from ``counts[b]`` on are unspecified but finite. Key blocks that no query sees are not visited.

    Args:
      q: [B, T, N, H], query heads of retrieval KV heads first.
      k: [B, T, K, H] keys of the chunk after RoPE.
      v: [B, T, K, H].
      kv: the layer's pools, in the basis of the other arguments (see `rotate`), holding at least the tokens before the
        chunk that are visible from it.
      tables: page tables [B, max_pages] int32.
      starts: [B] int32 position of each sequence's first query.
      counts: [B] int32 queries of each sequence.
      sink: tokens at the start that streaming heads see.
      local: tokens up to and including the query that streaming heads see.
      has_history: False promises that all ``starts`` are 0, and makes a smaller program where it can.
      implementation: a backend name, or None for the first that accepts.
    """
    return dispatch(
        "prefill_attention",
        IMPLEMENTATIONS,
        implementation,
        *(q, k, v, kv, tables, starts, counts),
        sink=sink,
        local=local,
        has_history=has_history,
    )
