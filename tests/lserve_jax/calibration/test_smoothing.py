"""Smoothing factors of a model whose channels' sizes are known."""

import jax
import jax.numpy as jnp
import numpy as np

from lserve_jax.calibration.prompts import Prompt
from lserve_jax.calibration.smoothing import exponents, find_smoothing
from lserve_jax.models.layers import numbers
from lserve_jax.weights.smoothing import SITES, STEPS
from pallas_kernels.core.quantized_matrix import quantize_groups, quantize_rows
from tests.lserve_jax.calibration import planted

CHANNEL = 3


def prompts(count: int = 2) -> list[Prompt]:
    return [planted.prompt(seed, length=100 + 30 * seed) for seed in range(count)]


def test_a_channel_that_the_norm_makes_larger_has_a_larger_factor():
    params = jax.tree.map(jnp.asarray, planted.params())
    plain = find_smoothing(params, planted.CONFIG, prompts(), chunk=64).exponents
    assert plain.keys() == {f"layers_{layer}.{site}" for layer in range(planted.LAYERS) for site in SITES}
    scale = params["layers_1"]["input_norm"]["scale"]
    params["layers_1"]["input_norm"]["scale"] = scale.at[CHANNEL].multiply(1 / 16)
    kernel = params["layers_1"]["attention"]["qkv_proj"]["kernel"]
    params["layers_1"]["attention"]["qkv_proj"]["kernel"] = kernel.at[..., CHANNEL].multiply(16)
    changed = find_smoothing(params, planted.CONFIG, prompts(), chunk=64).exponents
    name = "layers_1.attention.qkv_proj"
    difference = changed[name].astype(int) - plain[name]
    others = np.delete(difference, CHANNEL)
    # sqrt((x / 16) / (w · 16)) is a sixteenth: four octaves, less the mean that all are relative to.
    assert abs(difference[CHANNEL] - np.median(others) + 4 * STEPS) <= 2
    assert np.abs(others - np.median(others)).max() <= 2


def test_quantised_weights_have_the_factors_of_their_numbers():
    packed, plain = (jax.tree.map(jnp.asarray, planted.params()) for _ in range(2))
    for layer in range(planted.LAYERS):
        entry = packed[f"layers_{layer}"]
        qkv, gate_up = entry["attention"]["qkv_proj"]["kernel"], entry["mlp"]["gate_up_proj"]["kernel"]
        entry["attention"]["qkv_proj"]["kernel"] = (quantize_groups(qkv[:, :-1], 32), quantize_rows(qkv[:, -1:]))
        entry["mlp"]["gate_up_proj"]["kernel"] = quantize_groups(gate_up, 32)
        for module, axis in (("attention", 1), ("mlp", 0)):
            for name in entry[module].keys() & {"qkv_proj", "gate_up_proj"}:
                kernel = numbers(entry[module][name]["kernel"], jnp.dtype("float32"), axis)
                plain[f"layers_{layer}"][module][name]["kernel"] = kernel
    mine, theirs = (
        find_smoothing(params, planted.CONFIG, prompts(1), chunk=64).exponents for params in (packed, plain)
    )
    for name in theirs:
        assert np.abs(mine[name].astype(int) - theirs[name]).max() <= 1


def test_prompts_that_were_measured_are_not_measured_again():
    done: dict[str, np.ndarray] = {}
    calls: list[int] = []
    params = planted.params()
    first = find_smoothing(params, planted.CONFIG, prompts(), chunk=64, done=done, on_progress=calls.append)
    assert calls == [1, 2]
    kept = dict(done)
    again = find_smoothing(params, planted.CONFIG, prompts(), chunk=64, done=done)
    assert all(done[name] is value for name, value in kept.items())
    jax.tree.map(np.testing.assert_array_equal, dict(first.exponents), dict(again.exponents))


def test_factors_are_balanced_and_finite():
    found = exponents(np.array([16.0, 1.0, 1.0, 0.0]), np.array([1.0, 16.0, 1.0, 0.0]))
    assert found.dtype == np.int8
    assert found[0] - found[2] == 2 * STEPS
    assert found[1] - found[2] == -2 * STEPS
    assert abs(int(found.astype(int).sum())) <= len(found)
    np.testing.assert_array_equal(exponents(np.zeros(4), np.zeros(4)), 0)
