"""The public op `decode_attention`."""

import jax

from pallas_kernels.core.dispatch import dispatch
from pallas_kernels.core.hopper import on_hopper
from pallas_kernels.core.paging import LayerKV, PageTables
from pallas_kernels.decode_attention import reference, xla

IMPLEMENTATIONS = {
    "mosaic_gpu": on_hopper(__name__),
    "xla": xla.decode_attention,
    "reference": reference.decode_attention,
}


def decode_attention(
    q: jax.Array,
    kv: LayerKV,
    tables: PageTables,
    lengths: jax.Array,
    selected: jax.Array | None,
    *,
    sink: int,
    local: int,
    implementation: str | None = None,
) -> jax.Array:
    """Returns attention outputs [B, N, H], in the dtype of ``q``, of each sequence's last token (LServe section 3.5).

    The token's key and value are already written. Its page, the open one, is read from the tail of the sequence's slot,
    all others from the pools. For query head n of KV head n // G at position ``p = lengths[b] − 1``, with S the tokens
    of the selected pages (retrieval) or of all pages (streaming):

        visible = {j in S : j <= p and (retrieval or j > p − local or j < sink)}
        out[b, n] = Σ_visible softmax(q[b, n] · k[j] / sqrt(H)) v[j]

    The result of a sequence depends only on that sequence's arguments. Pages without a visible token are not read.

    Args:
      q: [B, N, H], query heads of retrieval KV heads first.
      kv: the layer's pools and tail; with rotated values (see `rotate`), outputs are rotated too.
      tables: page tables [B, max_pages] int32, and slots.
      lengths: [B] int32 tokens of each sequence with the current one; 0 for an empty slot, whose output is zero.
      selected: [B, K_retrieval, n] int32 logical pages in ascending order, padded at the end with -1 (what
        `pallas_kernels.page_select` returns: the open page is among them, and pages past the sequence's end are
        skipped); None for all pages.
      sink: tokens at the start that streaming heads see.
      local: tokens at the end, the current one included, that streaming heads see.
      implementation: a backend name, or None for the first that accepts.
    """
    return dispatch(
        "decode_attention", IMPLEMENTATIONS, implementation, q, kv, tables, lengths, selected, sink=sink, local=local
    )
