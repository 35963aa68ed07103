"""The public op `block_select`."""

import jax

from pallas_kernels.block_select import reference, xla
from pallas_kernels.core.dispatch import dispatch
from pallas_kernels.core.paging import PagedKV
from pallas_kernels.prefill_attention.blocks import BlockList

IMPLEMENTATIONS = {"xla": xla.block_select, "reference": reference.block_select}


def block_select(
    q: jax.Array,
    pages: PagedKV,
    table: jax.Array,
    starts: jax.Array,
    counts: jax.Array,
    ends: jax.Array,
    *,
    queries: int,
    keys: int,
    threshold: float | None,
    sink: int,
    local: int,
    last: int,
    least: int,
    has_means: bool = True,
    implementation: str | None = None,
) -> BlockList:
    """Returns the blocks of the history that each block of a chunk's queries reads (FlashPrefill V2, arXiv 2608.19758).

    Block J holds the tokens ``J · keys … (J + 1) · keys − 1`` of a sequence. Tile I holds the queries of the chunk's
    rows ``I · queries …``, the first at position ``p = starts[b] + I · queries``. A KV head's score of a block is an
    estimate of the attention that its G query heads give it:

        s[i, J] = q[b, i] · k_mean[J] / sqrt(H)                              for the rows i of the tile, and each head
        E[J]    = Σ_i exp(s[i, J] − max s)                                   over rows before counts[b], and heads
        ranked  = {J : the block ends at or before p, and its pages are held}
        listed  = {J in ranked : E[J] >= threshold · max over ranked of E}
                  ∪ {J : the block has one of the first ``sink`` tokens, or one at p − local or behind, or one of the
                     page in which the chunk begins}
                  or every J, if p < least, or if the chunk ends the prompt and the tile has one of its last ``last``
                  tokens

    of the blocks that begin before ``starts[b]``. Tiles behind ``counts`` list nothing. k_mean[J] is the mean of the
    block's keys, by page means. What a tile of another than the last chunk lists does not depend on what follows, nor,
    of blocks before it, on how the prompt is split into chunks, as long as tiles begin at the same positions. Without a
    threshold, only the other rules list blocks.

    Args:
      q: [B, T, K · G, H] queries of the pool's heads.
      pages: the pool with the chunk (`kv_write`), with ``k_mean`` and ``v_mean`` if there is a threshold or
        ``has_means``.
      table: its page table [B, max_pages] int32.
      starts: [B] int32 position of each sequence's first query.
      counts: [B] int32 queries of each sequence.
      ends: [B] int32 tokens of each sequence's whole prompt.
      queries: queries per tile.
      keys: tokens per block, a multiple of the page size.
      threshold: share of the best block's score above which a block is listed, above 0; None lists none by score.
      sink: first tokens whose blocks are always listed.
      local: tokens before a tile whose blocks are always listed.
      last: tokens at the end of the prompt for which all blocks are listed.
      least: position before which all blocks are listed.
      has_means: whether the list has the means of all blocks, with which `prefill_attention` stands in for those that
        are not listed.
      implementation: a backend name, or None for the first that accepts.

    Raises:
      ValueError: if the pool has no means, ``keys`` is no multiple of the page size, or a number is out of range.
    """
    if keys < 1 or keys % pages.page_size or queries < 1:
        raise ValueError(f"{queries=} must be positive, and {keys=} a multiple of the page size {pages.page_size}")
    if threshold is not None and not threshold > 0:
        raise ValueError(f"{threshold=} must be above 0, or None")
    for name, number in (("sink", sink), ("local", local), ("last", last), ("least", least)):
        if number < 0:
            raise ValueError(f"{name}={number} must not be negative")
    if (threshold is not None or has_means) and (pages.k_mean is None or pages.v_mean is None):
        raise ValueError("the pool has no means (k_mean and v_mean), by which blocks are selected and stood in for")
    return dispatch(
        "block_select",
        IMPLEMENTATIONS,
        implementation,
        *(q, pages, table, starts, counts, ends),
        queries=queries,
        keys=keys,
        threshold=threshold,
        sink=sink,
        local=local,
        last=last,
        least=least,
        has_means=has_means,
    )
