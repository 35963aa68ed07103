"""The public op `kv_write`."""

import jax

from pallas_kernels.core.dispatch import dispatch
from pallas_kernels.core.hopper import on_hopper
from pallas_kernels.core.paging import LayerKV, PageTables
from pallas_kernels.kv_write import reference, xla

IMPLEMENTATIONS = {"mosaic_gpu": on_hopper(__name__), "xla": xla.kv_write, "reference": reference.kv_write}


def kv_write(
    k: jax.Array,
    v: jax.Array,
    kv: LayerKV,
    tables: PageTables,
    starts: jax.Array,
    counts: jax.Array,
    *,
    k_bounded: jax.Array | None = None,
    implementation: str | None = None,
) -> LayerKV:
    """Returns the pools of a layer with new tokens written: quantised, and their key statistics updated.

    Token t < ``counts[b]`` of sequence b goes to position ``p = starts[b] + t``: page ``table[b, p // page_size]``, row
    ``p % page_size``. Tokens whose page is -1 (a streaming page that no later query sees) and the rest of the chunk are
    dropped. Statistics of a sub-page are set by its first token and merged by later ones, so the former contents of a
    page never show (LServe section 3.5.2, without the reset fault of the paper's code):

        k_min[page, head, sub] = min over the sub-page's tokens of k_bounded    # k_max likewise; channel by channel

    Args:
      k: [B, T, K, H] keys after RoPE, retrieval heads first.
      v: [B, T, K, H].
      kv: the layer's pools; donate them to avoid a copy.
      tables: page tables [B, max_pages] int32.
      starts: [B] int32 position of each sequence's first token.
      counts: [B] int32 number of tokens of each sequence, 0 … T.
      k_bounded: [B, T, K, H] the keys that statistics bound, where pages hold others (`rotate`); None for ``k``. It is
        not read if the pools have no statistics.
      implementation: a backend name, or None for the first that accepts.
    """
    return dispatch("kv_write", IMPLEMENTATIONS, implementation, k, v, kv, tables, starts, counts, k_bounded=k_bounded)
