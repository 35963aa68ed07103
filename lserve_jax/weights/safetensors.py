"""Hugging Face checkpoints in safetensors: one file, or shards with an index; memory-mapped, read tensor by tensor."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from lserve_jax.config.errors import InputError, shown
from lserve_jax.config.json_file import read_json
from lserve_jax.weights.hf_packing import AS_NUMBERS, StoredMatrix
from lserve_jax.weights.hf_quantized import Quantized
from lserve_jax.weights.layout import Layout
from lserve_jax.weights.rules import Naming, Tensor
from lserve_jax.weights.tensors import Inventory
from pallas_kernels.core.quantized_matrix import QuantizedMatrix

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SHARD_PATTERN = re.compile(r"model-\d+-of-\d+\.safetensors")
DTYPES = ("F64", "F32", "F16", "BF16")


class Header(NamedTuple):
    """What a file says of one tensor: its safetensors dtype and its shape."""

    dtype: str
    shape: tuple[int, ...]


class SafetensorsFolder:
    """The tensors of a folder's ``model.safetensors``, or of the shards in its ``model.safetensors.index.json``.

    A quantised matrix counts as one tensor, ``….weight``, whatever the tensors are in which the files store it.
    """

    naming: Naming = "hf"

    def __init__(self, folder: Path, quantized: Quantized | None = None) -> None:
        self.folder = folder
        self.quantized = quantized or Quantized()

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
        headers, problems = self._headers()
        shapes, found = _compare(headers, self.quantized)
        return Inventory(shapes=shapes, problems=[*problems, *found])

    def layout(self, tensor: Tensor) -> Layout | None:
        """Returns how the files store a matrix that can be kept in 8 or 4 bits; None for numbers and all others.

        Raises:
          InputError: if a quantised matrix is incomplete.
        """
        matrix = self.quantized.matrices.get(tensor.names["hf"])
        if matrix is None or self._refusals[matrix.name]:
            return None
        return matrix.layout(self._scale_dtype(matrix))

    def require_kept(self) -> None:
        """Raises `InputError` if a quantised matrix cannot be kept as it is, or is incomplete."""
        refused = [name for name, refusal in self._refusals.items() if refusal]
        if refused:
            others = f" (and {len(refused) - 1} others)" if len(refused) > 1 else ""
            reason = self._refusals[refused[0]]
            raise InputError(f"{self.location}: {refused[0]}{others} cannot be kept packed: {reason}; {AS_NUMBERS}")

    @cached_property
    def _refusals(self) -> dict[str, str]:
        """Returns why each quantised matrix cannot be kept packed; empty if it can."""
        matrices = self.quantized.matrices
        if not matrices:
            return {}
        if problems := self.inventory().problems:
            raise InputError(f"{self.location}: {'; '.join(problems)}")
        with self.open() as reader:
            return {
                name: matrix.refusal(self._scale_dtype(matrix), reader.order(matrix))
                for name, matrix in matrices.items()
            }

    def _scale_dtype(self, matrix: StoredMatrix) -> str:
        """Returns the safetensors dtype of the scales of a complete matrix."""
        header = self._known_headers[matrix.scale]
        assert header is not None
        return header.dtype

    @contextmanager
    def open(self) -> Iterator["SafetensorsReader"]:
        """Yields what reads one tensor; files stay mapped until the context ends."""
        weight_map = self._weight_map() if self._is_sharded else {}
        with ExitStack() as stack:
            yield SafetensorsReader(self, weight_map, stack)

    @cached_property
    def _known_headers(self) -> dict[str, Header | None]:
        return self._headers()[0]

    def _headers(self) -> tuple[dict[str, Header | None], list[str]]:
        """Returns the header of every tensor, None if a problem covers it, and all problems of index and files."""
        return self._sharded_headers() if self._is_sharded else self._single_headers()

    def _single_headers(self) -> tuple[dict[str, Header | None], list[str]]:
        path = self.folder / SINGLE_FILE
        if not path.is_file():
            pickles = any(self.folder.glob("*.bin")) or any(self.folder.glob("*.pt*"))
            hint = "; pickled weights (*.bin, *.pt) are not read, convert them to safetensors" if pickles else ""
            raise InputError(f"{self.folder}: holds neither {SINGLE_FILE} nor {INDEX_FILE}{hint}")
        headers, problems = _read_header(path)
        if headers is None:
            raise InputError(f"{self.folder}: {problems[0]}")
        return dict(headers), problems

    def _sharded_headers(self) -> tuple[dict[str, Header | None], list[str]]:
        weight_map = self._weight_map()
        problems = [f"{name} lies in the folder but not in the index" for name in self._unnamed_shards(weight_map)]
        # Every tensor in the index counts as present: if a file lacks it, the problem of that file is reported instead.
        headers: dict[str, Header | None] = dict.fromkeys(weight_map)
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
                headers |= {name: held[name] for name in named & held.keys()}
        return headers, problems

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Puts the file's name in front of errors."""
        try:
            yield
        except InputError as error:
            raise InputError(f"{self.location}: {error}") from None

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


