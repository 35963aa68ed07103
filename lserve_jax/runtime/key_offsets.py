"""Finds layers whose keys quantised pages cannot hold: biases in channels that turn within a sub-page.

Rotary positions turn pairs of channels. Where they turn slowly, a bias is a constant, which the bounds of a sub-page
hold; where they turn fast, it hides what sets the keys apart.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from lserve_jax.config.inference import InferenceConfig
from lserve_jax.models.layers import RMSNorm, numbers
from lserve_jax.models.llama import Params
from lserve_jax.models.rope import apply_rope, rope_tables
from pallas_kernels import dequantize_keys, quantize_keys
from pallas_kernels.core.quantization import key_bounds

MOST_NOISE = 4.0
"""From here on pages hold no more of a key than 2 bits would without biases.

SmolLM2-135M with a bias in one channel of all key heads, in pages with one scale per key: where the noise of its layers
was at most 2, 4-bit pages cost a KL divergence of 0.02 (0.016 without biases); at most 3.7, 0.04; at most 6.4, 0.15;
and at most 14, 0.57.
"""
_BITS = {"int8": 8, "int4": 4}
_TOKENS = 64


def key_offset_warning(params: Params, config: InferenceConfig) -> str | None:
    """Returns one line that names the layers whose keys are lost in the pages, or None.

    Args:
      params: the loaded parameters.
      config: the engine's configuration.
    """
    if config.kv_dtype not in _BITS or not config.model.qkv_bias:
        return None
    worst = _worst_noise(params, config, config.kv_dtype)
    lost = [layer for layer, noise in enumerate(worst) if noise >= MOST_NOISE]
    if not lost:
        return None
    biases = [params[f"layers_{layer}"]["attention"]["qkv_proj"]["bias"][:, -2] for layer in lost]
    largest = max(float(jnp.abs(bias).max()) for bias in biases)
    suits_int8 = config.kv_dtype == "int4" and max(_worst_noise(params, config, "int8")) < MOST_NOISE
    return (
        f"kv_dtype {config.kv_dtype} does not suit this model: biases of up to {largest:.3g} in the keys of "
        f"layer{'s' * (len(lost) > 1)} {', '.join(map(str, lost))} leave pages an error {max(worst):.1f} times that of "
        f"4 bits without biases; expect nonsense, or use --kv-dtype {'int8' if suits_int8 else 'auto'}"
    )


def _worst_noise(params: Params, config: InferenceConfig, kv_dtype: str) -> list[float]:
    """Returns the largest `key_noise` of each layer among the heads whose pages have that type."""
    noise = [
        key_noise(params[f"layers_{layer}"], config, kv_dtype=kv_dtype) for layer in range(config.model.num_layers)
    ]
    # Retrieval heads come first. If their pages have 4 bits, those of streaming heads have 8.
    heads = config.num_retrieval if kv_dtype == "int4" else [config.model.num_kv_heads] * len(noise)
    return [float(max(np.asarray(found)[:count], default=0)) for found, count in zip(noise, heads, strict=True)]


@partial(jax.jit, static_argnames=("config", "kv_dtype"))
def key_noise(layer: Params, config: InferenceConfig, *, kv_dtype: str) -> jax.Array:
    """Returns [K]: the error of each head's keys in pages, over that of 4-bit pages of what sets these keys apart.

    Args:
      layer: the parameters of one layer; its keys are those of random hidden states.
      config: the engine's configuration.
      kv_dtype: "int4" or "int8".
    """
    model = config.model
    wide = jnp.dtype("float32")
    projection = layer["attention"]["qkv_proj"]
    # Each KV head's key comes before its value.
    kernel, bias = numbers(projection["kernel"], wide, join_axis=1)[:, -2], projection["bias"][:, -2].astype(wide)
    normal = jax.random.normal(jax.random.key(0), (_TOKENS, model.hidden_size), jnp.float32)
    hidden = normal * layer["input_norm"]["scale"].astype(wide)
    keys = jnp.einsum("td,khd->tkh", hidden, kernel, precision="highest") + bias
    if model.qk_norm:
        norm = RMSNorm(model.rms_norm_eps, wide)
        scale = layer["attention"]["k_norm"]["scale"].astype(wide)
        keys = norm.apply({"params": {"scale": scale}}, keys)
    assert isinstance(keys, jax.Array)
    tables = rope_tables(model.rope, model.head_dim, jnp.arange(_TOKENS))

    def error(keys: jax.Array, bits: int) -> jax.Array:
        stored = jnp.swapaxes(apply_rope(keys, tables), 0, 1)
        bounds = key_bounds(stored, config.sub_page_size)
        back = dequantize_keys(quantize_keys(stored, *bounds, bits), *bounds, wide)
        return jnp.sqrt(jnp.mean(jnp.square(back - stored), axis=(1, 2)))

    return error(keys, _BITS[kv_dtype]) / error(keys - jnp.mean(keys, axis=0), 4)
