"""Parts of the Llama family besides attention and rotary positions: projections, norms, and the loop over layers."""

import math
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

_MIN_CPU_ROWS = 4
"""With fewer bfloat16 rows, XLA's product on CPUs runs at 1 GFLOP/s (36 ms instead of 3 ms for the demo's logits)."""


def project(
    x: jax.Array, kernel: jax.Array, out_dtype: jnp.dtype | None = None, *, is_stored_wide: bool = False
) -> jax.Array:
    """Returns ``x @ kernel.T``.

    Checkpoints store matrices as outputs times inputs. On CPUs this layout is faster than the transpose for any number
    of rows (0.12 ms instead of 0.16 ms for 4 rows and 1536 x 576; 0.69 instead of 0.81 for 512; two cores with AMX).

    Args:
      x: [..., D].
      kernel: [F, D], of the dtype of ``x``.
      out_dtype: dtype of the result; None takes that of ``x``. CPUs do not round to the dtype of ``x`` in between.
      is_stored_wide: whether other devices do not round either: for results stored in ``out_dtype``, such as logits.

    Returns:
      [..., F]; accumulated in float32.
    """
    rows = x.reshape(-1, x.shape[-1])
    missing = _MIN_CPU_ROWS - rows.shape[0]
    precision = "highest" if x.dtype == jnp.float32 else None  # a GPU's default rounds float32 to 11 bits

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

    if x.dtype == jnp.float32 or (missing <= 0 and out_dtype is None):
        result = elsewhere(rows, kernel)
    else:
        result = jax.lax.platform_dependent(rows, kernel, cpu=on_cpu, default=elsewhere)
    return result.reshape(*x.shape[:-1], kernel.shape[0])


class Linear(nn.Module):
    """An affine map of the last ``in_axes`` axes to the axes ``features``. Its kernel is outputs times inputs."""

    features: Sequence[int]
    use_bias: bool
    dtype: jnp.dtype
    in_axes: int = 1
    out_dtype: jnp.dtype | None = None
    is_stored_wide: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns [..., *features] for inputs whose last ``in_axes`` axes are summed over."""
        split = x.ndim - self.in_axes
        batch, inputs = x.shape[:split], x.shape[split:]
        size = math.prod(inputs)
        initializer = nn.initializers.normal(1 / math.sqrt(size))
        kernel = self.param("kernel", initializer, (*self.features, *inputs), self.dtype)
        rows, matrix = x.reshape(*batch, size), kernel.reshape(-1, size)
        y = project(rows, matrix, self.out_dtype, is_stored_wide=self.is_stored_wide).reshape(*batch, *self.features)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, tuple(self.features), self.dtype).astype(y.dtype)
        return y


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
