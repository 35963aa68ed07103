"""The integers that stand for rows of inputs in a product of integers: one digit of 8 bits, or two for a few rows."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.core.quantized_matrix import largest_of_rows, quantize_rows

FEW_ROWS = 8
"""Rows that get two digits. A product of so few rows takes the time of reading the weights, whatever the rows are."""

_BASE = 256


class Digits(NamedTuple):
    """Rows of integers ``Σ_i digit_i · 256**i``, the most significant digits first.

    Attributes:
      codes: [digits · R, D] int8.
      scale: [R, 1] float32 what the integer 1 stands for.
    """

    codes: jax.Array
    scale: jax.Array

    def combine(self, totals: jax.Array) -> jax.Array:
        """Returns the product [R, F] float32 with the rows, of the products [digits · R, F] int32 with the codes."""
        wide = totals.astype(jnp.float32)
        rows = self.scale.shape[0]
        if rows < len(self.codes):
            wide = wide[:rows] * _BASE + wide[rows:]
        return wide * self.scale


def digits(x: jax.Array, bits: int) -> Digits:
    """Returns rows [R, D] as integers of 16 bits, or more than `FEW_ROWS` of 8 bits as `quantize_rows` makes them."""
    if bits == 8 and len(x) > FEW_ROWS:
        rows = quantize_rows(x)
        return Digits(rows.codes, rows.scale)
    wide = x.astype(jnp.float32)
    largest = largest_of_rows(wide)
    scale = jnp.where(largest == 0, 1.0, largest * jnp.float32(1 / (127 * _BASE)))
    whole = jnp.rint(wide / scale).astype(jnp.int32)
    high = (whole + _BASE // 2) >> 8
    codes = jnp.concatenate([high, whole - high * _BASE]).astype(jnp.int8)
    return Digits(codes, scale)
