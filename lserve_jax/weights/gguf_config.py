"""GGUF metadata as a Hugging Face configuration: every key is honoured, harmless, refused or warned of."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from lserve_jax.config.errors import InputError, shown
from lserve_jax.config.model import LARGEST_INT, RopeConfig
from lserve_jax.models.rope import rope_frequencies
from lserve_jax.weights.gguf_header import Header

# Architectures by llama.cpp's name; Mistral's models are stored as "llama". `read_hf` refuses others.
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

# Hugging Face's configuration keys by the metadata key below "<architecture>."; the second table may be absent.
REQUIRED_KEYS = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "context_length": "max_position_embeddings",
}
OPTIONAL_KEYS = {
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
}
INTEGER_KEYS = REQUIRED_KEYS.keys() - {"attention.layer_norm_rms_epsilon"} | {
    "attention.head_count_kv",
    "attention.key_length",
}
ROPE_SCALING_KEYS = {
    "rope.scale_linear": "factor",  # an older name of the next
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
}
ROPE_TYPE = "rope.scaling.type"
WINDOW = "attention.sliding_window"
# Further keys that `hf_config` reads or checks.
OTHER_KEYS = (
    *("vocab_size", "attention.head_count_kv", "attention.value_length", "attention.scale"),
    *("rope.dimension_count", ROPE_TYPE, WINDOW),
)
# Metadata that changes what the model computes, with the values for which it equals Hugging Face's model. llama.cpp
# takes a 0 for a number that is not set.
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.output_scale": (0, 1),
    "attention.value_scale": (0, 1),
    "attention.shared_kv_layers": (0,),
    "attention.temperature_length": (0,),
    "attention.temperature_scale": (0,),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "embedding_scale": (0, 1),
    "residual_scale": (0, 1),
    "hidden_activation": ("silu",),
    "use_parallel_residual": (False,),
    "swin_norm": (False,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "expert_shared_count": (0,),
    "nextn_predict_layers": (0,),
    "n_deepstack_layers": (0,),
    "rope.dimension_sections": (0,),
    "rope.scaling.alpha": (0,),
    "rope.scaling.attn_factor": (1,),
    "rope.scaling.yarn_attn_factor": (1,),
    "rope.scaling.yarn_ext_factor": (1, -1),
    "rope.scaling.yarn_log_multiplier": (0,),
}
# Metadata that does not change what the model computes. The window's pattern says which layers have it; where all
# attention ends at the window, it says nothing.
HARMLESS_KEYS = (
    *("pooling_type", "tensor_data_layout", "rope.scaling.finetuned"),
    *("attention.sliding_window_pattern", "attention.layer_norm_epsilon"),
)
KNOWN_KEYS = {
    *(*REQUIRED_KEYS, *OPTIONAL_KEYS, *ROPE_SCALING_KEYS, *OTHER_KEYS, *NEUTRAL_VALUES, *HARMLESS_KEYS),
}
# Metadata that names a token at which generation ends: end of text, of turn, of message.
END_TOKENS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")

# The converter stores Llama 3.1's frequency scaling as one factor per frequency; published models use these parameters.
ROPE_FACTORS = "rope_freqs.weight"
LLAMA3_ROPES = tuple(
    {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    for factor in (8.0, 32.0)
)


def hf_config(header: Header, rope_factors: np.ndarray | None) -> dict[str, Any]:
    """Returns the metadata as a ``config.json``.

    Args:
      header: the file's header.
      rope_factors: the values of the tensor `ROPE_FACTORS`, if the file has it.

    Raises:
      InputError: if metadata is missing, or needs what Hugging Face's model of that name does not support.
    """
    metadata, tensors = header
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        return {"architectures": [str(architecture)]}  # `read_hf` refuses it and lists the known ones
    own = _checked(architecture, _below(architecture, metadata))
    tokens = metadata.get("tokenizer.ggml.tokens")
    is_float32 = all(stored.kind == "F32" for stored in tensors.values())
    return {
        "architectures": [ARCHITECTURES[architecture]],
        "model_type": architecture,
        **{name: own[key] for key, name in (REQUIRED_KEYS | OPTIONAL_KEYS).items() if key in own},
        "num_key_value_heads": own.get("attention.head_count_kv", own["attention.head_count"]),
        "vocab_size": own.get("vocab_size", len(tokens) if isinstance(tokens, list) else None),
        "rope_scaling": _rope_scaling(own, rope_factors),
        **_window(architecture, own),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": _has_any(header, r"attn_(q|k|v|output)\.bias"),
        "mlp_bias": _has_any(header, r"ffn_(gate|up|down)\.bias"),
        "torch_dtype": "float32" if is_float32 else "bfloat16",
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": list(dict.fromkeys(metadata[key] for key in END_TOKENS if key in metadata)) or None,
    }


def unknown_keys(metadata: Mapping[str, Any]) -> list[str]:
    """Returns the keys of the architecture of which it is not known whether they change what the model computes."""
    architecture = str(metadata.get("general.architecture"))
    return sorted(f"{architecture}.{key}" for key in _below(architecture, metadata) if key not in KNOWN_KEYS)


def _below(architecture: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the metadata below the architecture's name; a list of equal values per layer becomes one value."""
    prefix = f"{architecture}."
    own = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    for key, value in own.items():
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            own[key] = value[0]
    return own


