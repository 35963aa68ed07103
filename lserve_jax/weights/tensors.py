"""From a file's tensors to the parameter tree: one check of everything, then one tensor at a time."""

import math
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from lserve_jax.config.model import ModelConfig
from lserve_jax.models.llama import Params
from lserve_jax.weights.rules import (
    HARMLESS,
    HARMLESS_TIED,
    HeadOrder,
    Naming,
    Tensor,
    check_heads,
    expected_tensors,
    head_index,
)

type Progress = Callable[[int, int], None]
type ReadTensor = Callable[[Tensor, np.dtype], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """What a file says it holds, read from its header alone.

    `shapes` gives each tensor's shape; None for one that `problems` already accounts for.
    """

    shapes: Mapping[str, tuple[int, ...] | None]
    problems: list[str] = field(default_factory=list)


class TensorSource(Protocol):
    """A file, or a folder of files, of named tensors."""

    @property
    def location(self) -> str:
        """What errors call it."""
        ...

    @property
    def naming(self) -> Naming:
        """Whose names its tensors have."""
        ...

    def inventory(self) -> Inventory:
        """Reads the headers."""
        ...

    def open(self) -> AbstractContextManager[ReadTensor]:
        """A function that reads one tensor: contiguous, of its `file_shape`, in the dtype given or the file's own.

        It raises ValueError for data that turns out to be damaged.
        """
        ...


def load_tensors(
    source: TensorSource,
    config: ModelConfig,
    dtype: np.dtype,
    heads: HeadOrder | None = None,
    progress: Progress | None = None,
) -> Params:
    """The parameter tree as jax arrays of `dtype`, KV heads in the order of `heads`.

    At any time the host holds the finished parameters and one tensor more.

    Args:
        source: where the tensors lie.
        config: the model they must make up.
        dtype: the dtype of every parameter.
        heads: the order of KV heads of each layer; None keeps the checkpoint's.
        progress: called with the bytes done and the bytes in all, first with 0 and then after every tensor.

    Raises:
        ValueError: every missing, unexpected or misshapen tensor and every unreadable file, in one line.
    """
    check_heads(heads, config)
    tensors = expected_tensors(config, source.naming)
    check_inventory(source, tensors, config)
    params: Params = {}
    total = sum(math.prod(tensor.shape) for tensor in tensors) * dtype.itemsize
    done = 0
    if progress:
        progress(done, total)
    with source.open() as read:
        for tensor in tensors:
            set_leaf(params, tensor.path, _load_tensor(read, tensor, dtype, head_index(tensor, config, heads)))
            done += math.prod(tensor.shape) * dtype.itemsize
            if progress:
                progress(done, total)
    return params


def parameter_tree(config: ModelConfig, leaf: Callable[[Tensor], Any]) -> Params:
    """Returns the model's parameter tree with ``leaf`` of every parameter: shapes, storage types, partition specs.

    Args:
      config: the model.
      leaf: makes an entry of a parameter's path, shape and axes, whose letters are those of `lserve_jax.weights.rules`.
    """
    params: Params = {}
    for tensor in expected_tensors(config):
        set_leaf(params, tensor.path, leaf(tensor))
    return params


def abstract_params(config: ModelConfig, dtype: jax.typing.DTypeLike) -> Params:
    """Returns the tree that `load_tensors` will give, as `jax.ShapeDtypeStruct`; reads and allocates nothing."""
    return parameter_tree(config, lambda tensor: jax.ShapeDtypeStruct(tensor.shape, jnp.dtype(dtype)))


def _load_tensor(read: ReadTensor, tensor: Tensor, dtype: np.dtype, index: tuple[int, np.ndarray] | None) -> jax.Array:
    held = read(tensor, dtype).reshape(tensor.shape)
    if index is not None:
        axis, order = index
        held = np.take(held, order, axis)
    return jax.device_put(np.array(held, dtype))  # a copy: jax may keep it, and what was read may be the file's pages


def set_leaf(params: Params, path: tuple[str, ...], value: Any) -> None:
    """Puts `value` into the nested dict under `path`."""
    for key in path[:-1]:
        params = params.setdefault(key, {})
    params[path[-1]] = value


def get_leaf(params: Params, path: tuple[str, ...]) -> Any:
    """The value under `path` of the nested dict."""
    for key in path:
        params = params[key]
    return params


def check_inventory(source: TensorSource, tensors: list[Tensor], config: ModelConfig) -> None:
    """Raises one ValueError that names every way in which the source is not what the model needs."""
    inventory = source.inventory()
    expected = {tensor.names[source.naming]: tensor.file_shape for tensor in tensors}
    harmless = [HARMLESS.get(source.naming), HARMLESS_TIED.get(source.naming) if config.tie_embeddings else None]
    pattern = re.compile("|".join(filter(None, harmless)))
    held = {name: shape for name, shape in inventory.shapes.items() if not pattern.fullmatch(name)}
    problems = [*inventory.problems, *compare_shapes(expected, held)]
    if problems:
        raise ValueError(f"{source.location}: {'; '.join(problems)}")


def compare_shapes(expected: Mapping[str, tuple[int, ...]], held: Mapping[str, tuple[int, ...] | None]) -> list[str]:
    """One line for every tensor that is missing, unexpected or of another shape."""
    missing = [f"missing tensor {name} {list(shape)}" for name, shape in expected.items() if name not in held]
    unexpected = [f"unexpected tensor {name}" for name in held if name not in expected]
    misshapen = [
        f"tensor {name} has shape {list(got)}, expected {list(shape)}"
        for name, shape in expected.items()
        if (got := held.get(name)) is not None and got != shape
    ]
    return [*missing, *unexpected, *misshapen]
