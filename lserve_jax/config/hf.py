"""Reads Hugging Face's ``config.json`` into a `ModelConfig`: one table of architectures, all problems in one line."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from lserve_jax.config.errors import InputError
from lserve_jax.config.model import (
    AUTO_DTYPES,
    DEFAULT_THETA,
    LARGEST_INT,
    ROPE_KINDS,
    ModelConfig,
    RopeConfig,
    is_positive_int,
    is_positive_number,
)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How one model type of Hugging Face differs from the others; a row of `ARCHITECTURES`.

    A bias exists "always", "never", or if the checkpoint's ``attention_bias`` / ``mlp_bias`` is true ("config"). The
    sliding window applies "never", if it is not null ("given"), or if ``use_sliding_window`` is true ("switched").
    """

    hf_class: str
    qkv_bias: Literal["always", "never", "config"] = "never"
    o_bias: Literal["always", "never", "config"] = "never"
    mlp_bias: Literal["always", "never", "config"] = "never"
    qk_norm: bool = False
    window: Literal["never", "given", "switched"] = "never"
    needs_kv_heads: bool = True
    head_dim: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None


# Keys are values of ``model_type``; the defaults are those of the configuration classes of transformers.
ARCHITECTURES = {
    "llama": Architecture(
        hf_class="LlamaForCausalLM",
        qkv_bias="config",
        o_bias="config",
        mlp_bias="config",
        needs_kv_heads=False,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "mistral": Architecture(hf_class="MistralForCausalLM", window="given", bos_token_id=1, eos_token_id=2),
    "qwen2": Architecture(hf_class="Qwen2ForCausalLM", qkv_bias="always", window="switched"),
    "qwen3": Architecture(
        hf_class="Qwen3ForCausalLM",
        qkv_bias="config",
        o_bias="config",
        qk_norm=True,
        window="switched",
        head_dim=128,
    ),
}
DEFAULT_WINDOW = 4096  # what transformers assumes if a window applies and its key is absent
LAYER_TYPES = ("full_attention", "sliding_attention")


def read_hf(
    config: Mapping[str, Any], *, source: str, generation_config: Mapping[str, Any] | None = None
) -> ModelConfig:
    """Returns the configuration that a Hugging Face ``config.json`` describes.

    Reads old (``rope_theta``, ``rope_scaling``, ``torch_dtype``) and new (``rope_parameters``, ``dtype``) spellings.

    Args:
      config: the parsed ``config.json``.
      source: the file's name, with which every error begins.
      generation_config: the parsed ``generation_config.json``; its end-of-sequence tokens win.

    Raises:
      InputError: if the architecture or RoPE kind is unknown, keys are missing (all are named), values have the wrong
        type, or the checkpoint needs a feature that this model code does not have.
    """
    model_type = _model_type(config, source)
    architecture = ARCHITECTURES[model_type]
    reader = _Reader(config)
    num_heads = reader.size("num_attention_heads")
    hidden_size = reader.size("hidden_size")
    max_position = reader.size("max_position_embeddings")
    window = _sliding_window(architecture, reader, reader.size("num_hidden_layers"))
    # A null means as many KV heads as query heads; transformers has that default for an absent key only in Llama.
    has_kv_default = "num_key_value_heads" in config or not architecture.needs_kv_heads
    rope = _rope(reader, max_position)
    values: dict[str, Any] = {
        "architecture": model_type,
        "vocab_size": reader.size("vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": reader.size("intermediate_size"),
        "num_layers": reader.size("num_hidden_layers"),
        "num_heads": num_heads,
        "num_kv_heads": reader.size("num_key_value_heads", num_heads if has_kv_default else None),
        "head_dim": reader.size("head_dim", architecture.head_dim or _even_share(reader, hidden_size, num_heads)),
        "rms_norm_eps": reader.number("rms_norm_eps"),
        "max_context": min(_rope_range(rope, max_position), window or math.inf),
        "tie_embeddings": reader.flag("tie_word_embeddings", False),
        "qkv_bias": _has_bias(architecture.qkv_bias, reader, "attention_bias"),
        "o_bias": _has_bias(architecture.o_bias, reader, "attention_bias"),
        "mlp_bias": _has_bias(architecture.mlp_bias, reader, "mlp_bias"),
        "qk_norm": architecture.qk_norm,
        "dtype": _auto_dtype(reader),
        "bos_token_id": reader.token_ids("bos_token_id", architecture.bos_token_id)[0],
        "eos_token_ids": _eos_token_ids(reader, generation_config, architecture),
    }
    _refuse_unsupported(reader)
    reader.raise_problems(source)
    try:
        return ModelConfig(rope=RopeConfig(**rope), **values)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None


class _Reader:
    """Reads typed values from a parsed ``config.json`` and records every problem instead of stopping at the first.

    After a problem, methods return a harmless value; `raise_problems` keeps it from being used.
    """

    def __init__(self, config: Mapping[str, Any], prefix: str = "", problems: list[str] | None = None) -> None:
        self.config = config
        self.prefix = prefix
        self.missing: list[str] = []
        self.problems: list[str] = [] if problems is None else problems

    def section(self, key: str) -> "_Reader":
        """Returns a reader of the mapping under ``key`` (empty if absent or null) that records its problems here."""
        value = self.config.get(key) or {}
        if not isinstance(value, Mapping):
            self.problems.append(f"{self.prefix}{key} must be a mapping, got {value!r}")
            value = {}
        reader = _Reader(value, f"{self.prefix}{key}.", self.problems)
        reader.missing = self.missing
        return reader

    def size(self, key: str, default: int | None = None) -> int:
        """Returns the positive integer under ``key``, required if ``default`` is None (null counts as absent)."""
        value = self.config.get(key)
        if value is None:
            return self._absent(key, default, 1)
        if not is_positive_int(value):
            return self._wrong(key, "a positive integer", value, 1)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Returns the positive number under ``key``, required if ``default`` is None (null counts as absent)."""
        value = self.config.get(key)
        if value is None:
            return self._absent(key, default, 1.0)
        if not is_positive_number(value):
            return self._wrong(key, "a positive number", value, 1.0)
        return float(value)

    def optional_number(self, key: str) -> float | None:
        """Returns the positive number under ``key``, or None if it is absent or null."""
        return None if self.config.get(key) is None else self.number(key)

    def flag(self, key: str, default: bool) -> bool:
        """Returns the boolean under ``key``."""
        value = self.config.get(key)
        if value is None:
            return default
        return value if isinstance(value, bool) else self._wrong(key, "true or false", value, default)

    def text(self, key: str, default: str) -> str:
        """Returns the string under ``key``."""
        value = self.config.get(key)
        if value is None:
            return default
        return value if isinstance(value, str) else self._wrong(key, "a string", value, default)

    def token_ids(self, key: str, default: int | None) -> tuple[int | None, ...]:
        """Returns the token ids under ``key``, a number or a list; ``(default,)`` if it is absent or null."""
        value = self.config.get(key)
        if value is None:
            return (default,)
        ids = value if isinstance(value, list) else [value]
        if not ids or not all(map(_is_token_id, ids)):
            return self._wrong(key, "a token id or a list of them", value, (default,))
        return tuple(ids)

    def raise_problems(self, source: str) -> None:
        """Raises one `InputError` that begins with ``source`` and names every missing key and every problem."""
        problems = [f"missing required keys: {', '.join(dict.fromkeys(self.missing))}"] if self.missing else []
        problems += dict.fromkeys(self.problems)
        if problems:
            raise InputError(f"{source}: {'; '.join(problems)}")

    def _absent[T](self, key: str, default: T | None, stand_in: T) -> T:
        if default is None:
            self.missing.append(self.prefix + key)
            return stand_in
        return default

    def _wrong[T](self, key: str, expected: str, value: object, stand_in: T) -> T:
        self.problems.append(f"{self.prefix}{key} must be {expected}, got {value!r}")
        return stand_in


def _is_token_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST_INT


def _model_type(config: Mapping[str, Any], source: str) -> str:
    """Returns the key of `ARCHITECTURES` that ``config`` names by "architectures" or, if absent, by "model_type"."""
    by_class = {row.hf_class: model_type for model_type, row in ARCHITECTURES.items()}
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and named else config.get("model_type")
    known = ", ".join(f"{row.hf_class} ({model_type})" for model_type, row in ARCHITECTURES.items())
    if name is None:
        raise InputError(f"{source}: names no architecture (key architectures or model_type); known: {known}")
    if isinstance(name, str) and (name in by_class or name in ARCHITECTURES):
        return by_class.get(name, name)
    raise InputError(f"{source}: architecture {name!r} is not supported; known: {known}")


def _even_share(reader: _Reader, hidden_size: int, num_heads: int) -> int:
    """Returns the head size that applies if the config gives none."""
    if reader.config.get("head_dim") is None and hidden_size % num_heads:
        reader.problems.append(f"num_attention_heads ({num_heads}) must divide hidden_size ({hidden_size})")
    return max(hidden_size // num_heads, 1)


def _rope_section(reader: _Reader) -> _Reader:
    """Returns the mapping of RoPE parameters; the old spelling wins over the new one, as in transformers."""
    return reader.section("rope_scaling" if reader.config.get("rope_scaling") else "rope_parameters")


def _rope(reader: _Reader, max_position: int) -> dict[str, Any]:
    """Returns the arguments of `RopeConfig`; records an unknown kind as a problem."""
    section = _rope_section(reader)
    kind = section.text("rope_type", section.text("type", "default"))
    values: dict[str, Any] = {
        "kind": kind,
        "theta": section.number("rope_theta", reader.number("rope_theta", DEFAULT_THETA)),
    }
    if kind not in ROPE_KINDS:
        reader.problems.append(f"RoPE kind {kind!r} is not supported; known kinds: {', '.join(ROPE_KINDS)}")
        return {"theta": values["theta"]}
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


def _yarn(section: _Reader, ratio: float) -> dict[str, Any]:
    """Returns yarn's arguments, with the defaults of transformers (an explicit null factor is the length ratio)."""
    return {
        "factor": section.number("factor", ratio if "factor" in section.config else None),
        "beta_fast": section.number("beta_fast", 32.0),
        "beta_slow": section.number("beta_slow", 1.0),
        "attention_factor": section.optional_number("attention_factor"),
        "mscale": section.optional_number("mscale"),
        "mscale_all_dim": section.optional_number("mscale_all_dim"),
        "truncate": section.flag("truncate", True),
    }


def _rope_range(rope: Mapping[str, Any], max_position: int) -> int:
    """Returns the tokens that the rotary embedding covers (Qwen's model cards enable yarn and keep the old range)."""
    if rope.get("kind") != "yarn":
        return max_position
    return max(max_position, int(min(rope["factor"] * rope["original_max_position"], LARGEST_INT)))


def _sliding_window(architecture: Architecture, reader: _Reader, num_layers: int) -> int | None:
    """Returns the window in tokens if any layer uses one, otherwise None."""
    if architecture.window == "given":
        return None if reader.config.get("sliding_window", 0) is None else reader.size("sliding_window", DEFAULT_WINDOW)
    if architecture.window == "never" or not reader.flag("use_sliding_window", False):
        return None
    if "sliding_window" in reader.config and reader.config["sliding_window"] is None:
        return None
    layer_types = reader.config.get("layer_types")
    if isinstance(layer_types, list):
        is_windowed = "sliding_attention" in layer_types
    else:
        is_windowed = reader.size("max_window_layers", 28) < num_layers
    return reader.size("sliding_window", DEFAULT_WINDOW) if is_windowed else None


def _has_bias(rule: str, reader: _Reader, key: str) -> bool:
    return reader.flag(key, False) if rule == "config" else rule == "always"


def _auto_dtype(reader: _Reader) -> str:
    name = reader.text("dtype", reader.text("torch_dtype", "float32")).removeprefix("torch.")
    if name not in AUTO_DTYPES:
        reader.problems.append(f"dtype {name!r} is not one of {', '.join(AUTO_DTYPES)}")
    return AUTO_DTYPES.get(name, "float32")


def _eos_token_ids(
    reader: _Reader, generation_config: Mapping[str, Any] | None, architecture: Architecture
) -> tuple[int, ...]:
    default = architecture.eos_token_id
    ids = reader.token_ids("eos_token_id", default)
    if generation_config and generation_config.get("eos_token_id") is not None:
        ids = _Reader(generation_config, "generation_config.", reader.problems).token_ids("eos_token_id", default)
    return cast(tuple[int, ...], tuple(dict.fromkeys(token for token in ids if token is not None)))


def _refuse_unsupported(reader: _Reader) -> None:
    """Records what a checkpoint of a known architecture needs and this model code does not support."""
    config = reader.config
    activation = reader.text("hidden_act", "silu")
    if activation != "silu":
        reader.problems.append(f"hidden_act {activation!r} is not supported, only 'silu'")
    if config.get("quantization_config"):
        method = config["quantization_config"]
        name = method.get("quant_method") if isinstance(method, Mapping) else method
        reader.problems.append(
            f"quantization_config ({name!r}) is not supported; use an unquantised or a GGUF checkpoint"
        )
    layer_types = config.get("layer_types") or []
    if not isinstance(layer_types, list) or any(name not in LAYER_TYPES for name in layer_types):
        reader.problems.append(
            f"layer_types {layer_types!r} are not supported, only lists of {' and '.join(LAYER_TYPES)}"
        )
    rope = _rope_section(reader).config
    if any(name in rope for name in LAYER_TYPES):
        reader.problems.append("a RoPE for each layer type is not supported, only one for all layers")
    for holder in (config, rope):
        if holder.get("partial_rotary_factor") not in (None, 1):
            reader.problems.append(
                f"partial_rotary_factor {holder['partial_rotary_factor']!r} is not supported, only 1"
            )
