"""The specification of `page_select`: one sequence and head after the other, with numpy. It cannot be jitted."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.core.paging import NO_PAGE, PagedKV
from pallas_kernels.page_select.selection import Selection


def page_select(
    q: jax.Array,
    pages: PagedKV,
    table: jax.Array,
    lengths: jax.Array,
    previous: Selection,
    is_refresh: jax.Array,
    budgets: jax.Array,
    *,
    num_selected: int,
    interval: int,
    sink_pages: int,
    reduction: str,
    spread: float,
    memory: float,
) -> Selection:
    """Returns what `pallas_kernels.page_select` defines."""
    result, remembered = np.array(previous.pages), np.array(previous.scores)
    for b in range(q.shape[0]):
        length, page_size = int(lengths[b]), pages.page_size
        if not is_refresh[b] or length == 0:
            continue
        count = -(-length // page_size)
        budget = int(budgets[b])
        end = max(length - interval, 0) // page_size if count > budget else 0
        reserve = range(count, min((length + interval - 2) // page_size + 1, table.shape[1]))
        for head in range(pages.num_kv_heads):
            rank = np.full(count, -np.inf, np.float32)
            rank[:end] = page_scores(q, pages, table, b, head, end, reduction, spread)
            if memory and end:
                rank[:end] = (rank[:end] - rank.max()) * np.float32(q.shape[-1] ** -0.5)
                change = np.float32(interval * math.log(memory))
                for page, kept in zip(result[b, head], remembered[b, head], strict=True):
                    if 0 <= page < end:
                        rank[page] = max(rank[page], kept + change)
            order = sorted(range(count), key=lambda i: (not (i < sink_pages or i >= end), -rank[i], i))
            chosen = [*sorted(order[:budget]), *reserve]
            kept = [rank[page] if memory and page < end else -np.inf for page in chosen]
            padding = result.shape[2] - len(chosen)
            result[b, head] = chosen + [NO_PAGE] * padding
            remembered[b, head] = kept + [-np.inf] * padding
    return Selection(jnp.asarray(result), jnp.asarray(remembered))


def page_scores(
    q: jax.Array, pages: PagedKV, table: jax.Array, b: int, head: int, count: int, reduction: str, spread: float
) -> np.ndarray:
    """Returns the scores [count] float32 of the first, sealed pages of one sequence and KV head."""
    assert pages.k_min is not None and pages.k_max is not None
    queries = np.asarray(q[b], np.float32).reshape(pages.num_kv_heads, -1, q.shape[-1])[head]
    scores = []
    for logical in range(count):
        page = int(table[b, logical])
        low, high = (np.asarray(x[page, head], np.float32) for x in (pages.k_min, pages.k_max))
        bounds = queries[:, None] * low, queries[:, None] * high  # [G, subs, H]
        by_channel = (1 + spread) / 2 * np.maximum(*bounds) + (1 - spread) / 2 * np.minimum(*bounds)
        by_query = by_channel.sum(-1).max(axis=1)  # [G]
        scores.append(by_query.max() if reduction == "max" else by_query.mean())
    return np.array(scores, np.float32)
