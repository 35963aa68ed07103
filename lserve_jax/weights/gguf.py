"""GGUF files: tensors as they are packed, or dequantised one block of rows at a time, in Hugging Face's layout."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from lserve_jax.config.errors import InputError, shown
from lserve_jax.weights.gguf_config import ROPE_FACTORS, hf_config, unknown_keys
from lserve_jax.weights.gguf_header import Stored, read_header
from lserve_jax.weights.gguf_packed import LAYOUTS, unpack
from lserve_jax.weights.layout import Layout
from lserve_jax.weights.rules import Naming, Tensor
from lserve_jax.weights.tensors import Inventory
from pallas_kernels.core.quantized_matrix import QuantizedMatrix

# llama.cpp rotates neighbouring elements (2i, 2i + 1) in these, so its converter interleaves the halves of a head.
INTERLEAVED = ("llama",)

# The types of weights that `gguf.dequantize` can read.
TENSOR_TYPES = (
    *("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
    *("TQ1_0", "TQ2_0", "MXFP4"),
)
CHUNK_BYTES = 16 << 20  # of float32 per dequantised block of rows
SPLIT_NAME = re.compile(r".*-\d{5}-of-(\d{5})\.gguf")


class GGUFFile:
    """A GGUF file with its header read and its tensors mapped.

    ``metadata`` has plain Python values by GGUF key.

    Raises:
      InputError: if the file is not a GGUF file, is truncated, or is one part of a split one.
    """

    naming: Naming = "gguf"

    def __init__(self, path: Path) -> None:
        self.path = path
        split = SPLIT_NAME.fullmatch(path.name)
        is_split = split is not None and int(split[1]) > 1
        self._header = read_header(path)
        self.metadata, self.tensors = self._header
        if is_split or self.metadata.get("split.count", 1) not in (0, 1):
            raise InputError(f"{path}: split GGUF files are not read; join them with llama-gguf-split --merge")

    @property
    def location(self) -> str:
        """Returns the path of the file."""
        return str(self.path)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Returns one line about metadata of which it is not known what it changes, if there is any."""
        unknown = [f"{shown(key)} = {shown(self.metadata[key])}" for key in unknown_keys(self.metadata)]
        if not unknown:
            return ()
        return (
            f"{self.path}: unknown metadata may change what the model computes and is ignored: {', '.join(unknown)}",
        )

    def hf_config(self) -> dict[str, Any]:
        """Returns the metadata as a ``config.json``.

        Raises:
          InputError: if metadata is missing, or needs what Hugging Face's model of that name does not support.
        """
        try:
            return hf_config(self._header, self._rope_factors())
        except InputError as error:
            raise InputError(f"{self.path}: {error}") from None

    def _rope_factors(self) -> np.ndarray | None:
        stored = self.tensors.get(ROPE_FACTORS)
        return None if stored is None else _dequantize(stored, np.dtype(np.float32)).reshape(-1)

    def inventory(self) -> Inventory:
        """Returns the shape of every tensor, with a problem for each type that cannot be dequantised."""
        unreadable = {name: stored.kind for name, stored in self.tensors.items() if stored.kind not in TENSOR_TYPES}
        return Inventory(
            shapes={name: None if name in unreadable else stored.shape for name, stored in self.tensors.items()},
            problems=[f"tensor {name} has type {kind}, which is not read" for name, kind in unreadable.items()],
        )

    def layout(self, tensor: Tensor) -> Layout | None:
        """Returns how the file packs a matrix in 8 or 4 bits; None for what is read as numbers, or is missing."""
        stored = self.tensors.get(tensor.names["gguf"])
        return LAYOUTS.get(stored.kind) if stored and len(stored.shape) > 1 else None

    @contextmanager
    def open(self) -> Iterator["GGUFReader"]:
        """Yields what reads one tensor at a time."""
        yield GGUFReader(self)


class GGUFReader:
    """Reads the tensors of a GGUF file in Hugging Face's layout."""

    def __init__(self, file: GGUFFile) -> None:
        self._file = file

    def array(self, tensor: Tensor, dtype: np.dtype) -> np.ndarray:
        """Returns a tensor in ``dtype``; a packed one is dequantised."""
        return _dequantize(self._stored(tensor), dtype)

    def packed(self, tensor: Tensor) -> QuantizedMatrix:
        """Returns a matrix as the file packs it, in its `GGUFFile.layout`: numpy leaves of its ``file_shape``."""
        stored = self._stored(tensor)
        return unpack(stored.data, stored.kind, stored.shape)

    def _stored(self, tensor: Tensor) -> Stored:
        """Returns a tensor of the file with its rows in Hugging Face's order."""
        stored = self._file.tensors[tensor.names["gguf"]]
        if not (tensor.is_rotary and self._file.metadata["general.architecture"] in INTERLEAVED):
            return stored
        head_dim = tensor.shape[tensor.axes.index("H")]
        return stored._replace(data=_undo_interleaving(stored.data, head_dim))


def _dequantize(stored: Stored, dtype: np.dtype) -> np.ndarray:
    """Returns the tensor in ``dtype``, dequantised one block of rows at a time to avoid a float32 copy of the whole."""
    if stored.kind not in TENSOR_TYPES:
        raise InputError(f"tensors of type {stored.kind} are not read")
    kind = gguf.GGMLQuantizationType[stored.kind]
    array = np.empty(stored.shape, dtype)
    rows = len(stored.data) if stored.data.ndim > 1 else stored.data.size
    step = max(1, CHUNK_BYTES // 4 * rows // max(array.size, 1))
    for start in range(0, rows, step):
        array[start : start + step] = gguf.dequantize(stored.data[start : start + step], kind)
    return array


def _undo_interleaving(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Returns the rows of every head in Hugging Face's order (0, 1, 2, …), from llama.cpp's (0, H/2, 1, H/2 + 1, …)."""
    pairs = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
