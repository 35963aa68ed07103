"""How a matrix is stored in 8 or 4 bits, apart from its numbers: known from a file's header before it is read."""

import math
from dataclasses import dataclass, replace
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.core.quantized_matrix import (
    CENTRE,
    QuantizedMatrix,
    expand,
    integers,
    pack,
    quantize_groups,
    quantize_rows,
)

CODES = ("int8", "uint8", "float8_e4m3fn")
SCALES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The form of a `QuantizedMatrix` of any shape.

    Attributes:
      codes: dtype of the codes; "uint8" are two codes of 4 bits.
      group: inputs that share a scale; None for all of a row.
      scale: dtype of the scales, or their layout if they are quantised too.
      low: the same of the offsets; None for none.
      input_bits: see `QuantizedMatrix`.
    """

    codes: str
    group: int | None
    scale: "str | Layout"
    low: "str | Layout | None" = None
    input_bits: int | None = None

    @classmethod
    def of(cls, matrix: QuantizedMatrix) -> Self:
        """Returns the layout of a matrix; one group per row is None if the codes have 8 bits."""
        is_row = matrix.group == matrix.shape[-1] and matrix.bits == 8

        def part(leaf: Any) -> "str | Layout":
            return Layout.of(leaf) if isinstance(leaf, QuantizedMatrix) else str(jnp.dtype(leaf.dtype))

        return cls(
            codes=str(jnp.dtype(matrix.codes.dtype)),
            group=None if is_row else matrix.group,
            scale=part(matrix.scale),
            low=None if matrix.low is None else part(matrix.low),
            input_bits=matrix.input_bits,
        )

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Returns the layout whose fields are JSON values, the opposite of `dataclasses.asdict`.

        Raises:
          ValueError: if no matrix has such a layout.
          TypeError: if fields are missing or unknown.
        """
        parts = {name: cls.from_json(part) for name, part in value.items() if isinstance(part, dict)}
        found = cls(**{**value, **parts})
        least = 2 if found.bits == 4 else 1  # two codes of 4 bits are a byte
        has_group = type(found.group) is int and found.group > 0 and found.group % least == 0
        is_known = (
            found.codes in CODES
            and (has_group or (found.group is None and found.bits == 8))
            and (found.scale in SCALES or isinstance(found.scale, Layout))
            and (found.low in (None, *SCALES) or isinstance(found.low, Layout))
            and found.input_bits in (None, 8, 16)
        )
        is_w8a8 = (found.codes, found.group, found.low) == ("int8", None, None)
        if not is_known or (found.input_bits is not None and not is_w8a8):
            raise ValueError(f"no layout: {value}")
        return found

    def suits(self, inputs: int) -> bool:
        """Returns whether a matrix of so many inputs consists of whole groups."""
        group = self.group or inputs
        parts = [part for part in (self.scale, self.low) if isinstance(part, Layout)]
        return inputs % group == 0 and all(part.suits(inputs // group) for part in parts)

    @property
    def bits(self) -> int:
        """Returns the bits per code: 8 or 4."""
        return 4 if self.codes == "uint8" else 8

    @property
    def words(self) -> str:
        """Returns the type in words, such as "int8" or "int4 in groups of 32"."""
        name = "int4" if self.bits == 4 else self.codes
        return name if self.group is None else f"{name} in groups of {self.group}"

    def within(self, block: int) -> Self:
        """Returns the layout with groups that divide ``block`` inputs: blocks can then change places."""
        if self.group is None:
            return self
        group = math.gcd(self.group, block)

        def part[P: "str | Layout | None"](kind: P) -> P:
            return kind.within(block // group) if isinstance(kind, Layout) else kind

        return replace(self, group=group, scale=part(self.scale), low=part(self.low))

    def abstract(self, shape: tuple[int, ...]) -> QuantizedMatrix:
        """Returns a matrix of `jax.ShapeDtypeStruct` leaves with ``shape`` [..., D]."""
        *rows, inputs = shape
        groups = (*rows, inputs // (self.group or inputs))

        def part(kind: "str | Layout") -> Any:
            return kind.abstract(groups) if isinstance(kind, Layout) else jax.ShapeDtypeStruct(groups, jnp.dtype(kind))

        return QuantizedMatrix(
            codes=jax.ShapeDtypeStruct((*rows, inputs * self.bits // 8), jnp.dtype(self.codes)),
            scale=part(self.scale),
            low=None if self.low is None else part(self.low),
            input_bits=self.input_bits,
        )


def fit(matrix: QuantizedMatrix, layout: Layout) -> QuantizedMatrix:
    """Returns the same numbers, as numpy arrays, with the smaller groups of ``layout``: each scale is repeated."""
    if layout.group is None:
        return matrix
    times = matrix.group // layout.group
    codes = matrix.codes
    if matrix.bits == 4 and times > 1:
        codes = pack(integers(matrix, np) + (CENTRE if matrix.low is None else 0), layout.group, np)

    def part(scale: Any, kind: "str | Layout") -> Any:
        if not isinstance(kind, Layout):
            return np.repeat(scale, times, axis=-1) if times > 1 else scale
        return fit(replace(scale, codes=np.repeat(scale.codes, times, axis=-1)), kind)

    low = None if layout.low is None else part(matrix.low, layout.low)
    return replace(matrix, codes=codes, scale=part(matrix.scale, layout.scale), low=low)


def converted(
    source: Any,
    form: "str | Layout",
    shape: tuple[int, ...],
    *,
    rows: np.ndarray | None = None,
    columns: np.ndarray | None = None,
) -> Any:
    """Returns a matrix [F, D], or a vector [F], in another form.

    It is made some rows at a time: what is float32 in between stays in the cache.

    Args:
      source: numbers, or a quantised matrix, as numpy arrays.
      form: a dtype, the layout `INT8` or `INT8_WIDE`, or that of `INT4` with any group.
      shape: F and D.
      rows: [F] float32 what each row is multiplied by; None for nothing.
      columns: [D] float32 the same of each column.
    """
    step = max(1, _CHUNK * shape[0] // max(math.prod(shape), 1))
    whole = form.abstract(shape) if isinstance(form, Layout) else jax.ShapeDtypeStruct(shape, jnp.dtype(form))
    out = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), whole)
    for start in range(0, shape[0], step):
        some = slice(start, start + step)
        wide = expand(jax.tree.map(lambda leaf, some=some: leaf[some], source), np.float32, np)
        if rows is not None:
            wide = wide * rows[some].reshape(-1, *[1] * (len(shape) - 1))
        if columns is not None:
            wide = wide * columns
        part = _quantized(wide, form) if isinstance(form, Layout) else wide
        for target, values in zip(jax.tree.leaves(out), jax.tree.leaves(part), strict=True):
            target[some] = values
    return out


def _quantized(array: np.ndarray, layout: Layout) -> QuantizedMatrix:
    if layout.bits == 8:
        return quantize_rows(array, np, input_bits=layout.input_bits)
    assert layout.group is not None and replace(layout, group=INT4.group) == INT4
    return quantize_groups(array, layout.group, np)


_CHUNK = 1 << 16
"""Numbers that are converted together: 256 KiB of float32."""

INT8 = Layout(codes="int8", group=None, scale="float32", input_bits=8)
"""What ``weight_dtype="int8"`` makes: W8A8, one scale per output."""

INT8_WIDE = replace(INT8, input_bits=16)
"""The same for inputs that 8 bits do not suffice for, such as those of the logits."""

INT4 = Layout(codes="uint8", group=32, scale="float16", low="float16")
"""What ``weight_dtype="int4"`` makes of numbers: the layout of GGUF's Q4_1."""
