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
    implementation: str | None = None,
) -> LayerKV:
    """Returns the pools and the tail of a layer with new tokens written, and the pages that they fill sealed.

    Token t < ``counts[b]`` of sequence b goes to position ``p = starts[b] + t``: row ``p % page_size`` of the tail of
    its slot, ``tables.slots[b]``. When that is the last row, the page is sealed: ``table[b, p // page_size]`` of each
    pool gets what it stores of all the page's tokens (LServe section 3.5.2, without the reset fault of the paper's
    code):

        k_min[page, head, sub] = min over the sub-page's tokens of k          # k_max likewise; channel by channel
        k[page, head, row]     = k, or its codes within these bounds          # see `QuantizedKeys`
        v[page, head, row]     = v, or its codes with scale and offset        # see `quantize`

    Where a table has -1 (a streaming page that no later query sees), nothing is stored. The tokens of a page before
    ``starts[b]`` are those that the tail of the slot holds. Afterwards the tail holds the page of the newest token, and
    anything in the rows after it. Sequences without new tokens change nothing.

    Args:
      k: [B, T, K, H] keys after RoPE, retrieval heads first.
      v: [B, T, K, H].
      kv: the layer's pools and tail; donate them to avoid a copy.
      tables: page tables [B, max_pages] int32, and slots [B] int32, distinct where there are new tokens.
      starts: [B] int32 position of each sequence's first token.
      counts: [B] int32 number of tokens of each sequence, 0 … T.
      implementation: a backend name, or None for the first that accepts.
    """
    return dispatch("kv_write", IMPLEMENTATIONS, implementation, k, v, kv, tables, starts, counts)
