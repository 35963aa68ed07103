"""One program of the Hopper kernel of `quantized_matmul`: a tile of outputs, and a share of the inputs.

Products are transposed: y = W·xᵀ [outputs, rows], with wgmma's 64 rows on the side of the outputs and the rows of
inputs, padded to a multiple of 8, on the other side. Each compute warpgroup has 64 outputs. One more copies inputs at
once, and codes in advance, block by block.

Codes are never dequantised. A warpgroup widens them to float16 in registers, which is exact, and multiplies each group
of inputs on its own; scales and offsets come after the product:

    y = Σ_groups scale · (n · x) + low · Σ x

Integers on both sides are multiplied from shared memory.
"""

from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.core.mosaic import bit_field, is_interpreted, tile
from pallas_kernels.core.quantized_matrix import CENTRE

OUTPUTS = 64
"""Outputs of a warpgroup."""
BYTES = 128
"""Bytes of codes of an output in a block."""
_WGMMA = plgpu.Layout.WGMMA
_BY_OUTPUT, _BY_ROW = _WGMMA.reduce(1), _WGMMA.reduce(0)


class Form(NamedTuple):
    """The static properties of a product.

    Attributes:
      rows: rows of inputs, padded to a multiple of 8.
      bits: of the codes.
      group: inputs that share a scale; those of a block if scales come after the kernel.
      has_scales, has_low: what comes within the kernel.
      is_integer: whether inputs are int8.
    """

    rows: int
    bits: int
    group: int
    has_scales: bool
    has_low: bool
    is_integer: bool

    @property
    def block(self) -> int:
        """Inputs of a block."""
        return BYTES * 8 // self.bits

    @property
    def piece(self) -> int:
        """Inputs that are multiplied at once: a group, or a part of it, so that its codes need few registers."""
        return BYTES if self.is_integer else min(self.group, 64)


