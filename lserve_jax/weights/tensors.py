"""Loads a file's tensors into the parameter tree: checks everything once, then makes one parameter at a time."""

import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from lserve_jax.config.digest import text_digest
from lserve_jax.config.errors import InputError
from lserve_jax.config.model import ModelConfig
from lserve_jax.models.layers import parts_of
from lserve_jax.models.llama import Params
from lserve_jax.weights.finite import describe, is_finite
from lserve_jax.weights.forms import Form, Forms, LayoutOf, Run, joined, kept
from lserve_jax.weights.layout import Layout, converted, fit
from lserve_jax.weights.rules import (
    HARMLESS,
    HARMLESS_TIED,
    HeadOrder,
    Naming,
    Parameter,
    Tensor,
    check_heads,
    expected_tensors,
    head_order,
    parameters,
)
from pallas_kernels.core.quantized_matrix import QuantizedMatrix

MOST_NAMED = 3  # of the tensors that are not finite, in an error

type Progress = Callable[[int, int], None]


class Reader(Protocol):
    """Reads tensors of an open file; raises `InputError` if the data is damaged."""

    def array(self, tensor: Tensor, dtype: np.dtype, /) -> np.ndarray:
        """Returns the numbers of a tensor: contiguous, of its ``file_shape``, in the given or the file's dtype."""
        ...

    def packed(self, tensor: Tensor, /) -> QuantizedMatrix:
        """Returns a matrix as the file stores it, numpy arrays in the form that ``layout`` promised: [F, D]."""
        ...


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

    def layout(self, tensor: Tensor) -> Layout | None:
        """Returns how the file stores a matrix that it keeps in 8 or 4 bits; None for numbers."""
        ...

    def open(self) -> AbstractContextManager[Reader]:
        """Yields what reads one tensor after the other."""
        ...


class LoadParams(Protocol):
    """Reads the weights of one checkpoint, see `load_tensors`."""

    def __call__(self, config: ModelConfig, forms: Forms, heads: HeadOrder | None, progress: Progress | None) -> Params:
        """Returns the parameter tree."""
        ...


def load_tensors(
    source: TensorSource,
    config: ModelConfig,
    forms: Forms,
    heads: HeadOrder | None = None,
    progress: Progress | None = None,
) -> Params:
    """Returns the parameter tree as jax arrays, KV heads in the order of ``heads``.

    At any time, the host's memory holds the finished parameters and one more, with the tensors of which it is made.

    Args:
      source: the file or folder with the tensors.
      config: the model to which they must belong.
      forms: the form of every parameter.
      heads: the order of KV heads of each layer; None keeps the checkpoint's.
      progress: called with the bytes done and the total, first with 0 and then after every parameter.

    Raises:
      InputError: if tensors are missing, unexpected, misshapen or not finite, or files unreadable; one line for all.
    """
    check_heads(heads, config)
    tensors = expected_tensors(config, source.naming)
    check_inventory(source, tensors, config)
    params: Params = {}
    expected = parameters(config, source.naming)
    sizes = [tree_bytes(forms.abstract(parameter, source.layout)) for parameter in expected]
    done, total = 0, sum(sizes)
    if progress:
        progress(done, total)
    # numpy would warn of numbers beyond the range of their type: they are infinite then, and named at the end.
    with source.open() as read, np.errstate(over="ignore", invalid="ignore"):
        assembly = _Assembly(source, read, forms)
        for parameter, size in zip(expected, sizes, strict=True):
            leaf = assembly.parameter(parameter, head_order(parameter, config, heads))
            # jax may keep these arrays: nothing writes to them.
            set_leaf(params, parameter.path, jax.device_put(leaf))
            del leaf
            done += size
            if progress:
                progress(done, total)
    if damaged := [f"{name} ({what})" for name, what in assembly.damaged.items()]:
        named = ", ".join([*damaged[:MOST_NAMED], *["…"] * (len(damaged) > MOST_NAMED)])
        raise InputError(
            f"{source.location}: {len(damaged)} of {len(tensors)} tensors are not finite as {forms.dtype}: {named}; "
            "every answer would be nonsense: fetch or export the checkpoint again"
        )
    return params


