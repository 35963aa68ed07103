"""Reads what a ``config.json`` says of its rotary embedding, from all the places where it may stand."""

from collections.abc import Iterator, Mapping
from typing import Any

from lserve_jax.config.errors import shown
from lserve_jax.config.model import DEFAULT_THETA, LARGEST_INT, ROPE_KINDS
from lserve_jax.config.reader import Reader

LAYER_TYPES = ("full_attention", "sliding_attention")
TYPE_KEYS = ("rope_type", "type")
# Numbers that a section may hold or the file itself.
TOP_LEVEL_KEYS = ("rope_theta", "partial_rotary_factor")
KNOWN_KEYS = {
    *TYPE_KEYS,
    *TOP_LEVEL_KEYS,
    *("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"),
    *("attention_factor", "mscale", "mscale_all_dim", "truncate"),
    "finetuned",  # of older configurations: says how the model was trained, not what it computes
}


def read_rope(reader: Reader, max_position: int) -> dict[str, Any]:
    """Returns the arguments of `RopeConfig`; records an unknown kind, and places that disagree, as problems.

    Args:
      reader: reads the whole file.
      max_position: its ``max_position_embeddings``.
    """
    section = _gather(reader)
    kind = section.text("rope_type", "default")
    values: dict[str, Any] = {"kind": kind, "theta": section.number("rope_theta", DEFAULT_THETA)}
    unknown = sorted(key for key, value in section.config.items() if key not in KNOWN_KEYS and value is not None)
    if kind not in ROPE_KINDS:
        reader.problems.append(f"RoPE kind {shown(kind)} is not supported; known kinds: {', '.join(ROPE_KINDS)}")
        return {"theta": values["theta"]}
    reader.problems += [f"{shown(section.name(key))} {shown(section.config[key])} is not supported" for key in unknown]
    if (partial := section.number("partial_rotary_factor", 1.0)) != 1.0:
        reader.problems.append(f"{section.name('partial_rotary_factor')} {partial} is not supported, only 1")
    if kind == "default" and section.optional_number("factor", 1.0) != 1.0:
        reader.problems.append(
            f"{section.name('factor')} {shown(section.config['factor'])} needs a rope_type: {', '.join(ROPE_KINDS[1:])}"
        )
    if kind in ("llama3", "yarn"):
        # As in transformers, the key at the top level wins over the section's; without either, the whole range counts.
        in_section = section.size("original_max_position_embeddings", max_position)
        values["original_max_position"] = reader.size("original_max_position_embeddings", in_section)
    if kind == "linear":
        values["factor"] = section.number("factor")
    if kind == "llama3":
        values |= {key: section.number(key) for key in ("factor", "low_freq_factor", "high_freq_factor")}
    if kind == "yarn":
        values |= _yarn(section, max_position / values["original_max_position"])
    return values


def rope_range(rope: Mapping[str, Any], max_position: int) -> int:
    """Returns the tokens that the rotary embedding covers (Qwen's model cards enable yarn and keep the old range)."""
    if rope.get("kind") != "yarn":
        return max_position
    return max(max_position, int(min(rope["factor"] * rope["original_max_position"], LARGEST_INT)))


def _yarn(section: Reader, ratio: float) -> dict[str, Any]:
    """Returns yarn's arguments, with the defaults of transformers (an explicit null factor is the length ratio)."""
    return {
        "factor": section.number("factor", ratio if "factor" in section.config else None),
        "beta_fast": section.optional_number("beta_fast", 32.0, zero_is_absent=True),
        "beta_slow": section.optional_number("beta_slow", 1.0, zero_is_absent=True),
        "attention_factor": section.optional_number("attention_factor", None),
        "mscale": section.optional_number("mscale", None, zero_is_absent=True),
        "mscale_all_dim": section.optional_number("mscale_all_dim", None, zero_is_absent=True),
        "truncate": section.flag("truncate", True),
    }


def _gather(reader: Reader) -> Reader:
    """Returns one section with the parameters of all places; records a problem for each that two of them dispute.

    ``rope_scaling`` is the older name of ``rope_parameters``. transformers reads only the first of them that it finds,
    and so loses a base that stands in the other: a model with a wrong base answers, but badly.
    """
    values: dict[str, Any] = {}
    names: dict[str, str] = {}
    for prefix, place in _places(reader):
        for key, value in place.items():
            # Both spellings of the type are one parameter.
            parameter = "rope_type" if key in TYPE_KEYS else key
            held = values.get(parameter)
            if held is None:
                values[parameter], names[parameter] = value, prefix + key
            elif value is not None and value != held:
                reader.problems.append(
                    f"{names[parameter]} {shown(held)} and {prefix}{key} {shown(value)} differ; remove the wrong one"
                )
    first = "rope_scaling" if reader.config.get("rope_scaling") else "rope_parameters"
    return Reader(values, f"{first}.", parent=reader, names=names)


def _places(reader: Reader) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields each mapping that holds parameters, with the prefix of its keys."""
    old, new = dict(reader.section("rope_scaling").config), dict(reader.section("rope_parameters").config)
    if any(old.get(key) is not None for key in TYPE_KEYS):
        # Model cards tell users to add a ``rope_scaling`` to the plain parameters that transformers 5 wrote.
        new = {key: value for key, value in new.items() if not (key in TYPE_KEYS and value == "default")}
    for name, section in (("rope_scaling", old), ("rope_parameters", new)):
        yield f"{name}.", {key: value for key, value in section.items() if key not in LAYER_TYPES}
        yield from _per_layer_type(reader, name, section)
    yield "", {key: reader.config[key] for key in TOP_LEVEL_KEYS if key in reader.config}


def _per_layer_type(reader: Reader, name: str, section: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields the parameters of the first type of layers, if all types have the same."""
    nested = {f"{name}.{key}": section[key] for key in LAYER_TYPES if section.get(key) is not None}
    found = list(nested.values())
    if not all(isinstance(value, Mapping) and value == found[0] for value in found):
        text = ", ".join(f"{key} {shown(value)}" for key, value in nested.items())
        reader.problems.append(f"a RoPE for each layer type is not supported, only one for all layers; got {text}")
        return
    for key, value in list(nested.items())[:1]:
        yield f"{key}.", value
