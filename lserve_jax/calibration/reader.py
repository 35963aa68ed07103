"""Reads prompts into a dense KV cache chunk by chunk, so that memory does not grow quadratically with their length."""

import operator
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from lserve_jax.calibration.pages import Chunk
from lserve_jax.calibration.prompts import Prompt
from lserve_jax.config.errors import InputError
from lserve_jax.config.inference import InferenceConfig
from lserve_jax.models.llama import Params
from lserve_jax.runtime.cache import KVCache, init_cache
from lserve_jax.runtime.steps import prefill_step
from pallas_kernels import PageTables


class Step[T](Protocol):
    """A function that computes a chunk's term of a prompt's result: an array, or a pytree of them."""

    def __call__(self, params: Params, cache: KVCache, chunk: Chunk, *, config: InferenceConfig) -> tuple[T, KVCache]:
        """Returns the chunk's term and the cache with the chunk; ``cache`` may be donated."""
        ...


class Reader:
    """A model and the pages of one sequence, which all prompts use in turn.

    Prompts of all lengths share compiled programs, since lengths are data.
    """

    def __init__(self, params: Params, config: InferenceConfig, prompts: Sequence[Prompt], *, chunk: int) -> None:
        """Allocates the pages of the longest prompt.

        Args:
          params: the model's parameters in the checkpoint's order of heads.
          config: a dense model without quantised pages.
          prompts: all prompts that will be read.
          chunk: prompt tokens per call.

        Raises:
          InputError: if ``config`` is not such a model, or there is no prompt.
        """
        if not prompts:
            raise InputError("prompts must hold at least one prompt, got none")
        if config.num_retrieval != (config.model.num_kv_heads,) * config.model.num_layers:
            raise InputError("config.heads must be None: streaming heads are compared with a dense model")
        if config.kv_dtype != config.dtype:
            raise InputError(f"kv_dtype={config.kv_dtype!r} must be auto: heads are compared on unquantised pages")
        self.params, self.config = params, config
        self._width = max(prompt.num_answer for prompt in prompts)
        self._chunk = chunk
        pages = -(-max(len(prompt.tokens) for prompt in prompts) // config.attention.page_size)
        self._table = jnp.arange(pages, dtype=jnp.int32)
        self.cache = init_cache(config, max_num_seqs=1, retrieval_pages=pages, streaming_pages=1)

    def read(self, prompt: Prompt) -> Chunk:
        """Returns the tokens that predict the answer, after a dense prefill of all earlier tokens."""
        last = _last(prompt)
        tables = PageTables(self._table[None], self._table[None])
        for start in range(0, last, self._chunk):
            piece = prompt.tokens[start : min(start + self._chunk, last)]
            starts, counts = (jnp.full(1, value, jnp.int32) for value in (start, len(piece)))
            tokens = _padded(piece, self._chunk, 0)[None]
            _, self.cache = prefill_step(self.params, self.cache, tokens, starts, counts, tables, config=self.config)
        return self.answer(prompt)

    def answer(self, prompt: Prompt) -> Chunk:
        """Returns the tokens that predict the answer, padded to the longest answer of all prompts; reads nothing."""
        return self._piece(prompt, _last(prompt), self._width)

    def read_through[T](self, prompt: Prompt, step: Step[T], combine: Callable[[Any, Any], Any] = operator.add) -> T:
        """Returns the sum of ``step`` over all chunks of a prompt, answer included; ``combine`` replaces the sum."""
        parts = []
        for start in range(0, len(prompt.tokens) - 1, self._chunk):
            part, self.cache = step(
                self.params, self.cache, self._piece(prompt, start, self._chunk), config=self.config
            )
            parts.append(part)
        return jax.tree.map(lambda *terms: reduce(combine, terms), *parts)

    def _piece(self, prompt: Prompt, start: int, size: int) -> Chunk:
        """Returns ``size`` tokens from ``start`` on, without the prompt's last token, which predicts nothing."""
        tokens = prompt.tokens[start : min(start + size, len(prompt.tokens) - 1)]
        begin = len(prompt.tokens) - prompt.num_answer
        after = range(start + 1, start + 1 + len(tokens))
        return Chunk(
            tokens=_padded(tokens, size, 0),
            targets=_padded([prompt.tokens[at] if at >= begin else -1 for at in after], size, -1),
            asks=_padded([prompt.asks[at - begin] if at >= begin else 0 for at in after], size, 0),
            start=jnp.int32(start),
            count=jnp.int32(len(tokens)),
            table=self._table,
            sources=_padded(prompt.sources, self._table.size * self.config.attention.page_size, 0),
        )


def _last(prompt: Prompt) -> int:
    """Returns the position of the question's last token, which predicts the answer's first one."""
    return len(prompt.tokens) - prompt.num_answer - 1


def _padded(values: Sequence[int], size: int, fill: int) -> jax.Array:
    row = np.full(size, fill, np.int32)
    row[: len(values)] = values
    return jnp.asarray(row)
