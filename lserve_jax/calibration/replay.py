"""Reads a prompt once, as serving does, and decodes its answer in many rows at once, each with its own dense layers."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from lserve_jax.calibration.masked import divergence
from lserve_jax.calibration.prompts import Prompt
from lserve_jax.config.inference import InferenceConfig, LayerKind
from lserve_jax.models.layerwise import run_model
from lserve_jax.models.llama import Attend, Params
from lserve_jax.runtime.attend import decode_attend, prefill_attend
from lserve_jax.runtime.cache import KVCache, LayerCache, init_cache
from pallas_kernels import NO_PAGE, PageTables

STEPS = 64
"""Most tokens of an answer that are decoded."""

type _State = tuple[LayerCache, jax.Array, jax.Array]
"""What `attend` gets of a layer: its cache, its order of KV heads [K], and which rows [B] read all of its pages."""


def in_order(attend: Attend, order: jax.Array) -> Attend:
    """Returns an ``attend``, which has retrieval heads first, for weights in the checkpoint's order of heads.

    So the weights are needed once. ``order`` [K] int32 has the checkpoint's KV heads, as `HeadClasses` orders them.
    """

    def attend_in_order[S](kind: LayerKind, q: jax.Array, k: jax.Array, v: jax.Array, state: S) -> tuple[jax.Array, S]:
        groups = (*q.shape[:2], k.shape[2], -1, q.shape[3])
        q = q.reshape(groups)[:, :, order].reshape(q.shape)
        out, state = attend(kind, q, k[:, :, order], v[:, :, order], state)
        return out.reshape(groups)[:, :, jnp.argsort(order)].reshape(q.shape), state

    return attend_in_order


@partial(jax.jit, static_argnames="config", donate_argnames="cache")
def read_step(
    params: Params,
    cache: KVCache,
    tokens: jax.Array,
    start: jax.Array,
    count: jax.Array,
    tables: PageTables,
    *,
    config: InferenceConfig,
) -> KVCache:
    """Returns the cache with a chunk of one sequence; ``params`` have the checkpoint's order of heads.

    Args:
      params: the model's parameters.
      cache: donated.
      tokens: [T] int32.
      start: scalar int32 position of the first token.
      count: scalar int32 valid tokens.
      tables: page tables [1, max_pages] int32, and the slot.
      config: static settings.
    """
    attend = prefill_attend(config, tables, start[None], count[None])

    def ordered(
        kind: LayerKind, q: jax.Array, k: jax.Array, v: jax.Array, state: tuple[LayerCache, jax.Array]
    ) -> tuple[jax.Array, LayerCache]:
        cache, order = state
        return in_order(attend, order)(kind, q, k, v, cache)

    positions = start + jnp.arange(tokens.size, dtype=jnp.int32)
    states = tuple(zip(cache, _orders(config), strict=True))
    return run_model(params, states, tokens[None], positions[None], ordered, config)[1]


@partial(jax.jit, static_argnames="config", donate_argnames="cache")
def replay(
    params: Params,
    cache: KVCache,
    tokens: jax.Array,
    start: jax.Array,
    count: jax.Array,
    tables: PageTables,
    is_dense: jax.Array,
    *,
    config: InferenceConfig,
) -> tuple[jax.Array, KVCache]:
    """Returns the hidden states [T, B, D] after each decoded token and the final norm, and the cache.

    Args:
      params: the model's parameters in the checkpoint's order of heads.
      cache: holds ``start`` tokens in every row; donated.
      tokens: [T] int32 that all rows decode, whatever the model would choose.
      start: scalar int32 tokens before them.
      count: scalar int32 how many of them are decoded; rows of the result after them are 0.
      tables: page tables [B, max_pages] int32; row b has slot b.
      is_dense: [B, L] bool layers in which a row reads all pages.
      config: static settings.
    """
    rows, orders = is_dense.shape[0], _orders(config)

    def step(index: jax.Array, carry: tuple[jax.Array, KVCache]) -> tuple[jax.Array, KVCache]:
        hidden, cache = carry
        lengths, steps = (jnp.full(rows, value, jnp.int32) for value in (start + index + 1, index))

        def attend(
            kind: LayerKind, q: jax.Array, k: jax.Array, v: jax.Array, state: _State
        ) -> tuple[jax.Array, LayerCache]:
            cache, order, reads_all = state
            served = decode_attend(config, tables, lengths, steps, reads_all=reads_all)
            return in_order(served, order)(kind, q, k, v, cache)

        states = tuple(zip(cache, orders, is_dense.T, strict=True))
        fed = jnp.full((rows, 1), tokens[index], jnp.int32)
        found, cache = run_model(params, states, fed, (lengths - 1)[:, None], attend, config)
        return hidden.at[index].set(found[:, 0]), cache

    nothing = jnp.zeros((tokens.size, rows, config.model.hidden_size), config.dtype)
    return jax.lax.fori_loop(jnp.int32(0), count, step, (nothing, cache))


def _orders(config: InferenceConfig) -> jax.Array:
    """Returns the checkpoint's KV heads [L, K] int32 of each layer, retrieval heads first."""
    assert config.heads is not None
    return jnp.asarray(config.heads.order, jnp.int32)


