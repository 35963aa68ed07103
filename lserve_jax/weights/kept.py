"""Weights that stay loaded for one model after another, which differ only in the order of their KV heads."""

import jax
import numpy as np

from lserve_jax.config.model import ModelConfig
from lserve_jax.models.llama import Params
from lserve_jax.weights.forms import Forms
from lserve_jax.weights.rules import HeadOrder, Parameter, check_heads, head_order, parameters
from lserve_jax.weights.tensors import LoadParams, Progress, get_leaf, reorder_heads, set_leaf, tree_bytes


class KeptParams:
    """Loads the weights at the first call, keeps them, and permutes their heads at each further call.

    A loader like the one that it wraps. While no earlier model is alive, memory holds one copy of the weights and one
    more parameter.
    """

    def __init__(self, load: LoadParams) -> None:
        self._load = load
        self._kept: tuple[Forms, HeadOrder | None, Params] | None = None

    def __call__(self, config: ModelConfig, forms: Forms, heads: HeadOrder | None, progress: Progress | None) -> Params:
        """Returns the parameter tree, see `lserve_jax.weights.tensors.load_tensors`; its leaves are kept."""
        kept, self._kept = self._kept, None  # whatever fails in between loses them
        if kept is None or kept[0] != forms:
            del kept
            params = self._load(config, forms, heads, progress)
        else:
            _, before, params = kept
            check_heads(heads, config)
            reorder(params, config, before, heads, progress)
        self._kept = forms, heads, params
        return jax.tree.map(lambda leaf: leaf, params)  # dicts of its own: the next call changes the kept ones


def reorder(
    params: Params,
    config: ModelConfig,
    before: HeadOrder | None,
    after: HeadOrder | None,
    progress: Progress | None = None,
) -> None:
    """Permutes the heads of a parameter tree from one order to another, in place, one parameter at a time.

    Args:
      params: the tree; its leaves are replaced.
      config: the model.
      before: the order of KV heads that the tree has; None is the checkpoint's.
      after: the order that it gets.
      progress: called with the bytes done and the total, first with 0 and then after every parameter.
    """
    changing = parameters(config)
    sizes = [tree_bytes(get_leaf(params, parameter.path)) for parameter in changing]
    for done, parameter in enumerate(changing):
        if progress:
            progress(sum(sizes[:done]), sum(sizes))
        order = _change(parameter, config, before, after)
        if order is not None:
            leaf = reorder_heads(get_leaf(params, parameter.path), parameter, order)
            # The old leaf goes before the next one comes.
            set_leaf(params, parameter.path, jax.block_until_ready(leaf))
    if progress:
        progress(sum(sizes), sum(sizes))


def _change(
    parameter: Parameter, config: ModelConfig, before: HeadOrder | None, after: HeadOrder | None
) -> np.ndarray | None:
    """Returns the present block of each new one along the parameter's heads; None if none moves."""
    same = np.arange(config.num_kv_heads)
    old, new = (head_order(parameter, config, heads) for heads in (before, after))
    order = np.argsort(same if old is None else old)[same if new is None else new]
    return None if np.array_equal(order, same) else order
