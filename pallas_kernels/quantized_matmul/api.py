"""The public op `quantized_matmul`."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.core.dispatch import dispatch
from pallas_kernels.core.hopper import on_hopper
from pallas_kernels.core.quantized_matrix import QuantizedMatrix
from pallas_kernels.quantized_matmul import reference, xla

IMPLEMENTATIONS = {
    "mosaic_gpu": on_hopper(__name__),
    "xla": xla.quantized_matmul,
    "reference": reference.quantized_matmul,
}


def quantized_matmul(
    x: jax.Array, w: QuantizedMatrix, *, out_dtype: Any = None, implementation: str | None = None
) -> jax.Array:
    """Returns ``x @ w.T`` [R, F] for the matrix that ``w`` stands for, accumulated in float32.

    With 8 ``w.input_bits`` (W8A8), rows of ``x`` are first quantised as `quantize_rows` does, and the product of the
    integers n is exact:

        out[r, f] = (Σ_d n_x[r, d] · n_w[f, d]) · scale_x[r] · scale_w[f]       scale_x[r] = max_d |x[r, d]| / 127

    With 16, and for up to `FEW_ROWS` rows, those of a decode step, integers have 16 bits in two digits of 8, whose
    products are added in float32. Few rows take no longer by it, since reading the weights takes most of the time.

    A row of the result depends only on that row of ``x``. It is zero where the row is, and without a finite number
    where the row of ``x`` has NaN or, with W8A8, infinity.

    Args:
      x: [R, D] bfloat16 or float32.
      w: [F, D].
      out_dtype: dtype of the result; None takes that of ``x``.
      implementation: a backend name, or None for the first that accepts.

    Raises:
      ValueError: if the shapes do not fit, or ``w`` asks for int8 inputs without having int8 codes alone, one scale
        per row.
    """
    if x.ndim != 2 or len(w.shape) != 2 or x.shape[1] != w.shape[1]:
        raise ValueError(f"rows {x.shape} and a matrix {w.shape} have no product")
    if w.input_bits is not None and (w.codes.dtype != jnp.int8 or w.low is not None or w.group != w.shape[1]):
        raise ValueError("int8 inputs need a matrix of int8 codes with one scale per row and no offsets")
    return dispatch("quantized_matmul", IMPLEMENTATIONS, implementation, x, w, out_dtype=out_dtype)
