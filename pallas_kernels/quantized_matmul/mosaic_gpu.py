"""`quantized_matmul` for Hopper: a few rows of inputs, so that the time is that of reading the weights.

Inputs become float16: rows are multiplied by powers of two, so that the largest number of each is below 2**14. Each
program multiplies a share of the inputs (`program`). Shares are added afterwards, in their order.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.core.hopper import SHARED_MEMORY, Device, refuse_unless, require_hopper
from pallas_kernels.core.launch import configure
from pallas_kernels.core.quantized_matrix import QuantizedMatrix, expand
from pallas_kernels.quantized_matmul.digits import digits
from pallas_kernels.quantized_matmul.program import BYTES, OUTPUTS, Form, Program, arranged, copy, in_pairs, multiply

MOST_ROWS = 32
"""Rows of inputs that the kernel is made for; with more, tensor cores are busy and weights are better dequantised."""
_LARGEST_EXPONENT = 14
"""Inputs are scaled to numbers below 2**14. What is 2**28 times smaller than its row's largest one loses bits."""


@dataclass(frozen=True)
class Config:
    """A launch.

    Attributes:
      warpgroups: compute warpgroups of a program, with 64 outputs each; one more copies.
      stages: blocks of codes in flight.
      splits: programs that share the inputs of an output.
    """

    warpgroups: int
    stages: int
    splits: int


@partial(jax.jit, static_argnames=("out_dtype", "config"))
def quantized_matmul(
    x: jax.Array, w: QuantizedMatrix, *, out_dtype: Any = None, config: Config | None = None
) -> jax.Array:
    """Returns what `pallas_kernels.quantized_matmul` defines; ``config`` overrides the tuned launch.

    It is jitted for the cache: layers of one shape share one kernel, which takes seconds to build.

    Raises:
      NotImplementedError: on any device but a Hopper GPU, and for arguments that the kernel does not support.
    """
    device = require_hopper()
    _refuse(x, w)
    integers = digits(x, w.input_bits) if w.input_bits is not None else None
    if integers is None:
        form = form_of(len(x), w)
        inputs, sums, factor = _scaled(form, x)
    else:
        form = form_of(len(integers.codes), w)
        inputs, sums, factor = integers.codes, None, 1.0
    config = config or _configure(device, w.shape, form)
    shares = _launch(form, config, inputs, sums, w)
    y = jnp.sum(shares, axis=0, dtype=shares.dtype)
    y = y * factor if integers is None else integers.combine(y)
    if w.has_row_scales:
        y = y * expand(w.scale, jnp.float32).T
    return y.astype(out_dtype or x.dtype)


