"""Reads prompts with any heads streaming, as data of one program, and compares what the model then predicts."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from lserve_jax.calibration.attention import average, scores, weights
from lserve_jax.calibration.pages import Chunk, LayerHeads, forward, visible_keys
from lserve_jax.calibration.prompts import Prompt
from lserve_jax.calibration.reader import Reader
from lserve_jax.config.heads import classify
from lserve_jax.config.inference import InferenceConfig
from lserve_jax.models import layerwise
from lserve_jax.models.llama import Params
from lserve_jax.runtime.cache import KVCache

_COMPARED_TOGETHER = 4
"""Tokens whose log-probabilities are in memory at once."""


def retrieval_heads(gates: NDArray[np.floating], share: float) -> NDArray[np.bool_]:
    """Returns which heads [L, K] keep the whole context at a static sparsity, as the loader chooses them."""
    classes = classify(gates, share)
    heads = np.arange(classes.num_kv_heads)
    kept = zip(classes.order, classes.num_retrieval, strict=True)
    return np.stack([np.isin(heads, order[:count]) for order, count in kept])


@partial(jax.jit, static_argnames="config", donate_argnames="cache")
def masked_step(
    params: Params,
    cache: KVCache,
    chunk: Chunk,
    is_retrieval: jax.Array,
    local: jax.Array,
    *,
    config: InferenceConfig,
) -> tuple[jax.Array, KVCache]:
    """Returns the hidden states [T, D] of a chunk after the final norm, and the cache with the chunk.

    Args:
      params: the model's parameters in the checkpoint's order of heads.
      cache: the cache of a dense model with the tokens before the chunk; donated.
      chunk: the tokens.
      is_retrieval: [L, K] bool, which heads keep the whole context; the others stream.
      local: scalar int32, the window of the heads that stream.
      config: a dense model; its ``attention`` has the ``sink`` of streaming.
    """
    is_dense, is_streaming = visible_keys(chunk, config.attention.sink, local)

    def attend(layer: int, x: jax.Array, heads: LayerHeads, gate: jax.Array) -> tuple[jax.Array, None]:
        def head(index: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return average(weights(scores(q, k), jnp.where(gate[index], is_dense, is_streaming)), v)

        return heads.map(chunk, head), None

    hidden, _, cache = forward(params, cache, chunk, is_retrieval, attend, config)
    return hidden[0], cache


def answer_states(reader: Reader, prompt: Prompt, is_retrieval: NDArray[np.bool_], local: int) -> jax.Array:
    """Returns the hidden states [T, D] of ``reader.answer(prompt)`` after a prompt that was read with streaming heads.

    Args:
      reader: the model; its ``config.attention`` has the ``sink``.
      prompt: the prompt.
      is_retrieval: [L, K], which heads keep the whole context; the others stream from the prompt's first token on.
      local: the window of the heads that stream.
    """
    step = partial(masked_step, is_retrieval=jnp.asarray(is_retrieval), local=jnp.int32(local))
    hidden = np.asarray(reader.read_through(prompt, step, lambda *parts: jnp.concatenate(parts)))
    answer = reader.answer(prompt)
    return jnp.asarray(np.pad(hidden, ((0, answer.tokens.size), (0, 0)))[answer.start :][: answer.tokens.size])


@partial(jax.jit, static_argnames="config")
def answer_loss(params: Params, hidden: jax.Array, answer: Chunk, *, config: InferenceConfig) -> jax.Array:
    """Returns the mean negative log-likelihood of the targets of ``answer``, from its hidden states [T, D]."""
    nll = answer.nll(layerwise.log_probabilities(params, config, hidden))
    return jnp.sum(nll) / jnp.sum(answer.is_target)


@partial(jax.jit, static_argnames="config")
def divergence(params: Params, wanted: jax.Array, found: jax.Array, *, config: InferenceConfig) -> jax.Array:
    """Returns the Kullback-Leibler divergence [T, ...] float32, in nats, of predictions from those that are wanted.

    Args:
      params: the model's parameters.
      wanted: [T, D] hidden states after the final norm, of the attention that others are compared with.
      found: [T, ..., D] those of other attentions at the same tokens.
      config: static settings.
    """

    def of_token(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
        right, other = (layerwise.log_probabilities(params, config, x) for x in pair)
        return jnp.sum(jnp.exp(right) * (right - other), axis=-1)

    return jax.lax.map(of_token, (wanted, found), batch_size=_COMPARED_TOGETHER)