class Program(NamedTuple):
    """What one program does.

    Attributes:
      form: the product.
      warpgroups: compute warpgroups.
      stages: blocks of codes in flight.
      share: inputs, whole blocks.
      tile, split: the program's place among those of other outputs, and of other inputs.
    """

    form: Form
    warpgroups: int
    stages: int
    share: int
    tile: Any = None
    split: Any = None

    @property
    def blocks(self) -> int:
        """Blocks of the share."""
        return self.share // self.form.block

    @property
    def groups(self) -> int:
        """Groups of the share."""
        return self.share // self.form.group

    def outputs(self, warpgroup: Any) -> Any:
        """Returns the outputs of a warpgroup."""
        return pl.ds((self.tile * self.warpgroups + warpgroup) * OUTPUTS, OUTPUTS)

    def scratch(self, dtypes: dict[str, Any]) -> dict[str, Any]:
        """Returns the shared memory, given the dtypes of what is copied there."""
        form, warpgroups = self.form, self.warpgroups
        copies = self.blocks + form.has_low
        smem = {
            "codes": tile((self.stages, warpgroups, OUTPUTS, BYTES // dtypes["codes"].itemsize), dtypes["codes"]),
            "ready": plgpu.Barrier(num_arrivals=warpgroups, num_barriers=self.stages),
            "free": plgpu.Barrier(num_arrivals=warpgroups, num_barriers=self.stages),
            "x": tile((self.blocks, form.rows, form.block), dtypes["x"], form.piece),
            "inputs_ready": plgpu.Barrier(num_arrivals=copies),
            "out": plgpu.SMEM((warpgroups, form.rows, OUTPUTS), jnp.int32 if form.is_integer else jnp.float32),
        }
        if form.has_scales:
            smem["scale"] = plgpu.SMEM((warpgroups, self.groups, OUTPUTS), jnp.float32)
        if form.has_low:
            smem["low"] = plgpu.SMEM((warpgroups, self.groups, OUTPUTS), jnp.float32)
            smem["sums"] = plgpu.SMEM((self.groups, form.rows), jnp.float32)
        return smem

    @property
    def fixed_bytes(self) -> int:
        """Returns the bytes of shared memory besides codes."""
        form, outputs = self.form, OUTPUTS * self.warpgroups
        scales = self.groups * (outputs * (form.has_scales + form.has_low) + form.rows * form.has_low)
        return form.rows * self.share * (1 if form.is_integer else 2) + 4 * (scales + form.rows * outputs)

    @property
    def stage_bytes(self) -> int:
        """Returns the bytes of a block of codes."""
        return OUTPUTS * self.warpgroups * BYTES


def copy(program: Program, gmem: dict[str, Any], smem: dict[str, Any]) -> None:
    """Copies the inputs of a share to shared memory, and its codes block by block, as slots become free."""
    form, blocks, stages = program.form, program.blocks, program.stages
    columns = smem["codes"].shape[-1]

    def copy_codes(block: jax.Array) -> None:
        slot, place = block % stages, pl.ds((program.split * blocks + block) * columns, columns)
        for i in range(program.warpgroups):
            source = gmem["codes"].at[program.outputs(i), place]
            plgpu.copy_gmem_to_smem(source, smem["codes"].at[slot, i], smem["ready"].at[slot])

    for block in range(blocks):
        place = pl.ds((program.split * blocks + block) * form.block, form.block)
        plgpu.copy_gmem_to_smem(gmem["x"].at[:, place], smem["x"].at[block], smem["inputs_ready"])
    if form.has_low:
        place = pl.ds(program.split * program.groups, program.groups)
        plgpu.copy_gmem_to_smem(gmem["sums"].at[place], smem["sums"], smem["inputs_ready"])

    @pl.loop(0, blocks)
    def _copy_block(block: jax.Array) -> None:
        pl.when(block >= stages)(partial(plgpu.barrier_wait, smem["free"].at[block % stages]))
        copy_codes(block)

    @pl.loop(max(blocks - stages, 0), blocks)
    def _drain(block: jax.Array) -> None:
        plgpu.barrier_wait(smem["free"].at[block % stages])


def multiply(program: Program, role: jax.Array, gmem: dict[str, Any], out_gmem: Any, smem: dict[str, Any]) -> None:
    """Multiplies the codes of a warpgroup's outputs with a share of the inputs, and writes the products."""
    form, groups_per_block = program.form, program.form.block // program.form.group
    own = {name: smem[name].at[role] for name in ("scale", "low", "out") if name in smem}
    if form.has_scales:
        _read_scales(program, role, gmem, own)
    plgpu.barrier_wait(smem["inputs_ready"])
    products = _integer_products if form.is_integer else _products

    def add_block(block: jax.Array, y: jax.Array) -> jax.Array:
        slot = block % program.stages
        plgpu.barrier_wait(smem["ready"].at[slot])
        for i, product in enumerate(products(form, smem["codes"].at[slot, role], smem["x"].at[block])):
            y = _added(form, y, product, own, smem, block * groups_per_block + i)
        plgpu.commit_smem()  # the copy engine must not write before codes have been read into registers
        plgpu.barrier_arrive(smem["free"].at[slot])
        return y

    start = plgpu.layout_cast(jnp.zeros((OUTPUTS, form.rows), own["out"].dtype), _WGMMA)
    y = jax.lax.fori_loop(0, program.blocks, add_block, start)
    own["out"].transpose((1, 0))[...] = plgpu.layout_cast(y, plgpu.Layout.WGMMA_TRANSPOSED)
    plgpu.commit_smem()
    rows = pl.ds(0, out_gmem.shape[1])
    plgpu.copy_smem_to_gmem(own["out"].at[rows], out_gmem.at[program.split, :, program.outputs(role)])
    plgpu.wait_smem_to_gmem(0)


def _read_scales(program: Program, role: jax.Array, gmem: dict[str, Any], own: dict[str, Any]) -> None:
    """Transposes scales and offsets in shared memory. Offsets become those of codes that are centred."""
    place = (program.outputs(role), pl.ds(program.split * program.groups, program.groups))

    def load(name: str) -> jax.Array:
        return plgpu.load(gmem[name].at[place], layout=_WGMMA, optimized=False).astype(jnp.float32)

    numbers = {"scale": load("scale")}
    if program.form.has_low:
        low = load("low")
        numbers["low"] = low + CENTRE * numbers["scale"] if program.form.bits == 4 else low
    for name, stored in numbers.items():
        own[name].transpose((1, 0))[...] = plgpu.layout_cast(stored, plgpu.Layout.WGMMA_TRANSPOSED)


def _added(
    form: Form, y: jax.Array, product: jax.Array, own: dict[str, Any], smem: dict[str, Any], group: jax.Array
) -> jax.Array:
    """Returns ``y + scale · product + low · Σ x`` [64, rows] for a group."""

    def by_output(name: str) -> jax.Array:
        return jax.lax.broadcast_in_dim(plgpu.load(own[name].at[group], layout=_BY_OUTPUT), y.shape, (0,))

    y = y + (by_output("scale") * product if form.has_scales else product)
    if form.has_low:
        sums = plgpu.load(smem["sums"].at[group], layout=_BY_ROW)
        y = y + by_output("low") * jax.lax.broadcast_in_dim(sums, y.shape, (1,))
    return y


def _integer_products(form: Form, codes: Any, x: Any) -> list[jax.Array]:
    """Returns the product [64, rows] int32 of a block."""

    def run(accumulator: Any) -> jax.Array:
        plgpu.wgmma(accumulator, codes, x.transpose((1, 0)))
        plgpu.wgmma_wait(0)
        return accumulator[...]

    return [pl.run_scoped(run, plgpu.ACC((OUTPUTS, form.rows), jnp.int32))]


def _products(form: Form, codes: Any, x: Any) -> list[jax.Array]:
    """Returns the products [64, rows] float32 of each group of a block."""
    pairs = plgpu.load(codes, layout=_WGMMA)

    def factors(first: int) -> tuple[jax.Array, Any]:
        place, width = (n * form.bits // 16 for n in (first, form.piece))
        some = jax.lax.slice(pairs, (0, place), (OUTPUTS, place + width))
        return _widened(some, form.bits), x.at[:, pl.ds(first, form.piece)].transpose((1, 0))

    def product(group: int) -> jax.Array:
        pieces = range(group, group + form.group, form.piece)
        if is_interpreted():  # the interpreter's wgmma takes no left operand in registers
            dots = [
                jnp.dot(left, right[...], preferred_element_type=jnp.float32) for left, right in map(factors, pieces)
            ]
            return reduce(jnp.add, dots)

        def run(accumulator: Any) -> jax.Array:
            for piece in pieces:
                plgpu.wgmma(accumulator, *factors(piece))
                plgpu.wgmma_wait(0)  # the next piece takes the same registers
            return accumulator[...]

        return pl.run_scoped(run, plgpu.ACC((OUTPUTS, form.rows), jnp.float32))

    return [product(group) for group in range(0, form.block, form.group)]


def _widened(pairs: jax.Array, bits: int) -> jax.Array:
    """Returns the codes of pairs of bytes [64, n] as float16 [64, piece], in the order of `arranged`; all are exact.

    Codes become the low bits of 1024 = 0x6400, whose last bit counts one. High halves of bytes come out 16 times.
    """

    def part(place: int, mask: int, flipped: int, centre: int) -> jax.Array:
        codes = bit_field(pairs, 8 * place, mask, 0x6400 ^ flipped)
        return jax.lax.bitcast_convert_type(codes, jnp.float16) - (1024 + centre)

    if bits == 8:
        parts = [part(place, 0xFF, 0x80, 128) for place in range(2)]  # signed
    else:
        parts = [part(place, 15 * unit, 0, CENTRE * unit) for unit in (1, 16) for place in range(2)]
    return jnp.concatenate(parts, axis=1)


def arranged(form: Form, x: jax.Array) -> jax.Array:
    """Returns inputs [R, D] in the order of codes in pieces: by half of the byte, then by its place in a pair of bytes.

    Those of high halves, whose codes come 16 times as large, are divided by that.
    """
    halves, rows = 8 // form.bits, len(x)
    pieces = form.group // form.piece
    grouped = x.reshape(rows, -1, halves, pieces, form.piece // halves // 2, 2)
    sizes = jnp.asarray([1, 1 / 16][:halves], x.dtype).reshape(halves, 1, 1, 1)
    return jnp.transpose(grouped * sizes, (0, 1, 3, 2, 5, 4)).reshape(x.shape)


def in_pairs(codes: jax.Array) -> jax.Array:
    """Returns the same bytes [F, n] as pairs [F, n // 2] uint16, which copies nothing."""
    return jax.lax.bitcast_convert_type(codes.reshape(len(codes), -1, 2), jnp.uint16)
