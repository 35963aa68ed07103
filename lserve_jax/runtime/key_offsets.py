"""Finds layers whose keys 4-bit pages cannot hold: those with an offset, the same in every key, that is far larger."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from lserve_jax.config.inference import InferenceConfig
from lserve_jax.models.llama import Params
from lserve_jax.models.rope import apply_rope, rope_tables
from pallas_kernels import dequantize, quantize, rotate

_TOKENS = 64


@partial(jax.jit, static_argnames=("config",))
def key_noise(layer: Any, config: InferenceConfig) -> jax.Array:
    """Returns [K]: by how much the offset of each KV head's keys raises the error of 4-bit pages.

    The keys are those of random hidden states, with the biases and norms of the layer. 1 means no offset; 4 means that
    4 bits hold of the keys what 2 bits hold without the offset.
    """
    model = config.model
    attention = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), layer["attention"])
    hidden = jax.random.normal(jax.random.key(0), (_TOKENS, model.hidden_size)) * layer["input_norm"]["scale"].astype(jnp.float32)
    keys = jnp.einsum("td,khd->tkh", hidden, attention["k_proj"]["kernel"], precision="highest")
    keys += attention["k_proj"].get("bias", 0.0)
    tables = rope_tables(model.rope, model.head_dim, jnp.arange(_TOKENS))

    def error(keys: jax.Array) -> jax.Array:
        stored = rotate(apply_rope(keys, tables))
        return jnp.sqrt(jnp.mean((dequantize(quantize(stored, 4), jnp.float32) - stored) ** 2, axis=(0, 2)))

    own = keys - jnp.mean(keys, axis=0)
    return error(keys) / error(own)
