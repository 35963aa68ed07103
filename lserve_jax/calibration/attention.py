"""Differentiable attention of one KV head over contiguous keys, with access to masks and weights."""

import jax
import jax.numpy as jnp


def scores(q: jax.Array, k: jax.Array) -> jax.Array:
    """Returns ``q · k / sqrt(H)`` [G, T, S] float32 for queries [G, T, H] of a KV head's group and keys [S, H]."""
    products = jnp.einsum("gth,sh->gts", q, k, precision="highest", preferred_element_type=jnp.float32)
    return products * q.shape[-1] ** -0.5


def weights(scores: jax.Array, is_seen: jax.Array) -> jax.Array:
    """Returns the softmax over the keys that each query sees, [T, S]; each query must see at least one."""
    return jax.nn.softmax(jnp.where(is_seen, scores, -jnp.inf), axis=-1)


def average(weights: jax.Array, v: jax.Array) -> jax.Array:
    """Returns outputs [G, T, H] float32 for weights [G, T, S] and values [S, H]; multiplies in the values' dtype."""
    weights = weights.astype(v.dtype)
    return jnp.einsum("gts,sh->gth", weights, v, precision="highest", preferred_element_type=jnp.float32)


def by_kv_head(q: jax.Array, num_kv_heads: int) -> jax.Array:
    """Returns a model's queries [T, N, H] as [K, G, T, H]."""
    tokens, _, head_dim = q.shape
    return jnp.moveaxis(q.reshape(tokens, num_kv_heads, -1, head_dim), 0, 2)


def by_query_head(outputs: jax.Array) -> jax.Array:
    """Returns outputs [K, G, T, H] in a model's layout [T, N, H]."""
    tokens, head_dim = outputs.shape[2:]
    return jnp.moveaxis(outputs, 2, 0).reshape(tokens, -1, head_dim)
