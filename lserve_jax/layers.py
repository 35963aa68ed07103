"""The parts of a Llama-family layer that are neither attention nor weights: projections, norms and rotary positions."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lserve_jax.config import RopeConfig

_MIN_CPU_ROWS = 4
"""XLA's CPU product of fewer bfloat16 rows than this runs at 1 GFLOP/s (36 ms, not 3, for the demo's logits)."""


def project(
    x: jax.Array, kernel: jax.Array, out_dtype: jnp.dtype | None = None, *, is_stored_wide: bool = False
) -> jax.Array:
    """Returns ``x @ kernel.T``.

    Outputs times inputs is how checkpoints hold matrices, and on CPUs faster than the transpose for any number of rows
    (0.12 ms, not 0.16, for 4 rows and 1536 x 576; 0.69, not 0.81, for 512 rows; two cores with AMX).

    Args:
      x: [..., D].
      kernel: [F, D], of the dtype of ``x``.
      out_dtype: of the result; None takes that of ``x``. On CPUs it is not rounded to that of ``x`` in between.
      is_stored_wide: whether no device rounds it: for what goes to memory as it is, as logits do.

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
        return product(rows, kernel).astype(out_dtype)  # with what follows: nothing wide is stored

    if x.dtype == jnp.float32 or (missing <= 0 and out_dtype is None):
        result = elsewhere(rows, kernel)
    else:
        result = jax.lax.platform_dependent(rows, kernel, cpu=on_cpu, default=elsewhere)
    return result.reshape(*x.shape[:-1], kernel.shape[0])


class Linear(nn.Module):
    """An affine map of the last ``in_axes`` axes to ``features``, of which heads may be one. Kernel outputs first."""

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
    """``x / sqrt(mean(x²) + epsilon) · scale`` over the last axis; the mean in float32."""

    epsilon: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the normalised ``x`` [..., D]."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.dtype)
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon)
        return normed.astype(self.dtype) * scale


def rope_frequencies(rope: RopeConfig, head_dim: int) -> tuple[np.ndarray, float]:
    """Returns the angular frequencies [head_dim // 2] (radians a token, float32) and the factor on cos and sin.

    Kinds: ``default`` (Su et al. 2021), ``linear`` (position interpolation), ``llama3`` (Llama 3.1: long wavelengths
    stretched, a smooth ramp between), ``yarn`` (Peng et al. 2023, section 3: a ramp over dimensions, and attention
    temperature). Rounded to float32 step by step, as in training: at position p, one last digit of a frequency is p of
    them in the angle.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = 1 / (rope.theta ** exponents.astype(np.float64)).astype(np.float32)
    scaling = 1.0
    if rope.kind == "linear":
        frequencies = frequencies / rope.factor
    elif rope.kind == "llama3":
        frequencies = _llama3_frequencies(rope, frequencies)
    elif rope.kind == "yarn":
        frequencies, scaling = _yarn_frequencies(rope, frequencies, head_dim), _yarn_scaling(rope)
    assert frequencies.dtype == np.float32
    return frequencies, scaling


def _llama3_frequencies(rope: RopeConfig, frequencies: np.ndarray) -> np.ndarray:
    assert rope.original_max_position is not None
    turns = rope.original_max_position * frequencies / (2 * math.pi)  # in the original context
    keep = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0, 1)
    return (1 - keep) * frequencies / rope.factor + keep * frequencies


def _yarn_frequencies(rope: RopeConfig, frequencies: np.ndarray, head_dim: int) -> np.ndarray:
    assert rope.original_max_position is not None
    original = rope.original_max_position

    def dimension(turns: float) -> float:
        """The dimension that makes this many turns in the original context."""
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 1e-3
    keep = 1 - np.clip((np.arange(head_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(width), 0, 1)
    return frequencies / rope.factor * (1 - keep) + frequencies * keep


def _yarn_scaling(rope: RopeConfig) -> float:
    def temperature(mscale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * mscale * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return temperature(rope.mscale) / temperature(rope.mscale_all_dim)
    return temperature(1.0)


def rope_tables(rope: RopeConfig, head_dim: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns cos and sin, each [*positions.shape, 1, head_dim // 2] float32, for integer token positions."""
    frequencies, scaling = rope_frequencies(rope, head_dim)
    angles = positions.astype(jnp.float32)[..., None, None] * frequencies
    return jnp.cos(angles) * scaling, jnp.sin(angles) * scaling


def apply_rope(x: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Returns ``x`` [B, T, N, H] with dimension pairs (i, i + H/2) rotated by the tables of `rope_tables`."""
    cos, sin = tables
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