@dataclass
class _Assembly:
    """Makes parameters from the tensors of an open file, and notes those that are not finite."""

    source: TensorSource
    read: Reader
    forms: Forms
    damaged: dict[str, str] = field(default_factory=dict)

    def parameter(self, parameter: Parameter, order: np.ndarray | None) -> Any:
        """Returns the parameter's entry of the tree as numpy arrays in memory of their own: files may be mapped."""

        def entry(run: Run) -> Any:
            pieces = [self._piece(parameter, tensor, shape, run.form) for tensor, shape in run.parts]
            if len(pieces) > 1:
                return jax.tree.map(lambda *leaves: np.concatenate(leaves, parameter.axis), *pieces)
            return jax.tree.map(_owned, pieces[0])

        whole = joined(entry(run) for run in self.forms.runs(parameter, self.source.layout))
        return whole if order is None else reorder_heads(whole, parameter, order, np)

    def _piece(self, parameter: Parameter, tensor: Tensor, shape: tuple[int, ...], form: Form) -> Any:
        """Returns one tensor in the given form, with its shape in the tree."""
        held = self.source.layout(tensor)
        rows, columns = self._factors(parameter, tensor)
        is_smoothed = rows is not None or columns is not None
        if isinstance(form, Layout) and held is not None and form == kept(parameter, held) and not is_smoothed:
            piece = fit(self.read.packed(tensor), form)
        elif isinstance(form, Layout) or held is not None or is_smoothed:
            wide = np.dtype(np.float32)
            if held is not None:
                source = self.read.packed(tensor)
            else:
                source = self.read.array(tensor, wide).reshape(tensor.flat_shape)
            self._check(tensor, source)
            piece = converted(source, form, tensor.flat_shape, rows=rows, columns=columns)
        else:
            piece = self.read.array(tensor, jnp.dtype(form)).astype(jnp.dtype(form), copy=False)
        self._check(tensor, piece)
        return piece.reshape(*shape[:-1]) if isinstance(piece, QuantizedMatrix) else piece.reshape(shape)

    def _factors(self, parameter: Parameter, tensor: Tensor) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Returns what the tensor's rows and columns are multiplied by."""
        smoothing = self.forms.smoothing
        return (None, None) if smoothing is None else (smoothing.of_outputs(tensor), smoothing.of_inputs(parameter))

    def _check(self, tensor: Tensor, piece: Any) -> None:
        leaves = [leaf for leaf in jax.tree.leaves(piece) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        bad = [leaf for leaf in leaves if not is_finite(leaf)]
        if bad:
            self.damaged.setdefault(tensor.names[self.source.naming], describe(bad[0]))


def _owned(array: np.ndarray) -> np.ndarray:
    return array if array.flags.owndata else np.array(array)


def tree_bytes(tree: Any) -> int:
    """Returns the bytes of all arrays of a pytree; `jax.ShapeDtypeStruct` leaves count as arrays."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def describe_forms(params: Params) -> str:
    """Returns the types of a tree's matrices by bytes, most first, such as "int8" or "int4 in groups of 32, int8"."""
    found: dict[str, int] = {}
    leaves = jax.tree.leaves_with_path(params, is_leaf=lambda leaf: isinstance(leaf, QuantizedMatrix))
    for path, leaf in leaves:
        words = Layout.of(leaf).words if isinstance(leaf, QuantizedMatrix) else str(leaf.dtype)
        if "bias" not in jax.tree_util.keystr(path[-1:]) and len(leaf.shape) > 1:
            found[words] = found.get(words, 0) + tree_bytes(leaf)
    return ", ".join(sorted(found, key=lambda words: -found[words]))


def forms_digest(params: Params) -> str:
    """Returns 16 hexadecimal digits that stand for the form of every parameter of a tree, whatever its numbers."""
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, QuantizedMatrix))
    forms = [Layout.of(leaf) if isinstance(leaf, QuantizedMatrix) else str(leaf.dtype) for leaf in leaves]
    return text_digest(repr([(form, leaf.shape) for form, leaf in zip(forms, leaves, strict=True)]))


def reorder_heads(leaf: Any, parameter: Parameter, order: np.ndarray, xp: ModuleType = jnp) -> Any:
    """Returns an entry of the tree with its blocks per KV head in another order.

    Args:
      leaf: an array, a quantised matrix whose groups lie within the blocks, or a tuple of them.
      parameter: what it is.
      order: the present block of each new one.
      xp: numpy or jax.numpy.
    """

    def moved(array: Any) -> Any:
        if parameter.head_axis == 0:
            return xp.take(array, order, axis=0)
        if array.shape[-1] == 1:  # one scale per output
            return array
        blocks = array.reshape(*array.shape[:-1], parameter.num_kv_heads, -1)
        return xp.take(blocks, order, axis=-2).reshape(array.shape)

    return jax.tree.map(moved, leaf)


def separate(params: Params, config: ModelConfig) -> Params:
    """Returns the tree of the tensors of which the parameters are made.

    Numbers have the shape of their letters, quantised matrices are [F, D].
    """
    tensors: Params = {}
    for parameter in parameters(config):
        entry, axis = get_leaf(params, parameter.path), parameter.axis
        runs = list(parts_of(entry))
        start = 0
        for tensor, shape in zip(parameter.parts, parameter.part_shapes, strict=True):
            if start == runs[0].shape[axis]:
                del runs[0]
                start = 0
            end = start + shape[axis]
            cut = (slice(None),) * axis + (slice(start, end),)
            part = jax.tree.map(lambda leaf, cut=cut: np.asarray(leaf)[cut], runs[0])  # views, where the host has them
            rows = tensor.flat_shape[:1] if isinstance(part, QuantizedMatrix) else tensor.shape
            set_leaf(tensors, tensor.path, part.reshape(*rows))
            start = end
    return tensors


def parameter_tree(config: ModelConfig, leaf: Callable[[Parameter], Any]) -> Params:
    """Returns the model's parameter tree with ``leaf`` of every parameter: shapes, storage types, partition specs.

    Args:
      config: the model.
      leaf: makes an entry from a parameter's path, shape and axes (the letters of `lserve_jax.weights.rules`).
    """
    params: Params = {}
    for parameter in parameters(config):
        set_leaf(params, parameter.path, leaf(parameter))
    return params


def abstract_params(
    config: ModelConfig,
    dtype: jax.typing.DTypeLike,
    weight_dtype: str | None = None,
    layout_of: LayoutOf = lambda tensor: None,
) -> Params:
    """Returns the tree of `load_tensors` as `jax.ShapeDtypeStruct`; reads and allocates nothing.

    Args:
      config: the model.
      dtype: type of numbers.
      weight_dtype: see `Forms`.
      layout_of: how the file stores each tensor.
    """
    forms = Forms(dtype=str(jnp.dtype(dtype)), weight_dtype=weight_dtype)
    return parameter_tree(config, lambda parameter: forms.abstract(parameter, layout_of))


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
