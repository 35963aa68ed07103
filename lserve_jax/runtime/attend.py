"""The one interface between model and cache: ``attend`` callables that write to and read from the paged KV cache."""

from dataclasses import asdict
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lserve_jax.config.errors import InputError
from lserve_jax.config.inference import InferenceConfig, LayerKind, Reading
from lserve_jax.config.selectors import BOUND, page_scores
from lserve_jax.models.llama import Attend
from lserve_jax.runtime import selectors as _selectors  # noqa: F401 - registers them
from lserve_jax.runtime.cache import LayerCache
from pallas_kernels import (
    NO_PAGE,
    LayerKV,
    PageTables,
    Selection,
    Walk,
    block_select,
    choose_pages,
    decode_attention,
    kv_write,
    page_select,
    prefill_attention,
    rotate,
)
from pallas_kernels.core.paging import div_up


def _window(reading: Reading, tables: PageTables, page_size: int) -> tuple[int, int]:
    """Returns sink and window, cut to the length of the page tables, so that a larger setting costs nothing."""
    longest = tables.streaming.shape[1] * page_size
    return min(reading.sink, longest), min(reading.local, longest)


def as_stored(config: InferenceConfig, x: jax.Array) -> jax.Array:
    """Returns values [..., H] in the basis of the pages, or outputs in the basis of the model.

    The rotation of 4-bit pages is self-inverse. Keys and queries stay as they are: channels that are large are nearly
    constant within a sub-page.
    """
    return rotate(x) if config.is_rotated else x


def _or_all(pages: jax.Array, reads_all: jax.Array, held: int) -> jax.Array:
    """Returns the page lists ``pages`` [B, K, n], but all ``held`` pages for the sequences ``reads_all`` [B]."""
    size = max(held, pages.shape[-1])
    padded = jnp.pad(pages, ((0, 0), (0, 0), (0, size - pages.shape[-1])), constant_values=NO_PAGE)
    return jnp.where(reads_all[:, None, None], jnp.arange(size, dtype=pages.dtype), padded)


class Span(NamedTuple):
    """The chunks of a call: tokens ``starts[b] … starts[b] + counts[b] − 1`` of prompts of ``ends[b]`` tokens, [B]."""

    starts: jax.Array
    counts: jax.Array
    ends: jax.Array