def _checked(architecture: str, own: dict[str, Any]) -> dict[str, Any]:
    """Returns ``own``; raises one `InputError` for all that is missing, mistyped or not supported."""
    prefix = f"{architecture}."
    problems = []
    missing = [prefix + key for key in REQUIRED_KEYS if key not in own]
    if missing:
        problems.append(f"missing required metadata: {', '.join(missing)}")
    for key in INTEGER_KEYS & own.keys():
        if isinstance(own[key], list):
            problems.append(f"{prefix}{key} differs between layers, which is not supported")
        elif not isinstance(own[key], int) or own[key] < 1:
            problems.append(f"{prefix}{key} must be a positive integer, got {shown(own[key])}")
    problems += [
        f"{prefix}{key} = {shown(own[key])} is not supported"
        for key, neutral in NEUTRAL_VALUES.items()
        if key in own and own[key] not in neutral
    ]
    if not problems:
        problems += _head_size_problems(prefix, own)
    if problems:
        raise InputError("; ".join(problems))
    return own


def _head_size_problems(prefix: str, own: Mapping[str, Any]) -> list[str]:
    head_dim = own.get("attention.key_length") or own["embedding_length"] // own["attention.head_count"]
    problems = [
        f"{prefix}{key} must equal the head size {head_dim}, got {shown(own[key])}"
        for key in ("attention.value_length", "rope.dimension_count")
        if own.get(key, head_dim) != head_dim
    ]
    scale = own.get("attention.scale", 0)
    if scale and not np.isclose(scale, head_dim**-0.5, rtol=1e-4):
        problems.append(f"{prefix}attention.scale = {shown(scale)} is not supported, only head size**-0.5")
    return problems


def _window(architecture: str, own: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keys that bound attention by a window, empty without one."""
    window = own.get(WINDOW, 0)
    if not isinstance(window, int) or not 0 <= window <= LARGEST_INT:
        raise InputError(f"{architecture}.{WINDOW} must be an integer from 0, got {shown(window)}")
    if not window:
        return {}
    if architecture == "llama":  # Hugging Face's Llama has no window; with one, the model is Mistral's
        return {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": window}
    return {"sliding_window": window, "use_sliding_window": True, "max_window_layers": 0}


def _has_any(header: Header, pattern: str) -> bool:
    return any(re.fullmatch(rf"blk\.\d+\.{pattern}", name) for name in header.tensors)


def _rope_scaling(own: Mapping[str, Any], factors: np.ndarray | None) -> dict[str, Any] | None:
    """Returns the ``rope_scaling`` section: linear or yarn from the metadata, llama3 from the tensor of factors."""
    scaling = {name: own[key] for key, name in ROPE_SCALING_KEYS.items() if own.get(key, 0) != 0}
    # As in llama.cpp, a factor without a type is a linear one, and the type "none" scales nothing.
    kind = own.get(ROPE_TYPE, "linear" if scaling.get("factor", 1) != 1 else "none")
    is_scaled = kind != "none" and (kind, scaling.get("factor", 1)) != ("linear", 1)
    if factors is None or np.all(factors == 1.0):
        return {"rope_type": kind, **scaling} if is_scaled else None
    theta = own.get("rope.freq_base", RopeConfig().theta)
    for candidate in LLAMA3_ROPES:
        if not is_scaled and _matches(factors, candidate, theta):
            return dict(candidate)
    wanted = " or ".join(f"{rope['factor']:g}/1/4/8192" for rope in LLAMA3_ROPES)
    raise InputError(
        f"the factors in {ROPE_FACTORS} are not those of a known Llama 3 RoPE ({wanted}: factor, low_freq_factor, "
        "high_freq_factor, original_max_position_embeddings)"
    )


def _matches(factors: np.ndarray, candidate: Mapping[str, Any], theta: float) -> bool:
    """Returns whether ``candidate`` divides the plain frequencies by these factors."""
    head_dim = 2 * factors.size
    rope = RopeConfig(
        kind="llama3",
        theta=theta,
        factor=candidate["factor"],
        low_freq_factor=candidate["low_freq_factor"],
        high_freq_factor=candidate["high_freq_factor"],
        original_max_position=candidate["original_max_position_embeddings"],
    )
    plain, _ = rope_frequencies(RopeConfig(theta=theta), head_dim)
    scaled, _ = rope_frequencies(rope, head_dim)
    return bool(np.allclose(plain / scaled, factors, rtol=1e-3))
