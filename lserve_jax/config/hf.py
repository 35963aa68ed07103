"""Reads Hugging Face's ``config.json`` into a `ModelConfig`: one table of architectures, all problems in one line."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from lserve_jax.config.errors import InputError, shown
from lserve_jax.config.model import AUTO_DTYPES, ModelConfig, RopeConfig
from lserve_jax.config.reader import Reader
from lserve_jax.config.rope import LAYER_TYPES, read_rope, rope_range


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
# Keys that change what a model computes and that this model code does not have, each with the values that change
# nothing. transformers knows them in other architectures.
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "hidden_activation": ("silu",),
    "attention_multiplier": (),
    "attention_scale": (),
    "query_pre_attn_scalar": (),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "scale_emb": (1,),
    "scale_depth": (),
    "clip_qkv": (),
    "alibi": (False,),
    "parallel_attn": (False,),
    "use_parallel_residual": (False,),
    "is_causal": (True,),
    "use_bidirectional_attention": (False,),
    "is_encoder_decoder": (False,),
    "rope_interleave": (False,),
    "rope_traditional": (False,),
    "no_rope_layers": ([],),
    "no_rope_layer_interval": (),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "n_routed_experts": (0,),
}


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
    reader = Reader(config)
    num_heads = reader.size("num_attention_heads")
    hidden_size = reader.size("hidden_size")
    max_position = reader.size("max_position_embeddings")
    num_layers = reader.size("num_hidden_layers")
    window = _sliding_window(architecture, reader, num_layers)
    # A null means as many KV heads as query heads; transformers has that default for an absent key only in Llama.
    has_kv_default = "num_key_value_heads" in config or not architecture.needs_kv_heads
    rope = read_rope(reader, max_position)
    values: dict[str, Any] = {
        "architecture": model_type,
        "vocab_size": reader.size("vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": reader.size("intermediate_size"),
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": reader.size("num_key_value_heads", num_heads if has_kv_default else None),
        "head_dim": reader.size("head_dim", architecture.head_dim or _even_share(reader, hidden_size, num_heads)),
        "rms_norm_eps": reader.number("rms_norm_eps"),
        "max_context": min(rope_range(rope, max_position), window or math.inf),
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
    _check_layer_types(reader, window)
    reader.raise_problems(source)
    try:
        return ModelConfig(rope=RopeConfig(**rope), **values)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None


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
    raise InputError(f"{source}: architecture {shown(name)} is not supported; known: {known}")


def _even_share(reader: Reader, hidden_size: int, num_heads: int) -> int:
    """Returns the head size that applies if the config gives none."""
    if reader.config.get("head_dim") is None and hidden_size % num_heads:
        reader.problems.append(f"num_attention_heads ({num_heads}) must divide hidden_size ({hidden_size})")
    return max(hidden_size // num_heads, 1)


def _sliding_window(architecture: Architecture, reader: Reader, num_layers: int) -> int | None:
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
        is_windowed = reader.size("max_window_layers", 28, least=0) < num_layers
    return reader.size("sliding_window", DEFAULT_WINDOW) if is_windowed else None


def _has_bias(rule: str, reader: Reader, key: str) -> bool:
    return reader.flag(key, False) if rule == "config" else rule == "always"


def _auto_dtype(reader: Reader) -> str:
    name = reader.text("dtype", reader.text("torch_dtype", "float32")).removeprefix("torch.")
    if name not in AUTO_DTYPES:
        reader.problems.append(f"dtype {shown(name)} is not one of {', '.join(AUTO_DTYPES)}")
    return AUTO_DTYPES.get(name, "float32")


def _eos_token_ids(
    reader: Reader, generation_config: Mapping[str, Any] | None, architecture: Architecture
) -> tuple[int, ...]:
    default = architecture.eos_token_id
    ids = reader.token_ids("eos_token_id", default)
    if generation_config and generation_config.get("eos_token_id") is not None:
        ids = Reader(generation_config, "generation_config.", parent=reader).token_ids("eos_token_id", default)
    return cast(tuple[int, ...], tuple(dict.fromkeys(token for token in ids if token is not None)))


def _refuse_unsupported(reader: Reader) -> None:
    """Records what a checkpoint of a known architecture needs and this model code does not support."""
    config = reader.config
    for key, neutral in NEUTRAL_VALUES.items():
        value = config.get(key)
        if value is not None and value not in neutral:
            only = f", only {' or '.join(map(repr, neutral))}" if neutral else ""
            reader.problems.append(f"{key} {shown(value)} is not supported{only}")
    if config.get("quantization"):  # MLX's; those of Hugging Face are read with the weights
        shape = shown(config["quantization"])
        reader.problems.append(f"quantization ({shape}) is not supported; use an unquantised or a GGUF checkpoint")


def _check_layer_types(reader: Reader, window: int | None) -> None:
    """Records kinds of layers that the model code does not have, and a window that has no size."""
    layer_types = reader.config.get("layer_types") or []
    if not isinstance(layer_types, list) or any(name not in LAYER_TYPES for name in layer_types):
        reader.problems.append(
            f"layer_types {shown(layer_types)} are not supported, only lists of {' and '.join(LAYER_TYPES)}"
        )
    elif "sliding_attention" in layer_types and window is None:
        reader.problems.append(
            "layer_types name sliding_attention, but no sliding window applies (sliding_window, use_sliding_window)"
        )
