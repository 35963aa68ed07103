"""The header of a GGUF file: its metadata as Python values, and where each of its tensors lies.

The file is mapped. Its layout (little-endian): magic, version, the numbers of tensors and of metadata, the metadata, a
description of each tensor, and the tensors at multiples of an alignment.
"""

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np

from lserve_jax.config.errors import InputError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
# Types of metadata by their number in the file, as codes of `struct`; then those that have no code.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
# Tensors that are stored as numbers; all others are rows of blocks of bytes.
NUMBERS = {"F32": np.float32, "F16": np.float16}


class Stored(NamedTuple):
    """A tensor as stored in the file: mapped but not read.

    Attributes:
      data: [..., numbers or bytes of a row], in the order of ``shape``.
      kind: name of the type, such as "Q4_K", or its number if the gguf package does not know it.
      shape: the tensor's shape, outermost axis first.
    """

    data: np.ndarray
    kind: str
    shape: tuple[int, ...]


class Metadata(dict[str, Any]):
    """The metadata of a GGUF file, plain Python values by key.

    Attributes:
      location: the path of the file, for messages.
    """

    def __init__(self, values: Mapping[str, Any], location: str) -> None:
        super().__init__(values)
        self.location = location


class Header(NamedTuple):
    """Metadata by key, and tensors by name."""

    metadata: Metadata
    tensors: dict[str, Stored]


class _DamageError(Exception):
    """The bytes are not those of a GGUF file."""


def read_header(path: Path) -> Header:
    """Returns the header of the file at ``path``.

    Raises:
      InputError: if it cannot be read, is not a GGUF file of a known version, or is cut short.
    """
    try:
        data = np.memmap(path, mode="r") if path.stat().st_size else np.empty(0, np.uint8)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    try:
        return _parse(path, data)
    except (_DamageError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path}: truncated or not a GGUF file ({error})") from None


def _parse(path: Path, data: np.ndarray) -> Header:
    cursor = _Cursor(data)
    if cursor.take(len(MAGIC)) != MAGIC:
        raise _DamageError("it does not begin with GGUF")
    version = cursor.number("I")
    if version & 0xFFFF == 0 and version:
        raise InputError(f"{path}: written in the other byte order; convert it with gguf-convert-endian")
    if version not in VERSIONS:
        raise InputError(f"{path}: has version {version} of GGUF, only {' and '.join(map(str, VERSIONS))} are read")
    num_tensors, num_metadata = cursor.number("Q"), cursor.number("Q")
    metadata = Metadata({}, str(path))
    for _ in range(num_metadata):
        key = cursor.string()
        if key in metadata:
            raise _DamageError(f"metadata {key!r} stands there twice")
        metadata[key] = cursor.value(cursor.number("I"))
    described = [cursor.tensor() for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise _DamageError(f"general.alignment {alignment!r}")
    begin = -(-cursor.at // alignment) * alignment
    tensors: dict[str, Stored] = {}
    for name, shape, number, offset in described:
        if name in tensors:
            raise _DamageError(f"tensor {name!r} stands there twice")
        tensors[name] = _stored(data, name, shape, number, begin + offset)
    return Header(metadata, tensors)


def _stored(data: np.ndarray, name: str, shape: tuple[int, ...], number: int, begin: int) -> Stored:
    """Returns the tensor that begins at a byte of ``data``; an empty one if its type is unknown."""
    try:
        kind = gguf.GGMLQuantizationType(number)
        block, size = gguf.GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        return Stored(np.empty(0, np.uint8), str(number), shape)
    *rows, columns = shape
    if columns % block:
        raise _DamageError(f"tensor {name!r} has rows of {columns} elements, no multiple of the {block} of a block")
    row = columns // block * size
    end = begin + math.prod(rows) * row
    if end > data.size:
        raise _DamageError(f"tensor {name!r} ends at byte {end} of {data.size}")
    held = data[begin:end].view(np.ndarray).reshape(*rows, row)
    return Stored(held.view(NUMBERS.get(kind.name, np.uint8)), kind.name, shape)


class _Cursor:
    """Reads one value after the other; `at` is the next byte."""

    def __init__(self, data: np.ndarray) -> None:
        self._view = memoryview(data)
        self.at = 0

    def take(self, size: int) -> memoryview:
        """Returns the next bytes."""
        begin, self.at = self.at, self.at + size
        if self.at > len(self._view):
            raise _DamageError(f"a value ends at byte {self.at} of {len(self._view)}")
        return self._view[begin : self.at]

    def number(self, code: str) -> Any:
        """Returns the next number, of a type of `struct`."""
        (number,) = struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))
        return number

    def string(self) -> str:
        """Returns the next string: its length in bytes stands before it."""
        return str(self.take(int.from_bytes(self.take(8), "little")), "utf-8")

    def value(self, kind: int) -> Any:
        """Returns the next piece of metadata; a float32 as its shortest decimal (1e-05, not 9.999999747378752e-06)."""
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            return self._array(self.number("I"), self.number("Q"))
        if kind not in SCALARS:
            raise _DamageError(f"metadata of type {kind}")
        number = self.number(SCALARS[kind])
        return float(str(np.float32(number))) if SCALARS[kind] == "f" else number

    def _array(self, kind: int, count: int) -> list[Any]:
        if kind in SCALARS:
            dtype = np.dtype(f"<{SCALARS[kind]}")
            return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()
        if kind == STRING:
            return [self.string() for _ in range(count)]
        return [self.value(kind) for _ in range(count)]

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Returns a tensor's name, its shape with the outermost axis first, the number of its type, and its offset."""
        name = self.string()
        dimensions = self._array(10, self.number("I"))
        return name, tuple(reversed(dimensions)) or (1,), self.number("I"), self.number("Q")
