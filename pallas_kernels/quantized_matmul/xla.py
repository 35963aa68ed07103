"""`quantized_matmul` for any device. CPUs dequantise some outputs at a time, and so keep them in the cache."""

from collections.abc import Iterable
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.core.quantized_matrix import CENTRE, QuantizedMatrix, expand, integers
from pallas_kernels.quantized_matmul.digits import digits

_MIN_CPU_ROWS = 4
"""With fewer rows, XLA's products on CPUs that are no product of a matrix and a vector are many times slower."""
_BLOCK = 2**19
"""Weights that a CPU dequantises at once, 1 to 2 MB."""


@partial(jax.jit, static_argnames="out_dtype")
def quantized_matmul(x: jax.Array, w: QuantizedMatrix, *, out_dtype: Any = None) -> jax.Array:
    """Returns what `pallas_kernels.quantized_matmul` defines.

    Weights are rounded to the dtype of ``x``, unless each row has one scale, which is applied after the product, or a
    CPU multiplies fewer than 4 rows, in float32.
    """
    if w.input_bits is not None:
        y = _integer_product(x, w, w.input_bits)
    else:
        y = jax.lax.platform_dependent(x, w, cpu=_in_blocks, default=_at_once)
    if w.has_row_scales:
        y = y * expand(w.scale, jnp.float32).T
    return y.astype(out_dtype or x.dtype)


def _integer_product(x: jax.Array, w: QuantizedMatrix, input_bits: int) -> jax.Array:
    """Returns the product [R, F] float32 of rows as integers with the codes of ``w``."""
    rows = digits(x, input_bits)

    def on_cpu(codes: jax.Array, weights: jax.Array) -> jax.Array:
        missing = max(_MIN_CPU_ROWS - codes.shape[0], 0)
        return _dot(jnp.pad(codes, ((0, missing), (0, 0))), weights, jnp.int32)[: codes.shape[0]]

    elsewhere = partial(_dot, dtype=jnp.int32)
    return rows.combine(jax.lax.platform_dependent(rows.codes, w.codes, cpu=on_cpu, default=elsewhere))


def _at_once(x: jax.Array, w: QuantizedMatrix) -> jax.Array:
    """Returns the product [R, F] float32, before scales of rows."""
    return _dot(x, integers(w).astype(x.dtype) if w.has_row_scales else expand(w, x.dtype))


def _in_blocks(x: jax.Array, w: QuantizedMatrix) -> jax.Array:
    """Returns the product [R, F] float32, before scales of rows, some outputs at a time.

    Fewer than 4 rows are multiplied one by one, in float32.
    """
    rows, (outputs, size) = x.shape[0], w.shape
    block = min(max(_BLOCK // size, 16), outputs)
    dtype = jnp.dtype(jnp.float32) if rows < _MIN_CPU_ROWS else x.dtype
    inputs = _parts(x.astype(dtype), w)

    def multiply(start: jax.Array) -> jax.Array:
        some = jax.tree.map(lambda leaf: _slice(leaf, start, block), w)
        pairs = list(zip(inputs, _weights(some, dtype), strict=True))
        if 0 < rows < _MIN_CPU_ROWS:
            return jnp.stack([_sum(_dot(weights, part[row]) for part, weights in pairs) for row in range(rows)])
        return _sum(_dot(part, weights) for part, weights in pairs)

    # The last block ends with the last output, and begins within the block before it.
    starts = jnp.minimum(jnp.arange(0, outputs, block, dtype=jnp.int32), outputs - block)
    y = jax.lax.map(multiply, starts)
    whole = jnp.moveaxis(y[:-1], 0, 1).reshape(rows, (len(y) - 1) * block)
    return jnp.concatenate([whole, y[-1][:, whole.shape[1] - outputs :]], axis=1)


def _parts(x: jax.Array, w: QuantizedMatrix) -> list[jax.Array]:
    """Returns the inputs [R, D / parts] that belong to the halves of packed bytes; whole bytes have one part."""
    if w.bits == 8:
        return [x]
    rows, size = x.shape
    halves = x.reshape(rows, size // w.group, 2, w.group // 2)
    return [halves[:, :, half].reshape(rows, size // 2) for half in range(2)]


def _weights(w: QuantizedMatrix, dtype: Any) -> list[jax.Array]:
    """Returns the `_parts` of the matrix [F, D / parts] as ``dtype``, without scales of rows."""
    codes = w.codes.reshape(*w.scale.shape, -1)
    parts = [codes] if w.bits == 8 else [codes & 15, codes >> 4]
    wide = [part.astype(jnp.float32) for part in parts]
    if w.bits == 4 and w.low is None:
        wide = [part - CENTRE for part in wide]
    if not w.has_row_scales:
        scale = expand(w.scale, jnp.float32)[..., None]
        low = 0.0 if w.low is None else expand(w.low, jnp.float32)[..., None]
        wide = [part * scale + low for part in wide]
    return [part.reshape(w.shape[0], -1).astype(dtype) for part in wide]


def _slice(leaf: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """Returns some rows. On CPUs, XLA would convert all of a float8 array first: 50 ms for 4096²."""
    as_bytes = jax.lax.bitcast_convert_type(leaf, jnp.uint8) if leaf.dtype == jnp.float8_e4m3fn else leaf
    rows = jax.lax.dynamic_slice_in_dim(as_bytes, start, size)
    return jax.lax.bitcast_convert_type(rows, leaf.dtype)


def _sum(terms: Iterable[jax.Array]) -> jax.Array:
    return reduce(jnp.add, terms)


def _dot(left: jax.Array, right: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    """Returns the sums ``dtype`` over the last axes of both."""
    contraction = (((left.ndim - 1,), (right.ndim - 1,)), ((), ()))
    precision = "highest" if left.dtype == jnp.float32 else None  # a GPU's default rounds float32 to 11 bits
    return jax.lax.dot_general(left, right, contraction, precision=precision, preferred_element_type=dtype)
