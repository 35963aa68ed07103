"""Which settings are compared: a preset with some fields replaced, written as one word of the command line."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from lserve_jax.config.attention import PRESETS, AttentionConfig, default_pages, from_preset

# A comma before a letter begins another variant, and a plus before "name=" another field: lists keep their commas.
_NEXT_VARIANT = re.compile(r"\s*,\s*(?=[a-zA-Z])")
_NEXT_FIELD = re.compile(r"\+(?=\w+=)")
_NO_LIMIT = 2**31
_OF_BUDGET = ("page_size", "sub_page_size", "has_lookahead")
"""Fields that `default_pages` may set."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One setting of a comparison.

    Attributes:
      label: the text that it was written as; results are filed under it.
      preset: see `lserve_jax.config.attention.PRESETS`.
      options: fields of `AttentionConfig` that replace the preset's. A ``token_budget`` that is a `float` is a share of
        the prompt's length.
      head_pattern: folder with head gates; None takes what the run takes.
      of_model: settings that suit the model, see `lserve_jax.config.attention.from_preset`.
    """

    label: str
    preset: str
    options: Mapping[str, Any] = field(default_factory=dict)
    head_pattern: str | None = None
    of_model: Mapping[str, Any] = field(default_factory=dict)

    def config(self, length: int) -> AttentionConfig:
        """Returns the policy for prompts of ``length`` tokens.

        A share of them is rounded up to whole pages, and to those that are always read.

        Raises:
          ValueError: for a value that cannot be, in one line that names the variant.
        """
        try:
            budget = self.options.get("token_budget")
            if not isinstance(budget, float):
                return from_preset(self.preset, of_model=self.of_model, **self.options)
            tokens = math.ceil(budget * length - 1e-9)
            pages = default_pages(self.preset, tokens, {**self.of_model, **self.options})
            options = {**pages, **self.options, "token_budget": _NO_LIMIT}
            free = from_preset(self.preset, of_model=self.of_model, **options)
            count = max(-(-tokens // free.page_size), free.forced_pages)
            options["token_budget"] = count * free.page_size
            return from_preset(self.preset, of_model=self.of_model, **options)
        except ValueError as error:
            raise ValueError(f"variant {self.label!r}: {error}") from None


def parse_variants(text: str) -> tuple[Variant, ...]:
    """Returns the variants of a text such as ``dense,lserve:static_sparsity=0.75+token_budget=25%,quest``.

    Raises:
      ValueError: for anything that is no variant, or one that is named twice, in one line.
    """
    variants = tuple(parse_variant(word) for word in _NEXT_VARIANT.split(text.strip()))
    labels = [variant.label for variant in variants]
    twice = [label for label in labels if labels.count(label) > 1]
    if twice:
        raise ValueError(f"variant {twice[0]!r} is named twice")
    return variants


def parse_variant(text: str) -> Variant:
    """Returns the variant ``PRESET[:field=value[+field=value…]]``.

    Fields are those of `AttentionConfig`, ``dense_layers=0,1`` with commas, and ``head_pattern``. ``token_budget`` may
    be a share of the prompt's length, as in ``token_budget=25%``.

    Raises:
      ValueError: in one line that names the variant.
    """
    label = text.strip()
    preset, colon, rest = label.partition(":")
    if preset not in PRESETS:
        raise ValueError(f"variant {label!r}: the preset {preset!r} must be one of {', '.join(PRESETS)}")
    options: dict[str, Any] = {}
    for name, value in _split(rest) if colon else ():
        if name not in _FIELDS:
            raise ValueError(f"variant {label!r}: unknown field {name!r}; known are {', '.join(_FIELDS)}")
        if name in options:
            raise ValueError(f"variant {label!r}: {name} is given twice")
        parse, what = _FIELDS[name]
        try:
            options[name] = parse(value)
        except (ValueError, KeyError):
            raise ValueError(f"variant {label!r}: {name}={value} must be {what}") from None
    return Variant(label=label, preset=preset, head_pattern=options.pop("head_pattern", None), options=options)


def change(variant: Variant, fields: str) -> Variant:
    """Returns the variant with some fields (``field=value[+field=value…]``) replaced; itself where all have that value.

    Raises:
      ValueError: as `parse_variant`.
    """
    preset, _, rest = variant.label.partition(":")
    old, new = dict(_split(rest) if rest else ()), dict(_split(fields))
    defaults = replace(parse_variant(preset), of_model=variant.of_model).config(0)
    wanted = parse_variant(f"{preset}:{fields}").options
    # Page sizes that are not named follow from the budget, and are not known here.
    unnamed = {name: None if name in _OF_BUDGET else getattr(defaults, name) for name in wanted}
    if {**unnamed, **variant.options}.items() >= wanted.items():
        return variant
    text = f"{preset}:" + "+".join(f"{name}={value}" for name, value in {**old, **new}.items())
    return replace(parse_variant(text), of_model=variant.of_model)


def _split(fields: str) -> list[tuple[str, str]]:
    """Returns names and values as they are written."""
    parts = (part.partition("=") for part in _NEXT_FIELD.split(fields))
    return [(name, value) for name, _, value in parts]


def _budget(text: str) -> int | float:
    if not text.endswith("%"):
        return int(text)
    share = float(text.removesuffix("%")) / 100
    if not 0 < share <= 1:
        raise ValueError
    return share


_KINDS: dict[Any, tuple[Callable[[str], Any], str]] = {
    int: (int, "a whole number"),
    int | None: (_budget, "a whole number, or a share of the prompt from above 0% to 100%"),
    float: (float, "a number"),
    bool: ({"true": True, "false": False}.__getitem__, "true or false"),
    tuple[int, ...]: (lambda text: tuple(int(part) for part in text.split(",") if text), "layer numbers such as 0,1"),
    str: (str, "a word"),
}
"""By the type of a field: how its text is read, and what it must be."""

_FIELDS = {one.name: _KINDS[one.type] for one in fields(AttentionConfig) if one.name != "preset"}
_FIELDS["head_pattern"] = (str, "a folder")
