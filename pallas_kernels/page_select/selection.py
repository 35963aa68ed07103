"""The page lists of a selection, the rule that makes them from scores, and what the next selection remembers."""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.core.paging import NO_PAGE, div_down, div_up, take


class Selection(NamedTuple):
    """The pages that each KV head of each sequence reads until the next selection.

    Attributes:
      pages: [B, K, width] int32 logical pages, ascending, padded at the end with -1.
      scores: [B, K, width] float32, at most 0, what is remembered of each page: about the logarithm of its attention as
        a share of the best page's. -inf where there is no page or one that was not ranked, and without memory.
    """

    pages: jax.Array
    scores: jax.Array

    @classmethod
    def empty(cls, batch: int, heads: int, width: int) -> "Selection":
        """Returns lists without pages."""
        shape = (batch, heads, width)
        return cls(jnp.full(shape, NO_PAGE, jnp.int32), jnp.full(shape, -jnp.inf, jnp.float32))

    def without_memory(self, is_new: jax.Array) -> "Selection":
        """Returns the lists with nothing remembered by the sequences ``is_new`` [B]: another had their slot before."""
        return self._replace(scores=jnp.where(is_new[:, None, None], -jnp.inf, self.scores))


class Rule(NamedTuple):
    """How scores become page lists; the fields are those of `pallas_kernels.page_select`."""

    num_selected: int
    interval: int
    sink_pages: int
    memory: float
    page_size: int
    head_dim: int

    def end_of_ranked(self, length: jax.Array, budget: jax.Array) -> jax.Array:
        """Returns the first page after the ranked ones, which are sealed: 0 if all pages are selected.

        It is the page of the first token that came since the last selection.
        """
        recent = div_down(jnp.maximum(length - self.interval, 0), self.page_size)
        return jnp.where(length > budget * self.page_size, recent, 0)

    def select(self, scores: jax.Array, length: jax.Array, budget: jax.Array, previous: Selection) -> Selection:
        """Returns the selection [K, width] of one sequence.

        Args:
          scores: [K, max_pages] float32; of pages that are not ranked, anything.
          length: scalar int32 tokens, at least 1.
          budget: scalar int32 pages to select.
          previous: its last selection [K, width].
        """
        max_pages, end = scores.shape[1], self.end_of_ranked(length, budget)
        ranks, page = self.ranks(scores, end, previous), jnp.arange(max_pages, dtype=jnp.int32)
        order = jnp.where((page < self.sink_pages) | (page >= end), jnp.inf, ranks)
        order = jnp.where(page < div_up(length, self.page_size), order, -jnp.inf)
        _, chosen = jax.lax.top_k(order, min(self.num_selected, max_pages))
        # Among equals earlier pages come first, so that pages after the sequence's end come last in any case.
        count = jnp.minimum(budget, div_up(length, self.page_size))
        is_chosen = jnp.arange(chosen.shape[1], dtype=jnp.int32) < count
        chosen = jnp.where(is_chosen, chosen.astype(jnp.int32), max_pages)
        pages = self._listed(chosen, length, previous.pages.shape[1], max_pages)
        return Selection(pages, self.remembered(ranks, pages, end))

    def ranks(self, scores: jax.Array, end: jax.Array, previous: Selection) -> jax.Array:
        """Returns by what the pages before ``end`` are ranked, [K, max_pages]; of others, anything. See `select`."""
        if not self.memory:
            return scores
        page = jnp.arange(scores.shape[1], dtype=jnp.int32)
        best = jnp.max(jnp.where(page < end, scores, -jnp.inf), axis=1, keepdims=True)
        relative = (scores - best) * self.head_dim**-0.5
        kept = previous.scores + self.interval * math.log(self.memory)
        heads = jnp.arange(scores.shape[0], dtype=jnp.int32)[:, None]
        return relative.at[heads, previous.pages].max(kept, mode="drop", wrap_negative_indices=False)

    def remembered(self, ranks: jax.Array, pages: jax.Array, end: jax.Array) -> jax.Array:
        """Returns what to remember [K, width] of listed pages: the ranks of those that have one."""
        if not self.memory:
            return jnp.full(pages.shape, -jnp.inf, jnp.float32)
        heads = jnp.arange(ranks.shape[0], dtype=jnp.int32)[:, None]
        found = take(ranks, heads, jnp.clip(pages, 0, ranks.shape[1] - 1))
        return jnp.where((pages >= 0) & (pages < end), found, -jnp.inf)

    def _listed(self, chosen: jax.Array, length: jax.Array, width: int, max_pages: int) -> jax.Array:
        """Returns the list [K, width] of chosen pages [K, n] (``max_pages`` for none), with those that come next."""
        reserve = div_up(length, self.page_size) + jnp.arange(width - self.num_selected, dtype=jnp.int32)
        reserve = jnp.where(reserve * self.page_size < length + self.interval - 1, reserve, max_pages)
        reserve = jnp.broadcast_to(reserve, (chosen.shape[0], reserve.size))
        ordered = jnp.sort(jnp.concatenate([chosen, reserve], axis=1), axis=1)
        ordered = jnp.pad(ordered, ((0, 0), (0, width - ordered.shape[1])), constant_values=max_pages)
        return jnp.where(ordered < max_pages, ordered, NO_PAGE)


@partial(jax.jit, static_argnames=("num_selected", "interval", "sink_pages", "memory", "page_size", "head_dim"))
def choose_pages(
    scores: jax.Array,
    lengths: jax.Array,
    previous: Selection,
    is_refresh: jax.Array,
    budgets: jax.Array | None = None,
    *,
    num_selected: int,
    interval: int,
    sink_pages: int,
    memory: float,
    page_size: int,
    head_dim: int,
) -> Selection:
    """Returns what `pallas_kernels.page_select` does, from scores of your own.

    Args:
      scores: [B, K, max_pages] float32, in the unit of the products q · k; those of pages that are always selected, or
        that do not exist, may be anything, others anything below infinity.
      lengths: this and the rest as for `pallas_kernels.page_select`.
      previous: the last result.
      is_refresh: [B] bool.
      budgets: [B] int32 or None.
      num_selected: pages to select.
      interval: decode steps from one selection to the next.
      sink_pages: first pages, always selected.
      memory: 0 … 1.
      page_size: tokens per page.
      head_dim: H, of whose root a difference of scores means e times the attention.
    """
    rule = Rule(num_selected, interval, sink_pages, memory, page_size, head_dim)
    budgets = jnp.full_like(lengths, num_selected) if budgets is None else budgets
    chosen = jax.vmap(rule.select)(scores, lengths, budgets, previous)
    is_due = (is_refresh & (lengths > 0))[:, None, None]
    return jax.tree.map(lambda new, old: jnp.where(is_due, new, old), chosen, previous)
