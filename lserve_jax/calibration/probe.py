"""Measures what each head loses by streaming at the tokens that predict an answer, directly and as the loss's slope."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lserve_jax.calibration.attention import average, scores, weights
from lserve_jax.calibration.pages import Chunk, LayerHeads, forward, visible_keys
from lserve_jax.config.inference import InferenceConfig
from lserve_jax.models import layerwise
from lserve_jax.models.layers import numbers
from lserve_jax.models.llama import Params
from lserve_jax.runtime.cache import KVCache


class Heads(NamedTuple):
    """The KV heads of a layer at the queries of a chunk.

    Attributes:
      dense, streaming: [K, G, T, H] float32 outputs from the same queries, keys and values.
      outside: [K, G, T] share of the dense attention outside sink and window.
      source: [K, G, T] share of the dense attention on the passage that is asked for.
    """

    dense: jax.Array
    streaming: jax.Array
    outside: jax.Array
    source: jax.Array


class Slopes(NamedTuple):
    """First-order increase of losses when a head's gate falls, [L, K] each.

    Attributes:
      nll: the answer's mean negative log-likelihood.
      divergence: the mean Kullback-Leibler divergence of the predictions from the dense model's.
    """

    nll: jax.Array
    divergence: jax.Array


@partial(jax.jit, static_argnames="config")
def probe(
    params: Params, cache: KVCache, chunk: Chunk, *, config: InferenceConfig
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Returns each measure [L, K] of the dense model's heads, averaged over the chunk's targets, and hidden states.

    The hidden states [1, T, D] are those after the final norm, for `slopes`. The memory is that of the scores [G, T, S]
    of one KV head at a time.

    Args:
      params: the model's parameters in the checkpoint's order of heads.
      cache: the cache of a dense model with the tokens before the chunk.
      chunk: the tokens.
      config: a dense model; its ``attention`` has the ``sink`` and ``local`` of streaming.
    """
    shares = chunk.is_target / jnp.maximum(jnp.sum(chunk.is_target), 1.0)
    compare = _comparison(chunk, config)

    def attend(layer: int, x: jax.Array, heads: LayerHeads, gate: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        found = compare(heads)
        kernel = numbers(params[f"layers_{layer}"]["attention"]["o_proj"]["kernel"], jnp.dtype(config.dtype))
        return found.dense, {name: value @ shares for name, value in _measures(found, kernel, x).items()}

    gates = jnp.ones((config.model.num_layers, config.model.num_kv_heads), jnp.float32)
    hidden, measures, _ = forward(params, cache, chunk, gates, attend, config)
    return {name: jnp.stack([found[name] for found in measures]) for name in measures[0]}, hidden


@partial(jax.jit, static_argnames="config")
def slopes(
    params: Params, cache: KVCache, chunk: Chunk, gates: jax.Array, reference: jax.Array, *, config: InferenceConfig
) -> Slopes:
    """Returns the slopes of losses by gates that blend each head's output.

        output = gate · dense + (1 − gate) · streaming

    The memory is that of `probe` and of the activations of one layer.

    Args:
      params: as for `probe`.
      cache: as for `probe`.
      chunk: as for `probe`.
      gates: [L, K] float32 gates at which the slopes are taken.
      reference: [1, T, D] the dense model's hidden states.
      config: as for `probe`.
    """
    shares = chunk.is_target / jnp.maximum(jnp.sum(chunk.is_target), 1.0)
    compare = _comparison(chunk, config)

    def attend(layer: int, x: jax.Array, heads: LayerHeads, gate: jax.Array) -> tuple[jax.Array, None]:
        found, share = compare(heads), gate[:, None, None, None]
        return share * found.dense + (1 - share) * found.streaming, None

    def losses(gates: jax.Array) -> jax.Array:
        hidden, _, _ = forward(params, cache, chunk, gates, attend, config)
        found, wanted = (layerwise.log_probabilities(params, config, x)[0] for x in (hidden, reference))
        divergence = jnp.sum(jnp.exp(wanted) * (wanted - found), axis=-1)
        return jnp.stack([shares @ chunk.nll(found), shares @ divergence])

    _, pull = jax.vjp(losses, gates)
    return Slopes(*(-pull(direction)[0] for direction in np.eye(2, dtype=np.float32)))


def _comparison(chunk: Chunk, config: InferenceConfig) -> Callable[[LayerHeads], Heads]:
    """Returns the function that computes dense and streaming attention of a layer's heads."""
    is_dense, is_streaming = visible_keys(chunk, config.attention.sink, config.attention.local)
    passages = jnp.pad(chunk.sources, (0, chunk.tokens.size))
    is_source = (passages == chunk.asks[:, None]) & (chunk.asks[:, None] > 0)

    def head(index: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array) -> Heads:
        products = scores(q, k)
        dense, streaming = (weights(products, is_seen) for is_seen in (is_dense, is_streaming))
        outside, source = (jnp.sum(jnp.where(where, dense, 0.0), axis=-1) for where in (~is_streaming, is_source))
        return Heads(average(dense, v), average(streaming, v), outside, source)

    return lambda heads: heads.map(chunk, head)


def _measures(heads: Heads, kernel: jax.Array, x: jax.Array) -> dict[str, jax.Array]:
    """Returns each measure [K, T] of a layer's heads.

    Args:
      heads: the heads' outputs and shares.
      kernel: [D, N · H] the layer's output projection.
      x: [1, T, D] the layer's input hidden states.
    """
    dense, lost = heads.dense, heads.dense - heads.streaming
    grouped = kernel.reshape(kernel.shape[0], *dense.shape[:2], -1)

    def project(outputs: jax.Array) -> jax.Array:
        outputs = outputs.astype(kernel.dtype)
        return jnp.einsum("kgth,dkgh->ktd", outputs, grouped, precision="highest", preferred_element_type=jnp.float32)

    def norm(vectors: jax.Array) -> jax.Array:
        return jnp.linalg.norm(vectors.astype(jnp.float32), axis=-1) + 1e-6

    harm = norm(project(lost))
    return {
        "mass": jnp.mean(heads.outside, axis=1),
        "mass_max": jnp.max(heads.outside, axis=1),
        "needle": jnp.mean(heads.source, axis=1),
        "needle_max": jnp.max(heads.source, axis=1),
        "error": jnp.mean(norm(lost) / norm(dense), axis=1),
        "output_error": harm / norm(jnp.sum(project(dense), axis=0)),
        "residual_error": harm / norm(x[0]),
    }
