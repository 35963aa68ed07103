"""Converted checkpoint folders: parameters through orbax, together with the configuration and tokenizer files.

Each tensor has a file name of its own. A quantised matrix is a folder with its leaves: codes, scale and low.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.tree_util import keystr, tree_leaves_with_path, tree_map_with_path

from lserve_jax.config.errors import InputError
from lserve_jax.config.generation import GENERATION_FILE
from lserve_jax.config.model import ModelConfig
from lserve_jax.models.llama import Params
from lserve_jax.weights.layout import Layout, converted
from lserve_jax.weights.rules import Naming, Tensor, expected_tensors
from lserve_jax.weights.tensors import Inventory, Reader, get_leaf, separate, set_leaf
from pallas_kernels.core.quantized_matrix import QuantizedMatrix

PARAMS_FOLDER = "params"
LIST_FILE = "params.json"
"""Names, shapes and layouts: shapes alone could be found only by opening every array."""


def is_orbax_folder(folder: Path) -> bool:
    """Returns whether `save` wrote the folder."""
    return (folder / LIST_FILE).is_file()


def check_target(folder: Path) -> None:
    """Raises `InputError` unless `save` can write ``folder``: it does not exist, or is an empty folder."""
    try:
        str(folder).encode()
    except UnicodeEncodeError:  # bytes of a file name that are no UTF-8, which orbax cannot pass on
        raise InputError(f"{folder}: the name must be valid Unicode") from None
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: exists and is not a folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"{folder}: the folder is not empty; name a new one")


def save(
    folder: Path,
    params: Params,
    *,
    config: ModelConfig,
    hf_config: Mapping[str, Any],
    generation_config: Mapping[str, Any],
    write_others: Callable[[Path], None],
) -> None:
    """Writes a folder that `open_checkpoint` reads; it appears under its name only when it is complete.

    Args:
      folder: where to write; it must not exist, or be an empty folder.
      params: the parameter tree in the checkpoint's order of heads.
      config: the model.
      hf_config: becomes ``config.json``.
      generation_config: becomes ``generation_config.json``; an empty one is not written.
      write_others: writes the tokenizer's files, and what else belongs to the model, into the given folder.

    Raises:
      InputError: if the folder exists and is not empty.
    """
    folder = folder.absolute()
    check_target(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    partial.mkdir()
    try:
        _write_json(partial / "config.json", hf_config)
        if generation_config:
            _write_json(partial / GENERATION_FILE, generation_config)
        write_others(partial)
        tensors = separate(params, config)
        listed = {
            tensor.names["ours"]: _entry(tensor, get_leaf(tensors, tensor.path))
            for tensor in expected_tensors(config, "ours")
        }
        _write_json(partial / LIST_FILE, listed)
        import orbax.checkpoint as ocp  # at the top of the file, this import would delay every start by 0.15 s

        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(partial / PARAMS_FOLDER, _without_classes(tensors))
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _entry(tensor: Tensor, leaf: Any) -> Any:
    """Returns what the list says of a tensor: its shape, and the layout if it is quantised."""
    if not isinstance(leaf, QuantizedMatrix):
        return tensor.shape
    return {"shape": tensor.shape, "layout": asdict(Layout.of(leaf))}


def _without_classes(tensors: Params) -> Params:
    """Returns the tree with a dict of leaves for each quantised matrix."""
    found: Params = {}
    for path, leaf in tree_leaves_with_path(tensors):
        set_leaf(found, tuple(_names(path)), leaf)
    return found


class Listed(NamedTuple):
    """What the list says of a tensor; a layout of None is that of numbers."""

    shape: tuple[int, ...]
    layout: Layout | None

    @classmethod
    def of(cls, entry: Any) -> "Listed":
        """Returns an entry of the list: a shape, or an object with a shape and a layout."""
        is_quantised = isinstance(entry, dict)
        shape, layout = (entry["shape"], Layout.from_json(entry["layout"])) if is_quantised else (entry, None)
        return cls(tuple(map(int, shape)), layout)


class OrbaxFolder:
    """The parameters that `save` wrote."""

    naming: Naming = "ours"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.params = folder.absolute() / PARAMS_FOLDER

    @property
    def location(self) -> str:
        """Returns the path of the file that lists the parameters."""
        return str(self.folder / LIST_FILE)

    def files(self) -> list[Path]:
        """Returns the files that hold the parameters."""
        return [self.folder / LIST_FILE, *sorted(path for path in self.params.rglob("*") if path.is_file())]

    @cached_property
    def _listed(self) -> dict[str, Listed]:
        """The list that `save` wrote; raises `InputError` if it is missing or damaged."""
        path = self.folder / LIST_FILE
        try:
            listed = json.loads(path.read_text(encoding="utf-8"))
            return {name: Listed.of(entry) for name, entry in listed.items()}
        except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
            raise InputError(f"{path}: not a list of parameters ({error})") from None

    def inventory(self) -> Inventory:
        """Returns the shape of every parameter, from the list that `save` wrote.

        Raises:
          InputError: if the list is missing or cannot be read.
        """
        return Inventory(shapes={name: listed.shape for name, listed in self._listed.items()})

    def layout(self, tensor: Tensor) -> Layout | None:
        """Returns how a matrix is quantised; None for numbers, and for what is missing.

        Raises:
          InputError: if the list cannot be read, or the tensor cannot have the layout that it names.
        """
        name = tensor.names["ours"]
        layout = self._listed[name].layout if name in self._listed else None
        if layout is not None and not (tensor.is_matrix and layout.suits(tensor.flat_shape[-1])):
            raise InputError(f"{self.location}: {name} {list(tensor.shape)} cannot be stored as {layout.words}")
        return layout

    @contextmanager
    def open(self) -> Iterator[Reader]:
        """Yields what reads one tensor after the other."""
        yield _OrbaxReader(self)


class _OrbaxReader:
    """Reads arrays through tensorstore, as orbax does, which for each of them would read the metadata of all."""

    def __init__(self, folder: OrbaxFolder) -> None:
        self._folder = folder
        with self._naming_damage():
            metadata = json.loads((folder.params / "_METADATA").read_text(encoding="utf-8"))
            if not metadata["use_ocdbt"]:
                raise ValueError("not in OCDBT's format")
            self._driver = "zarr3" if metadata["use_zarr3"] else "zarr"

    def array(self, tensor: Tensor, dtype: np.dtype) -> np.ndarray:
        """Returns the numbers of a tensor in ``dtype``; a quantised one is dequantised."""
        if self._folder.layout(tensor) is None:
            return self._read(tensor.path, tensor.shape).astype(dtype, copy=False)
        return converted(self.packed(tensor), str(dtype), tensor.flat_shape).reshape(tensor.shape)

    def packed(self, tensor: Tensor) -> QuantizedMatrix:
        """Returns a quantised matrix [F, D] as it is stored."""
        layout = self._folder.layout(tensor)
        assert layout is not None

        def leaf(path: tuple[Any, ...], expected: jax.ShapeDtypeStruct) -> np.ndarray:
            return self._read((*tensor.path, *_names(path)), expected.shape, expected.dtype)

        return tree_map_with_path(leaf, layout.abstract(tensor.flat_shape))

    def _read(self, path: tuple[str, ...], shape: tuple[int, ...], dtype: np.dtype | None = None) -> np.ndarray:
        """Returns an array, which must have the given shape and, unless it is None, the given dtype."""
        import tensorstore  # here, as it would delay every start

        name, folder = ".".join(path), self._folder.params
        kvstore = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}, "path": f"{name}/"}
        with self._naming_damage():
            spec = {"driver": self._driver, "kvstore": kvstore}
            array = tensorstore.open(spec, open=True, read=True).result().read().result()
        found, listed = (array.shape, array.dtype), (shape, dtype or array.dtype)
        for what, mine, theirs in zip(("shape", "type"), found, listed, strict=True):
            if mine != theirs:
                raise InputError(f"{folder}: {name} has {what} {mine}, but {LIST_FILE} says {theirs}")
        return array

    @contextmanager
    def _naming_damage(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = next(iter(str(error).partition(" [")[0].splitlines()), repr(error))  # then the whole request
            raise InputError(f"{self._folder.params}: damaged or not an orbax checkpoint ({reason})") from None


def _names(path: tuple[Any, ...]) -> list[str]:
    """Returns the keys and fields on the way to a leaf."""
    return keystr(path, simple=True, separator="/").split("/")


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
