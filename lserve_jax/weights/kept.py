"""Weights that stay loaded for one model after another, which differ only in the order of their KV heads."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from lserve_jax.config.model import ModelConfig
from lserve_jax.models.llama import Params
from lserve_jax.weights.rules import HeadOrder, Tensor, check_heads, expected_tensors, head_index
from lserve_jax.weights.tensors import LoadParams, Progress, get_leaf, set_leaf


class KeptParams:
    """Loads the weights at the first call, keeps them, and permutes their heads at each further call.

    A loader like the one that it wraps. While no earlier model is alive, memory holds one copy of the weights and one
    more tensor.
    """

    def __init__(self, load: LoadParams) -> None:
        self._load = load
        self._kept: tuple[np.dtype, HeadOrder | None, Params] | None = None

    def __call__(
        self, config: ModelConfig, dtype: np.dtype, heads: HeadOrder | None, progress: Progress | None
    ) -> Params:
        """Returns the parameter tree, see `lserve_jax.weights.tensors.load_tensors`; its leaves are kept."""
        kept, self._kept = self._kept, None  # whatever fails in between loses them
        if kept is None or kept[0] != dtype:
            del kept
            params = self._load(config, dtype, heads, progress)
        else:
            _, before, params = kept
            check_heads(heads, config)
            reorder(params, config, before, heads, progress)
        self._kept = dtype, heads, params
        return jax.tree.map(lambda leaf: leaf, params)  # dicts of its own: the next call changes the kept ones


def reorder(
    params: Params,
    config: ModelConfig,
    before: HeadOrder | None,
    after: HeadOrder | None,
    progress: Progress | None = None,
) -> None:
    """Permutes the heads of a parameter tree from one order to another, in place, one tensor at a time.

    Args:
      params: the tree; its leaves are replaced.
      config: the model.
      before: the order of KV heads that the tree has; None is the checkpoint's.
      after: the order that it gets.
      progress: called with the bytes done and the total, first with 0 and then after every tensor.
    """
    tensors = expected_tensors(config)
    sizes = [math.prod(tensor.shape) * get_leaf(params, tensor.path).dtype.itemsize for tensor in tensors]
    for done, tensor in enumerate(tensors):
        if progress:
            progress(sum(sizes[:done]), sum(sizes))
        change = _change(tensor, config, before, after)
        if change is not None:
            axis, order = change
            leaf = jnp.take(get_leaf(params, tensor.path), order, axis, mode="clip")
            set_leaf(params, tensor.path, jax.block_until_ready(leaf))  # the old leaf goes before the next one comes
    if progress:
        progress(sum(sizes), sum(sizes))


def _change(
    tensor: Tensor, config: ModelConfig, before: HeadOrder | None, after: HeadOrder | None
) -> tuple[int, np.ndarray] | None:
    """Returns the axis along which ``tensor`` is permuted and the present index of each new one; None if none moves."""
    indices = [head_index(tensor, config, heads) for heads in (before, after)]
    axes = [index[0] for index in indices if index is not None]
    if not axes:
        return None
    same = np.arange(tensor.shape[axes[0]])
    old, new = (same if index is None else index[1] for index in indices)
    order = np.argsort(old)[new]
    return None if np.array_equal(order, same) else (axes[0], order)
