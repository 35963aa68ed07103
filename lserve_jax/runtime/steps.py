"""The compiled programs: a prompt chunk, one decode step, and a loop of decode steps with sampling.

Pure functions of pytrees. ``cache`` is donated: use the returned one. Only the shapes of arguments are static; lengths
of contexts, page tables, sampling settings and numbers of steps are data, and nothing recompiles when they change.
"""

import json
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import export

from lserve_jax.config.inference import InferenceConfig
from lserve_jax.config.sampling import MOST_TOP_LOGPROBS
from lserve_jax.models.layerwise import run_model, unembed
from lserve_jax.models.llama import Params
from lserve_jax.runtime.adjustments import Adjustments, adjust
from lserve_jax.runtime.attend import decode_attend, prefill_attend
from lserve_jax.runtime.cache import KVCache, LayerCache
from lserve_jax.runtime.sampling import SamplingState, likeliest, sample, token_logprobs
from pallas_kernels import LayerKV, PagedKV, PageTables, QuantizedArray, QuantizedKeys, Selection, Tail
from pallas_kernels.core.dtypes import narrowed


class DecodeState(NamedTuple):
    """The decoding state of a batch, one row per slot.

    Attributes:
      tokens: [B] int32 each sequence's newest token, which is not in the cache yet.
      lengths: [B] int32 tokens of each sequence, the newest included.
      decode_steps: [B] int32 decode steps since the sequence's prefill: the phase of its page selection.
      remaining: [B] int32 tokens that may still be generated; 0 for an empty slot.
      stop_tokens: [B, S] int32 tokens that end a sequence, padded with -1.
    """

    tokens: jax.Array
    lengths: jax.Array
    decode_steps: jax.Array
    remaining: jax.Array
    stop_tokens: jax.Array


class Generated(NamedTuple):
    """The result of decode steps, [steps, B], or of one token per sequence, [B].

    Attributes:
      tokens: int32 the tokens that each sequence took; -1 where it had ended.
      logprobs: float32 their log-probabilities under the model's unmodified distribution.
      choices: int32 the tokens that sampling chose: the same, unless others were forced.
      top_tokens: [..., N] int32 the likeliest tokens, best first (see `likeliest`); 0 if no sequence asked for them.
      top_logprobs: [..., N] float32 their log-probabilities.
      logits: [..., V] float32 the model's, before any change; None if they were not asked for.
    """

    tokens: jax.Array
    logprobs: jax.Array
    choices: jax.Array
    top_tokens: jax.Array
    top_logprobs: jax.Array
    logits: jax.Array | None = None


class Scores(NamedTuple):
    """Log-probabilities of a prompt chunk's following tokens.

    Attributes:
      logprobs: [B, T] float32 of the token that follows each one.
      top_tokens: [B, T, N] int32 the likeliest tokens there, best first (see `likeliest`).
      top_logprobs: [B, T, N] float32 their log-probabilities.
    """

    logprobs: jax.Array
    top_tokens: jax.Array
    top_logprobs: jax.Array


_SCORED_TOGETHER = 64
"""Tokens whose logits are in memory at once during the scoring of a chunk."""


