"""Random weights for a model of which only the shapes are known: what its size costs, in memory and time."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lserve_jax.config.model import ModelConfig
from lserve_jax.models.llama import Params
from lserve_jax.weights.forms import Forms
from lserve_jax.weights.load import Checkpoint
from lserve_jax.weights.rules import HeadOrder
from lserve_jax.weights.tensors import Progress, parameter_tree
from pallas_kernels import QuantizedMatrix

_DEVIATION = 0.02
_REPEATED = 1 << 20
"""Random numbers that follow each other again and again: making billions of them would take minutes."""


def with_random_weights(checkpoint: Checkpoint) -> Checkpoint:
    """Returns a checkpoint whose weights are random: codes evenly, numbers normally distributed, norms of 1."""
    rng = np.random.default_rng(0)
    normal = rng.normal(scale=_DEVIATION, size=_REPEATED)
    codes = {"int8": rng.integers(-127, 128, _REPEATED), "uint8": rng.integers(0, 256, _REPEATED)}

    def filled(leaf: Any) -> Any:
        if isinstance(leaf, QuantizedMatrix):
            steps = 2**leaf.bits - 1
            size = _DEVIATION * np.sqrt(12)  # the width of an even distribution of that deviation
            scale = np.full(leaf.scale.shape, size / steps, leaf.scale.dtype)
            low = None if leaf.low is None else np.full(leaf.low.shape, -size / 2, leaf.low.dtype)
            return replace(leaf, codes=_resized(codes[str(leaf.codes.dtype)], leaf.codes), scale=scale, low=low)
        return np.ones(leaf.shape, leaf.dtype) if len(leaf.shape) == 1 else _resized(normal, leaf)

    def load(config: ModelConfig, forms: Forms, heads: HeadOrder | None, progress: Progress | None) -> Params:
        def leaf(parameter: Any) -> Any:
            return jax.device_put(filled(forms.abstract(parameter, checkpoint.layout_of)))

        return parameter_tree(config, leaf)

    return replace(checkpoint, loader=load)


def _resized(numbers: np.ndarray, leaf: Any) -> np.ndarray:
    return np.resize(numbers.astype(jnp.dtype(leaf.dtype)), leaf.shape)
