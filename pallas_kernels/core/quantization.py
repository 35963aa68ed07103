"""Arrays quantised along their last axis to 8 or 4 bits, asymmetric: scale and zero per row (LServe 3.3, QServe)."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

SMALLEST_RELATIVE_SCALE = 2.0**-20
"""Floor of ``scale / max|x|``: a constant row would divide by zero, a nearly constant one overflow."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class QuantizedArray:
    """``x ≈ (code − zero) · scale`` with unsigned codes.

    Attributes:
      codes: [..., H] uint8 for 8 bits; [..., H // 2] uint8 for 4 bits, element i in the low half of byte i and element
        i + H // 2 in its high half.
      scale: [...] float32.
      zero: [...] float32, not rounded.
      bits: 8 or 4.
    """

    codes: jax.Array
    scale: jax.Array
    zero: jax.Array
    bits: int = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that this stands for."""
        return (*self.codes.shape[:-1], self.codes.shape[-1] * (8 // self.bits))


def bits_of(array: jax.Array | QuantizedArray) -> int:
    """Returns the bits per element: 8 or 4 of codes, or those of the dtype."""
    return array.bits if isinstance(array, QuantizedArray) else array.dtype.itemsize * 8


def quantize(x: jax.Array, bits: int) -> QuantizedArray:
    """Returns ``x`` [..., H] quantised row by row: ``code = clip(round((x − min) / scale), 0, 2**bits − 1)``.

    ``scale = (max − min) / (2**bits − 1)`` and ``zero = −min / scale``, computed in float32; a constant row is exact.
    The code is ``round(x / scale + zero)``, written so that no compiler fuses it with a different rounding.

    Raises:
      ValueError: if ``bits`` is neither 8 nor 4, or H is odd.
    """
    if bits not in (8, 4):
        raise ValueError(f"{bits=} must be 8 or 4")
    if x.shape[-1] % 2:
        raise ValueError(f"last axis of {x.shape} must be even")
    x = x.astype(jnp.float32)
    low, high = jnp.min(x, axis=-1), jnp.max(x, axis=-1)
    largest = jnp.maximum(jnp.maximum(high, -low), jnp.finfo(jnp.float32).tiny / SMALLEST_RELATIVE_SCALE)
    scale = jnp.maximum((high - low) * (1 / (2**bits - 1)), largest * SMALLEST_RELATIVE_SCALE)
    zero = -low / scale
    codes = jnp.clip(jnp.round((x - low[..., None]) / scale[..., None]), 0, 2**bits - 1).astype(jnp.uint8)
    if bits == 4:
        first, second = jnp.split(codes, 2, axis=-1)
        codes = first | (second << 4)
    return QuantizedArray(codes=codes, scale=scale, zero=zero, bits=bits)


def rotate(x: jax.Array) -> jax.Array:
    """Returns ``x`` [..., H] in another orthonormal basis, which spreads large channels over all; its own inverse.

    A Hadamard matrix of the largest power of two that divides H, block by block: ``rotate(q) · rotate(k) = q · k``.
    Four bits per channel with one scale per row then lose less (QuaRot, Ashkboos et al. 2024).
    """
    head_dim = x.shape[-1]
    size = head_dim & -head_dim
    signs = np.ones((1, 1), np.float32)
    while len(signs) < size:
        signs = np.block([[signs, signs], [signs, -signs]])
    # Signs are exact in any dtype; a GPU's default precision would round float32 numbers to 11 bits.
    rotated = jnp.einsum(
        "...ij,jk->...ik",
        x.reshape(*x.shape[:-1], -1, size),
        jnp.asarray(signs, x.dtype),
        precision="highest",
        preferred_element_type=jnp.float32,
    )
    return (rotated * size**-0.5).astype(x.dtype).reshape(x.shape)


def dequantize(array: jax.Array | QuantizedArray, dtype: jnp.dtype) -> jax.Array:
    """Returns ``(code − zero) · scale`` as ``dtype``, computed in float32; an ordinary array is only converted."""
    if not isinstance(array, QuantizedArray):
        return array.astype(dtype)
    codes = array.codes
    if array.bits == 4:
        codes = jnp.concatenate([codes & 15, codes >> 4], axis=-1)
    wide = (codes.astype(jnp.float32) - array.zero[..., None]) * array.scale[..., None]
    return wide.astype(dtype)
