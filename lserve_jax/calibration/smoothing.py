"""Finds smoothing factors: how large each input of a model's linear maps is, relative to its token and its weights."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lserve_jax.calibration.pages import Chunk
from lserve_jax.calibration.progress import Done
from lserve_jax.calibration.prompts import Prompt
from lserve_jax.calibration.reader import Reader
from lserve_jax.config.inference import InferenceConfig
from lserve_jax.models import layerwise
from lserve_jax.models.layers import each_layer, parts_of
from lserve_jax.models.llama import Layer, Params
from lserve_jax.runtime.attend import prefill_attend
from lserve_jax.runtime.cache import KVCache, LayerCache
from lserve_jax.weights.smoothing import SITES, STEPS, Smoothing
from lserve_jax.weights.tensors import get_leaf
from pallas_kernels import PageTables
from pallas_kernels.core.quantized_matrix import expand


def find_smoothing(
    params: Params,
    config: InferenceConfig,
    prompts: Sequence[Prompt],
    *,
    chunk: int = 512,
    done: Done | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Smoothing:
    """Returns factors ``sqrt(x / w)`` for each channel of the inputs of a layer's linear maps (`SITES`).

    x is the largest value of the channel relative to the root mean square of its token, over the tokens of all prompts:
    a token has one scale, so what counts is how channels compare within it, and one large token decides nothing. w is
    the root mean square of the channel's weights. The range of both, in bits, then becomes the same (SmoothQuant,
    equation 4, with its α = 0.5).

    Args:
      params: the model's parameters, not smoothed, in the checkpoint's order of heads.
      config: a dense model.
      prompts: prompts of any lengths.
      chunk: prompt tokens per call.
      done: largest values by prompt, which are not computed again.
      on_progress: called with the prompts done.
    """
    reader, done = Reader(params, config, prompts, chunk=chunk), {} if done is None else done
    largest: dict[str, np.ndarray] = {}
    for number, prompt in enumerate(prompts, start=1):
        names = [f"layers_{layer}.{site}" for layer in range(config.model.num_layers) for site in SITES]
        keys = {name: f"channels {prompt.digest} {name}" for name in names}
        if not done.keys() >= set(keys.values()):
            found = reader.read_through(prompt, channel_sizes, jnp.maximum)
            done.update({keys[name]: np.asarray(found[name]) for name in names})
        for name, key in keys.items():
            largest[name] = np.maximum(largest.get(name, 0.0), done[key])
        if on_progress is not None:
            on_progress(number)
    return Smoothing({name: exponents(sizes, _weight_sizes(params, name)) for name, sizes in largest.items()})


def exponents(inputs: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns [D] int8, the factors ``sqrt(inputs / weights)`` as `Smoothing` stores them, 1 in the mean."""
    logs = (np.log2(np.maximum(inputs, 1e-6)) - np.log2(np.maximum(weights, 1e-6))) / 2
    return np.clip(np.rint((logs - logs.mean()) * STEPS), -127, 127).astype(np.int8)


def _weight_sizes(params: Params, name: str) -> np.ndarray:
    """Returns the root mean square [D] of the weights of each input of a linear map."""
    kernel = get_leaf(params, (*name.split("."), "kernel"))
    parts = [expand(part, jnp.float32) for part in parts_of(kernel)]
    rows = jnp.concatenate([part.reshape(-1, part.shape[-1]) for part in parts])
    return np.asarray(jnp.sqrt(jnp.mean(jnp.square(rows), axis=0)))


_CAPTURED = ("input_norm", "post_attention_norm", "gate_up_proj")


@partial(jax.jit, static_argnames="config", donate_argnames="cache")
def channel_sizes(
    params: Params, cache: KVCache, chunk: Chunk, *, config: InferenceConfig
) -> tuple[dict[str, jax.Array], KVCache]:
    """Returns, per linear map of `SITES`, the largest ``|x_c| / rms(x)`` [D] of a chunk's tokens, and the cache."""
    positions = chunk.start + jnp.arange(chunk.tokens.size, dtype=jnp.int32)
    x, rope = layerwise.begin(params, config, chunk.tokens[None], positions[None])
    table = chunk.table[None]
    attend = prefill_attend(config, PageTables(table, table), chunk.start[None], chunk.count[None])
    is_token = jnp.arange(chunk.tokens.size) < chunk.count

    def run(layer: int, x: jax.Array, state: LayerCache) -> tuple[jax.Array, tuple[dict[str, jax.Array], LayerCache]]:
        model: Any = Layer(config.model, jnp.dtype(config.dtype))
        (x, state), seen = model.apply(
            *({"params": params[f"layers_{layer}"]}, x, rope, config.kind(layer), state, attend),
            capture_intermediates=lambda module, _: module.name in _CAPTURED,
            mutable=["intermediates"],
        )
        seen = seen["intermediates"]
        gate_up = seen["mlp"]["gate_up_proj"]["__call__"][0]
        inputs = {
            "attention.qkv_proj": seen["input_norm"]["__call__"][0],
            "mlp.gate_up_proj": seen["post_attention_norm"]["__call__"][0],
            "mlp.down_proj": nn.silu(gate_up[..., 0, :]) * gate_up[..., 1, :],
        }
        return x, ({f"layers_{layer}.{site}": _relative(y[0], is_token) for site, y in inputs.items()}, state)

    _, results = each_layer(x, cache, run)
    sizes, new_cache = zip(*results, strict=True)
    return {name: value for layer in sizes for name, value in layer.items()}, tuple(new_cache)


def _relative(x: jax.Array, is_token: jax.Array) -> jax.Array:
    """Returns the largest |x| [D], relative to the root mean square of its token, for ``x`` [T, D]."""
    wide = jnp.abs(x.astype(jnp.float32))
    relative = wide / jnp.sqrt(jnp.maximum(jnp.mean(jnp.square(wide), axis=-1, keepdims=True), 1e-30))
    return jnp.max(jnp.where(is_token[:, None], relative, 0.0), axis=0)