@partial(jax.jit, static_argnames=("config", "has_history", "has_all_logits"), donate_argnames="cache")
def prefill_step(
    params: Params,
    cache: KVCache,
    tokens: jax.Array,
    starts: jax.Array,
    counts: jax.Array,
    tables: PageTables,
    ends: jax.Array | None = None,
    *,
    config: InferenceConfig,
    has_history: bool = True,
    has_all_logits: bool = False,
) -> tuple[jax.Array, KVCache]:
    """Returns the logits [B, V] float32 of the last token of each sequence's chunk, and the cache with the chunk.

    Args:
      params: the model's parameters, heads in the order of ``config.heads``.
      cache: from `init_cache`; donated.
      tokens: [B, T] int32; T is the chunk size, a static shape.
      starts: [B] int32 tokens of each sequence that are already in the cache.
      counts: [B] int32 valid tokens of each row, 0 … T.
      tables: page tables [B, max_pages] int32 with the pages of the history that is still visible and of the chunk, and
        the slot of each row, which will decode it; rows without tokens may name any.
      ends: [B] int32 tokens of each sequence's whole prompt; may be None unless ``prefill_sparsity`` leaves something
        out, but not for a prompt's last tokens.
      config: static settings.
      has_history: False promises that all ``starts`` are 0: a smaller program for prompts of one chunk.
      has_all_logits: whether to return the logits of every token, [B, T, V].

    Raises:
      InputError: if ``ends`` is needed and None.
    """
    arguments = (params, cache, tokens, starts, counts, tables, ends)
    params, cache, tokens, starts, counts, tables, ends = narrowed(arguments)
    span = starts, counts, ends
    hidden, cache = _prefill(params, cache, tokens, span, tables, config, has_history=has_history)
    return unembed(params, config, hidden if has_all_logits else _last(hidden, counts)), cache


@partial(jax.jit, static_argnames=("config", "has_history"), donate_argnames="cache")
def score_step(
    params: Params,
    cache: KVCache,
    tokens: jax.Array,
    starts: jax.Array,
    counts: jax.Array,
    tables: PageTables,
    ends: jax.Array,
    following: jax.Array,
    has_top: jax.Array,
    *,
    config: InferenceConfig,
    has_history: bool = True,
) -> tuple[jax.Array, Scores, KVCache]:
    """Returns what `prefill_step` does, and between logits and cache the scores of the chunk's following tokens.

    Args:
      params: as for `prefill_step`, like all that is not said here.
      cache: donated.
      tokens: [B, T] int32.
      starts: [B] int32.
      counts: [B] int32.
      tables: page tables [B, max_pages] int32.
      ends: [B] int32.
      following: [B, T] int32 the token after each one.
      has_top: scalar bool, whether the likeliest tokens are wanted too.
      config: static settings.
      has_history: False promises that all ``starts`` are 0.
    """
    arguments = (params, cache, tokens, tables, following)
    params, cache, tokens, tables, following = narrowed(arguments)
    span = narrowed((starts, counts, ends))
    hidden, cache = _prefill(params, cache, tokens, span, tables, config, has_history=has_history)
    batch, length = tokens.shape
    block = min(_SCORED_TOGETHER, length)

    def in_blocks(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, [(0, 0), (0, -length % block), *[(0, 0)] * (x.ndim - 2)])
        return padded.reshape(batch, -1, block, *x.shape[2:]).swapaxes(0, 1)

    def score(block: tuple[jax.Array, jax.Array]) -> Scores:
        logits = unembed(params, config, block[0])
        return Scores(token_logprobs(logits, block[1]), *likeliest(logits, has_top))

    found = jax.lax.map(score, (in_blocks(hidden), in_blocks(following)))
    scores = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(batch, -1, *x.shape[3:])[:, :length], found)
    return unembed(params, config, _last(hidden, span[1])), scores, cache


