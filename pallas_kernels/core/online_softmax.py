"""Softmax over blocks of keys, one at a time (Milakov & Gimelshein 2018; FlashAttention).

Products of float32 arrays, here and in the ops, ask for the highest precision: a GPU's default rounds to 11 bits.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

HIDDEN = -1e30
"""The score of a hidden key. Its exponential is zero under every maximum, for none falls below `FLOOR`."""

FLOOR = -1e20
"""The maximum of a row that has seen no key: finite, so that it does not become NaN."""


class OnlineSoftmax(NamedTuple):
    """Running state over key blocks, float32: maximum [...], sum of exponentials [...], weighted values [..., H]."""

    maximum: jax.Array
    total: jax.Array
    values: jax.Array

    @classmethod
    def start(cls, rows: tuple[int, ...], head_dim: int) -> "OnlineSoftmax":
        """Returns the state that has seen nothing."""
        zeros = jnp.zeros(rows, jnp.float32)
        return cls(zeros + FLOOR, zeros, jnp.zeros((*rows, head_dim), jnp.float32))

    def add(self, scores: jax.Array, visible: jax.Array, v: jax.Array) -> "OnlineSoftmax":
        """Returns the state after a block.

        Args:
          scores: [K, R, S] float32; hidden ones may hold anything, NaN too.
          visible: broadcastable to [K, R, S] bool.
          v: [K, S, H], finite also where hidden; the product runs in its dtype and accumulates in float32.
        """
        scores = jnp.where(visible, scores, HIDDEN)
        maximum = jnp.maximum(self.maximum, jnp.max(scores, axis=-1))
        weights = jnp.exp(scores - maximum[..., None])
        decay = jnp.exp(self.maximum - maximum)
        weights_v = weights.astype(v.dtype)
        products = jnp.einsum("krs,ksh->krh", weights_v, v, precision="highest", preferred_element_type=jnp.float32)
        return OnlineSoftmax(
            maximum, self.total * decay + jnp.sum(weights, axis=-1), self.values * decay[..., None] + products
        )

    def finish(self) -> jax.Array:
        """Returns the attention output [..., H] float32; zeros for rows that saw no key."""
        return self.values / jnp.where(self.total > 0, self.total, 1.0)[..., None]
