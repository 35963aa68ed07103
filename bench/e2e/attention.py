"""The attention of all layers without the rest of the model."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from lserve_jax.config.inference import InferenceConfig
from lserve_jax.runtime.attend import decode_attend, prefill_attend
from lserve_jax.runtime.cache import KVCache
from pallas_kernels import PageTables


@partial(jax.jit, static_argnames=("config", "steps"), donate_argnames="cache")
def attention_loop(
    cache: KVCache,
    q: jax.Array,
    kv: jax.Array,
    lengths: jax.Array,
    tables: PageTables,
    *,
    config: InferenceConfig,
    steps: int,
) -> tuple[Any, KVCache]:
    """Returns the outputs of the last of ``steps`` decode steps' write, selection and attention, and the cache."""

    def step(index: jax.Array, carry: tuple[Any, KVCache]) -> tuple[Any, KVCache]:
        attend = decode_attend(config, tables, lengths + index, jnp.full_like(lengths, index))
        return _all_layers(attend, config, carry[1], q, kv)

    return jax.lax.fori_loop(0, steps, step, ((jnp.zeros_like(q),) * len(cache), cache))


@partial(jax.jit, static_argnames="config", donate_argnames="cache")
def attention_chunk(
    cache: KVCache,
    q: jax.Array,
    kv: jax.Array,
    starts: jax.Array,
    counts: jax.Array,
    tables: PageTables,
    *,
    config: InferenceConfig,
) -> tuple[Any, KVCache]:
    """Returns the outputs of every layer's write and attention for a chunk, and the cache."""
    return _all_layers(prefill_attend(config, tables, starts, counts, ends=starts + counts), config, cache, q, kv)


def _all_layers(
    attend: Any, config: InferenceConfig, cache: KVCache, q: jax.Array, kv: jax.Array
) -> tuple[Any, KVCache]:
    results = [attend(kind, q, kv, kv, state) for kind, state in zip(config.kinds, cache, strict=True)]
    outs, layers = zip(*results, strict=True)
    return outs, layers