class Replayer:
    """A model that selects pages, and the pages of one prompt, which all rows share, and of each row's new tokens."""

    def __init__(
        self, params: Params, config: InferenceConfig, prompts: Sequence[Prompt], *, rows: int, chunk: int
    ) -> None:
        """Allocates the pages of the longest prompt.

        Args:
          params: the model's parameters in the checkpoint's order of heads.
          config: streaming heads and page selection as they will be used.
          prompts: all prompts that will be read.
          rows: sets of dense layers that are compared at once.
          chunk: prompt tokens per prefill call.
        """
        self.params, self.config, self._chunk = params, config, chunk
        page_size, self._rows = config.attention.page_size, rows + 1  # the first row reads all pages
        self._shared = -(-max(len(prompt.tokens) for prompt in prompts) // page_size)
        self._own = STEPS // page_size + 2
        pages = self._shared + self._rows * self._own
        self._cache = init_cache(config, max_num_seqs=self._rows, retrieval_pages=pages, streaming_pages=pages)

    def divergences(self, prompt: Prompt, dense: NDArray[np.bool_]) -> NDArray[np.floating]:
        """Returns how far page selection moves the predictions of an answer, in nats per token: one number per row.

        It is the mean Kullback-Leibler divergence from what the model predicts where all layers read all pages.

        Args:
          prompt: its answer is decoded, up to `STEPS` tokens of it.
          dense: [rows, L] layers that read all pages.
        """
        start = len(prompt.tokens) - prompt.num_answer
        self._read(prompt.tokens[:start])
        answer = prompt.tokens[start:][:STEPS]
        tables = self._tables(start)
        hidden, self._cache = replay(
            *(self.params, self._cache, _padded(answer, STEPS), np.int32(start), np.int32(len(answer)), tables),
            np.pad(dense, ((1, 0), (0, 0)), constant_values=True),
            config=self.config,
        )
        found = divergence(self.params, hidden[:, 0], hidden[:, 1:], config=self.config)
        return np.asarray(found)[: len(answer)].mean(axis=0)

    def _read(self, tokens: tuple[int, ...]) -> None:
        """Reads a prompt into slot 0 and gives all rows its open page."""
        table = np.arange(self._shared, dtype=np.int32)[None]
        tables = PageTables(table, table, np.zeros(1, np.int32))
        for start in range(0, len(tokens), self._chunk):
            piece = tokens[start : start + self._chunk]
            at = np.int32(start), np.int32(len(piece))
            self._cache = read_step(
                *(self.params, self._cache, _padded(piece, self._chunk), *at, tables), config=self.config
            )
        self._cache = _with_first_tail(self._cache)

    def _tables(self, length: int) -> PageTables:
        """Returns the page tables of all rows: the prompt's sealed pages, then pages of their own."""
        sealed = length // self.config.attention.page_size
        table = np.full((self._rows, self._shared + self._own), NO_PAGE, np.int32)
        table[:, :sealed] = np.arange(sealed)
        own = np.arange(self._rows * self._own, dtype=np.int32).reshape(self._rows, -1)
        table[:, sealed : sealed + self._own] = self._shared + own
        return PageTables(table, table)


@partial(jax.jit, donate_argnames="cache")
def _with_first_tail(cache: KVCache) -> KVCache:
    """Returns the cache with the open page of slot 0 in all slots."""

    def spread(x: jax.Array) -> jax.Array:
        return jnp.broadcast_to(x[:1], x.shape)

    return tuple(layer._replace(kv=layer.kv._replace(tail=jax.tree.map(spread, layer.kv.tail))) for layer in cache)


def _padded(tokens: tuple[int, ...], size: int) -> NDArray[np.int32]:
    row = np.zeros(size, np.int32)
    row[: len(tokens)] = tokens
    return row
