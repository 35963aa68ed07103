"""The model as functions of its parameters: begin, one layer, end; and the whole with one trace per kind of layer."""

from typing import Any, cast

import jax
import jax.numpy as jnp

from lserve_jax.config.inference import InferenceConfig, LayerKind
from lserve_jax.models.layers import each_layer
from lserve_jax.models.llama import Attend, Layer, Llama, Params, RopeTables


def run_model(
    params: Params,
    state: tuple[Any, ...],
    tokens: jax.Array,
    positions: jax.Array,
    attend: Attend,
    config: InferenceConfig,
) -> tuple[jax.Array, tuple[Any, ...]]:
    """Returns the hidden states [B, T, D] of tokens [B, T] after the final norm, and the new state of each layer.

    Layers of one `LayerKind` are traced once: tracing takes most of a start whose programs hit the compilation cache.

    Args:
      params: the model's parameters, heads in the order of ``config.heads``.
      state: one entry per layer, the state of ``attend``.
      tokens: [B, T] int32.
      positions: [B, T] int32 absolute positions.
      attend: the attention; it gets the layer's `LayerKind`.
      config: static settings.
    """
    x, rope = begin(params, config, tokens, positions)

    def layer(kind: LayerKind, params: Params, x: jax.Array, rope: RopeTables, state: Any) -> tuple[jax.Array, Any]:
        return _layer(params, config, kind, x, rope, state, attend)

    traced_once = jax.jit(layer, static_argnums=0)
    x, new_state = each_layer(
        x, state, lambda index, x, old: traced_once(config.kinds[index], params[f"layers_{index}"], x, rope, old)
    )
    return end(params, config, x), new_state


def begin(
    params: Params, config: InferenceConfig, tokens: jax.Array, positions: jax.Array
) -> tuple[jax.Array, RopeTables]:
    """Returns embeddings [B, T, D] and rotary tables of tokens and positions [B, T] int32."""
    return _apply(params, config, "begin", tokens, positions)


def run_layer(
    params: Params, config: InferenceConfig, layer: int, x: jax.Array, rope: RopeTables, state: Any, attend: Attend
) -> tuple[jax.Array, Any]:
    """Returns the hidden states [B, T, D] after one layer, and the state that ``attend`` returns."""
    return _layer(params[f"layers_{layer}"], config, config.kind(layer), x, rope, state, attend)


def end(params: Params, config: InferenceConfig, x: jax.Array) -> jax.Array:
    """Returns hidden states [..., D] after the final norm."""
    return _apply(params, config, "end", x)


def unembed(params: Params, config: InferenceConfig, hidden: jax.Array) -> jax.Array:
    """Returns logits [..., V] float32 of hidden states [..., D] after the final norm."""
    return _apply(params, config, "unembed", hidden)


def log_probabilities(params: Params, config: InferenceConfig, hidden: jax.Array) -> jax.Array:
    """Returns log-probabilities [..., V] float32 of the next token, for hidden states [..., D] after the final norm."""
    return jax.nn.log_softmax(unembed(params, config, hidden), axis=-1)


def _layer(
    params: Params, config: InferenceConfig, kind: LayerKind, x: jax.Array, rope: RopeTables, state: Any, attend: Attend
) -> tuple[jax.Array, Any]:
    layer = Layer(config.model, jnp.dtype(config.dtype))
    return cast(Any, layer.apply({"params": params}, x, rope, kind, state, attend))


def _apply(params: Params, config: InferenceConfig, method: str, *args: jax.Array) -> Any:
    return Llama(config.model, jnp.dtype(config.dtype)).apply({"params": params}, *args, method=method)
