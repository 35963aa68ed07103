"""Converted checkpoint folders: parameters through orbax, together with the configuration and tokenizer files."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lserve_jax.config.errors import InputError
from lserve_jax.config.generation import GENERATION_FILE
from lserve_jax.models.llama import Params
from lserve_jax.weights.rules import Naming, Tensor
from lserve_jax.weights.tensors import Inventory, ReadTensor, get_leaf, set_leaf

PARAMS_FOLDER = "params"
# Names and shapes: orbax finds shapes only by opening every array, and if one of them is damaged, its other reads go on
# after the error.
LIST_FILE = "params.json"


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
    hf_config: Mapping[str, Any],
    generation_config: Mapping[str, Any],
    write_others: Callable[[Path], None],
) -> None:
    """Writes a folder that `open_checkpoint` reads; it appears under its name only when it is complete.

    Args:
      folder: where to write; it must not exist, or be an empty folder.
      params: the parameter tree in the checkpoint's order of heads.
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
        leaves = jax.tree_util.tree_leaves_with_path(params)
        _write_json(partial / LIST_FILE, {".".join(key.key for key in path): leaf.shape for path, leaf in leaves})
        import orbax.checkpoint as ocp  # at the top of the file, this import would delay every start by 0.15 s

        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(partial / PARAMS_FOLDER, params)
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class OrbaxFolder:
    """The parameters that `save` wrote, read one at a time, so that no other read is active if one is damaged."""

    naming: Naming = "ours"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._params = folder.absolute() / PARAMS_FOLDER

    @property
    def location(self) -> str:
        """Returns the path of the file that lists the parameters."""
        return str(self.folder / LIST_FILE)

    def files(self) -> list[Path]:
        """Returns the files that hold the parameters."""
        return [self.folder / LIST_FILE, *sorted(path for path in self._params.rglob("*") if path.is_file())]

    def inventory(self) -> Inventory:
        """Returns the shape of every parameter, from the list that `save` wrote.

        Raises:
          InputError: if the list is missing or cannot be read.
        """
        path = self.folder / LIST_FILE
        try:
            listed = json.loads(path.read_text(encoding="utf-8"))
            return Inventory(shapes={name: tuple(map(int, shape)) for name, shape in listed.items()})
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"{path}: not a list of parameters ({error})") from None

    @contextmanager
    def open(self) -> Iterator[ReadTensor]:
        """Yields a function that restores one parameter directly into the given dtype."""
        import orbax.checkpoint as ocp

        with ocp.PyTreeCheckpointer() as checkpointer:

            def read(tensor: Tensor, dtype: np.dtype) -> np.ndarray:
                item: Params = {}
                options: Params = {}
                set_leaf(item, tensor.path, 0)
                set_leaf(options, tensor.path, ocp.RestoreArgs(restore_type=np.ndarray, dtype=dtype))
                arguments = ocp.args.PyTreeRestore(item=item, restore_args=options, partial_restore=True)
                try:
                    restored = checkpointer.restore(self._params, args=arguments)
                except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                    # orbax and tensorstore raise these for damaged files; their messages have many lines.
                    reason = next(iter(str(error).splitlines()), repr(error))
                    raise InputError(f"{self._params}: damaged or not an orbax checkpoint ({reason})") from None
                array = get_leaf(restored, tensor.path)
                if array.shape != tensor.shape:
                    name = tensor.names["ours"]
                    raise InputError(
                        f"{self._params}: {name} has shape {array.shape}, but {LIST_FILE} says {tensor.shape}"
                    )
                return array

            yield read


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
