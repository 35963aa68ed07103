"""The specification of `quantized_matmul`: everything at once, in float32."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.core.quantized_matrix import QuantizedMatrix, expand
from pallas_kernels.quantized_matmul.digits import digits


def quantized_matmul(x: jax.Array, w: QuantizedMatrix, *, out_dtype: Any = None) -> jax.Array:
    """Returns what `pallas_kernels.quantized_matmul` defines."""
    if w.input_bits:
        rows = digits(x, w.input_bits)
        totals = jnp.einsum("rd,fd->rf", rows.codes.astype(jnp.int32), w.codes.astype(jnp.int32))
        y = rows.combine(totals) * expand(w.scale, jnp.float32).T
    else:
        y = jnp.einsum("rd,fd->rf", x.astype(jnp.float32), expand(w, jnp.float32), precision="highest")
    return y.astype(out_dtype or x.dtype)
