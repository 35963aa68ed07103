"""Codes of pages in shared memory to bfloat16 for the tensor cores, by one warpgroup on a Hopper GPU."""

from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from pallas_kernels.core.mosaic import is_interpreted
from pallas_kernels.core.operands import canonical_layout, replicated

_KEY_ROWS, _VALUE_ROWS = 64, 32
"""The most rows of keys and of values that go through registers at once."""


class RowsInRegisters(NamedTuple):
    """How a warpgroup moves ``rows`` rows of ``columns`` elements through registers.

    A thread has 8 adjacent elements of a row, or 4 if there are too few. A warp takes adjacent rows of one swizzled
    tile of ``width`` columns, so that stores have no bank conflicts.
    """

    rows: int
    columns: int
    width: int

    @property
    def vector(self) -> int:
        """Adjacent elements per thread."""
        return min(self.rows * min(self.columns, 64) // 128, 8)

    @property
    def warps(self) -> int:
        """Warps below each other."""
        return 2 if self.columns > self.width == 32 else 4

    @property
    def lane_rows(self) -> int:
        """Rows that a warp takes at once."""
        return 32 * self.vector // self.width

    @property
    def layout(self) -> Any:
        """The layout of the rows."""
        return self.by_sub(1)

    def by_sub(self, size: int) -> Any:
        """Returns the layout of one row per sub-page of ``size`` rows: each thread has those of its rows."""
        across, warp_rows, lane_rows = min(self.columns, 64), self.rows // self.warps, self.lane_rows
        tiles = (
            (self.rows // size, across),
            (max(warp_rows // size, 1), self.width),
            (max(lane_rows // size, 1), self.width),
            (self.vector,),
        )
        dims = (-7, *replicated(size // warp_rows), -6), (-3, *replicated(min(size, lane_rows)), -2)
        return canonical_layout(tiles, *dims)

    def repeat(self, x: jax.Array, size: int) -> jax.Array:
        """Returns rows of sub-pages, in the layout `by_sub`, each ``size`` times; no thread needs those of another."""
        if is_interpreted():
            return jnp.repeat(x, size, axis=0)
        shape, layout = (self.rows, self.columns), self.layout

        @plgpu.inline_mgpu(
            arg_types=(self.by_sub(size),), return_type=plgpu.ShapeDtypeStruct(shape, x.dtype, layout=layout)
        )
        def copy(_: Any, x: Any) -> Any:  # the context, and the rows in registers
            return type(x)(_registers=self.repeated(x.registers), _layout=layout.to_mgpu(), _is_signed=x.is_signed)

        run: Any = copy  # without the context
        return run(x)

    def repeated(self, registers: NDArray[Any]) -> NDArray[Any]:
        """Returns the registers of a thread in ``layout``, given those in the layout of any sub-pages."""
        by_tile = registers.reshape(max(self.columns // 64, 1), -1)
        passes = self.rows // (self.warps * self.lane_rows)
        shape = self.layout.to_mgpu().registers_shape((self.rows, self.columns))
        return np.repeat(by_tile, passes // by_tile.shape[1], axis=1).reshape(shape)


def dequantize_keys(stored: tuple[Any, Any, Any], bits: int, width: int, target_smem: Any) -> None:
    """Writes a block of keys in bfloat16; see `QuantizedKeys`.

    Args:
      stored: codes [keys, H · bits / 8], and the bounds k_min and k_max [subs, H] of their sub-pages.
      bits: 8 or 4.
      width: columns of a swizzled tile of the target.
      target_smem: [keys, H] bfloat16.
    """
    codes_smem, *bounds_smem = stored
    keys, columns = codes_smem.shape
    sub = keys // bounds_smem[0].shape[0]
    rows = min(max(4 * sub, 16), _KEY_ROWS)  # each of the four warps has one sub-page, whose steps it makes once
    size, through = min(sub, rows), RowsInRegisters(rows, columns, width)

    @pl.loop(0, keys // rows)
    def _some_rows(i: jax.Array) -> None:
        at, subs = pl.ds(i * rows, rows), pl.ds(i * rows // sub, rows // size)
        for j, codes in enumerate(_parts(codes_smem.at[at], bits, through)):
            channels = pl.ds(j * columns, columns)
            low, high = (
                plgpu.load(x.at[subs, channels], layout=through.by_sub(size), optimized=False).astype(jnp.float32)
                for x in bounds_smem
            )
            step = (high - low) * (1 / (2**bits - 1))
            low, step = (through.repeat(x, size) for x in (low, step))
            target_smem[at, channels] = (codes * step + low).astype(jnp.bfloat16)


def dequantize_values(stored: tuple[Any, Any, Any], bits: int, width: int, page_size: int, target_smem: Any) -> None:
    """Writes a block of values in bfloat16; see `QuantizedArray`.

    Args:
      stored: codes [values, H · bits / 8], and the scales and lows [pages, …] float16 of the rows of each page.
      bits: 8 or 4.
      width: columns of a swizzled tile of the target.
      page_size: tokens per page.
      target_smem: [values, H] bfloat16.
    """
    codes_smem, *vectors_smem = stored
    (values, columns), rows = codes_smem.shape, min(page_size, _VALUE_ROWS)
    through = RowsInRegisters(rows, columns, width)

    @pl.loop(0, values // rows)
    def _some_rows(i: jax.Array) -> None:
        at, (page, first) = pl.ds(i * rows, rows), (i * rows // page_size, i * rows % page_size)

        def by_row(vector_smem: Any) -> jax.Array:
            vector = plgpu.load(
                vector_smem.at[page, pl.ds(first, rows)], layout=through.layout.reduce(1), optimized=False
            )
            return jax.lax.broadcast_in_dim(vector.astype(jnp.float32), (rows, columns), (0,))

        scale, low = (by_row(x) for x in vectors_smem)
        for j, codes in enumerate(_parts(codes_smem.at[at], bits, through)):
            target_smem[at, pl.ds(j * columns, columns)] = (codes * scale + low).astype(jnp.bfloat16)


def _parts(codes_smem: Any, bits: int, through: RowsInRegisters) -> list[jax.Array]:
    """Returns the codes of each of the equal parts of a row, in float32."""
    codes = plgpu.load(codes_smem, layout=through.layout, optimized=False).astype(jnp.int32)
    return [part.astype(jnp.float32) for part in ([codes] if bits == 8 else [codes & 15, codes >> 4])]
