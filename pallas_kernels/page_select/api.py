"""The public op `page_select`."""

import jax
import jax.numpy as jnp

from pallas_kernels.core.dispatch import dispatch
from pallas_kernels.core.hopper import on_hopper
from pallas_kernels.core.paging import PagedKV
from pallas_kernels.page_select import reference, xla
from pallas_kernels.page_select.selection import Selection

IMPLEMENTATIONS = {"mosaic_gpu": on_hopper(__name__), "xla": xla.page_select, "reference": reference.page_select}


def selection_width(num_selected: int, interval: int, page_size: int) -> int:
    """Returns the entries of one page list: the selected pages, and those that may begin before the next selection."""
    return num_selected + -(-(interval - 1) // page_size)


def page_select(
    q: jax.Array,
    pages: PagedKV,
    table: jax.Array,
    lengths: jax.Array,
    previous: Selection,
    is_refresh: jax.Array,
    budgets: jax.Array | None = None,
    *,
    num_selected: int,
    interval: int,
    sink_pages: int,
    reduction: str = "max",
    spread: float = 1.0,
    memory: float = 0.0,
    implementation: str | None = None,
) -> Selection:
    """Returns the pages [B, K, `selection_width`] that each KV head reads until the next selection.

    Sequences whose step is no refresh, or that have no token, keep ``previous`` and cost nothing. Else
    (LServe section 3.5.2, equation 2; Quest), with p the position of the current token:

        score(sub)  = Σ_d (1 + spread)/2 · max(q[d] · k_max[sub, d], q[d] · k_min[sub, d])
                        + (1 − spread)/2 · min(q[d] · k_max[sub, d], q[d] · k_min[sub, d])     float32
        score(page) = max over the query heads of the KV head (reduction "max", or "mean") of
                      max over its sub-pages
        relative(page) = (score(page) − best)/√H, with best the greatest score of the ranked pages
        rank(page)  = score(page), or with memory
                      max(relative(page), remembered(page) + interval · ln memory)
        selected    = the sink pages, the pages of tokens p − interval + 1 … p, and of the others the best ranks, to
                      ``num_selected`` in all (earlier page first among equals); all pages if there are no more
        then, as reserve, the pages after p's that tokens up to p + interval − 1 will begin, if the table has them

    Ranked are all pages before that of token p − interval + 1, the sink pages among them; none if all are selected. The
    page of the current token is open and has no statistics yet, but it is always selected. remembered(page) is the rank
    with which the last selection selected a page; −inf for pages that it did not rank, or did not select.

    A ``spread`` of 1 bounds q · k from above, as Quest and LServe do; 0 takes the middle of the bounds. Channels are
    seldom extreme together, so the bound is far above any true score (√H times, if they are independent), and how far
    is noise in the ranking: a spread between the two finds more of the attention mass.

    A page that mattered a few tokens ago often matters again, and one query does not always find it: text that is
    copied has words that occur everywhere. e^relative estimates a page's attention as a share of the best page's. With
    ``memory``, a selected page keeps its share, times ``memory`` per step, until a query gives it more, or pages that
    have more take its place. A query that looks for nothing changes little: it gives the sink everything, and other
    pages less than what is remembered.

    Args:
      q: [B, K · G, H] queries of the retrieval heads.
      pages: the retrieval pool, with ``k_min`` and ``k_max``.
      table: its page table [B, max_pages] int32.
      lengths: [B] int32 tokens of each sequence with the current one.
      previous: the last result; see `Selection.without_memory` for a sequence that is new in its slot.
      is_refresh: [B] bool.
      budgets: [B] int32 pages that each sequence selects, from the forced ones to ``num_selected``; None: as many.
      num_selected: the most pages that a sequence selects, at least the forced ones.
      interval: decode steps from one selection to the next; 1 selects at every step.
      sink_pages: first pages, always selected.
      reduction: "max" or "mean" over the query heads of a group.
      spread: 0 … 1, how much of the distance between a sub-page's bounds counts.
      memory: 0 … 1, what is left of a page's share after each step; 0 remembers nothing, 1 never forgets.
      implementation: a backend name, or None for the first that accepts.

    Raises:
      ValueError: if the pool has no statistics, ``reduction`` is unknown, ``spread`` or ``memory`` out of range, or
        ``num_selected`` below the forced pages.
    """
    if pages.k_min is None or pages.k_max is None:
        raise ValueError("the pool has no key statistics (k_min and k_max), by which pages are selected")
    forced = sink_pages + (interval + pages.page_size - 2) // pages.page_size + 1
    if num_selected < forced:
        raise ValueError(f"{num_selected=} must be at least the {forced} pages that are always read")
    if reduction not in ("max", "mean"):
        raise ValueError(f'{reduction=} must be "max" or "mean"')
    for name, share in (("spread", spread), ("memory", memory)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name}={share!r} must be from 0 to 1")
    budgets = jnp.full_like(lengths, num_selected) if budgets is None else budgets
    return dispatch(
        "page_select",
        IMPLEMENTATIONS,
        implementation,
        *(q, pages, table, lengths, previous, is_refresh, budgets),
        num_selected=num_selected,
        interval=interval,
        sink_pages=sink_pages,
        reduction=reduction,
        spread=spread,
        memory=memory,
    )
