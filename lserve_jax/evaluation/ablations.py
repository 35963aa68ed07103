"""The ablation: changes one field of a base variant at a time, as in the paper's tables."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lserve_jax.config.errors import InputError
from lserve_jax.evaluation.summary import Cell
from lserve_jax.evaluation.variants import Variant, change

BASE = "lserve:page_size=16+sub_page_size=4+token_budget=25%+kv_dtype=int8"

AXES: Mapping[str, tuple[str, ...]] = {
    "page": (
        "page_size=8+sub_page_size=4",
        "page_size=16+sub_page_size=2",
        "page_size=16+sub_page_size=4",
        "page_size=16+sub_page_size=16",
        "page_size=32+sub_page_size=32",
        "page_size=32+sub_page_size=16",
        "page_size=64+sub_page_size=64",
        "page_size=64+sub_page_size=16",
    ),
    "budget": tuple(f"token_budget={share}%" for share in (12.5, 25, 50, 100)),
    "selector": (
        *("selector=bound", "selector=bound+selector_spread=1"),
        *(f"selector={name}" for name in ("mean_key", "oracle", "random")),
    ),
    "interval": tuple(f"selector_interval={steps}" for steps in (1, 2, 4, 8, 16)),
    "sparsity": tuple(f"static_sparsity={share}" for share in (0, 0.25, 0.5, 0.75)),
    "sink": tuple(f"sink={tokens}" for tokens in (0, 16, 64, 128, 256)),
    "local": tuple(f"local={tokens}" for tokens in (64, 128, 256, 512)),
    "prefill_local": tuple(f"prefill_local={tokens}" for tokens in (128, 256, 512, 1024, 4096)),
    "kv_dtype": tuple(f"kv_dtype={name}" for name in ("auto", "int8", "int4")),
    "weight_dtype": tuple(f"weight_dtype={name}" for name in ("auto", "bfloat16", "int8", "int4")),
    "reduction": tuple(f"group_reduction={name}" for name in ("max", "mean")),
    "spread": tuple(f"selector_spread={share}" for share in (0, 0.25, 0.5, 0.75, 1)),
    "memory": tuple(f"selector_memory={share}" for share in (0, 0.3, 0.6, 0.8)),
    "forced_sink": ("is_sink_forced=true", "is_sink_forced=false"),
}
"""For each axis, the fields that its settings replace in the base variant."""

DENSE_LAYER = "dense_layer"
"""An axis with one setting per layer of the model; `AXES` are the axes that all models share."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A point of an axis: the fields that it changes, and the resulting variant."""

    axis: str
    fields: str
    variant: Variant

    def as_json(self) -> dict[str, Any]:
        """Returns the setting as JSON values."""
        names = ("label", "preset", "options", "head_pattern", "weight_dtype", "of_model")
        variant = {name: getattr(self.variant, name) for name in names}
        return {"axis": self.axis, "fields": self.fields, "variant": variant}


def settings(base: Variant, axes: Iterable[str], num_layers: int) -> list[Setting]:
    """Returns the settings of some axes; those that change nothing have the base variant itself.

    Args:
      base: the variant that the settings change.
      axes: names of `AXES`, or ``dense_layer``, in whose settings no layer or exactly one reads all pages.
      num_layers: layers of the model.

    Raises:
      InputError: for an unknown axis.
    """
    known = {**AXES, DENSE_LAYER: tuple(f"dense_layers={layer}" for layer in ("", *range(num_layers)))}
    found = []
    for axis in axes:
        if axis not in known:
            raise InputError(f"ablation {axis!r} must be one of {', '.join(known)}")
        found += [Setting(axis=axis, fields=fields, variant=change(base, fields)) for fields in known[axis]]
    return found


def by_axis(settings: Sequence[Setting], cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """Returns the cells of each axis, the reference's first; a setting is named by the fields that it changes."""
    found = {}
    for axis in dict.fromkeys(setting.axis for setting in settings):
        fields = {setting.variant.label: setting.fields for setting in settings if setting.axis == axis}
        reference = [cell["variant"] for cell in cells if cell["is_reference"]][:1]
        order = list(dict.fromkeys((*reference, *fields)))  # the reference may be a setting of the axis
        groups = dict.fromkeys((cell["task"], cell["length"]) for cell in cells)
        members = {(cell["task"], cell["length"], cell["variant"]): cell for cell in cells}
        found[axis] = [
            {**members[*group, label], "variant": fields.get(label, label)}
            for group in groups
            for label in order
            if (*group, label) in members
        ]
    return found
