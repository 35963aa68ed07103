"""Operands of tensor cores that Mosaic GPU kernels make in registers: widened codes, and rows that keys share.

Columns are *by quartets* where the text says so. A thread that loads four neighbouring numbers has columns
4 t … 4 t + 3 of 16, with t its place among four threads, and wgmma wants it to have columns 2 t, 2 t + 1, 2 t + 8 and
2 t + 9. It gives the former for the latter, and so does the other operand: a product does not depend on the order of
the columns that it sums over. So nothing moves between threads, and four codes come with one load.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm, vector
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils

from pallas_kernels.core.mosaic import is_interpreted


def canonical_layout(tiles: tuple[tuple[int, ...], ...], warp_dims: tuple[Any, ...], lane_dims: tuple[Any, ...]) -> Any:
    """Returns a layout by its tiles, given the dimensions of the innermost tile, without dimensions of one."""
    tiled = mgpu.TiledLayout(plgpu.Tiling(tiles), warp_dims, lane_dims, vector_dim=-1, _check_canonical=False)
    tiled = tiled.canonicalize()
    return plgpu.Layout.TILED(tiled.tiling, tiled.warp_dims, tiled.lane_dims, vector_dim=tiled.vector_dim)


QUARTETS = plgpu.Layout.WGMMA_8BIT
"""The layout of [64 i, 16 j] in which a thread has four neighbours, for `by_quartets` and `widened_keys`."""


class CodePart(NamedTuple):
    """The values for tensor cores of one of the equal parts of a row's codes: ``code = factor · value + bias``."""

    mask: int
    factor: float
    bias: float


KEY_PARTS = {
    8: (CodePart(mask=0xFF, factor=1.0, bias=0.0),),
    4: (CodePart(mask=0x0F, factor=1.0, bias=0.0), CodePart(mask=0xF0, factor=1 / 16, bias=0.0)),
}
"""Parts by bits for `widened_keys`."""
VALUE_PARTS = {
    8: (CodePart(mask=0xFF, factor=1.0, bias=128.0),),
    4: (CodePart(mask=0x0F, factor=1.0, bias=-128.0), CodePart(mask=0xF0, factor=1 / 8, bias=-16.0)),
}
"""Parts by bits for `widened_values`."""


def widened_keys(codes: jax.Array, bits: int) -> list[jax.Array]:
    """Returns the `KEY_PARTS` of codes [64, H · bits / 8] in the layout `QUARTETS` as float16 [64, H / parts].

    Results are in the WGMMA layout, by quartets; every value is exact. A byte becomes the low bits of 1024 = 0x6400,
    whose last bit counts one. This needs no conversion.
    """
    parts = KEY_PARTS[bits]
    if is_interpreted():
        return [_by_quartets((codes & part.mask).astype(jnp.float16)) for part in parts]
    types = [plgpu.ShapeDtypeStruct(codes.shape, jnp.float16, layout=plgpu.Layout.WGMMA)] * len(parts)

    @plgpu.inline_mgpu(arg_types=(QUARTETS,), return_type=types)
    def widen(_: Any, codes: Any) -> Any:  # the context, and the codes in registers
        pair = ir.VectorType.get((2,), ir.F16Type.get())

        def split(register: Any, mask: int) -> list[Any]:
            return [utils.bitcast(_and(x, mask), pair) for x in _pairs_of_bytes(register, 0x64)]

        splits = [partial(split, mask=part.mask) for part in parts]
        return [_two_for_one(codes, split, codes.shape, plgpu.Layout.WGMMA, 2) for split in splits]

    run: Callable[..., list[jax.Array]] = widen  # without the context
    return [part - 1024 for part in run(codes)]


