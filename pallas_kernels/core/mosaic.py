"""What the Mosaic GPU kernels share: tiles of shared memory, codes as tensor-core operands, the interpreter's gap."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax._src import config as jax_config  # the interpreter's switch has no public name


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


class CodePart(NamedTuple):
    """The values for tensor cores of one of the equal parts of a row's codes: ``code = factor · value + bias``."""

    mask: int
    factor: float
    bias: float


KEY_PARTS = {
    8: (CodePart(mask=0xFF, factor=1.0, bias=-1024.0),),
    4: (CodePart(mask=0x0F, factor=1.0, bias=-1024.0), CodePart(mask=0xF0, factor=1 / 16, bias=-64.0)),
}
"""Parts by bits for `widened_keys`."""
VALUE_PARTS = {
    8: (CodePart(mask=0xFF, factor=1.0, bias=128.0),),
    4: (CodePart(mask=0x0F, factor=1.0, bias=-128.0), CodePart(mask=0xF0, factor=1 / 16, bias=8.0)),
}
"""Parts by bits for `widened_values`."""


def widened_keys(codes: jax.Array, bits: int) -> list[jax.Array]:
    """Returns the `KEY_PARTS` of codes [rows, H · bits / 8] as float16 [rows, H / parts]; every value is exact.

    The byte becomes the low bits of 1024 = 0x6400, whose last bit counts one. This needs no conversion and no shift of
    bytes, which GPUs do not have.
    """
    wide = codes.astype(jnp.uint16)
    return [_with_exponent(wide & part.mask, 0x6400, jnp.float16) for part in KEY_PARTS[bits]]


def widened_values(codes: jax.Array, bits: int) -> list[jax.Array]:
    """Returns the `VALUE_PARTS` of codes [rows, H · bits / 8] as bfloat16 [rows, H / parts]; every value is exact.

    The dtype is bfloat16, since weights may be arbitrarily small. It has seven bits after 128 = 0x4300, enough for a
    low nibble. Other codes go through signed bytes, for which there is a fast conversion.
    """
    if bits == 8:
        return [(codes ^ 0x80).astype(jnp.int8).astype(jnp.bfloat16)]
    low, high = VALUE_PARTS[4]
    return [
        _with_exponent(codes.astype(jnp.uint16) & low.mask, 0x4300, jnp.bfloat16),
        ((codes & high.mask) ^ 0x80).astype(jnp.int8).astype(jnp.bfloat16),
    ]


def _with_exponent(x: jax.Array, exponent: int, dtype: Any) -> jax.Array:
    return jax.lax.bitcast_convert_type(x | exponent, dtype)


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
    rows: int, columns: int, left_rows: Callable[[int], list[jax.Array]], rights: list[Any]
) -> jax.Array:
    """Returns ``Σ left @ right`` like `product`, with left operands in registers, 64 rows at a time.

    Args:
      rows: a multiple of 64.
      columns: a multiple of 8.
      left_rows: i → rows ``i … i + 63`` of each left operand.
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
