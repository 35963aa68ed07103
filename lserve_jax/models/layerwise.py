"""A model layer by layer, so that gradients hold the activations of one layer and not of all (rematerialisation)."""

from typing import Any

import jax
import jax.numpy as jnp

from lserve_jax.config.inference import InferenceConfig
from lserve_jax.models.llama import Attend, Llama, Params, RopeTables
from lserve_jax.models.rope import rope_tables


def embed(params: Params, config: InferenceConfig, tokens: jax.Array) -> jax.Array:
    """Returns hidden states [1, T, D] before the first layer, for tokens [T]."""
    return _apply(params, config, lambda model: model.embed(tokens[None]))


def rotary(config: InferenceConfig, positions: jax.Array) -> RopeTables:
    """Returns the rotary tables of positions [T]."""
    return rope_tables(config.model.rope, config.model.head_dim, positions[None])


def run_layer(
    params: Params, config: InferenceConfig, layer: int, x: jax.Array, rope: RopeTables, state: Any, attend: Attend
) -> tuple[jax.Array, Any]:
    """Returns the hidden states [1, T, D] after a layer, and what ``attend`` makes of ``state``."""
    return _apply(params, config, lambda model: model.layers[layer](x, rope, layer, state, attend))


def final_norm(params: Params, config: InferenceConfig, x: jax.Array) -> jax.Array:
    """Returns hidden states [1, T, D] after the final norm."""
    return _apply(params, config, lambda model: model.final_norm(x))


def log_probabilities(params: Params, config: InferenceConfig, hidden: jax.Array) -> jax.Array:
    """Returns log-probabilities [1, T, V] float32 of the next token, for hidden states [1, T, D] after the norm."""
    return jax.nn.log_softmax(_apply(params, config, lambda model: model.unembed(hidden)), axis=-1)


def _apply(params: Params, config: InferenceConfig, method: Any) -> Any:
    return Llama(config.model, jnp.dtype(config.dtype)).apply({"params": params}, method=method)
