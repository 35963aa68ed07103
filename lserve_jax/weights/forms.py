"""In which form each parameter of a checkpoint is kept in memory: as numbers, or quantised to 8 or 4 bits."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from math import gcd
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lserve_jax.config.errors import InputError
from lserve_jax.config.inference import WEIGHT_DTYPES
from lserve_jax.weights.layout import INT4, INT8, INT8_WIDE, Layout
from lserve_jax.weights.rules import Parameter, Tensor
from lserve_jax.weights.smoothing import Smoothing

type Form = str | Layout
"""The dtype of numbers, or the layout of a quantised matrix."""

type LayoutOf = Callable[[Tensor], Layout | None]
"""The layout in which a file stores a tensor; None for numbers."""


_WIDE = ("down_proj",)
"""Linear maps whose inputs get 16 bits with "int8", as those of the logits do: large values are in other channels for
each token, so that no fixed factors per channel help (8 bits there cost SmolLM2-135M 0.4% of perplexity)."""


class Run(NamedTuple):
    """Neighbouring parts of a parameter that have one form, and are one entry of the tree.

    Attributes:
      form: what they become.
      parts: each tensor with its shape in the tree.
      shape: the shape of all, joined.
    """

    form: Form
    parts: tuple[tuple[Tensor, tuple[int, ...]], ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Forms:
    """The form of every parameter.

    Attributes:
      dtype: type of numbers, "bfloat16" or "float32": of norms, of biases, and of matrices that are not quantised.
      weight_dtype: "auto" keeps matrices as the file has them; "bfloat16" and "float32" make numbers of all;
        "int8" quantises them to 8 bits per output channel, "int4" to 4 bits per group, or keeps the 4 bits of a file;
        None makes numbers of ``dtype``.
      smoothing: factors that move size from inputs into weights; None for none.
    """

    dtype: str
    weight_dtype: str | None = None
    smoothing: Smoothing | None = None

    def __post_init__(self) -> None:
        if self.weight_dtype not in (None, *WEIGHT_DTYPES):
            raise InputError(f"weight_dtype={self.weight_dtype!r} must be one of {', '.join(WEIGHT_DTYPES)}")

    def runs(self, parameter: Parameter, layout_of: LayoutOf) -> Iterator[Run]:
        """Yields the parts of a parameter; a file may store its parts in different forms."""
        pairs = zip(parameter.parts, parameter.part_shapes, strict=True)
        axis = parameter.axis
        for form, found in groupby(pairs, key=lambda pair: self._form(parameter, layout_of(pair[0]))):
            parts = tuple(found)
            first = parts[0][1]
            length = sum(shape[axis] for _, shape in parts)
            yield Run(form, parts, (*first[:axis], length, *first[axis + 1 :]))

    def abstract(self, parameter: Parameter, layout_of: LayoutOf) -> Any:
        """Returns the parameter's entry of the tree with leaves of `jax.ShapeDtypeStruct`."""
        return joined(
            form.abstract(shape) if isinstance(form, Layout) else jax.ShapeDtypeStruct(shape, jnp.dtype(form))
            for form, _, shape in self.runs(parameter, layout_of)
        )

    def _form(self, parameter: Parameter, held: Layout | None) -> Form:
        """Returns the form of a part of ``parameter`` that the file has in the layout ``held``."""
        wish = self.weight_dtype
        if not parameter.is_matrix or wish is None or (wish == "auto" and held is None):
            return self.dtype
        if wish in ("bfloat16", "float32"):
            return wish
        if wish != "auto":
            is_inside = parameter.layer is not None
            if wish == "int8" and is_inside and parameter.path[-2] not in _WIDE:
                return INT8
            if wish == "int8" or not is_inside:  # embeddings and logits lose most by 4 bits
                return INT8_WIDE
            if held is None or held.bits != 4:
                held = replace(INT4, group=gcd(32, parameter.shape[-1]))
        assert held is not None
        return kept(parameter, held)


def kept(parameter: Parameter, held: Layout) -> Layout:
    """Returns the layout of a file's matrix in the tree: with groups that stay whole when heads change places."""
    return held.within(parameter.shape[-1] // parameter.num_kv_heads) if parameter.head_axis == -1 else held


def joined(parts: Iterable[Any]) -> Any:
    """Returns the only part, or a tuple of several."""
    found = tuple(parts)
    return found[0] if len(found) == 1 else found
