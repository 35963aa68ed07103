"""The models of the bench and their settings, by name."""

import dataclasses
from functools import cache

import numpy as np

from lserve_jax.config.attention import from_preset
from lserve_jax.config.heads import classify
from lserve_jax.config.hf import read_hf
from lserve_jax.config.inference import InferenceConfig
from lserve_jax.config.model import ModelConfig
from lserve_jax.weights.load import open_checkpoint

GPU_MODEL = "llama-3.1-8b"
TINY = "tiny"
TINY_MODEL = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 2**20,
    "rms_norm_eps": 1e-5,
    "vocab_size": 256,
}
TINY_ATTENTION = {"page_size": 16, "sub_page_size": 4, "sink": 16, "local": 32, "prefill_local": 64}
TINY_BUDGET = 96


@cache
def model_config(model: str) -> ModelConfig:
    """Returns the shapes of a model: ``tiny``, or whatever `open_checkpoint` knows."""
    return read_hf(TINY_MODEL, source=TINY) if model == TINY else open_checkpoint(model).config


@cache
def inference_config(model: str, preset: str, implementation: str) -> InferenceConfig:
    """Returns the static settings of ``PRESET[:KV_DTYPE]``; as many heads stream in one layer as in another."""
    name, _, kv_dtype = preset.partition(":")
    shapes, policy = model_config(model), from_preset(name, kv_dtype=kv_dtype or None)
    if model == TINY:
        policy = dataclasses.replace(policy, token_budget=policy.token_budget and TINY_BUDGET, **TINY_ATTENTION)
    gates = np.random.default_rng(0).random((shapes.num_layers, shapes.num_kv_heads))
    return InferenceConfig(
        model=shapes,
        attention=policy,
        heads=classify(gates, policy.static_sparsity, quota="layer"),
        dtype="bfloat16",
        implementation=backend(implementation),
    )


def backend(implementation: str) -> str | None:
    """Returns the ops' name of an implementation."""
    return None if implementation == "auto" else implementation
