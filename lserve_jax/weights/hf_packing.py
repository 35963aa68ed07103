"""How Hugging Face's quantised checkpoints pack a matrix: from its tensors to codes, scales and zero points, and back.

Every format means the same, see `Codes`. A `Packing` says which tensors a file has for a matrix and how to read them.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, override

import numpy as np

from lserve_jax.config.errors import InputError, shown
from lserve_jax.weights.layout import Layout
from pallas_kernels.core.quantized_matrix import CENTRE, QuantizedMatrix, pack

FLOATS = ("F16", "BF16", "F32")
SCALE_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
CHUNK = 1 << 20
"""Numbers that are dequantised at once, to avoid a float32 copy of a whole matrix."""
AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where a word of AWQ has its eight columns: column c in the half-byte ``AWQ_PLACES[c]``."""
AS_NUMBERS = "weight_dtype bfloat16 loads it as ordinary numbers"


class Part(NamedTuple):
    """One tensor of a quantised matrix: the shapes and the safetensors dtypes that it may have; the first is usual."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    is_optional: bool = False


@dataclass(frozen=True, kw_only=True)
class Codes:
    """``w[f, d] = (n[f, d] - zero[f, group[d]]) · scale[f, group[d]]``: what every format means.

    Attributes:
      n: [F, D] int8 (-8 … 7 for 4 bits) or float8_e4m3fn.
      scale: [F, G] of the file's dtype.
      zero: [F, G] int16; None for none.
      group: [D], the group of each input.
    """

    n: np.ndarray
    scale: np.ndarray
    zero: np.ndarray | None
    group: np.ndarray

    def numbers(self, dtype: np.dtype) -> np.ndarray:
        """Returns the matrix [F, D] as ``dtype``, computed in float32."""
        out = np.empty(self.n.shape, dtype)
        step = max(1, CHUNK // self.n.shape[1])
        for start in range(0, len(out), step):
            rows = slice(start, start + step)
            wide = self.n[rows].astype(np.float32)
            if self.zero is not None:
                wide -= np.take(self.zero[rows], self.group, axis=1)
            wide *= np.take(self.scale[rows].astype(np.float32), self.group, axis=1)
            out[rows] = wide
        return out


@dataclass(frozen=True, kw_only=True)
class Packing(ABC):
    """How one format stores a matrix [F, D] of F outputs and D inputs.

    Attributes:
      bits: bits per code in our layout: 8 or 4.
      block: how many outputs and how many inputs share a scale; None for all of them.
      has_zeros: whether zero points are needed: they are not where they only centre the codes.
      input_bits: see `QuantizedMatrix`.
      unused: the last names of tensors that the matrix may have and that its numbers do not need.
      refusal: why it cannot be kept packed; empty if it can.
    """

    bits: int = 8
    block: tuple[int | None, int | None]
    has_zeros: bool = False
    input_bits: int | None = None
    unused: tuple[str, ...] = ()
    refusal: str = ""

    @property
    def dtype(self) -> str:
        """Returns the dtype of the codes in our layout."""
        return "uint8" if self.bits == 4 else "int8"

    @property
    @abstractmethod
    def scale_name(self) -> str:
        """Returns the last name of the tensor with the scales."""

    @property
    def order_name(self) -> str:
        """Returns the last name of the tensor with the group of each input; empty where neighbours share one."""
        return ""

    @abstractmethod
    def parts(self, shape: tuple[int, int]) -> dict[str, Part]:
        """Returns the tensors that a file has for a matrix of ``shape``, by their last names."""

    @abstractmethod
    def codes(self, tensors: Mapping[str, np.ndarray], shape: tuple[int, int]) -> Codes:
        """Returns what the tensors mean; raises `InputError` if they contradict each other."""

    def grid(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Returns how many blocks of outputs and of inputs have a scale of their own."""
        rows, inputs = (math.ceil(size / (step or size)) for size, step in zip(shape, self.block, strict=True))
        return rows, inputs

    def groups(self, inputs: int) -> np.ndarray:
        """Returns the group [D] of each input where neighbours share one."""
        return np.arange(inputs) // (self.block[1] or inputs)

    def spread(self, values: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        """Returns one value per output and group [F, G] from one value per block."""
        return np.repeat(values.reshape(self.grid(shape)), self.block[0] or shape[0], axis=0)[: shape[0]]

    def step(self, inputs: int) -> int:
        """Returns the group of our layout, which divides the inputs also where a block does not."""
        return math.gcd(self.block[1] or inputs, inputs)


@dataclass(frozen=True, kw_only=True)
class WholeCodes(Packing):
    """One byte per code: compressed-tensors' int-quantized and float-quantized, DeepSeek's and AutoFP8's float8."""

    is_float: bool = False
    suffix: str = "weight_scale"

    @property
    @override
    def dtype(self) -> str:
        return "float8_e4m3fn" if self.is_float else "int8"

    @property
    @override
    def scale_name(self) -> str:
        return self.suffix

    @override
    def parts(self, shape: tuple[int, int]) -> dict[str, Part]:
        shapes = _grid_shapes(self.grid(shape))
        parts = {"weight": Part((shape,), ("F8_E4M3" if self.is_float else "I8",)), self.suffix: Part(shapes, FLOATS)}
        return parts | ({"weight_zero_point": Part(shapes, ("I8",))} if self.has_zeros else {})

    @override
    def codes(self, tensors: Mapping[str, np.ndarray], shape: tuple[int, int]) -> Codes:
        zero = self.spread(tensors["weight_zero_point"], shape).astype(np.int16) if self.has_zeros else None
        scale = self.spread(tensors[self.suffix], shape)
        return Codes(n=tensors["weight"], scale=scale, zero=zero, group=self.groups(shape[1]))


@dataclass(frozen=True, kw_only=True)
class PackedCodes(Packing):
    """compressed-tensors' pack-quantized: words along the inputs; zero points are packed along the outputs."""

    @property
    @override
    def scale_name(self) -> str:
        return "weight_scale"

    @property
    @override
    def order_name(self) -> str:
        return "weight_g_idx"

    @override
    def parts(self, shape: tuple[int, int]) -> dict[str, Part]:
        rows, inputs = shape
        grid = self.grid(shape)
        parts = {
            "weight_packed": Part(((rows, _words(inputs, self.bits)),), ("I32",)),
            "weight_scale": Part(_grid_shapes(grid), FLOATS),
            "weight_shape": Part(((2,),), ("I64", "I32")),
        }
        if self.has_zeros:
            parts["weight_zero_point"] = Part(((_words(grid[0], self.bits), grid[1]),), ("I32",))
        return parts | {self.order_name: Part(((inputs,),), ("I32", "I64"), is_optional=True)}

    @override
    def codes(self, tensors: Mapping[str, np.ndarray], shape: tuple[int, int]) -> Codes:
        rows, inputs = shape
        if (told := tuple(tensors["weight_shape"].tolist())) != shape:
            raise InputError(f"weight_shape says {list(told)}, the model needs {list(shape)}")
        zero = None
        if self.has_zeros:
            words = np.ascontiguousarray(tensors["weight_zero_point"].T)
            zero = _centred(_unpack(words, self.bits)[:, :rows].T, self.bits).astype(np.int16)
        return Codes(
            n=_centred(_unpack(tensors["weight_packed"], self.bits)[:, :inputs], self.bits),
            scale=self.spread(tensors["weight_scale"], shape),
            zero=zero,
            group=_order(tensors.get(self.order_name), self.groups(inputs)),
        )


@dataclass(frozen=True, kw_only=True)
class GptqCodes(Packing):
    """GPTQ: words along the inputs of the transposed matrix, zero points in words along the outputs.

    The first version of the format stores the zero points of a word minus one each, as a difference of whole words: a
    zero point of 0 borrows from its neighbour, and is read back by adding whole words. Early files give every matrix a
    bias, of zeros where the model has none.
    """

    is_first_version: bool = True
    has_extra_bias: bool = False

    @property
    @override
    def scale_name(self) -> str:
        return "scales"

    @property
    @override
    def order_name(self) -> str:
        return "g_idx"

    @override
    def parts(self, shape: tuple[int, int]) -> dict[str, Part]:
        rows, inputs = shape
        groups = self.grid(shape)[1]
        bias = {"bias": Part(((rows,),), FLOATS, is_optional=True)} if self.has_extra_bias else {}
        return bias | {
            "qweight": Part(((_words(inputs, self.bits), rows),), ("I32",)),
            "qzeros": Part(((groups, _words(rows, self.bits)),), ("I32",)),
            "scales": Part(((groups, rows),), FLOATS),
            self.order_name: Part(((inputs,),), ("I32", "I64"), is_optional=True),
        }

    @override
    def codes(self, tensors: Mapping[str, np.ndarray], shape: tuple[int, int]) -> Codes:
        rows, inputs = shape
        if self.has_extra_bias and "bias" in tensors and tensors["bias"].any():
            raise InputError(
                "its bias is not zero, but config.json describes a model without (attention_bias, mlp_bias)"
            )
        words = tensors["qzeros"].view(np.uint32)
        if self.is_first_version:
            words = words + np.uint32(0x11111111 if self.bits == 4 else 0x01010101)
        zero = _centred(_unpack(words, self.bits)[:, :rows].T, self.bits).astype(np.int16)
        if not self.has_zeros and zero.any():
            wrong = int(zero.flat[np.flatnonzero(zero)[0]]) + (1 << self.bits - 1)
            raise InputError(
                f"qzeros hold a zero point of {wrong}, but quantization_config.sym says that all are "
                f"{1 << self.bits - 1}; fetch the checkpoint again, or correct sym"
            )
        return Codes(
            n=_centred(_unpack(np.ascontiguousarray(tensors["qweight"].T), self.bits)[:, :inputs], self.bits),
            scale=np.ascontiguousarray(tensors["scales"].T),
            zero=zero if self.has_zeros else None,
            group=_order(tensors.get(self.order_name), self.groups(inputs)),
        )


@dataclass(frozen=True, kw_only=True)
class AwqCodes(Packing):
    """AWQ (gemm): words along the outputs of the transposed matrix, whose eight columns are interleaved."""

    @property
    @override
    def scale_name(self) -> str:
        return "scales"

    @override
    def parts(self, shape: tuple[int, int]) -> dict[str, Part]:
        rows, inputs = shape
        groups, words = self.grid(shape)[1], _words(rows, self.bits)
        return {
            "qweight": Part(((inputs, words),), ("I32",)),
            "qzeros": Part(((groups, words),), ("I32",)),
            "scales": Part(((groups, rows),), FLOATS),
        }

    @override
    def codes(self, tensors: Mapping[str, np.ndarray], shape: tuple[int, int]) -> Codes:
        def unpacked(words: np.ndarray) -> np.ndarray:
            words = np.ascontiguousarray(words.T)
            out = np.empty((len(words), 8, words.shape[1]), np.uint8)
            for column, place in enumerate(AWQ_PLACES):
                out[:, column] = (words >> 4 * place) & 15
            return _centred(out.reshape(-1, words.shape[1])[: shape[0]], 4)

        return Codes(
            n=unpacked(tensors["qweight"]),
            scale=np.ascontiguousarray(tensors["scales"].T),
            zero=unpacked(tensors["qzeros"]).astype(np.int16),
            group=self.groups(shape[1]),
        )


@dataclass(frozen=True, kw_only=True)
class StoredMatrix:
    """The matrix ``name`` (``….weight``) of a checkpoint, [F, D], in the tensors of its packing."""

    name: str
    shape: tuple[int, int]
    packing: Packing

    @cached_property
    def parts(self) -> dict[str, Part]:
        """Returns the tensors that a file has for it, by their full names."""
        return {self.full(part): shapes for part, shapes in self.packing.parts(self.shape).items()}

    @cached_property
    def unused(self) -> frozenset[str]:
        """Returns the full names of tensors that belong to it and that nothing needs."""
        return frozenset(map(self.full, self.packing.unused))

    @property
    def scale(self) -> str:
        """Returns the full name of the tensor with its scales."""
        return self.full(self.packing.scale_name)

    def full(self, part: str) -> str:
        """Returns the name in the file of a tensor with this last name."""
        return f"{self.name.removesuffix('weight')}{part}"

    @property
    def order(self) -> str | None:
        """Returns the full name of the tensor with the group of each input; None where neighbours share one."""
        return self.full(self.packing.order_name) if self.packing.order_name else None

    def refusal(self, scale_dtype: str, order: np.ndarray | None) -> str:
        """Returns why it cannot be kept packed; empty if it can.

        Args:
          scale_dtype: safetensors dtype of its scales.
          order: the tensor ``order`` [D]; None if the file has none.
        """
        packing, inputs = self.packing, self.shape[1]
        if packing.refusal:
            return packing.refusal
        if order is not None and not ((order == -1).all() or np.array_equal(order, packing.groups(inputs))):
            return "its inputs are in act-order, so that no neighbours share a scale"
        if packing.has_zeros and scale_dtype == "F32":
            return "zero points with scales in float32 would have to be rounded"
        group = packing.step(inputs)
        return f"groups of {group} inputs in 4 bits are not whole bytes" if packing.bits == 4 and group % 2 else ""

    def layout(self, scale_dtype: str) -> Layout:
        """Returns how it is kept packed, with scales of a safetensors dtype."""
        packing, inputs = self.packing, self.shape[1]
        group = packing.step(inputs)
        return Layout(
            codes=packing.dtype,
            group=None if packing.bits == 8 and group == inputs else group,
            scale=SCALE_DTYPES[scale_dtype],
            low="float32" if packing.has_zeros else None,
            input_bits=packing.input_bits,
        )

    def numbers(self, tensors: Mapping[str, np.ndarray], dtype: np.dtype) -> np.ndarray:
        """Returns the matrix [F, D] as ``dtype``, from its tensors by their full names."""
        return self._codes(tensors).numbers(dtype)

    def unpack(self, tensors: Mapping[str, np.ndarray]) -> QuantizedMatrix:
        """Returns the same numbers as codes and scales, from its tensors by their full names, unless `refusal`."""
        codes, packing, inputs = self._codes(tensors), self.packing, self.shape[1]
        assert np.array_equal(codes.group, packing.groups(inputs)), "see refusal"
        group = packing.step(inputs)
        chosen = codes.group[::group]
        scale = np.ascontiguousarray(codes.scale[:, chosen])
        n, shift = codes.n, np.int16(0)
        if packing.bits == 4:
            n, shift = pack(codes.n + np.int8(CENTRE), group, np), np.int16(CENTRE)
        low = None
        if codes.zero is not None:
            low = (-codes.zero[:, chosen] - shift).astype(np.float32) * scale.astype(np.float32)
        return QuantizedMatrix(codes=n, scale=scale, low=low, input_bits=packing.input_bits)

    def _codes(self, tensors: Mapping[str, np.ndarray]) -> Codes:
        start = len(self.full(""))
        try:
            return self.packing.codes({name[start:]: tensor for name, tensor in tensors.items()}, self.shape)
        except InputError as error:
            raise InputError(f"{self.name}: {error}") from None


def _words(count: int, bits: int) -> int:
    """Returns how many words of 32 bits hold ``count`` codes."""
    return math.ceil(count * bits / 32)


def _grid_shapes(grid: tuple[int, int]) -> tuple[tuple[int, ...], ...]:
    """Returns the shapes in which files store one value per block: as a grid, and without axes of length 1."""
    rows, inputs = grid
    flat = [(rows,)] if inputs == 1 else []
    return (grid, *flat, *([()] if grid == (1, 1) else []))


def _unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """Returns the codes [R, W · 32 / bits] uint8 of words [R, W] of 32 bits; the first code is in the lowest bits."""
    octets = words.view(np.uint8)
    if bits == 8:
        return octets
    out = np.empty((len(octets), octets.shape[1] * 2), np.uint8)
    np.bitwise_and(octets, 15, out=out[:, ::2])
    np.right_shift(octets, 4, out=out[:, 1::2])
    return out


def _centred(codes: np.ndarray, bits: int) -> np.ndarray:
    """Returns codes from 0 as int8 numbers around 0."""
    return (codes - np.uint8(1 << bits - 1)).view(np.int8)


def _order(index: np.ndarray | None, usual: np.ndarray) -> np.ndarray:
    """Returns the group [D] of each input; files that have no order leave its tensor out, or fill it with -1."""
    if index is None or (index == -1).all():
        return usual
    last = int(usual[-1])
    if index.min() < 0 or index.max() > last:
        raise InputError(f"g_idx must hold groups 0 to {last}, has {shown(int(index.min()))} to {int(index.max())}")
    return index
