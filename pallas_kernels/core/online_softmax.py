"""Softmax over blocks of keys, one at a time (Milakov & Gimelshein 2018; FlashAttention).

Products of float32 arrays, here and in the ops, use the highest precision, since a GPU's default rounds to 11 bits.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

HIDDEN = -1e30
"""The score of a hidden key. Its exponential is zero under every maximum, since no maximum is below `FLOOR`."""

FLOOR = -1e20
"""The maximum of a row that has seen no key: finite, so that it does not become NaN."""


class OnlineSoftmax(NamedTuple):
    """Running state over key blocks, float32: maximum [...], sum of exponentials [...], weighted values [..., W]."""

    maximum: jax.Array
    total: jax.Array
    values: jax.Array

    @classmethod
    def start(cls, rows: tuple[int, ...], columns: int) -> "OnlineSoftmax":
        """Returns the state before any key."""
        zeros = jnp.zeros(rows, jnp.float32)
        return cls(zeros + FLOOR, zeros, jnp.zeros((*rows, columns), jnp.float32))

    def add(
        self,
        scores: jax.Array,
        values: jax.Array,
        *,
        scale: float,
        visible: jax.Array | None = None,
        has_ones: bool = False,
    ) -> "OnlineSoftmax":
        """Returns the state after a block.

        Args:
          scores: [..., R, S] float32 products of queries and keys; those of hidden keys may be anything, even NaN.
          values: [..., S, W], finite even for hidden keys; the product runs in its dtype and accumulates in float32.
          scale: positive factor of the scores.
          visible: broadcastable to [..., R, S] bool; None if every row sees every key.
          has_ones: whether the values are those of `with_ones`, for `finish_ones`; ``total`` then stays zero.
        """
        if visible is not None:
            scores = jnp.where(visible, scores, HIDDEN / scale)
        # The scale is applied after the maximum, to save a pass over the scores on CPUs.
        maximum = jnp.maximum(self.maximum, jnp.max(scores, axis=-1) * scale)
        shifted = scores * scale - maximum[..., None]
        weights = _exp_bfloat16(shifted) if values.dtype == jnp.bfloat16 else jnp.exp(shifted)
        weights = jax.lax.optimization_barrier(weights)  # else XLA computes it once for each use
        products = jnp.einsum(
            "...rs,...sw->...rw", weights, values, precision="highest", preferred_element_type=jnp.float32
        )
        decay = jnp.exp(self.maximum - maximum)
        total = self.total if has_ones else self.total * decay + jnp.sum(weights, axis=-1, dtype=jnp.float32)
        return OnlineSoftmax(maximum, total, self.values * decay[..., None] + products)

    def finish(self) -> jax.Array:
        """Returns the attention output [..., W] float32; zeros for rows that saw no key."""
        return self.values / jnp.where(self.total > 0, self.total, 1.0)[..., None]

    def finish_ones(self, head_dim: int) -> jax.Array:
        """Returns the attention output [..., H] float32 if the values were those of `with_ones`."""
        return OnlineSoftmax(self.maximum, self.values[..., head_dim], self.values[..., :head_dim]).finish()


def with_ones(v: jax.Array, exists: jax.Array) -> jax.Array:
    """Returns values [..., S, `columns_with_ones`] whose column H is one; rows of keys that do not exist are zero.

    The weighted sum of that column is the softmax's denominator, of exactly the weights that the product uses. For many
    rows, this is far less work than a sum over their scores.

    Args:
      v: [..., S, H].
      exists: [..., S] bool.
    """
    head_dim = v.shape[-1]
    width = columns_with_ones(head_dim)
    padding = [(0, 0)] * (v.ndim - 1) + [(0, width - head_dim)]
    columns = jnp.where(jnp.arange(width, dtype=jnp.int32) == head_dim, jnp.ones((), v.dtype), jnp.pad(v, padding))
    return jnp.where(exists[..., None], columns, jnp.zeros((), v.dtype))


def columns_with_ones(head_dim: int) -> int:
    """Returns the number of columns of `with_ones`: H + 1, rounded up to whole tiles of CPUs' matrix units."""
    return -(-(head_dim + 1) // 16) * 16


def _exp_bfloat16(x: jax.Array) -> jax.Array:
    """Returns exp(x) as bfloat16 for float32 x <= 0: 2^n, by the exponent's bits, times a cubic of relative error 1e-4.

    The error is a twentieth of bfloat16's rounding, and the time a third of XLA's. The result is zero from -88 down.
    """
    y = jnp.maximum(x * math.log2(math.e), -127.0)
    whole = jnp.floor(y)
    part = y - whole
    mantissa = 1.0 + part * (0.69583282 + part * (0.22606716 + part * 0.07810012))
    bits = jax.lax.bitcast_convert_type(mantissa, jnp.int32) + (whole.astype(jnp.int32) << 23)
    return jax.lax.bitcast_convert_type(bits, jnp.float32).astype(jnp.bfloat16)
