"""Files that llama.cpp quantised give what llama.cpp computes with their dequantised weights in float32.

tests/golden/make_quantized_gguf.py made the files and the logits.
"""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from lserve_jax.models.llama import Llama
from lserve_jax.weights import open_checkpoint
from tests.lserve_jax.test_parity import forward, load, max_error

FOLDER = Path(__file__).resolve().parent.parent / "golden" / "quantized" / "gguf"
NAMES = tuple(json.loads((FOLDER / "tensors.json").read_text()))

TOLERANCE = 1e-4  # measured: 3e-5


@pytest.mark.parity
@pytest.mark.parametrize("weight_dtype", [None, "auto"])
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_llama_cpp(name: str, weight_dtype: str | None):
    with np.load(FOLDER / f"{name}.npz") as golden:
        tokens, theirs = golden["tokens"], golden["logits"]
    ours, _ = forward(*load(str(FOLDER / f"{name}.gguf"), weight_dtype=weight_dtype), tokens[None])
    assert max_error(ours, theirs) <= TOLERANCE


@pytest.mark.parity
@pytest.mark.usefixtures("embedded_gguf")
def test_packed_weights_of_the_embedded_model_are_as_exact_as_their_numbers():
    """In bfloat16 both differ from float32 by up to 0.8: one rounding that falls otherwise changes all later layers."""
    checkpoint = open_checkpoint("smollm2-135m-instruct")
    tokens = np.random.default_rng(0).integers(100, 40000, (1, 24)).astype(np.int32)

    def logits(dtype: str, weight_dtype: str | None) -> np.ndarray:
        params = checkpoint.load_params(dtype, weight_dtype=weight_dtype)
        return forward(Llama(checkpoint.config, jnp.dtype(dtype)), {"params": params}, tokens)[0]

    exact = logits("float32", None)
    assert max_error(logits("float32", "auto"), exact) <= 1e-3
    numbers, packed = (np.abs(logits("bfloat16", form) - exact) for form in (None, "auto"))
    assert packed.mean() <= 1.1 * numbers.mean()
    assert packed.max() <= 1.3 * numbers.max()
