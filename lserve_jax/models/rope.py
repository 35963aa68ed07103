"""The kinds of rotary position embedding: plain, linear, llama3, yarn."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from lserve_jax.config.model import RopeConfig


def rope_frequencies(rope: RopeConfig, head_dim: int) -> tuple[np.ndarray, float]:
    """Returns the angular frequencies [head_dim // 2] (radians per token, float32) and the factor on cos and sin.

    Kinds: "default" (Su et al. 2021), "linear" (position interpolation), "llama3" (Llama 3.1: it stretches long
    wavelengths, with a smooth ramp between), "yarn" (Peng et al. 2023, section 3: a ramp over dimensions, and attention
    temperature). Every operation rounds to float32, as in training: position p multiplies an error in the last digit of
    a frequency by p.
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
        """Returns the dimension that makes this many turns in the original context."""
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
