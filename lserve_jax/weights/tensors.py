"""Loads a file's tensors into the parameter tree: checks everything once, then reads one tensor at a time."""

import math
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from lserve_jax.config.errors import InputError
from lserve_jax.config.model import ModelConfig
from lserve_jax.models.llama import Params
from lserve_jax.weights.finite import describe, is_finite
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

MOST_NAMED = 3  # of the tensors that are not finite, in an error

type Progress = Callable[[int, int], None]
type ReadTensor = Callable[[Tensor, np.dtype], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """The contents of a file according to its header.

    ``shapes`` has the shape of each tensor, or None if ``problems`` already covers the tensor.
    """

    shapes: Mapping[str, tuple[int, ...] | None]
    problems: list[str] = field(default_factory=list)


class TensorSource(Protocol):
    """A file, or a folder of files, of named tensors."""

    @property
    def location(self) -> str:
        """Returns the name of the source for error messages."""
        ...

    @property
    def naming(self) -> Naming:
        """Returns the convention for the names of its tensors."""
        ...

    def inventory(self) -> Inventory:
        """Returns the contents according to the headers."""
        ...

    def open(self) -> AbstractContextManager[ReadTensor]:
        """Yields a function that reads one tensor: contiguous, of its ``file_shape``, in the given or the file's dtype.

        The function raises `InputError` if the data is damaged.
        """
        ...


class LoadParams(Protocol):
    """Reads the weights of one checkpoint, see `load_tensors`."""

    def __call__(
        self, config: ModelConfig, dtype: np.dtype, heads: HeadOrder | None, progress: Progress | None
    ) -> Params:
        """Returns the parameter tree."""
        ...


def load_tensors(
    source: TensorSource,
    config: ModelConfig,
    dtype: np.dtype,
    heads: HeadOrder | None = None,
    progress: Progress | None = None,
) -> Params:
    """Returns the parameter tree as jax arrays of ``dtype``, KV heads in the order of ``heads``.

    At any time, the host's memory holds the finished parameters and one more tensor.

    Args:
      source: the file or folder with the tensors.
      config: the model to which they must belong.
      dtype: the dtype of every parameter.
      heads: the order of KV heads of each layer; None keeps the checkpoint's.
      progress: called with the bytes done and the total, first with 0 and then after every tensor.

    Raises:
      InputError: if tensors are missing, unexpected, misshapen or not finite, or files unreadable; one line for all.
    """
    check_heads(heads, config)
    tensors = expected_tensors(config, source.naming)
    check_inventory(source, tensors, config)
    params: Params = {}
    total = sum(math.prod(tensor.shape) for tensor in tensors) * dtype.itemsize
    done = 0
    if progress:
        progress(done, total)
    damaged: list[str] = []
    # numpy would warn of numbers beyond the range of ``dtype``: they are infinite then, and named at the end.
    with source.open() as read, np.errstate(over="ignore", invalid="ignore"):
        for tensor in tensors:
            array = _load_tensor(read, tensor, dtype, head_index(tensor, config, heads))
            if not is_finite(array):
                damaged.append(f"{tensor.names[source.naming]} ({describe(array)})")
            # jax may keep this array: nothing writes to it.
            set_leaf(params, tensor.path, jax.device_put(array))
            del array
            done += math.prod(tensor.shape) * dtype.itemsize
            if progress:
                progress(done, total)
    if damaged:
        named = ", ".join([*damaged[:MOST_NAMED], *["…"] * (len(damaged) > MOST_NAMED)])
        raise InputError(
            f"{source.location}: {len(damaged)} of {len(tensors)} tensors are not finite as {dtype.name}: {named}; "
            "every answer would be nonsense: fetch or export the checkpoint again"
        )
    return params


def parameter_tree(config: ModelConfig, leaf: Callable[[Tensor], Any]) -> Params:
    """Returns the model's parameter tree with ``leaf`` of every parameter: shapes, storage types, partition specs.

    Args:
      config: the model.
      leaf: makes an entry from a parameter's path, shape and axes (the letters of `lserve_jax.weights.rules`).
    """
    params: Params = {}
    for tensor in expected_tensors(config):
        set_leaf(params, tensor.path, leaf(tensor))
    return params


def abstract_params(config: ModelConfig, dtype: jax.typing.DTypeLike) -> Params:
    """Returns the tree of `load_tensors` as `jax.ShapeDtypeStruct`; reads and allocates nothing."""
    return parameter_tree(config, lambda tensor: jax.ShapeDtypeStruct(tensor.shape, jnp.dtype(dtype)))


def _load_tensor(read: ReadTensor, tensor: Tensor, dtype: np.dtype, index: tuple[int, np.ndarray] | None) -> np.ndarray:
    """Returns the tensor in our layout, in memory of its own: ``read`` may return mapped memory."""
    held = read(tensor, dtype).reshape(tensor.shape)
    if index is not None:
        axis, order = index
        held = np.take(held, order, axis)
    return np.array(held, dtype)


def set_leaf(params: Params, path: tuple[str, ...], value: Any) -> None:
    """Puts ``value`` into the nested dict under ``path``."""
    for key in path[:-1]:
        params = params.setdefault(key, {})
    params[path[-1]] = value


def get_leaf(params: Params, path: tuple[str, ...]) -> Any:
    """Returns the value under ``path`` of the nested dict."""
    for key in path:
        params = params[key]
    return params


def check_inventory(source: TensorSource, tensors: list[Tensor], config: ModelConfig) -> None:
    """Raises one `InputError` that names every difference between the source and what the model needs."""
    inventory = source.inventory()
    expected = {tensor.names[source.naming]: tensor.file_shape for tensor in tensors}
    harmless = [HARMLESS.get(source.naming), HARMLESS_TIED.get(source.naming) if config.tie_embeddings else None]
    pattern = re.compile("|".join(filter(None, harmless)))
    held = {name: shape for name, shape in inventory.shapes.items() if not pattern.fullmatch(name)}
    problems = [*inventory.problems, *compare_shapes(expected, held)]
    if problems:
        raise InputError(f"{source.location}: {'; '.join(problems)}")


def compare_shapes(expected: Mapping[str, tuple[int, ...]], held: Mapping[str, tuple[int, ...] | None]) -> list[str]:
    """Returns one line for every tensor that is missing, unexpected or of another shape."""
    missing = [f"missing tensor {name} {list(shape)}" for name, shape in expected.items() if name not in held]
    unexpected = [f"unexpected tensor {name}" for name in held if name not in expected]
    misshapen = [
        f"tensor {name} has shape {list(got)}, expected {list(shape)}"
        for name, shape in expected.items()
        if (got := held.get(name)) is not None and got != shape
    ]
    return [*missing, *unexpected, *misshapen]
