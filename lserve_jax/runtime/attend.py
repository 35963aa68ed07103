"""The one interface between model and cache: ``attend`` callables that write to and read from the paged KV cache."""

import jax
import jax.numpy as jnp

from lserve_jax.config.inference import InferenceConfig, LayerKind, Reading
from lserve_jax.models.llama import Attend
from lserve_jax.runtime.cache import LayerCache
from pallas_kernels import PageTables, decode_attention, kv_write, page_select, prefill_attention, rotate


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


def prefill_attend(
    config: InferenceConfig, tables: PageTables, starts: jax.Array, counts: jax.Array, *, has_history: bool = True
) -> Attend:
    """Returns the attention of a prompt chunk: tokens ``starts[b] … starts[b] + counts[b] − 1`` of each sequence.

    Without ``has_history`` all ``starts`` must be 0.
    """

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
            implementation=config.implementation,
        )
        return as_stored(config, out), state._replace(kv=kv)

    return attend


def decode_attend(config: InferenceConfig, tables: PageTables, lengths: jax.Array, decode_steps: jax.Array) -> Attend:
    """Returns the attention of one new token per sequence.

    Args:
      config: static settings.
      tables: page tables [B, max_pages].
      lengths: [B] tokens of each sequence, the new one included; 0 for an empty slot.
      decode_steps: [B] decode steps of each sequence since its prefill: every ``selector_interval``-th step, from step
        0 on, selects pages.
    """
    attention = config.attention

    def attend(
        kind: LayerKind, q: jax.Array, k: jax.Array, v: jax.Array, state: LayerCache
    ) -> tuple[jax.Array, LayerCache]:
        is_used = (lengths > 0).astype(lengths.dtype)
        kv = kv_write(
            *(k, as_stored(config, v), state.kv, tables, lengths - is_used, is_used),
            implementation=config.implementation,
        )
        selected, num_selected = None, kind.decode.num_selected
        # If a selection has room for every page of a sequence, or of the pool, all pages are read.
        held = tables.retrieval.shape[1]
        if state.selected is not None and num_selected is not None and held > num_selected:
            assert kv.retrieval is not None
            group = q.shape[2] // k.shape[2]
            state = state._replace(
                selected=page_select(
                    *(q[:, 0, : kv.num_retrieval * group], kv.retrieval, jnp.asarray(tables.retrieval)),
                    *(lengths, state.selected),
                    decode_steps % attention.selector_interval == 0,
                    num_selected=num_selected,
                    interval=attention.selector_interval,
                    sink_pages=attention.sink_pages,
                    reduction=attention.group_reduction,
                    spread=attention.selector_spread,
                    has_lookahead=attention.has_lookahead,
                    implementation=config.implementation,
                )
            )
            selected = state.selected
        sink, local = _window(kind.decode, tables, attention.page_size)
        out = decode_attention(
            *(q[:, 0], kv, tables, lengths, selected),
            sink=sink,
            local=local,
            implementation=config.implementation,
        )
        return as_stored(config, out)[:, None], state._replace(kv=kv)

    return attend
