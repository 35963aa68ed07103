"""The specification of `page_select`: one sequence and head after the other, with numpy. It cannot be jitted."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.core.paging import NO_PAGE, PagedKV


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
    reduction: str,
    spread: float,
    has_lookahead: bool,
) -> jax.Array:
    """Returns what `pallas_kernels.page_select` defines."""
    result = np.array(previous)
    for b in range(q.shape[0]):
        length, page_size = int(lengths[b]), pages.page_size
        if not is_refresh[b] or length == 0:
            continue
        last, count = (length - 1) // page_size, -(-length // page_size)
        recent = range(max(length - interval, 0) // page_size, count)
        reserve = range(last + 1, min((length + interval - 2) // page_size + 1, table.shape[1]))
        for head in range(pages.num_kv_heads):
            score, ends = page_scores(q, pages, table, b, head, last, reduction, spread)
            if has_lookahead:
                score[1:] = np.maximum(score[1:], ends[:-1])
            score = np.append(score, np.inf)  # the open page
            order = sorted(range(count), key=lambda i: (not (i < sink_pages or i in recent), -score[i], i))
            chosen = [*sorted(order[:num_selected]), *reserve]
            result[b, head] = chosen + [NO_PAGE] * (result.shape[2] - len(chosen))
    return jnp.asarray(result)


def page_scores(
    q: jax.Array, pages: PagedKV, table: jax.Array, b: int, head: int, count: int, reduction: str, spread: float
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the scores [count] float32 of the first, sealed pages of one sequence and KV head, and of their ends."""
    assert pages.k_min is not None and pages.k_max is not None
    queries = np.asarray(q[b], np.float32).reshape(pages.num_kv_heads, -1, q.shape[-1])[head]
    scores, ends = [], []
    for logical in range(count):
        page = int(table[b, logical])
        low, high = (np.asarray(x[page, head], np.float32) for x in (pages.k_min, pages.k_max))
        bounds = queries[:, None] * low, queries[:, None] * high  # [G, subs, H]
        by_channel = (1 + spread) / 2 * np.maximum(*bounds) + (1 - spread) / 2 * np.minimum(*bounds)
        by_sub = by_channel.sum(-1)  # [G, subs]
        best, end = (x.max() if reduction == "max" else x.mean() for x in (by_sub.max(axis=1), by_sub[:, -1]))
        scores.append(best)
        ends.append(end)
    return np.array(scores, np.float32), np.array(ends, np.float32)
