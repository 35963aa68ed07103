"""Parts of the Llama family besides attention and rotary positions: projections, norms, and the loop over layers."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from pallas_kernels import QuantizedMatrix, quantized_matmul
from pallas_kernels.core.quantized_matrix import expand

_MIN_CPU_ROWS = 4
"""With fewer bfloat16 rows, XLA's product on CPUs runs at 1 GFLOP/s (36 ms instead of 3 ms for the demo's logits)."""


def project(
    x: jax.Array,
    kernel: jax.Array | QuantizedMatrix,
    out_dtype: jnp.dtype | None = None,
    *,
    is_stored_wide: bool = False,
) -> jax.Array:
    """Returns ``x @ kernel.T``: the one place where the model multiplies by weights.

    Checkpoints store matrices as outputs times inputs. On CPUs this layout is faster than the transpose for any number
    of rows (0.12 ms instead of 0.16 ms for 4 rows and 1536 x 576; 0.69 instead of 0.81 for 512; two cores with AMX).

    Args:
      x: [..., D].
      kernel: [F, D]; numbers of another dtype are converted to that of ``x``.
      out_dtype: dtype of the result; None takes that of ``x``. CPUs do not round to the dtype of ``x`` in between.
      is_stored_wide: whether other devices do not round either: for results stored in ``out_dtype``, such as logits.

    Returns:
      [..., F]; accumulated in float32.
    """
    rows = x.reshape(-1, x.shape[-1])
    if isinstance(kernel, QuantizedMatrix):
        result = quantized_matmul(rows, kernel, out_dtype=out_dtype)
    else:
        result = _plain_product(rows, kernel.astype(x.dtype), out_dtype, is_stored_wide)
    return result.reshape(*x.shape[:-1], kernel.shape[0])


def _plain_product(rows: jax.Array, kernel: jax.Array, out_dtype: jnp.dtype | None, is_stored_wide: bool) -> jax.Array:
    missing = _MIN_CPU_ROWS - rows.shape[0]
    precision = "highest" if rows.dtype == jnp.float32 else None  # a GPU's default rounds float32 to 11 bits

    def product(rows: jax.Array, kernel: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
        contraction = (((1,), (1,)), ((), ()))
        return jax.lax.dot_general(rows, kernel, contraction, precision=precision, preferred_element_type=dtype)

    def on_cpu(rows: jax.Array, kernel: jax.Array) -> jax.Array:
        if missing <= 0:
            return product(rows, kernel, out_dtype)
        return product(jnp.pad(rows, ((0, missing), (0, 0))), kernel, out_dtype)[:-missing]

    def elsewhere(rows: jax.Array, kernel: jax.Array) -> jax.Array:
        if out_dtype is None or is_stored_wide:
            return product(rows, kernel, out_dtype)
        return product(rows, kernel).astype(out_dtype)  # XLA fuses the cast with its consumer: nothing wide is stored

    if rows.dtype == jnp.float32 or (missing <= 0 and out_dtype is None):
        return elsewhere(rows, kernel)
    return jax.lax.platform_dependent(rows, kernel, cpu=on_cpu, default=elsewhere)


def _weight(module: nn.Module, name: str, shape: tuple[int, ...], dtype: jnp.dtype) -> Any:
    """Returns a matrix of the module's parameters in whatever form it is stored, or makes numbers."""
    if module.has_variable("params", name):
        return module.get_variable("params", name)
    return module.param(name, nn.initializers.normal(1 / math.sqrt(shape[-1])), shape, dtype)


def parts_of(kernel: Any) -> tuple[Any, ...]:
    """Returns the arrays or quantised matrices of which the kernel of a `Linear` consists, mostly one."""
    return kernel if isinstance(kernel, tuple) else (kernel,)


class Linear(nn.Module):
    """An affine map of the last axis to the axes ``features``. Its kernel is outputs times inputs.

    The kernel is one array [*features, D] or quantised matrix, or a tuple of them if a checkpoint stores its parts in
    different forms: these follow each other along the axis ``join_axis`` of ``features``.
    """

    features: Sequence[int]
    use_bias: bool
    dtype: jnp.dtype
    join_axis: int = 0
    out_dtype: jnp.dtype | None = None
    is_stored_wide: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns [..., *features] for inputs [..., D]."""
        kernel = _weight(self, "kernel", (*self.features, x.shape[-1]), self.dtype)
        parts = [self._product(x, part) for part in parts_of(kernel)]
        y = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=x.ndim - 1 + self.join_axis)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, tuple(self.features), self.dtype).astype(y.dtype)
        return y

    def _product(self, x: jax.Array, kernel: jax.Array | QuantizedMatrix) -> jax.Array:
        matrix = kernel.reshape(-1) if isinstance(kernel, QuantizedMatrix) else kernel.reshape(-1, x.shape[-1])
        y = project(x, matrix, self.out_dtype, is_stored_wide=self.is_stored_wide)
        return y.reshape(*x.shape[:-1], *kernel.shape[:-1])


def numbers(kernel: Any, dtype: jnp.dtype, join_axis: int = 0) -> jax.Array:
    """Returns the kernel of a `Linear` as one array [*features, D] of ``dtype``."""
    parts = [expand(part, dtype) for part in parts_of(kernel)]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=join_axis)


class Embedding(nn.Module):
    """A table of vectors [V, D], which a tied model multiplies by to get logits."""

    num_words: int
    size: int
    dtype: jnp.dtype

    def setup(self) -> None:
        """Declares the table."""
        self.embedding = _weight(self, "embedding", (self.num_words, self.size), self.dtype)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Returns the vectors [..., D] of tokens [...] int32."""
        rows = jax.tree.map(lambda leaf: jnp.take(leaf, tokens, axis=0), self.embedding)
        return expand(rows, self.dtype)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Returns the product [..., V] float32 of hidden states [..., D] with every vector."""
        return project(hidden, self.embedding, jnp.dtype("float32"), is_stored_wide=True)


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x²) + epsilon) · scale`` over the last axis, with the mean in float32."""

    epsilon: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the normalised ``x`` [..., D]."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.dtype)
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon)
        return normed.astype(self.dtype) * scale


def each_layer[X, S, R](x: X, states: Iterable[S], run: Callable[[int, X, S], tuple[X, R]]) -> tuple[X, tuple[R, ...]]:
    """Returns the output of the last layer, and the result of each layer: the one loop over layers.

    Tracing unrolls it: a scan would copy the weights and the cache of each layer.

    Args:
      x: the input of the first layer.
      states: one entry per layer.
      run: (number of the layer, its input, its entry) → (its output, its result).
    """
    results = []
    for layer, state in enumerate(states):
        x, result = run(layer, x, state)
        results.append(result)
    return x, tuple(results)
