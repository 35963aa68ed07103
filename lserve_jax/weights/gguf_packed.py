"""GGUF's blocks of 8 and 4 bits as quantised matrices: bits change places, and no number is computed.

A row of a GGUF tensor is a row of blocks. A block holds the codes of 32 or 256 neighbouring inputs and their scales.
"""

import jax
import numpy as np

from lserve_jax.weights.layout import Layout
from pallas_kernels.core.quantized_matrix import QuantizedMatrix

CHUNK_BYTES = 1 << 20  # of blocks unpacked at a time: what is made on the way stays in the processor's cache

_SIXES = Layout(codes="int8", group=8, scale="float16")  # scales or offsets of 6 bits

LAYOUTS: dict[str, Layout] = {
    "Q8_0": Layout(codes="int8", group=32, scale="float16"),
    "Q4_0": Layout(codes="uint8", group=32, scale="float16"),
    "Q4_1": Layout(codes="uint8", group=32, scale="float16", low="float16"),
    "Q4_K": Layout(codes="uint8", group=32, scale=_SIXES, low=_SIXES),
    "Q5_K": Layout(codes="int8", group=32, scale=_SIXES, low=_SIXES),
    "Q6_K": Layout(codes="int8", group=16, scale=Layout(codes="int8", group=16, scale="float16")),
}
"""The types that are kept packed, and what they become; all others are dequantised."""

# The fields of a block. `d` is its scale; its offset is `m`, or `-dmin` times codes of 6 bits. Bytes that move together
# are one item ("V"): numpy copies whole items several times faster than short rows of bytes.
BLOCKS: dict[str, np.dtype] = {
    "Q8_0": np.dtype([("d", "<f2"), ("codes", "i1", 32)]),
    "Q4_0": np.dtype([("d", "<f2"), ("codes", "u1", 16)]),
    "Q4_1": np.dtype([("d", "<f2"), ("m", "<f2"), ("codes", "u1", 16)]),
    "Q4_K": np.dtype([("d", "<f2"), ("dmin", "<f2"), ("sixes", "<u4", 3), ("nibbles", "V16", (4, 2))]),
    "Q5_K": np.dtype([("d", "<f2"), ("dmin", "<f2"), ("sixes", "<u4", 3), ("high", "V32", 1), ("nibbles", "V32", 4)]),
    "Q6_K": np.dtype([("nibbles", "V32", (2, 2)), ("high", "V32", (2, 1)), ("scales", "i1", 16), ("d", "<f2")]),
}

# Codes are moved in words of 8 bytes; these are the lowest bits of each byte.
LOW_1, LOW_2, LOW_4 = 0x0101010101010101, 0x0303030303030303, 0x0F0F0F0F0F0F0F0F


