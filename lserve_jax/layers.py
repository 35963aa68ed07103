"""The parts of a Llama-family layer that are neither attention nor weights: projections, norms and rotary positions."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lserve_jax.config import RopeConfig

_MIN_CPU_ROWS = 4
"""XLA's CPU bfloat16 product of fewer rows than this runs at 1 GFLOP/s (36 ms against 3 ms for the embedded model's logits)."""


def project(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns ``x @ kernel`` over the last axis of ``x`` and the first of ``kernel``.

    Args:
      x: [..., D].
      kernel: [D, ...], of the dtype of ``x``.

    Returns:
      [..., *kernel.shape[1:]], of the dtype of ``x``; accumulated in float32.
    """
    rows = x.reshape(-1, x.shape[-1])
    matrix = kernel.reshape(kernel.shape[0], -1)
    missing = _MIN_CPU_ROWS - rows.shape[0]
    if x.dtype == jnp.bfloat16 and missing > 0:

        def padded(rows: jax.Array, matrix: jax.Array) -> jax.Array:
            return (jnp.pad(rows, ((0, missing), (0, 0))) @ matrix)[:-missing]

        product = jax.lax.platform_dependent(rows, matrix, cpu=padded, default=jnp.matmul)
    else:
        product = rows @ matrix
    return product.reshape(*x.shape[:-1], *kernel.shape[1:])


class Linear(nn.Module):
    """An affine map of the last axis; ``features`` may have several axes (heads stay an axis of their own)."""

    features: Sequence[int]
    use_bias: bool
    dtype: jnp.dtype
    in_axes: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        inputs = x.shape[x.ndim - self.in_axes :]
        x = x.reshape(*x.shape[: x.ndim - self.in_axes], -1)
        shape = (*inputs, *self.features)
        kernel = self.param("kernel", nn.initializers.normal(1 / math.sqrt(x.shape[-1])), shape, self.dtype)
        y = project(x, kernel.reshape(x.shape[-1], *self.features))
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, tuple(self.features), self.dtype)
        return y


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x²) + epsilon) · scale`` over the last axis; the mean in float32."""

    epsilon: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.dtype)
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon)
        return normed.astype(self.dtype) * scale


def rope_frequencies(rope: RopeConfig, head_dim: int) -> tuple[np.ndarray, float]:
    """Returns the angular frequencies [head_dim // 2] (radians a token, float32) and the factor on cos and sin.

    Kinds: ``default`` (Su et al. 2021), ``linear`` (position interpolation), ``llama3`` (Llama 3.1: long wavelengths
    stretched, a smooth ramp between), ``yarn`` (Peng et al. 2023, section 3: a ramp over dimensions, and attention
    temperature).
    """
    frequencies = rope.theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    scaling = 1.0
    if rope.kind == "linear":
        frequencies = frequencies / rope.factor
    elif rope.kind == "llama3":
        frequencies = _llama3_frequencies(rope, frequencies)
    elif rope.kind == "yarn":
        frequencies, scaling = _yarn_frequencies(rope, frequencies, head_dim), _yarn_scaling(rope)
    return frequencies.astype(np.float32), scaling


def _llama3_frequencies(rope: RopeConfig, frequencies: np.ndarray) -> np.ndarray:
    assert rope.original_max_position is not None
    turns = rope.original_max_position * frequencies / (2 * math.pi)  # in the original context
    keep = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0.0, 1.0)
    return frequencies * (keep + (1 - keep) / rope.factor)


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
    ramp = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 1e-3), 0.0, 1.0)
    return frequencies * (1 - ramp) + frequencies / rope.factor * ramp


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
