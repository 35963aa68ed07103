"""The public op `page_select`."""

import jax

from pallas_kernels.core.dispatch import dispatch
from pallas_kernels.core.hopper import on_hopper
from pallas_kernels.core.paging import PagedKV
from pallas_kernels.page_select import reference, xla

IMPLEMENTATIONS = {"mosaic_gpu": on_hopper(__name__), "xla": xla.page_select, "reference": reference.page_select}


def selection_width(num_selected: int, interval: int, page_size: int) -> int:
    """Returns the entries of one page list: the selected pages, and those that may begin before the next selection."""
    return num_selected + -(-(interval - 1) // page_size)


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
    reduction: str = "max",
    spread: float = 1.0,
    has_lookahead: bool = False,
    implementation: str | None = None,
) -> jax.Array:
    """Returns the logical pages [B, K, `selection_width`] int32 that each KV head reads until the next selection.

    Ascending, padded at the end with -1. Sequences whose step is no refresh keep ``previous`` and cost nothing. Else
    (LServe section 3.5.2, equation 2; Quest), with p the position of the current token:

        score(sub)  = Σ_d (1 + spread)/2 · max(q[d] · k_max[sub, d], q[d] · k_min[sub, d])
                        + (1 − spread)/2 · min(q[d] · k_max[sub, d], q[d] · k_min[sub, d])     float32
        score(page) = max over the query heads of the KV head (reduction "max", or "mean") of
                      max over its sub-pages
                      with ``has_lookahead``, at least the score of the last sub-page of the page before
        selected    = the sink pages, the pages of tokens p − interval + 1 … p, and of the others the ``num_selected``
                      best in all (earlier page first among equals); all pages if there are no more than that
        then, as reserve, the pages after p's that tokens up to p + interval − 1 will begin, if the table has them

    The page of the current token is open and has no statistics yet, but it is always selected.

    A ``spread`` of 1 bounds q · k from above, as Quest and LServe do; 0 takes the middle of the bounds. Channels are
    seldom extreme together, so the bound is far above any true score (√H times, if they are independent), and how far
    is noise in the ranking: a spread between the two finds more of the attention mass.

    A model that copies text reads one token further per step. Where it reads the end of a page, lookahead selects the
    following page before the next selection could. Sub-pages should then be about as long as the interval.

    Args:
      q: [B, K · G, H] queries of the retrieval heads.
      pages: the retrieval pool, with ``k_min`` and ``k_max``.
      table: its page table [B, max_pages] int32.
      lengths: [B] int32 tokens of each sequence with the current one.
      previous: [B, K, width] int32, the last result.
      is_refresh: [B] bool.
      num_selected: pages to select, at least the forced ones.
      interval: decode steps from one selection to the next; 1 selects at every step.
      sink_pages: first pages, always selected.
      reduction: "max" or "mean" over the query heads of a group.
      spread: 0 … 1, how much of the distance between a sub-page's bounds counts.
      has_lookahead: whether a page that follows a chosen end of a page scores as well as that.
      implementation: a backend name, or None for the first that accepts.

    Raises:
      ValueError: if the pool has no statistics, ``reduction`` is unknown, ``spread`` out of range, or ``num_selected``
        below the forced pages.
    """
    if pages.k_min is None or pages.k_max is None:
        raise ValueError("the pool has no key statistics (k_min and k_max), by which pages are selected")
    forced = sink_pages + (interval + pages.page_size - 2) // pages.page_size + 1
    if num_selected < forced:
        raise ValueError(f"{num_selected=} must be at least the {forced} pages that are always read")
    if reduction not in ("max", "mean"):
        raise ValueError(f'{reduction=} must be "max" or "mean"')
    if not 0 <= spread <= 1:
        raise ValueError(f"{spread=} must be from 0 to 1")
    return dispatch(
        "page_select",
        IMPLEMENTATIONS,
        implementation,
        *(q, pages, table, lengths, previous, is_refresh),
        num_selected=num_selected,
        interval=interval,
        sink_pages=sink_pages,
        reduction=reduction,
        spread=spread,
        has_lookahead=has_lookahead,
    )