def unpack(data: np.ndarray, kind: str, shape: tuple[int, ...]) -> QuantizedMatrix:
    """Returns a tensor as a matrix of numpy arrays, which stands for exactly the numbers of `gguf.dequantize`.

    Args:
      data: [F, bytes of a row] uint8, rows of blocks; may be mapped memory.
      kind: a type of `LAYOUTS`.
      shape: (F, D).
    """
    matrix = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), LAYOUTS[kind].abstract(shape))
    blocks = data.view(BLOCKS[kind])
    step = max(1, CHUNK_BYTES // max(1, data.shape[-1]))
    for start in range(0, len(blocks), step):
        _write(matrix, slice(start, start + step), _UNPACK[kind](blocks[start : start + step]))
    return matrix


def _write(matrix: QuantizedMatrix, rows: slice, part: QuantizedMatrix) -> None:
    """Writes rows, whose leaves may have more axes than those of ``matrix``."""

    def write(leaf: np.ndarray, new: np.ndarray) -> None:
        np.copyto(leaf[rows].reshape(new.shape), new, casting="no")

    jax.tree.map(write, matrix, part)


def _plain(blocks: np.ndarray) -> QuantizedMatrix:
    """Returns blocks of Q8_0, Q4_0 or Q4_1: their codes are in our order."""
    low = blocks["m"] if blocks.dtype == BLOCKS["Q4_1"] else None
    return QuantizedMatrix(codes=blocks["codes"], scale=blocks["d"], low=low)


def _q4_k(blocks: np.ndarray) -> QuantizedMatrix:
    """Returns blocks of Q4_K: every 32 bytes hold one group in their low halves and the next one in their high ones."""
    first, second = _planes(blocks["nibbles"])
    even = first & LOW_4 | (second & LOW_4) << 4
    odd = first >> 4 & LOW_4 | second & LOW_4 << 4
    scale, low = _scale_and_low(blocks)
    return QuantizedMatrix(codes=_interleave([even, odd], "V16").view(np.uint8), scale=scale, low=low)


def _q5_k(blocks: np.ndarray) -> QuantizedMatrix:
    """Returns blocks of Q5_K: four bits of a code as in Q4_K; the fifth of group i is bit i of the bytes of `high`."""
    (high,) = _planes(blocks["high"])
    groups = [plane >> shift & LOW_4 for plane in _planes(blocks["nibbles"]) for shift in (0, 4)]
    codes = [group | (high >> i & LOW_1) << 4 for i, group in enumerate(groups)]
    scale, low = _scale_and_low(blocks)
    return QuantizedMatrix(codes=_interleave(codes, "V32").view(np.int8), scale=scale, low=low)


def _q6_k(blocks: np.ndarray) -> QuantizedMatrix:
    """Returns blocks of Q6_K: 32 codes lie in the low halves of 32 bytes, the next in those of 32 more, then the high.

    Two more bits of each are in `high`, in this order. The codes 0 … 63 stand for -32 … 31.
    """
    (high,) = _planes(blocks["high"])
    quarters = [plane >> shift & LOW_4 for shift in (0, 4) for plane in _planes(blocks["nibbles"])]
    codes = [quarter | (high >> 2 * i & LOW_2) << 4 for i, quarter in enumerate(quarters)]
    scale = QuantizedMatrix(codes=blocks["scales"], scale=blocks["d"])
    return QuantizedMatrix(codes=_interleave(codes, "V32").view(np.int8) - np.int8(32), scale=scale)


def _scale_and_low(blocks: np.ndarray) -> tuple[QuantizedMatrix, QuantizedMatrix]:
    """Returns the scales and offsets of Q4_K or Q5_K, each with 8 codes of 6 bits per block.

    The first four scales and offsets fill the lower bits of the first two words. The other four of each have their
    upper 2 bits above those, and their lower 4 bits in the third word.
    """
    scales, lows, rest = (blocks["sixes"][..., word] for word in range(3))
    scales = [scales & 0x3F3F3F3F, rest & 0x0F0F0F0F | scales >> 2 & 0x30303030]
    lows = [lows & 0x3F3F3F3F, rest >> 4 & 0x0F0F0F0F | lows >> 2 & 0x30303030]
    scale = QuantizedMatrix(codes=np.stack(scales, axis=-1).view(np.int8), scale=blocks["d"])
    low = QuantizedMatrix(codes=np.stack(lows, axis=-1).view(np.int8), scale=-blocks["dmin"])
    return scale, low


def _planes(items: np.ndarray) -> list[np.ndarray]:
    """Returns, for each place on the last axis, the bytes of all items there as words."""
    return [items[..., place].copy().reshape(-1).view(np.uint64) for place in range(items.shape[-1])]


def _interleave(planes: list[np.ndarray], item: str) -> np.ndarray:
    """Returns the items of the planes in turn: the opposite of `_planes`."""
    whole = np.empty((planes[0].nbytes // np.dtype(item).itemsize, len(planes)), item)
    for place, plane in enumerate(planes):
        whole[:, place] = plane.view(item)
    return whole


_UNPACK = {"Q8_0": _plain, "Q4_0": _plain, "Q4_1": _plain, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k}