def _prefill(
    params: Params,
    cache: KVCache,
    tokens: jax.Array,
    span: tuple[jax.Array, jax.Array, jax.Array | None],
    tables: PageTables,
    config: InferenceConfig,
    *,
    has_history: bool,
) -> tuple[jax.Array, KVCache]:
    """Returns the hidden states [B, T, D] of a chunk, and the cache with it; ``span`` is (starts, counts, ends)."""
    starts, counts, ends = span
    positions = starts[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
    attend = prefill_attend(config, tables, starts, counts, ends=ends, has_history=has_history)
    return run_model(params, cache, tokens, positions, attend, config)


def _last(hidden: jax.Array, counts: jax.Array) -> jax.Array:
    """Returns the hidden states [B, D] of the last of ``counts`` [B] tokens."""
    last = jnp.maximum(counts - 1, 0)[:, None, None]
    return jnp.take_along_axis(hidden, last, axis=1)[:, 0]


def _decode(
    params: Params,
    cache: KVCache,
    tokens: jax.Array,
    lengths: jax.Array,
    decode_steps: jax.Array,
    tables: PageTables,
    config: InferenceConfig,
) -> tuple[jax.Array, KVCache]:
    positions = jnp.maximum(lengths - 1, 0)[:, None]
    attend = decode_attend(config, tables, lengths, decode_steps)
    hidden, cache = run_model(params, cache, tokens[:, None], positions, attend, config)
    return unembed(params, config, hidden[:, 0]), cache


@partial(jax.jit, static_argnames="config", donate_argnames="cache")
def decode_step(
    params: Params,
    cache: KVCache,
    tokens: jax.Array,
    lengths: jax.Array,
    decode_steps: jax.Array,
    tables: PageTables,
    *,
    config: InferenceConfig,
) -> tuple[jax.Array, KVCache]:
    """Returns the logits [B, V] float32 after one new token per sequence, and the cache with these tokens.

    Args:
      params: the model's parameters, heads in the order of ``config.heads``.
      cache: from `init_cache` with B slots; donated. Row b of every argument belongs to slot b.
      tokens: [B] int32 the new tokens.
      lengths: [B] int32 tokens of each sequence, the new one included; 0 for an empty slot.
      decode_steps: [B] int32 decode steps of each sequence since its prefill.
      tables: page tables [B, max_pages] int32 with a page for the new token.
      config: static settings.
    """
    return _decode(*narrowed((params, cache, tokens, lengths, decode_steps, tables)), config)


def _take(
    logits: jax.Array,
    positions: jax.Array,
    sampling: SamplingState,
    forced: jax.Array | None,
    adjustments: Adjustments | None,
    new: jax.Array,
) -> Generated:
    """Returns the next token of each sequence; forced tokens win. ``new``: see `adjust`."""
    adjusted = logits if adjustments is None else adjust(logits, positions, adjustments, new)
    choices = sample(adjusted, positions, sampling)
    tokens = choices if forced is None else jnp.where(forced >= 0, forced, choices)
    return Generated(tokens, token_logprobs(logits, tokens), choices, *likeliest(logits, jnp.any(sampling.num_top > 0)))


@partial(jax.jit, static_argnames=("config", "max_steps", "has_logits"), donate_argnames="cache")
def decode_loop(
    params: Params,
    cache: KVCache,
    state: DecodeState,
    tables: PageTables,
    sampling: SamplingState,
    num_steps: jax.Array,
    forced: jax.Array | None = None,
    adjustments: Adjustments | None = None,
    *,
    config: InferenceConfig,
    max_steps: int,
    has_logits: bool = False,
) -> tuple[Generated, DecodeState, KVCache]:
    """Returns the result of up to ``num_steps`` decode steps, the state after them, and the cache.

    A sequence ends at a stop token or when no token remains; the loop ends with its last sequence. The host takes no
    part in between, so the tables must have the pages of all steps.

    Args:
      params: the model's parameters.
      cache: donated.
      state: the state of each slot before the steps.
      tables: page tables [B, max_pages] int32.
      sampling: settings of each slot.
      num_steps: scalar int32, at most ``max_steps``.
      forced: [max_steps, B] int32 tokens that replace the sampled ones; -1 where sampling decides. None forces nothing.
      adjustments: changes of the logits of each slot; None changes nothing.
      config: static settings.
      max_steps: rows of the result.
      has_logits: whether the result has the logits of every step.
    """
    arguments = (params, cache, state, tables, sampling, num_steps, forced, adjustments)
    params, cache, state, tables, sampling, num_steps, forced, adjustments = narrowed(arguments)
    empty = _no_tokens(state.tokens.shape[0], config.model.vocab_size, has_logits=has_logits)
    nothing = jax.tree.map(lambda row: jnp.broadcast_to(row, (max_steps, *row.shape)), empty)

    def is_running(carry: tuple[jax.Array, Generated, DecodeState, KVCache]) -> jax.Array:
        return (carry[0] < num_steps) & jnp.any(carry[2].remaining > 0)

    def step(
        carry: tuple[jax.Array, Generated, DecodeState, KVCache],
    ) -> tuple[jax.Array, Generated, DecodeState, KVCache]:
        index, out, state, cache = carry
        is_active = state.remaining > 0
        lengths = jnp.where(is_active, state.lengths, 0)
        logits, cache = _decode(params, cache, state.tokens, lengths, state.decode_steps, tables, config)
        due = None if forced is None else forced[index]
        taken = _take(logits, state.lengths, sampling, due, adjustments, out.tokens)
        taken = taken._replace(logits=logits if has_logits else None)
        new = jax.tree.map(lambda x, none: jnp.where(_like(is_active, x), x, none), taken, empty)
        state = _advanced(state, new.tokens, is_active)
        out = jax.tree.map(lambda rows, row: rows.at[index].set(row), out, new)
        return index + 1, out, state, cache

    _, out, state, cache = jax.lax.while_loop(is_running, step, (jnp.int32(0), nothing, state, cache))
    return out, state, cache


def _no_tokens(slots: int, vocabulary: int, *, has_logits: bool) -> Generated:
    """Returns the result of a step in which no slot takes a token."""
    num_top = min(MOST_TOP_LOGPROBS, vocabulary)
    return Generated(
        tokens=jnp.full(slots, -1, jnp.int32),
        logprobs=jnp.zeros(slots, jnp.float32),
        choices=jnp.full(slots, -1, jnp.int32),
        top_tokens=jnp.zeros((slots, num_top), jnp.int32),
        top_logprobs=jnp.zeros((slots, num_top), jnp.float32),
        logits=jnp.zeros((slots, vocabulary), jnp.float32) if has_logits else None,
    )


def _like(rows: jax.Array, x: jax.Array) -> jax.Array:
    """Returns rows [B] with further dimensions of size 1, for `jnp.where` with ``x`` [B, ...]."""
    return rows.reshape(-1, *[1] * (x.ndim - 1))


def _advanced(state: DecodeState, tokens: jax.Array, is_active: jax.Array) -> DecodeState:
    """Returns the state after one step that gave ``tokens`` [B] to the active slots (``is_active`` [B])."""
    is_stop = jnp.any(tokens[:, None] == state.stop_tokens, axis=1)
    one = is_active.astype(jnp.int32)
    return DecodeState(
        tokens=jnp.where(is_active, tokens, state.tokens),
        lengths=state.lengths + one,
        decode_steps=state.decode_steps + one,
        remaining=jnp.where(is_stop, 0, state.remaining - one),
        stop_tokens=state.stop_tokens,
    )


@jax.jit
def sample_first(
    logits: jax.Array,
    positions: jax.Array,
    sampling: SamplingState,
    forced: jax.Array | None = None,
    adjustments: Adjustments | None = None,
) -> Generated:
    """Returns the tokens [B] sampled from prefill logits [B, V]; ``forced`` [B] and the rest as in `decode_loop`."""
    nothing_new = jnp.zeros((0, logits.shape[0]), jnp.int32)
    return _take(*narrowed((logits, positions, sampling, forced, adjustments)), nothing_new)


# An exported step (`jax.export`) can be written to a file only if the types of its arguments are registered by name.
for _kind in (
    LayerCache,
    LayerKV,
    PagedKV,
    Tail,
    Selection,
    PageTables,
    SamplingState,
    Adjustments,
    DecodeState,
    Generated,
    Scores,
):
    export.register_namedtuple_serialization(_kind, serialized_name=f"lserve_jax.{_kind.__name__}")
for _kind in (QuantizedArray, QuantizedKeys):
    export.register_pytree_node_serialization(
        _kind,
        serialized_name=f"lserve_jax.{_kind.__name__}",
        serialize_auxdata=lambda static: json.dumps(static).encode(),
        deserialize_auxdata=lambda text: tuple(json.loads(text)),
    )
