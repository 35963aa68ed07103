"""What the Mosaic GPU kernels share: tiles of shared memory, bit fields, products, the interpreter's gap."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax._src import config as jax_config  # the interpreter's switch has no public name
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm
from jax.experimental.mosaic.gpu import utils


def is_interpreted() -> bool:
    """Returns whether kernels that are traced now run in the interpreter (`plgpu.force_gpu_interpret_mode`)."""
    return jax_config.pallas_tpu_interpret_mode_context_manager.value is not None


def tile(shape: tuple[int, ...], dtype: Any, columns: int | None = None) -> Any:
    """Returns shared memory [..., rows, columns], tiled and swizzled for wgmma and the copy engine.

    Args:
      shape: shape of the memory.
      dtype: dtype of its elements.
      columns: the narrowest slice of the last axis that will be taken; the whole axis by default.
    """
    size = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle((columns or shape[-1]) * size * 8)
    transforms: Any = (plgpu.TilingTransform, plgpu.SwizzleTransform)  # pyright considers these abstract
    tiling, swizzling = transforms
    return plgpu.SMEM(shape, dtype, transforms=(tiling((8, swizzle // size)), swizzling(swizzle)))


def channel_per_thread(channels: int) -> Any:
    """Returns the layout of rows [..., 64 or 128] whose reduction over rows stays within a thread."""
    repeats = () if channels == 128 else (plgpu.Replicated(128 // channels),)
    return plgpu.Layout.TILED(
        plgpu.Tiling(((channels,), (channels // 4,), (1,))), warp_dims=(-3,), lane_dims=(*repeats, -2), vector_dim=-1
    )


def bit_field(pairs: jax.Array, shift: int, mask: int, flipped: int) -> jax.Array:
    """Returns ``((x >> shift) & mask) ^ flipped`` of uint16 numbers [64, n] in the WGMMA layout.

    Two numbers share a register, and take two instructions: GPUs can shift it as a whole, and the mask removes what
    comes over from the neighbour. The compiler would take seven.

    Args:
      pairs: the numbers.
      shift: bits, 0 or more.
      mask: none of its bits is above the ``16 - shift`` lowest.
      flipped: any 16 bits.
    """
    assert mask >> (16 - shift) == 0
    if is_interpreted():
        return ((pairs >> shift) & mask) ^ flipped
    layout = plgpu.Layout.WGMMA
    result = plgpu.ShapeDtypeStruct(pairs.shape, jnp.uint16, layout=layout)

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=result)
    def extract(_: Any, pairs: Any) -> Any:  # the context, and the numbers in registers
        i32 = ir.IntegerType.get_signless(32)
        registers = np.empty_like(pairs.registers)
        for place, register in np.ndenumerate(pairs.registers):
            word = utils.bitcast(register, i32)
            if shift:
                word = arith.shrui(word, utils.c(shift, i32))
            code = f"lop3.b32 $0, $1, {mask * 0x10001:#x}, $2, {_AND_XOR:#x};"
            word = llvm.inline_asm(i32, [word, utils.c(flipped * 0x10001, i32)], code, "=r,r,r")
            registers[place] = utils.bitcast(word, register.type)
        return type(pairs)(_registers=registers, _layout=pairs.layout, _is_signed=pairs.is_signed)

    run: Callable[..., jax.Array] = extract  # without the context
    return run(pairs)


_AND_XOR = (0xF0 & 0xCC) ^ 0xAA
"""The truth table of ``(a & b) ^ c``."""


def by_part(numbers: tuple[float, ...], shape: tuple[int, ...], axis: int, layout: Any) -> jax.Array:
    """Returns a float32 array with one number along each of the equal parts of an axis."""
    if len(numbers) == 1:
        return plgpu.layout_cast(jnp.full(shape, numbers[0], jnp.float32), layout)
    first, second = numbers
    index = plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=layout)
    return jnp.where(index < shape[axis] // 2, jnp.float32(first), jnp.float32(second))


def product(rows: int, columns: int, *factors: tuple[Any, Any]) -> jax.Array:
    """Returns ``Σ left @ right`` [rows, columns] float32 in the WGMMA layout.

    Args:
      rows: a multiple of 64.
      columns: a multiple of 8.
      *factors: pairs of a left and a right operand, references to shared memory.
    """

    def multiply(accumulator: Any) -> jax.Array:
        for left, right in factors:
            plgpu.wgmma(accumulator, left, right)
        plgpu.wgmma_wait(0)
        return accumulator[...]

    return pl.run_scoped(multiply, plgpu.ACC((rows, columns), jnp.float32))


def product_of_registers(
    rows: int, columns: int, left_rows: Callable[[int], Iterable[jax.Array]], rights: list[Any]
) -> jax.Array:
    """Returns ``Σ left @ right`` like `product`, with left operands in registers, 64 rows at a time.

    Args:
      rows: a multiple of 64.
      columns: a multiple of 8.
      left_rows: i → rows ``i … i + 63`` of each left operand; each is multiplied before the next one is asked for.
      rights: the right operands, references to shared memory.
    """
    starts = range(0, rows, 64)
    if is_interpreted():  # the interpreter's wgmma takes no left operand in registers
        parts = [
            sum(
                jnp.dot(left, right[...], preferred_element_type=jnp.float32)
                for left, right in zip(left_rows(i), rights, strict=True)
            )
            for i in starts
        ]
        return jnp.concatenate(parts)

    def multiply(accumulator: Any) -> jax.Array:
        for i in starts:
            for left, right in zip(left_rows(i), rights, strict=True):
                plgpu.wgmma(accumulator.at[pl.ds(i, 64)], plgpu.layout_cast(left, plgpu.Layout.WGMMA), right)
            plgpu.wgmma_wait(0)
        return accumulator[...]

    return pl.run_scoped(multiply, plgpu.ACC((rows, columns), jnp.float32))