def history_walk(
    config: InferenceConfig, kind: LayerKind, q: jax.Array, kv: LayerKV, tables: PageTables, span: Span
) -> Walk | None:
    """Returns the blocks of the history that a layer's retrieval heads read; None for all of them.

    Args:
      config: static settings.
      kind: the layer's.
      q: [B, T, N, H] queries after RoPE.
      kv: the layer's pools with the chunk.
      tables: page tables [B, max_pages].
      span: the chunks.
    """
    rule = kind.prefill.blocks
    if rule is None:
        return None
    assert kv.retrieval is not None
    heads = kind.num_retrieval * (q.shape[2] // (kind.num_retrieval + kind.num_streaming))
    # Products with few mean keys: the first implementation that accepts, whatever the others are.
    return Walk(
        retrieval=block_select(q[:, :, :heads], kv.retrieval, jnp.asarray(tables.retrieval), *span, **asdict(rule))
    )


def prefill_attend(
    config: InferenceConfig,
    tables: PageTables,
    starts: jax.Array,
    counts: jax.Array,
    *,
    ends: jax.Array | None = None,
    has_history: bool = True,
) -> Attend:
    """Returns the attention of a prompt chunk: tokens ``starts[b] … starts[b] + counts[b] − 1`` of each sequence.

    Args:
      config: static settings.
      tables: page tables [B, max_pages].
      starts: [B] tokens of each sequence that are already in the cache.
      counts: [B] tokens of each chunk.
      ends: [B] tokens of each whole prompt; may be None unless a layer leaves something out, but not for a prompt's
        last tokens.
      has_history: False promises that all ``starts`` are 0.

    Raises:
      InputError: if ``ends`` is needed and None.
    """
    if ends is None:
        if any(kind.prefill.blocks for kind in config.kinds):
            raise InputError("ends (lengths of prompts) must be given: prefill_sparsity leaves something out")
        ends = starts + counts
    span = Span(starts, counts, ends)

    def attend(
        kind: LayerKind, q: jax.Array, k: jax.Array, v: jax.Array, state: LayerCache
    ) -> tuple[jax.Array, LayerCache]:
        # The write comes before the read: this order lets XLA update the donated pages in place.
        v = as_stored(config, v)
        kv = kv_write(k, v, state.kv, tables, starts, counts, implementation=config.implementation)
        sink, local = _window(kind.prefill, tables, config.attention.page_size)
        out = prefill_attention(
            *(q, k, v, kv, tables, starts, counts),
            sink=sink,
            local=local,
            has_history=has_history,
            walk=history_walk(config, kind, q, kv, tables, span) if has_history else None,
            implementation=config.implementation,
        )
        return as_stored(config, out), state._replace(kv=kv)

    return attend


def decode_attend(
    config: InferenceConfig,
    tables: PageTables,
    lengths: jax.Array,
    decode_steps: jax.Array,
    *,
    reads_all: jax.Array | None = None,
) -> Attend:
    """Returns the attention of one new token per sequence.

    Args:
      config: static settings.
      tables: page tables [B, max_pages].
      lengths: [B] tokens of each sequence, the new one included; 0 for an empty slot.
      decode_steps: [B] decode steps of each sequence since its prefill: every ``selector_interval``-th step, from step
        0 on, selects pages.
      reads_all: [B] bool sequences that read all pages, even in a layer that selects; None for none.
    """
    attention = config.attention

    def select(q: jax.Array, kv: LayerKV, previous: Selection) -> Selection:
        """Returns the selection for queries [B, K · G, H] of the retrieval heads."""
        previous = previous.without_memory(decode_steps == 0)
        is_due = decode_steps % attention.selector_interval == 0
        assert attention.num_selected is not None
        budgets = attention.budgets(div_up(lengths, kv.page_size)) if attention.budget_share else None
        rule = {
            "num_selected": attention.num_selected,
            "interval": attention.selector_interval,
            "sink_pages": attention.sink_pages,
            "memory": attention.selector_memory,
        }
        if attention.selector == BOUND:
            assert kv.retrieval is not None
            return page_select(
                *(q, kv.retrieval, jnp.asarray(tables.retrieval), lengths, previous, is_due, budgets),
                reduction=attention.group_reduction,
                spread=attention.selector_spread,
                implementation=config.implementation,
                **rule,
            )
        scores = page_scores(attention.selector)(q, kv, tables, lengths)
        sizes = {"page_size": kv.page_size, "head_dim": q.shape[-1]}
        return choose_pages(scores, lengths, previous, is_due, budgets, **rule, **sizes)

    def attend(
        kind: LayerKind, q: jax.Array, k: jax.Array, v: jax.Array, state: LayerCache
    ) -> tuple[jax.Array, LayerCache]:
        is_used = (lengths > 0).astype(lengths.dtype)
        kv = kv_write(
            *(k, as_stored(config, v), state.kv, tables, lengths - is_used, is_used),
            implementation=config.implementation,
        )
        selected, least, held = None, attention.least_selected, tables.retrieval.shape[1]
        # If the smallest selection has room for every page of a sequence, or of the pool, all pages are read.
        if state.selected is not None and least is not None and held > least:
            queries = q[:, 0, : kind.num_retrieval * (q.shape[2] // k.shape[2])]
            selection = select(queries, kv, state.selected)
            state, selected = state._replace(selected=selection), selection.pages
            if reads_all is not None:
                selected = _or_all(selected, reads_all, held)
        sink, local = _window(kind.decode, tables, attention.page_size)
        out = decode_attention(
            *(q[:, 0], kv, tables, lengths, selected),
            sink=sink,
            local=local,
            implementation=config.implementation,
        )
        return as_stored(config, out)[:, None], state._replace(kv=kv)

    return attend