def widened_values(codes: jax.Array, bits: int) -> list[jax.Array]:
    """Returns the `VALUE_PARTS` of codes [64, H · bits / 8] in the WGMMA_UPCAST_4X layout as bfloat16 [64, H / parts].

    Every value is exact. The dtype is bfloat16, since weights may be arbitrarily small. It has seven bits after
    128 = 0x4300, enough for a nibble. Codes of 8 bits go through signed bytes, for which there is a fast conversion.
    """
    if bits == 8:
        return [(codes ^ 0x80).astype(jnp.int8).astype(jnp.bfloat16)]
    if is_interpreted():
        wide = codes.astype(jnp.int32)
        return [(x + 128).astype(jnp.bfloat16) for x in (wide & 0x0F, (wide & 0xF0) // 2)]
    layout = plgpu.Layout.WGMMA_UPCAST_4X

    @plgpu.inline_mgpu(
        arg_types=(layout,), return_type=[plgpu.ShapeDtypeStruct(codes.shape, jnp.bfloat16, layout=layout)] * 2
    )
    def widen(_: Any, codes: Any) -> Any:  # the context, and the codes in registers
        octet = ir.VectorType.get((8,), ir.BF16Type.get())
        parts = [np.empty_like(codes.registers) for _ in range(2)]
        for place, register in np.ndenumerate(codes.registers):
            pairs = _pairs_of_bytes(register, 0x43)
            parts[0][place] = _vector([_and(x, 0x0F) for x in pairs], octet)
            parts[1][place] = _vector([_high_nibbles(x) for x in pairs], octet)
        return [type(codes)(_registers=part, _layout=codes.layout, _is_signed=None) for part in parts]

    run: Callable[..., list[jax.Array]] = widen  # without the context
    return run(codes)


def by_quartets(x: jax.Array) -> jax.Array:
    """Returns ``x`` [64, n] of 16-bit numbers in the layout `QUARTETS` in the WGMMA layout, by quartets."""
    return _rearranged(x, x.shape, QUARTETS, plgpu.Layout.WGMMA, 2)


def rows_to_repeat(count: int) -> Any:
    """Returns the layout of [count, n] in which each thread has what `repeated_rows` gives it; count divides 64."""
    warps = min(count, 4)
    each = count // warps  # rows among the 16 of a warp, of which a thread has two in the WGMMA layout
    lanes = max(each // 2, 1)
    return canonical_layout(
        ((count, 16), (each, 16), (lanes, 16), (4,)),
        warp_dims=(-7, *replicated(4 // warps)),
        lane_dims=(-3, *replicated(8 // lanes), -2),
    )


def repeated_rows(x: jax.Array) -> jax.Array:
    """Returns each row of ``x`` [count, n] of 16-bit numbers 64 / count times, in the WGMMA layout, by quartets.

    ``x`` is in the layout of `rows_to_repeat`.
    """
    count, columns = x.shape
    if is_interpreted():
        x = jnp.repeat(x, 64 // count, axis=0)
    return _rearranged(x, (64, columns), rows_to_repeat(count), plgpu.Layout.WGMMA, 2)


def quartets_of_rows(shape: tuple[int, ...]) -> Any:
    """Returns the layout of [rows, 64 or 128] in which a thread has four neighbours, for `rows_by_quartets`."""
    return plgpu.Layout.WG_STRIDED(shape, vec_size=4)


def rows_by_quartets(x: jax.Array) -> jax.Array:
    """Returns ``x`` [rows, 64 or 128] of 16-bit numbers, by quartets, to be stored: a thread has pairs of neighbours.

    ``x`` is in the layout of `quartets_of_rows`; rows are a multiple of 8.
    """
    columns = x.shape[1]
    rows = 512 // columns  # that all threads have at once
    pairs = canonical_layout(
        ((rows, columns), (rows // 4, columns), (1, 16), (8,), (2,)), warp_dims=(-8,), lane_dims=(-6, -5, -2)
    )
    return _rearranged(x, x.shape, quartets_of_rows(x.shape), pairs, 1)


def _rearranged(x: jax.Array, shape: tuple[int, ...], source: Any, target: Any, halves: int) -> jax.Array:
    """Returns ``x`` in the layout ``target``, by quartets; see `_two_for_one`."""
    if is_interpreted():
        return _by_quartets(x)

    @plgpu.inline_mgpu(arg_types=(source,), return_type=plgpu.ShapeDtypeStruct(shape, x.dtype, layout=target))
    def rearrange(_: Any, x: Any) -> Any:  # the context, and the numbers in registers
        return _two_for_one(x, lambda y: [utils.vector_slice(y, part) for part in _PARTS], shape, target, halves)

    run: Callable[..., jax.Array] = rearrange  # without the context
    return run(x)


def _by_quartets(x: jax.Array) -> jax.Array:
    """Returns ``x`` [rows, n] with the order of columns that its name says."""
    return x.reshape(x.shape[0], -1, 4, 2, 2).swapaxes(2, 3).reshape(x.shape)


def _two_for_one(x: Any, split: Callable[[Any], list[Any]], shape: tuple[int, ...], layout: Any, halves: int) -> Any:
    """Returns an array in registers: those that ``split`` makes of each quartet of ``x``, two for one.

    Args:
      x: the quartets in registers.
      split: from a quartet to its first and its second pair, for columns 2 t, 2 t + 1 and 2 t + 8, 2 t + 9 of 16.
      shape: of the result.
      layout: of the result.
      halves: rows of a thread for each of its columns; where ``x`` has one for two, they are the same.
    """
    target = layout.to_mgpu()
    registers = np.empty(target.registers_shape(shape), dtype=object)
    by_column = registers.reshape(-1, 2, halves)
    for column, quartets in enumerate(x.registers.reshape(len(by_column), -1)):
        pairs = [split(quartet) for quartet in quartets]
        for half in range(halves):
            by_column[column, :, half] = pairs[half % len(pairs)]
    return type(x)(_registers=registers, _layout=target, _is_signed=None)


def _pairs_of_bytes(register: Any, above: int) -> list[Any]:
    """Returns the pairs of bytes of a register of 4 or 8, as 32 bits with ``above`` over each of the two."""
    i32 = ir.IntegerType.get_signless(32)
    count = utils.bitwidth(register.type) // 32
    words = utils.bitcast(register, ir.VectorType.get((count,), i32))
    words = [vector.extract(words, [], [i]) for i in range(count)]
    return [
        llvm.inline_asm(i32, [word], f"prmt.b32 $0, $1, {above:#x}, {order:#x};", "=r,r")
        for word in words
        for order in (0x4140, 0x4342)
    ]


def _and(pair: Any, mask: int) -> Any:
    """Returns a pair of bytes, under others, with the bits of a mask only; those above stay."""
    i32 = ir.IntegerType.get_signless(32)
    return pair if mask == 0xFF else arith.andi(pair, utils.c(mask * 0x10001 | 0xFF00FF00, i32))


def _high_nibbles(pair: Any) -> Any:
    """Returns the high nibbles of a pair of bytes, each as the bfloat16 number 128 + 8 · nibble."""
    i32 = ir.IntegerType.get_signless(32)
    operands = [arith.shrui(pair, utils.c(1, i32)), utils.c(0x43004300, i32)]
    return llvm.inline_asm(i32, operands, f"lop3.b32 $0, $1, 0x00780078, $2, {_AND_OR:#x};", "=r,r,r")


def _vector(words: list[Any], type_: Any) -> Any:
    """Returns a vector of some type that consists of words of 32 bits."""
    one = ir.VectorType.get((1,), ir.IntegerType.get_signless(32))
    return vector.bitcast(type_, utils.vector_concat([vector.broadcast(one, word) for word in words]))


def replicated(times: int) -> tuple[Any, ...]:
    """Returns the dimension of threads that have the same numbers; none for one."""
    return (plgpu.Replicated(times),) if times > 1 else ()


_PARTS = (slice(0, 2), slice(2, 4))
_AND_OR = (0xF0 & 0xCC) | 0xAA
"""The truth table of ``(a & b) | c``."""
