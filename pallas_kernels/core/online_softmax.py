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

_LOG2_E = math.log2(math.e)

_INTEGERS = 1.5 * 2**23
"""The last bits of this float32 number plus a small whole number are those of the whole number."""


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
        exists: jax.Array | None = None,
    ) -> "OnlineSoftmax":
        """Returns the state after a block.

        Args:
          scores: [..., R, S] float32 products of queries and keys; those of hidden keys may be anything, even NaN.
          values: [..., S, W], finite even for hidden keys; the product runs in its dtype and accumulates in float32.
          scale: positive factor of the scores.
          visible: broadcastable to [..., R, S] bool; None if every row sees every key.
          exists: broadcastable to [..., R, S] bool; None if all keys exist. Keys that do not exist weigh nothing, but
            their scores take part in the maximum. This costs no pass over the scores, as ``visible`` does.
        """
        if visible is not None:
            scores = jnp.where(visible, scores, HIDDEN / scale)
        # The scale is applied after the maximum, to save a pass over the scores on CPUs.
        maximum = jnp.maximum(self.maximum, jnp.max(scores, axis=-1) * scale)
        if values.dtype == jnp.bfloat16:
            weights = _exp2_bfloat16(scores * (scale * _LOG2_E) - (maximum * _LOG2_E)[..., None])
        else:
            weights = jnp.exp(scores * scale - maximum[..., None])
        if exists is not None:
            weights = jnp.where(exists, weights, jnp.zeros((), weights.dtype))
        weights = jax.lax.optimization_barrier(weights)  # else XLA computes it once for each use
        products = jnp.einsum(
            "...rs,...sw->...rw", weights, values, precision="highest", preferred_element_type=jnp.float32
        )
        decay = jnp.exp(self.maximum - maximum)
        total = self.total * decay + jnp.sum(weights, axis=-1, dtype=jnp.float32)
        return OnlineSoftmax(maximum, total, self.values * decay[..., None] + products)

    def finish(self) -> jax.Array:
        """Returns the attention output [..., W] float32; zeros for rows that saw no key."""
        return self.values / jnp.where(self.total > 0, self.total, 1.0)[..., None]


def _exp2_bfloat16(x: jax.Array) -> jax.Array:
    """Returns 2^x as bfloat16 for float32 x up to about 0: 2^n, by the exponent's bits, times a cubic.

    The cubic's relative error of 1e-4 is a fortieth of bfloat16's last digit, and the time a quarter of XLA's. The
    result is zero from -127 down.
    """
    x = jnp.maximum(x, -127.0)
    whole = jnp.floor(x)
    part = x - whole
    # 1 + 2^-8 instead of 1 rounds what is cut off below. XLA's own conversion takes as long as all of this.
    mantissa = (1.0 + 2.0**-8) + part * (0.69583282 + part * (0.22606716 + part * 0.07810012))
    bits = _bits(mantissa) + (_bits(whole + _INTEGERS) << 23)
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.int16), jnp.bfloat16)


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.int32)
