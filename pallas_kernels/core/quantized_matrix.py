"""Matrices of weights in 8 or 4 bits: integer codes, with a scale and optionally an offset per group of inputs.

One layout for all files and all products (QServe, GPTQ, AWQ, GGUF and compressed-tensors differ only in how they pack).
"""

from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

CENTRE = 8
"""What is subtracted from a 4-bit code of a matrix without offsets: the codes 0 … 15 stand for -8 … 7."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class QuantizedMatrix:
    """``w[..., i] = n[..., i] · scale[..., i // group] + low[..., i // group]`` with n the integers of the codes.

    A row (the last axis) holds the D inputs of one output; ``group`` divides D. The leaves are jax or numpy arrays.

    Attributes:
      codes: [..., D] int8 or float8_e4m3fn, which stand for themselves; [..., D // 2] uint8 for 4 bits: byte j of a
        group has element j in its low half and element j + group // 2 in its high half. Those are 0 … 15 with offsets,
        and -8 … 7 (the code minus 8) without.
      scale: [..., D // group] float16, bfloat16 or float32; or a matrix of the same kind with that shape, for files
        that quantise their scales too.
      low: offsets like ``scale``; None for none.
      input_bits: 8 or 16 if a product quantises its other side too, per row, and multiplies integers (W8A8): this needs
        int8 codes, one group per row and no offsets. None if inputs stay numbers.
    """

    codes: Any
    scale: Any
    low: Any = None
    input_bits: int | None = field(default=None, metadata={"static": True})

    @property
    def bits(self) -> int:
        """Returns the bits per code: 8 or 4."""
        return 4 if self.codes.dtype == jnp.uint8 else 8

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns the shape of the matrix that this stands for."""
        return (*self.codes.shape[:-1], self.codes.shape[-1] * (8 // self.bits))

    @property
    def group(self) -> int:
        """Returns how many neighbouring inputs share a scale."""
        return self.shape[-1] // self.scale.shape[-1]

    @property
    def has_row_scales(self) -> bool:
        """Returns whether each row has one scale and no offset: it can be applied after a product."""
        return self.group == self.shape[-1] and self.low is None

    def reshape(self, *rows: int) -> "QuantizedMatrix":
        """Returns the same matrix with its leading axes in the shape ``rows``; the last axis stays."""
        return jax.tree.map(lambda leaf: leaf.reshape(*rows, leaf.shape[-1]), self)


def quantized_matrices(tree: Any) -> list[QuantizedMatrix]:
    """Returns the quantised matrices of a pytree; not the scales of others that are quantised too."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, QuantizedMatrix))
    return [leaf for leaf in leaves if isinstance(leaf, QuantizedMatrix)]


def integers(matrix: QuantizedMatrix, xp: ModuleType = jnp) -> Any:
    """Returns the codes [..., D] as int8 numbers, unpacked and centred; float8 codes stay float8."""
    codes = matrix.codes
    if matrix.bits == 8:
        return codes
    packed = codes.reshape(*codes.shape[:-1], -1, matrix.group // 2)
    whole = xp.concatenate([packed & 15, packed >> 4], axis=-1).reshape(matrix.shape).astype(np.int8)
    return whole if matrix.low is not None else whole - np.int8(CENTRE)


def pack(codes: Any, group: int, xp: ModuleType = jnp) -> Any:
    """Returns the codes [..., D] 0 … 15 as bytes [..., D // 2] uint8, in the order of `QuantizedMatrix`."""
    low, high = xp.split(codes.astype(np.uint8).reshape(*codes.shape[:-1], -1, group), 2, axis=-1)
    return (low | (high << 4)).reshape(*codes.shape[:-1], -1)


def expand(matrix: Any, dtype: Any, xp: ModuleType = jnp) -> Any:
    """Returns the matrix [..., D] as ``dtype``, computed in float32; an ordinary array is only converted."""
    if not isinstance(matrix, QuantizedMatrix):
        return matrix.astype(dtype)
    groups = (*matrix.scale.shape, matrix.group)
    wide = integers(matrix, xp).astype(np.float32).reshape(groups) * expand(matrix.scale, np.float32, xp)[..., None]
    if matrix.low is not None:
        wide = wide + expand(matrix.low, np.float32, xp)[..., None]
    return wide.reshape(matrix.shape).astype(dtype)


def largest_of_rows(matrix: Any, xp: ModuleType = jnp) -> Any:
    """Returns ``max|x|`` [..., 1] of each row of float32 [..., D]; NaN where a row has NaN.

    Of positive numbers the bits are in the order of their size, with NaN above all. XLA's maximum of floats on CPUs may
    overlook NaN.
    """
    if xp is np:
        return np.max(np.abs(matrix).view(np.int32), axis=-1, keepdims=True).view(np.float32)
    bits = jax.lax.bitcast_convert_type(jnp.abs(matrix), jnp.int32)
    return jax.lax.bitcast_convert_type(jnp.max(bits, axis=-1, keepdims=True), jnp.float32)


def quantize_rows(matrix: Any, xp: ModuleType = jnp, *, input_bits: int | None = None) -> QuantizedMatrix:
    """Returns a matrix [..., D] in 8 bits with one scale per row: ``scale = max|w| / 127``, ``n = round(w / scale)``.

    A row of zeros has the scale 1; one with NaN or infinity has that for its scale.
    """
    wide = matrix.astype(np.float32)
    largest = largest_of_rows(wide, xp)
    scale = xp.where(largest == 0, np.float32(1), largest * np.float32(1 / 127))
    codes = xp.clip(xp.rint(wide / scale), -127, 127).astype(np.int8)
    return QuantizedMatrix(codes=codes, scale=scale, input_bits=input_bits)


def quantize_groups(matrix: Any, group: int, xp: ModuleType = jnp) -> QuantizedMatrix:
    """Returns a matrix [..., D] in 4 bits with a float16 scale and offset per group of inputs.

    ``low = min w``, ``scale = (max w − min w) / 15``, both rounded to float16 before the codes are chosen.
    """
    wide = matrix.astype(np.float32).reshape(*matrix.shape[:-1], -1, group)
    low = xp.min(wide, axis=-1).astype(np.float16)
    scale = ((xp.max(wide, axis=-1) - low.astype(np.float32)) * np.float32(1 / 15)).astype(np.float16)
    step = scale.astype(np.float32)
    step = xp.where(step > 0, step, np.float32(1))[..., None]
    codes = xp.clip(xp.rint((wide - low.astype(np.float32)[..., None]) / step), 0, 15)
    return QuantizedMatrix(codes=pack(codes.reshape(matrix.shape), group, xp), scale=scale, low=low)