class SafetensorsReader:
    """Reads the tensors of a folder while its files are open."""

    def __init__(self, source: SafetensorsFolder, weight_map: Mapping[str, str], stack: ExitStack) -> None:
        self._source = source
        self._weight_map = weight_map
        self._stack = stack
        self._handles: dict[str, Any] = {}

    def array(self, tensor: Tensor, dtype: np.dtype) -> np.ndarray:
        """Returns the tensor in the file's dtype; a quantised matrix as numbers of ``dtype``.

        Raises:
          InputError: if the tensors of a quantised matrix contradict each other.
        """
        name = tensor.names["hf"]
        matrix = self._source.quantized.matrices.get(name)
        if matrix is None:
            return self._read(name)
        with self._source._named_errors():
            return matrix.numbers(self._parts(matrix), dtype)

    def packed(self, tensor: Tensor) -> QuantizedMatrix:
        """Returns a quantised matrix as it is, in the layout that `SafetensorsFolder.layout` told.

        Raises:
          InputError: if its tensors contradict each other.
        """
        matrix = self._source.quantized.matrices[tensor.names["hf"]]
        with self._source._named_errors():
            return matrix.unpack(self._parts(matrix))

    def order(self, matrix: StoredMatrix) -> np.ndarray | None:
        """Returns the group [D] of each input of a quantised matrix; None if the file has none."""
        name = matrix.order
        return self._read(name) if name is not None and name in self._source._known_headers else None

    def _parts(self, matrix: StoredMatrix) -> dict[str, np.ndarray]:
        """Returns the tensors of a matrix by name, without the optional ones that the files lack."""
        held = self._source._known_headers
        return {name: self._read(name) for name, part in matrix.parts.items() if name in held or not part.is_optional}

    def _read(self, name: str) -> np.ndarray:
        file = self._weight_map.get(name, SINGLE_FILE)
        path = self._source.folder / file
        if file not in self._handles:
            self._handles[file] = self._stack.enter_context(safe_open(path, framework="numpy"))
        if self._handles[file].get_slice(name).get_dtype() == "F8_E4M3":
            return _read_float8(path, name)
        return self._handles[file].get_tensor(name)


def _read_float8(path: Path, name: str) -> np.ndarray:
    """Returns a tensor of float8, which numpy does not have and safetensors therefore does not read.

    The file has the length of its header (8 bytes), the header in JSON, and the bytes to which its offsets refer.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(length))[name]
        start, end = entry["data_offsets"]
        file.seek(8 + length + start)
        return np.frombuffer(file.read(end - start), ml_dtypes.float8_e4m3fn).reshape(entry["shape"])


def _read_header(path: Path) -> tuple[dict[str, Header] | None, list[str]]:
    """Returns the headers of a file's tensors; (None, problems) for a file that cannot be read."""
    if not path.is_file():
        return None, [f"{path.name} is missing"]
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.offset_keys()}
            return {name: Header(one.get_dtype(), tuple(one.get_shape())) for name, one in slices.items()}, []
    except (SafetensorError, OSError) as error:
        return None, [f"{path.name} is truncated or not a safetensors file ({error})"]


def _compare(
    headers: Mapping[str, Header | None], quantized: Quantized
) -> tuple[dict[str, tuple[int, ...] | None], list[str]]:
    """Returns the shapes of tensors, quantised matrices as one each, and the problems of dtypes and of their parts.

    A tensor or matrix with a problem has the shape None.
    """
    shapes: dict[str, tuple[int, ...] | None] = {}
    problems: list[str] = []
    owned: set[str] = set()
    for name, matrix in quantized.matrices.items():
        found = _part_problems(headers, matrix)
        owned |= {*matrix.parts, name}
        shapes[name] = None if found else matrix.shape
        problems += found
    for name, header in headers.items():
        if name in owned or quantized.is_unused(name):
            continue
        shapes[name] = header and header.shape
        # Beside a quantised matrix, what is no part of it and no bias is unexpected, whatever its dtype.
        is_plain = quantized.owner(name) is None or name.endswith(".bias")
        if header is not None and header.dtype not in DTYPES and is_plain:
            shapes[name] = None
            problems.append(f"tensor {name} has dtype {header.dtype}, expected one of {', '.join(DTYPES)}")
    return shapes, problems


def _part_problems(headers: Mapping[str, Header | None], matrix: StoredMatrix) -> list[str]:
    """Returns one line for every tensor of a quantised matrix that is missing, unexpected, or of another type."""
    problems = []
    if matrix.name in headers and matrix.name not in matrix.parts:
        problems.append(f"unexpected tensor {matrix.name}, which quantization_config says is quantised")
    for name, part in matrix.parts.items():
        header = headers.get(name)
        if name not in headers and not part.is_optional:
            problems.append(f"missing tensor {name} {list(part.shapes[0])}")
        elif header is not None and header.dtype not in part.dtypes:
            problems.append(f"tensor {name} has dtype {header.dtype}, expected {' or '.join(part.dtypes)}")
        elif header is not None and header.shape not in part.shapes:
            problems.append(f"tensor {name} has shape {list(header.shape)}, expected {list(part.shapes[0])}")
    return problems
