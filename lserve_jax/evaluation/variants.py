"""The settings that a run compares: a preset with some fields replaced, written as one word of the command line."""

import math
import re
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, replace
from typing import Any

from lserve_jax.config.attention import ALL, PRESETS, AttentionConfig, default_pages, from_preset
from lserve_jax.config.checks import LARGEST_INT
from lserve_jax.config.errors import InputError
from lserve_jax.config.heads import HeadClasses, HeadPattern
from lserve_jax.config.inference import WEIGHT_DTYPES
from lserve_jax.config.settings import read, settings

# A comma before a letter begins another variant, a plus before "name=" another field. So lists keep their commas.
_NEXT_VARIANT = re.compile(r"\s*,\s*(?=[a-zA-Z])")
_NEXT_FIELD = re.compile(r"\+(?=\w+=)")
_OF_MODEL = ("head_pattern", "weight_dtype")
"""Fields of a variant that are none of `AttentionConfig`: they say which model it is."""
_NO_LIMIT = LARGEST_INT
_OF_BUDGET = ("page_size", "sub_page_size")
"""Fields that `default_pages` may set."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One setting of a comparison.

    Attributes:
      label: its text on the command line, under which its results are stored.
      preset: see `lserve_jax.config.attention.PRESETS`.
      options: fields of `AttentionConfig` that replace the preset's. A ``token_budget`` that is a `float` is a share of
        the prompt's length.
      head_pattern: folder with head gates; None takes that of the run.
      weight_dtype: form of the weights, see `lserve_jax.engine.setup.prepare`; None takes that of the run.
      pattern: the head pattern of this variant, whose settings are its defaults; None if the model has none.
    """

    label: str
    preset: str
    options: Mapping[str, Any] = field(default_factory=dict)
    head_pattern: str | None = None
    weight_dtype: str | None = None
    pattern: HeadPattern | None = None

    @property
    def of_model(self) -> Mapping[str, Any]:
        """Returns the model's defaults, see `lserve_jax.config.attention.from_preset`."""
        return {} if self.pattern is None else self.pattern.settings

    def heads(self, length: int) -> HeadClasses | None:
        """Returns the classes of the model's KV heads; None if all are retrieval heads."""
        sparsity = self.config(length).static_sparsity
        return None if self.pattern is None or sparsity == 0 else self.pattern.classify(sparsity)

    def arguments(self, config: AttentionConfig) -> dict[str, Any]:
        """Returns a policy of this variant as arguments of `lserve_jax.prepare`.

        The sparsity is among them only if the variant names it: that insists on streaming heads, where a model without
        a head pattern is refused.
        """
        named = {"static_sparsity": self.options.get("static_sparsity")}
        return {"attention": config.preset, "weight_dtype": self.weight_dtype, **config.options(), **named}

    def config(self, length: int) -> AttentionConfig:
        """Returns the policy for prompts of ``length`` tokens.

        A budget that is a share is rounded up to whole pages, and to at least the pages that are always read.

        Raises:
          InputError: for a value out of range, in one line that names the variant.
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
        except InputError as error:
            raise InputError(f"variant {self.label!r}: {error}") from None


def parse_variants(text: str) -> tuple[Variant, ...]:
    """Returns the variants of a text such as ``dense,lserve:static_sparsity=0.75+token_budget=25%,quest``.

    Raises:
      InputError: in one line, for a text that is not a variant, or for a variant that is named twice.
    """
    variants = tuple(parse_variant(word) for word in _NEXT_VARIANT.split(text.strip()))
    labels = [variant.label for variant in variants]
    twice = [label for label in labels if labels.count(label) > 1]
    if twice:
        raise InputError(f"variant {twice[0]!r} is named twice")
    return variants


def parse_variant(text: str) -> Variant:
    """Returns the variant ``PRESET[:field=value[+field=value…]]``.

    The fields are those of `AttentionConfig`, the folder ``head_pattern``, and ``weight_dtype``. A list has commas:
    ``dense_layers=0,1``. ``token_budget`` may also be a share of the prompt's length, as in ``token_budget=25%``, or
    ``all``.

    Raises:
      InputError: in one line that names the variant.
    """
    label = text.strip()
    preset, colon, rest = label.partition(":")
    if preset not in PRESETS:
        raise InputError(f"variant {label!r}: the preset {preset!r} must be one of {', '.join(PRESETS)}")
    options: dict[str, Any] = {}
    known = settings(AttentionConfig)
    for name, value in _split(rest) if colon else ():
        if name not in known and name not in _OF_MODEL:
            raise InputError(f"variant {label!r}: unknown field {name!r}; known are {', '.join((*known, *_OF_MODEL))}")
        if name in options:
            raise InputError(f"variant {label!r}: {name} is given twice")
        try:
            options[name] = _read(known[name], value) if name in known else _read_of_model(name, value)
        except InputError as error:
            raise InputError(f"variant {label!r}: {name}={value} {error}") from None
    of_model = {name: options.pop(name, None) for name in _OF_MODEL}
    return Variant(label=label, preset=preset, options=options, **of_model)


def change(variant: Variant, fields: str) -> Variant:
    """Returns the variant with some fields (``field=value[+field=value…]``) replaced.

    It returns the variant itself if all the fields have these values already.

    Raises:
      InputError: as `parse_variant`.
    """
    preset, _, rest = variant.label.partition(":")
    old, new = dict(_split(rest) if rest else ()), dict(_split(fields))
    defaults = replace(parse_variant(preset), pattern=variant.pattern).config(0).options()
    wanted = parse_variant(f"{preset}:{fields}")
    # Page sizes that are not named follow from the budget, which may be a share of a length that is unknown here.
    unnamed = {name: None if name in _OF_BUDGET else defaults[name] for name in wanted.options}
    is_same_model = wanted.weight_dtype in (None, variant.weight_dtype)
    if is_same_model and {**unnamed, **variant.options}.items() >= wanted.options.items():
        return variant
    text = f"{preset}:" + "+".join(f"{name}={value}" for name, value in {**old, **new}.items())
    weight_dtype = wanted.weight_dtype or variant.weight_dtype
    return replace(parse_variant(text), pattern=variant.pattern, weight_dtype=weight_dtype)


def _split(fields: str) -> list[tuple[str, str]]:
    """Returns the names and values as texts."""
    parts = (part.partition("=") for part in _NEXT_FIELD.split(fields))
    return [(name, value) for name, _, value in parts]


def _read_of_model(name: str, text: str) -> str:
    """Returns the value of a field of `_OF_MODEL`; raises InputError("must be …")."""
    if name == "weight_dtype" and text not in WEIGHT_DTYPES:
        raise InputError(f"must be one of {', '.join(WEIGHT_DTYPES)}")
    return text


def _read(setting: Field[Any], text: str) -> Any:
    """Returns the value of a field, a share of the prompt's length as a `float`; raises InputError("must be …")."""
    if setting.name != "token_budget":
        return read(setting, text)
    try:
        if not text.endswith("%"):
            return read(setting, text)
        share = float(text.removesuffix("%")) / 100
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise InputError(f"must be a whole number, or a share of the prompt above 0% and up to 100%, or {ALL}")
    return share
