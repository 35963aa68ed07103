"""Smoothing factors: they change nothing by themselves, help where channels differ, and belong to one model."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from lserve_jax.config.errors import InputError
from lserve_jax.config.heads import SMOOTHING_FILE
from lserve_jax.models.llama import Llama
from lserve_jax.weights import open_checkpoint
from lserve_jax.weights.forms import Forms
from lserve_jax.weights.load import Checkpoint
from lserve_jax.weights.smoothing import SITES, STEPS, Smoothing, load_smoothing
from tests.lserve_jax.checkpoints import random_tensors, tiny_config, write_folder
from tests.lserve_jax.weights.test_rules import Heads

CONFIG = tiny_config(hidden_size=32, intermediate_size=64, attention_bias=True, mlp_bias=True)
LARGE = 5  # a channel of the hidden states


def checkpoint_of(folder: Path) -> Checkpoint:
    """A model whose norms make one channel a hundred times as large as the others, and whose weights undo that."""
    tensors = random_tensors(CONFIG)
    for layer in range(CONFIG["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = np.ones(32, np.float32)
            tensors[f"{prefix}{norm}.weight"][LARGE] = 100
        for name in ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.gate", "mlp.up"):
            tensors[f"{prefix}{name}_proj.weight"][:, LARGE] /= 100
    return open_checkpoint(str(write_folder(folder, CONFIG, tensors)))


def smoothing_of(checkpoint: Checkpoint, seed: int = 0) -> Smoothing:
    """Random factors."""
    rng, config = np.random.default_rng(seed), checkpoint.config
    sizes = {"attention.qkv_proj": config.hidden_size, "mlp.gate_up_proj": config.hidden_size}
    return Smoothing(
        {
            f"layers_{layer}.{site}": rng.integers(-40, 41, sizes.get(site, config.intermediate_size)).astype(np.int8)
            for layer in range(config.num_layers)
            for site in SITES
        }
    )


def hidden_states(checkpoint: Checkpoint, params: Any) -> np.ndarray:
    """Hidden states of 16 tokens, of which each attends to itself."""
    tokens = jnp.arange(16, dtype=jnp.int32)[None]
    group = checkpoint.config.num_heads // checkpoint.config.num_kv_heads
    nothing = (None,) * checkpoint.config.num_layers
    model: Any = Llama(checkpoint.config, jnp.dtype("float32"))
    found, _ = jax.jit(model.apply, static_argnums=4)(
        {"params": params}, tokens, tokens, nothing, lambda kind, q, k, v, state: (jnp.repeat(v, group, axis=2), state)
    )
    return np.asarray(found)


@pytest.mark.parametrize("heads", [None, Heads((2, 0, 1), (0, 1, 2), (1, 0, 2))])
def test_factors_alone_change_nothing(heads: Heads | None, tmp_path: Path):
    checkpoint = checkpoint_of(tmp_path)
    smoothed = Forms(dtype="float32", smoothing=smoothing_of(checkpoint))
    plain, other = (checkpoint.load(forms, heads) for forms in (Forms(dtype="float32"), smoothed))
    assert not np.allclose(*(tree["layers_0"]["mlp"]["down_proj"]["kernel"] for tree in (plain, other)))
    np.testing.assert_allclose(hidden_states(checkpoint, other), hidden_states(checkpoint, plain), rtol=1e-3, atol=1e-5)


def test_eight_bits_lose_less_with_factors_that_suit(tmp_path: Path):
    checkpoint = checkpoint_of(tmp_path)
    exact = hidden_states(checkpoint, checkpoint.load(Forms(dtype="float32")))
    exponents = {name: np.zeros_like(value) for name, value in smoothing_of(checkpoint).exponents.items()}
    for name, value in exponents.items():
        if not name.endswith("down_proj"):
            value[LARGE] = STEPS * np.log2(100)
    errors = [
        np.abs(
            hidden_states(checkpoint, checkpoint.load(Forms(dtype="float32", weight_dtype="int8", smoothing=found)))
            - exact
        )
        for found in (None, Smoothing(exponents))
    ]
    assert errors[1].mean() < errors[0].mean() / 4


def test_factors_are_those_of_one_model(tmp_path: Path):
    checkpoint = checkpoint_of(tmp_path / "model")
    assert load_smoothing(tmp_path, checkpoint.config) is None
    saved = smoothing_of(checkpoint)
    saved.save(tmp_path)
    loaded = load_smoothing(tmp_path, checkpoint.config)
    assert loaded is not None
    assert loaded.exponents.keys() == saved.exponents.keys()
    jax.tree.map(np.testing.assert_array_equal, dict(loaded.exponents), dict(saved.exponents))

    def refused(tensors: dict[str, np.ndarray]) -> str:
        safetensors.numpy.save_file(tensors, tmp_path / SMOOTHING_FILE)
        with pytest.raises(InputError) as caught:
            load_smoothing(tmp_path, checkpoint.config)
        assert str(tmp_path / SMOOTHING_FILE) in str(caught.value)
        return str(caught.value)

    tensors = dict(saved.exponents)
    name = "layers_1.mlp.down_proj"
    assert f"{name} has shape (63,), this model needs (64,)" in refused(tensors | {name: tensors[name][:-1].copy()})
    assert f"{name} has shape None" in refused({key: value for key, value in tensors.items() if key != name})
    assert "layers_9.mlp.down_proj has shape (64,), this model needs None" in refused(
        tensors | {"layers_9.mlp.down_proj": tensors[name]}
    )
    assert "must be int8" in refused(tensors | {name: tensors[name].astype(np.float32)})
    (tmp_path / SMOOTHING_FILE).write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot be read as safetensors"):
        load_smoothing(tmp_path, checkpoint.config)


def test_only_int8_is_smoothed(tmp_path: Path):
    checkpoint = checkpoint_of(tmp_path)
    smoothing = smoothing_of(checkpoint)
    assert checkpoint.forms("float32", "int8", smoothing).smoothing is smoothing
    for weight_dtype in (None, "auto", "bfloat16", "float32", "int4"):
        assert checkpoint.forms("float32", weight_dtype, smoothing).smoothing is None
