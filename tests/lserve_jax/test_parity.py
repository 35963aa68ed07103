"""The model gives what `transformers` gives: part by part, in logits and in greedy tokens (see tests/golden).

The golden files are float32, made by tests/golden/make_golden.py. Tolerances are absolute unless said otherwise.
"""

import json
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lserve_jax.config.heads import HeadClasses
from lserve_jax.config.hf import read_hf
from lserve_jax.models.llama import Llama
from lserve_jax.models.rope import rope_frequencies, rope_tables
from lserve_jax.weights import open_checkpoint

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
TINY = sorted(folder.name for folder in (GOLDEN / "tiny").iterdir())
ROPE_CASES: dict[str, dict[str, Any]] = json.loads((GOLDEN / "rope.json").read_text())

# Measured: rope 3e-7 (frequencies, relative), part 8e-6, logits 7e-5 (llama32; the others 1e-5), smollm2 1e-4.
TOLERANCE = {"rope": 1e-6, "part": 1e-4, "logits": 1e-4, "smollm2": 2e-3}


def attend(layer: int, q: jax.Array, k: jax.Array, v: jax.Array, state: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Dense causal attention [B, T, N, H]; the "state" it hands back is what it saw and gave, for the comparison."""
    groups = q.shape[2] // k.shape[2]
    keys, values = jnp.repeat(k, groups, axis=2), jnp.repeat(v, groups, axis=2)
    scores = jnp.einsum("btnh,bsnh->bnts", q, keys) / math.sqrt(q.shape[3])
    is_visible = jnp.tri(q.shape[1], dtype=bool)
    weights = jax.nn.softmax(jnp.where(is_visible, scores, -jnp.inf), axis=-1)
    out = jnp.einsum("bnts,bsnh->btnh", weights, values)
    return out, {"q_rope": q, "k_rope": k, "v_proj": v, "attention": out}


@cache
def load(model: str, heads: HeadClasses | None = None, weight_dtype: str | None = None) -> tuple[Llama, dict[str, Any]]:
    """The float32 model of a checkpoint and its variables."""
    checkpoint = open_checkpoint(model)
    params = checkpoint.load_params(jnp.float32, heads, weight_dtype=weight_dtype)
    return Llama(checkpoint.config, jnp.dtype(jnp.float32)), {"params": params}


def tiny(name: str) -> str:
    return str(GOLDEN / "tiny" / name)


def golden(path: str) -> dict[str, np.ndarray]:
    """The arrays of one golden file."""
    with np.load(GOLDEN / path) as arrays:
        return dict(arrays)


def forward(model: Llama, variables: dict[str, Any], tokens: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits [T, V] for tokens [1, T], and every part under make_golden.py's names."""

    def run(variables: Any, tokens: jax.Array) -> Any:
        positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        empty = (None,) * model.config.num_layers
        (hidden, state), captured = model.apply(
            variables, tokens, positions, empty, attend, capture_intermediates=True, mutable=["intermediates"]
        )
        return model.apply(variables, hidden, method="unembed"), state, captured["intermediates"]

    logits, state, captured = jax.jit(run)(variables, tokens)
    parts = {f"layers_{index}.{name}": value for index, seen in enumerate(state) for name, value in seen.items()}
    parts |= dict(captured_parts(captured)) | {"logits": logits}
    return np.asarray(logits[0]), {name: np.asarray(value[0]) for name, value in parts.items()}


def captured_parts(captured: Any) -> Iterator[tuple[str, jax.Array]]:
    """Yields name and output of the modules that `capture_intermediates` saw."""
    yield "embedding", captured["embed"]["__call__"][0]
    yield "final_norm", captured["final_norm"]["__call__"][0]
    for layer in (name for name in captured if name.startswith("layers_")):
        yield f"{layer}.output", captured[layer]["__call__"][0][0]
        for part in ("input_norm", "post_attention_norm", "mlp"):
            yield f"{layer}.{part}", captured[layer][part]["__call__"][0]
        for part, seen in captured[layer]["attention"].items():
            if part == "qkv_proj":  # [B, T, K, query heads and key and value, H]
                qkv = seen["__call__"][0]
                queries = qkv[..., :-2, :].reshape(*qkv.shape[:2], -1, qkv.shape[-1])
                yield from ((f"{layer}.q_proj", queries), (f"{layer}.k_proj", qkv[..., -2, :]))
            elif part != "__call__":
                yield f"{layer}.{part}", seen["__call__"][0]


def max_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest absolute difference; the shapes must agree and nothing may be NaN."""
    assert ours.shape == theirs.shape
    assert not np.isnan(ours).any()
    return float(np.max(np.abs(ours - theirs)))


@pytest.mark.parametrize("name", ROPE_CASES)
def test_rope_tables_match_transformers(name: str) -> None:
    theirs = {key.removeprefix(f"{name}."): value for key, value in golden("rope.npz").items()}
    config = read_hf(ROPE_CASES[name], source=name)
    frequencies, scaling = rope_frequencies(config.rope, config.head_dim)
    np.testing.assert_allclose(frequencies, theirs["inv_freq"], rtol=TOLERANCE["rope"], atol=0)
    np.testing.assert_allclose(scaling, theirs["attention_scaling"], rtol=TOLERANCE["rope"], atol=0)
    tables = rope_tables(config.rope, config.head_dim, jnp.asarray(theirs["positions"]))
    # One unit in the last place of a frequency turns into position times that at the angle.
    bound = TOLERANCE["rope"] + scaling * theirs["positions"] * float(np.finfo(np.float32).eps)
    for ours, part in zip(tables, ("cos", "sin"), strict=True):
        error = np.abs(np.asarray(ours)[:, 0] - theirs[part]).max(axis=-1)
        assert (error <= bound).all(), f"{part}: {error} at positions {theirs['positions']}"


@pytest.mark.parametrize("name", TINY)
def test_logits_match_transformers(name: str) -> None:
    theirs = golden(f"tiny/{name}/golden.npz")
    ours, _ = forward(*load(tiny(name)), theirs["tokens"])
    assert max_error(ours, theirs["logits"]) <= TOLERANCE["logits"]


@pytest.mark.parametrize("name", ["llama31", "llama_bias", "qwen2", "qwen3"])
def test_reordered_heads_leave_the_logits_as_they_were(name: str) -> None:
    theirs = golden(f"tiny/{name}/golden.npz")
    heads = HeadClasses(order=((1, 0), (0, 1)), num_retrieval=(1, 1))
    model, variables = load(tiny(name), heads)
    kernels = [
        held["params"]["layers_0"]["attention"]["qkv_proj"]["kernel"] for held in (variables, load(tiny(name))[1])
    ]
    assert np.array_equal(kernels[0], kernels[1][::-1])
    ours, _ = forward(model, variables, theirs["tokens"])
    assert max_error(ours, theirs["logits"]) <= TOLERANCE["logits"]


@pytest.mark.parametrize("name", ["llama3", "qwen3"])
def test_each_part_of_each_layer_matches_transformers(name: str) -> None:
    theirs = golden(f"tiny/{name}/parts.npz")
    _, ours = forward(*load(tiny(name)), theirs.pop("tokens"))
    assert ours.keys() >= theirs.keys()
    errors = {part: max_error(ours[part], value) for part, value in theirs.items()}
    assert {part: error for part, error in errors.items() if error > TOLERANCE["part"]} == {}


@pytest.mark.slow
@pytest.mark.parity
def test_smollm2_logits_match_transformers(embedded_gguf: Path) -> None:
    theirs = golden("smollm2/golden.npz")
    tokens = 256  # the engine's test takes all 1,024
    ours, _ = forward(*load(str(embedded_gguf)), theirs["tokens"][None, :tokens])
    assert max_error(ours[:, theirs["vocabulary_ids"]], theirs["logits"][:tokens]) <= TOLERANCE["smollm2"]
    assert max_error(ours.max(axis=-1), theirs["max"][:tokens]) <= TOLERANCE["smollm2"]
    assert max_error(ours[:1], theirs["full_logits"][:1]) <= TOLERANCE["smollm2"]
