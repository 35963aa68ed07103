"""Operands that are made in registers: what each thread has, and numbers that stand for codes.

The interpreter knows no registers, so the functions that rearrange them run here on the places of elements.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.mosaic import gpu as mgpu
from numpy.typing import NDArray

from pallas_kernels.core import operands
from tests.pallas_kernels import hopper

WGMMA = plgpu.Layout.WGMMA


class _Registers:
    """A stand-in for an array in the registers of one thread."""

    def __init__(self, _registers: NDArray[Any], _layout: Any, _is_signed: bool | None = None) -> None:
        self.registers, self.layout = _registers, _layout


def _tiled(x: NDArray[Any], layout: Any) -> NDArray[Any]:
    """A 2D array with the axes of a layout's tiles."""
    for tile in layout.tiling.tiles:
        kept, tiled = x.shape[: x.ndim - len(tile)], x.shape[x.ndim - len(tile) :]
        split = [part for size, step in zip(tiled, tile, strict=True) for part in (size // step, step)]
        x = x.reshape(*kept, *split)
        axes = np.arange(len(kept), x.ndim)
        x = x.transpose(*range(len(kept)), *axes[::2], *axes[1::2])
    return x


def _threads(x: NDArray[Any], layout: Any) -> Iterator[_Registers]:
    """What each of 128 threads has of an array: registers that are tuples of its elements."""
    if isinstance(layout, mgpu.WGStridedFragLayout):
        for mine in x.reshape(-1, 128, layout.vec_size).swapaxes(0, 1):
            registers = np.empty(len(mine), object)
            registers[:] = [tuple(register) for register in mine]
            yield _Registers(registers, layout)
        return
    tiled = _tiled(x, layout)
    for thread in range(128):
        index: list[Any] = [slice(None)] * tiled.ndim
        place = thread
        for dim in reversed((*layout.warp_dims, *layout.lane_dims)):
            size = dim.times if isinstance(dim, plgpu.Replicated) else tiled.shape[dim]
            if not isinstance(dim, plgpu.Replicated):
                index[dim] = slice(place % size, place % size + 1)
            place //= size
        mine = np.moveaxis(tiled[tuple(index)], layout.vector_dim, -1)
        registers = np.empty(mine.shape[:-1], object)
        for at in np.ndindex(registers.shape):
            registers[at] = tuple(mine[at])
        yield _Registers(registers.reshape(layout.registers_shape(x.shape)), layout)


def _check(monkeypatch: pytest.MonkeyPatch, rearrange: Callable[[Any], Any], x: Any, rows: Any) -> None:
    """A function makes registers that a thread has of ``rows``, by quartets, from those that it has of ``x``."""

    def check(x: NDArray[Any], shape: tuple[int, ...], source: Any, target: Any, halves: int) -> None:
        to = target.to_mgpu()
        expected: Any = operands._by_quartets(rows)
        assert shape == expected.shape
        for before, after in zip(_threads(x, source.to_mgpu()), _threads(expected, to), strict=True):
            made = operands._two_for_one(before, lambda four: [four[:2], four[2:]], shape, target, halves)
            assert made.layout == to and made.registers.shape == after.registers.shape
            assert list(made.registers.flat) == list(after.registers.flat)
        checked.append(True)

    checked: list[bool] = []
    monkeypatch.setattr(operands, "_rearranged", check)
    rearrange(x)
    assert checked


def _places(rows: int, columns: int) -> Any:
    return np.arange(rows * columns).reshape(rows, columns)


def test_the_stand_in_agrees_with_the_layout_of_wgmma() -> None:
    for thread, mine in enumerate(_threads(_places(64, 16), WGMMA.to_mgpu())):
        warp, lane = divmod(thread, 32)
        row, column = 16 * warp + lane // 4, 2 * (lane % 4)
        pairs = [(row + 8 * half, column + 8 * i) for i in range(2) for half in range(2)]
        assert list(mine.registers.flat) == [(16 * r + c, 16 * r + c + 1) for r, c in pairs]


@pytest.mark.parametrize("columns", [32, 64, 128])
def test_by_quartets(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    x = _places(64, columns)
    _check(monkeypatch, operands.by_quartets, x, x)


@pytest.mark.parametrize("columns", [32, 64])
@pytest.mark.parametrize("count", [1, 2, 4, 8, 16, 32, 64])
def test_repeated_rows(monkeypatch: pytest.MonkeyPatch, count: int, columns: int) -> None:
    x = _places(count, columns)
    _check(monkeypatch, operands.repeated_rows, x, np.repeat(x, 64 // count, axis=0))


@pytest.mark.parametrize("rows", [8, 16])
@pytest.mark.parametrize("columns", [64, 128])
def test_rows_by_quartets(monkeypatch: pytest.MonkeyPatch, rows: int, columns: int) -> None:
    x = _places(rows, columns)
    _check(monkeypatch, operands.rows_by_quartets, x, x)


@pytest.mark.parametrize("bits", [8, 4])
def test_parts_stand_for_codes(bits: int) -> None:
    codes = np.random.default_rng(0).integers(0, 256, (64, 32)).astype(np.uint8)
    expected = np.split(codes, 1) if bits == 8 else [codes & 15, codes >> 4]
    with hopper.interpreted():
        keys, values = (widen(jnp.asarray(codes), bits) for widen in (operands.widened_keys, operands.widened_values))
    for part, key, code in zip(operands.KEY_PARTS[bits], keys, expected, strict=True):
        assert key.dtype == jnp.float16
        found = part.factor * np.asarray(key, np.float32) + part.bias
        np.testing.assert_array_equal(found, operands._by_quartets(jnp.asarray(code)))
    for part, value, code in zip(operands.VALUE_PARTS[bits], values, expected, strict=True):
        assert value.dtype == jnp.bfloat16
        np.testing.assert_array_equal(part.factor * np.asarray(value, np.float32) + part.bias, code)