def form_of(rows: int, w: QuantizedMatrix) -> Form:
    """Returns the static properties of a product with rows of inputs."""
    has_scales = not w.has_row_scales
    return Form(
        rows=-(-rows // 8) * 8,
        bits=w.bits,
        group=w.group if has_scales else BYTES,
        has_scales=has_scales,
        has_low=w.low is not None,
        is_integer=w.input_bits is not None,
    )


def heuristic(device: Device, shape: tuple[int, ...], form: Form) -> Config:
    """Returns the launch for a shape: as few shares as occupy the device and leave memory for codes.

    Two programs fit on a multiprocessor, so that one reads codes while another begins or ends.
    """
    outputs, size = shape
    warpgroups = 2 if outputs % (2 * OUTPUTS) == 0 else 1
    tiles, room = outputs // (OUTPUTS * warpgroups), SHARED_MEMORY // 2 - 2 * 1024
    stages, splits = 0, 1
    for splits in _possible_splits(size, form):
        program = Program(form, warpgroups, 0, size // splits)
        stages = (room - program.fixed_bytes) // program.stage_bytes
        if stages >= 3 and 2 * tiles * splits >= 3 * device.multiprocessors:
            break
    return Config(warpgroups=warpgroups, stages=max(2, min(stages, 6)), splits=splits)


def _possible_splits(size: int, form: Form) -> list[int]:
    """Returns the numbers of equal shares of whole blocks, and of whole tiles of 8 scales, in ascending order."""
    return [
        n
        for n in range(1, size // form.block + 1)
        if size % (n * form.block) == 0 and not (form.has_scales and size // n // form.group % 8)
    ]


def _configure(device: Device, shape: tuple[int, ...], form: Form) -> Config:
    scales = "_inputs" if form.is_integer else f"_group{form.group}" if form.has_scales else ""
    low = "_low" if form.has_low else ""
    name = f"rows{form.rows}_outputs{shape[0]}_inputs{shape[1]}_int{form.bits}{scales}{low}"
    return configure("quantized_matmul", device.kind, name, heuristic(device, shape, form))


def _refuse(x: jax.Array, w: QuantizedMatrix) -> None:
    """Refuses arguments that the kernel does not support."""
    (outputs, size), rows, codes = w.shape, len(x), w.codes.dtype
    refuse_unless(0 < rows <= MOST_ROWS, f"rows must be 1 to {MOST_ROWS}, not {rows}")
    refuse_unless(w.input_bits is not None or x.dtype == jnp.bfloat16, f"rows must be bfloat16, not {x.dtype}")
    refuse_unless(codes in (jnp.int8, jnp.uint8), f"codes must be int8 or packed uint8, not {codes}")
    refuse_unless(outputs % OUTPUTS == 0, f"outputs must be a multiple of {OUTPUTS}, not {outputs}")
    block = BYTES * 8 // w.bits
    refuse_unless(size % block == 0, f"inputs must be a multiple of {block}, not {size}")
    if w.bits == 8 and w.has_row_scales:
        return
    groups = (16, 32, 64, 128) if w.bits == 8 else (32, 64, 128)
    refuse_unless(w.group in groups, f"a group of {w.bits}-bit codes must be one of {groups}, not {w.group}")
    scales = size // w.group
    refuse_unless(scales % 8 == 0, f"scales of an output must be a multiple of 8, not {scales}")


def _scaled(form: Form, x: jax.Array) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """Returns rows as float16, their sums by group, and what to multiply results by.

    Returns:
      [R, D] float16, `arranged`.
      [D // group, R] float32; None without offsets.
      [R, 1] float32 powers of two.
    """
    wide = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=-1, keepdims=True)
    exponent = jnp.clip(jnp.frexp(largest)[1], -100, 128) - _LARGEST_EXPONENT
    exponent = jnp.where(jnp.isfinite(largest), exponent, 0)
    wide = wide * _power_of_two(-exponent)
    sums = jnp.sum(wide.reshape(len(x), -1, form.group), axis=-1).T if form.has_low else None
    return arranged(form, wide).astype(jnp.float16), sums, _power_of_two(exponent)


def _power_of_two(exponent: jax.Array) -> jax.Array:
    """Returns 2**exponent as a float32 number, for exponents of -126 to 127; `jnp.exp2` need not be exact."""
    return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def _launch(form: Form, config: Config, inputs: jax.Array, sums: jax.Array | None, w: QuantizedMatrix) -> jax.Array:
    """Returns the products [splits, R, F] with each share of the inputs [R, D]; float32, or int32 of integers."""
    outputs, size = w.shape
    warpgroups = config.warpgroups
    program = Program(form, warpgroups, config.stages, size // config.splits)

    def padded(x: jax.Array, axis: int) -> jax.Array:
        return jnp.pad(x, [(0, form.rows - n if i == axis else 0) for i, n in enumerate(x.shape)])

    arrays = {"codes": w.codes if form.is_integer else in_pairs(w.codes), "x": padded(inputs, 0)}
    if form.has_scales:
        arrays["scale"] = _plain(w.scale)
    if sums is not None:
        arrays |= {"low": _plain(w.low), "sums": padded(sums, 1)}

    def quantized_matmul(gmem: dict[str, Any], out_gmem: Any, smem: dict[str, Any]) -> None:
        tile, split, role = (jax.lax.axis_index(axis) for axis in ("tile", "split", "role"))
        here = program._replace(tile=tile, split=split)
        pl.when(role == warpgroups)(partial(copy, here, gmem, smem))
        pl.when(role < warpgroups)(partial(multiply, here, role, gmem, out_gmem, smem))

    kernel = plgpu.kernel(
        quantized_matmul,
        out_type=jax.ShapeDtypeStruct(
            (config.splits, len(inputs), outputs), jnp.int32 if form.is_integer else jnp.float32
        ),
        grid=(outputs // (OUTPUTS * warpgroups), config.splits),
        grid_names=("tile", "split"),
        num_threads=warpgroups + 1,
        thread_name="role",
        scratch_types=[program.scratch({name: x.dtype for name, x in arrays.items()})],
    )
    return kernel(arrays)


def _plain(scale: Any) -> jax.Array:
    """Returns scales as an array: those that are quantised themselves are expanded."""
    return expand(scale, jnp.float32) if isinstance(scale, QuantizedMatrix) else scale
