"""Keys and values in 8 or 4 bits: values row by row, keys channel by channel within the bounds of a sub-page.

Channels of keys that are large are nearly constant over neighbouring tokens, so the range of a channel in a sub-page is
small (KIVI, Liu et al. 2024). Values have no such channels: each row has a scale and an offset (LServe 3.3, QServe).
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class QuantizedArray:
    """``x ≈ code · scale + low`` with unsigned codes, for instance values.

    Attributes:
      codes: [..., H] uint8 for 8 bits; [..., H // 2] uint8 for 4 bits, element i in the low half of byte i and element
        i + H // 2 in its high half.
      scale: [...] float16.
      low: [...] float16.
      bits: 8 or 4.
    """

    codes: jax.Array
    scale: jax.Array
    low: jax.Array
    bits: int = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that this stands for."""
        return _shape(self)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class QuantizedKeys:
    """``k[j, d] ≈ k_min[sub, d] + code[j, d] · (k_max[sub, d] − k_min[sub, d]) / (2**bits − 1)``, with sub that of j.

    The bounds belong to the page (`PagedKV`), whose selection reads them too.

    Attributes:
      codes: [..., tokens, H] or [..., tokens, H // 2] uint8, as those of `QuantizedArray`.
      bits: 8 or 4.
    """

    codes: jax.Array
    bits: int = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that this stands for."""
        return _shape(self)


def _shape(array: QuantizedArray | QuantizedKeys) -> tuple[int, ...]:
    return (*array.codes.shape[:-1], array.codes.shape[-1] * (8 // array.bits))


def bits_of(array: jax.Array | QuantizedArray | QuantizedKeys) -> int:
    """Returns the bits per element: 8 or 4 of codes, or those of the dtype."""
    return array.bits if isinstance(array, QuantizedArray | QuantizedKeys) else array.dtype.itemsize * 8


def quantize(x: jax.Array, bits: int) -> QuantizedArray:
    """Returns ``x`` [..., H] quantised row by row: ``code = clip(round((x − low) / scale), 0, 2**bits − 1)``.

    ``low = min x`` and ``scale = max(max x − low, 0) / (2**bits − 1)``, both rounded to float16 before the codes are
    chosen. A constant row of numbers that float16 has is exact. Beyond float16's ±65504, both take its last number.

    Raises:
      ValueError: if ``bits`` is neither 8 nor 4, or H is odd.
    """
    _check(x, bits)
    x = x.astype(jnp.float32)
    low = _half(jnp.min(x, axis=-1))
    offset = low.astype(jnp.float32)
    # Of a constant row, rounding may have taken the offset above the numbers.
    scale = _half(jnp.maximum(jnp.max(x, axis=-1) - offset, 0.0) * (1 / (2**bits - 1)))
    codes = _codes(x - offset[..., None], scale.astype(jnp.float32)[..., None], bits)
    return QuantizedArray(codes=codes, scale=scale, low=low, bits=bits)


def _half(x: jax.Array) -> jax.Array:
    """Returns float32 numbers as float16, which has none beyond ±65504."""
    largest = float(jnp.finfo(jnp.float16).max)
    # Without the barrier, XLA for GPUs leaves out a conversion to float16 and back.
    return jax.lax.optimization_barrier(jnp.clip(x, -largest, largest).astype(jnp.float16))


def key_bounds(keys: jax.Array, sub_page_size: int) -> tuple[jax.Array, jax.Array]:
    """Returns the least and the greatest number of each channel of keys [..., tokens, H], [..., subs, H] of sub-pages.

    The number of tokens is a multiple of ``sub_page_size``.
    """
    by_sub = keys.reshape(*keys.shape[:-2], -1, sub_page_size, keys.shape[-1])
    return jnp.min(by_sub, axis=-2), jnp.max(by_sub, axis=-2)


def quantize_keys(keys: jax.Array, k_min: jax.Array, k_max: jax.Array, bits: int) -> QuantizedKeys:
    """Returns keys [..., tokens, H] quantised within their bounds [..., subs, H] (see `key_bounds`), in float32.

    ``code = clip(round((k − k_min) / step), 0, 2**bits − 1)`` with the ``step`` of `QuantizedKeys`. A channel that is
    constant over a sub-page is exact.

    Raises:
      ValueError: if ``bits`` is neither 8 nor 4, or H is odd.
    """
    _check(keys, bits)
    low, step = _steps(k_min, k_max, bits)
    codes = _codes(_by_sub(keys.astype(jnp.float32), k_min) - low, step, bits)
    return QuantizedKeys(codes=codes.reshape(*keys.shape[:-1], -1), bits=bits)


def dequantize_keys(
    keys: jax.Array | QuantizedKeys, k_min: jax.Array | None, k_max: jax.Array | None, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """Returns keys [..., tokens, H] as ``dtype``, computed in float32; an ordinary array is only converted."""
    if not isinstance(keys, QuantizedKeys):
        return keys.astype(dtype)
    assert k_min is not None and k_max is not None
    low, step = _steps(k_min, k_max, keys.bits)
    codes = _by_sub(_unpacked(keys).astype(jnp.float32), k_min)
    return (codes * step + low).astype(dtype).reshape(keys.shape)


def _steps(k_min: jax.Array, k_max: jax.Array, bits: int) -> tuple[jax.Array, jax.Array]:
    """Returns the least numbers and the steps between codes, float32 [..., subs, 1, H]."""
    low, high = (x.astype(jnp.float32)[..., None, :] for x in (k_min, k_max))
    return low, (high - low) * (1 / (2**bits - 1))


def _by_sub(x: jax.Array, k_min: jax.Array) -> jax.Array:
    """Returns ``x`` [..., tokens, H] as [..., subs, tokens of a sub-page, H], for bounds [..., subs, H]."""
    return x.reshape(*k_min.shape[:-1], -1, k_min.shape[-1])


def _check(x: jax.Array, bits: int) -> None:
    if bits not in (8, 4):
        raise ValueError(f"{bits=} must be 8 or 4")
    if x.shape[-1] % 2:
        raise ValueError(f"last axis of {x.shape} must be even")


def _codes(above: jax.Array, step: jax.Array, bits: int) -> jax.Array:
    """Returns the packed codes of how far numbers [..., H] are above the least one; all 0 where the step is 0."""
    codes = jnp.clip(jnp.round(above * reciprocals(step)), 0, 2**bits - 1).astype(jnp.uint8)
    if bits == 4:
        first, second = jnp.split(codes, 2, axis=-1)
        codes = first | (second << 4)
    return codes


def reciprocals(step: jax.Array) -> jax.Array:
    """Returns what distances are multiplied by to get codes: finite, and 1 where the step is 0.

    Not divisions: XLA makes products with reciprocals of those whose divisors are broadcast, and rounds the others.
    """
    return jnp.minimum(1 / jnp.where(step > 0, step, 1.0), jnp.finfo(jnp.float32).max)


def _unpacked(array: QuantizedArray | QuantizedKeys) -> jax.Array:
    codes = array.codes
    return jnp.concatenate([codes & 15, codes >> 4], axis=-1) if array.bits == 4 else codes


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


def dequantize(array: jax.Array | QuantizedArray, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Returns ``code · scale + low`` as ``dtype``, computed in float32; an ordinary array is only converted."""
    if not isinstance(array, QuantizedArray):
        return array.astype(dtype)
    scale, low = (x.astype(jnp.float32)[..., None] for x in (array.scale, array.low))
    return (_unpacked(array).astype(jnp.float32) * scale + low).astype(dtype)
