"""Hugging Face checkpoints in safetensors: one file, or shards with an index; memory-mapped, read tensor by tensor."""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from lserve_jax.config.errors import InputError, shown
from lserve_jax.config.json_file import read_json
from lserve_jax.weights.rules import Naming, Tensor
from lserve_jax.weights.tensors import Inventory, ReadTensor

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SHARD_PATTERN = re.compile(r"model-\d+-of-\d+\.safetensors")
DTYPES = ("F64", "F32", "F16", "BF16")


class SafetensorsFolder:
    """The tensors of a folder's ``model.safetensors``, or of the shards in its ``model.safetensors.index.json``."""

    naming: Naming = "hf"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def location(self) -> str:
        """Returns the path of the file that lists the tensors."""
        return str(self.folder / (INDEX_FILE if self._is_sharded else SINGLE_FILE))

    def files(self) -> list[Path]:
        """Returns the files that hold the tensors."""
        names = sorted(set(self._weight_map().values())) if self._is_sharded else [SINGLE_FILE]
        return [self.folder / name for name in names]

    def inventory(self) -> Inventory:
        """Returns the shape of every tensor, and every problem of the index and of the files.

        Raises:
          InputError: if the folder has neither a single file nor an index, or the existing one cannot be read.
        """
        return self._sharded_inventory() if self._is_sharded else self._single_inventory()

    def _single_inventory(self) -> Inventory:
        path = self.folder / SINGLE_FILE
        if not path.is_file():
            pickles = any(self.folder.glob("*.bin")) or any(self.folder.glob("*.pt*"))
            hint = "; pickled weights (*.bin, *.pt) are not read, convert them to safetensors" if pickles else ""
            raise InputError(f"{self.folder}: holds neither {SINGLE_FILE} nor {INDEX_FILE}{hint}")
        shapes, problems = _read_header(path)
        if shapes is None:
            raise InputError(f"{self.folder}: {problems[0]}")
        return Inventory(shapes=shapes, problems=problems)

    def _sharded_inventory(self) -> Inventory:
        weight_map = self._weight_map()
        problems = [f"{name} lies in the folder but not in the index" for name in self._unnamed_shards(weight_map)]
        # Every tensor in the index counts as present: if a file lacks it, the problem of that file is reported instead.
        shapes: dict[str, tuple[int, ...] | None] = dict.fromkeys(weight_map)
        for file in sorted(set(weight_map.values())):
            named = {name for name, shard in weight_map.items() if shard == file}
            held, found = _read_header(self.folder / file)
            problems += found
            if held is not None:
                problems += [
                    f"{file} does not hold {name}, which the index puts there" for name in sorted(named - held.keys())
                ]
                problems += [
                    f"{file} holds {name}, which the index does not put there" for name in sorted(held.keys() - named)
                ]
                shapes |= {name: held[name] for name in named & held.keys()}
        return Inventory(shapes=shapes, problems=problems)

    @contextmanager
    def open(self) -> Iterator[ReadTensor]:
        """Yields a function that reads one tensor; files stay mapped until the context ends."""
        weight_map = self._weight_map() if self._is_sharded else {}
        handles: dict[str, Any] = {}
        with ExitStack() as stack:

            def read(tensor: Tensor, dtype: np.dtype) -> np.ndarray:
                name = tensor.names["hf"]
                file = weight_map.get(name, SINGLE_FILE)
                if file not in handles:
                    handles[file] = stack.enter_context(safe_open(self.folder / file, framework="numpy"))
                return handles[file].get_tensor(name)

            yield read

    @property
    def _is_sharded(self) -> bool:
        return not (self.folder / SINGLE_FILE).exists() and (self.folder / INDEX_FILE).exists()

    def _weight_map(self) -> dict[str, str]:
        """Returns the file of each tensor, from the index."""
        path = self.folder / INDEX_FILE
        weight_map = read_json(path).get("weight_map")
        if not isinstance(weight_map, dict):
            raise InputError(f"{path}: weight_map must be a mapping, got {shown(weight_map)}")
        bad = [file for file in weight_map.values() if not _is_plain_name(file)]
        if bad:
            raise InputError(f"{path}: shards must be plain file names in the same folder, got {shown(bad[0])}")
        return weight_map

    def _unnamed_shards(self, weight_map: dict[str, str]) -> list[str]:
        """Returns the shards in the folder to which the index assigns no tensor."""
        files = {path.name for path in self.folder.iterdir() if SHARD_PATTERN.fullmatch(path.name)}
        return sorted(files - set(weight_map.values()))


def _is_plain_name(file: object) -> bool:
    return isinstance(file, str) and file.isprintable() and 0 < len(file) <= 200 and Path(file).name == file


def _read_header(path: Path) -> tuple[dict[str, tuple[int, ...] | None] | None, list[str]]:
    """Returns the shapes of a file's tensors and their problems; (None, problems) for a file that cannot be read.

    A tensor whose dtype is not a float type has the shape None and a problem.
    """
    if not path.is_file():
        return None, [f"{path.name} is missing"]
    try:
        with safe_open(path, framework="numpy") as file:
            headers = {name: file.get_slice(name) for name in file.offset_keys()}
            kinds = {name: header.get_dtype() for name, header in headers.items()}
            shapes = {name: tuple(header.get_shape()) for name, header in headers.items()}
    except (SafetensorError, OSError) as error:
        return None, [f"{path.name} is truncated or not a safetensors file ({error})"]
    problems = [
        f"tensor {name} has dtype {kind}, expected one of {', '.join(DTYPES)}"
        for name, kind in kinds.items()
        if kind not in DTYPES
    ]
    return {name: shape if kinds[name] in DTYPES else None for name, shape in shapes.items()}, problems
