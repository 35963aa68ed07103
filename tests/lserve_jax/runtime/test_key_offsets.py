import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lserve_jax import LLM
from tests.lserve_jax.checkpoints import random_tensors, tiny_config, write_folder

SIZES: dict[str, Any] = {"max_model_len": 128, "max_num_seqs": 1, "prefill_chunk": 16, "attention": "dense"}
WIDE = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
SLOW, FAST = 7, 0  # pairs of 16 that turn by 0.0003 and by 1 per token; a bias in the first one hardly changes a model


def write_model(
    folder: Path, bias: float, *, channel: int = FAST, family: str = "qwen2", layers: tuple[int, ...] = (1,)
) -> Path:
    """A model with weights of a usual size, and a key bias in one channel of every head of some layers."""
    config = tiny_config(family, **WIDE, attention_bias=True)
    tensors = random_tensors(config)
    for name in tensors:
        if tensors[name].ndim == 2:
            tensors[name] *= tensors[name].shape[1] ** -0.5 * (2 if "q_proj" in name else 1)
        else:
            tensors[name] = 1 + 0.1 * tensors[name] if "norm" in name else 0.1 * tensors[name]
    for layer in layers:
        tensors[f"model.layers.{layer}.self_attn.k_proj.bias"][channel :: config["head_dim"]] = bias
    return write_folder(folder, config, tensors)


def divergence(folder: Path, kv_dtype: str) -> float:
    """The KL divergence of a prompt's distributions from those over float32 pages, from the second chunk on."""
    prompt = np.random.default_rng(0).integers(3, 40, 96).tolist()
    exact, found = (
        jax.nn.log_softmax(LLM(str(folder), kv_dtype=kind, **SIZES).logits(prompt)[16:])
        for kind in ("float32", kv_dtype)
    )
    return float(jnp.mean(jnp.sum(jnp.exp(exact) * (exact - found), axis=-1)))


def warnings_of(folder: Path, caplog: pytest.LogCaptureFixture, kv_dtype: str) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING, "lserve_jax"):
        LLM(str(folder), kv_dtype=kv_dtype, **SIZES)
    return [record.message for record in caplog.records]


def test_biases_of_channels_that_turn_slowly_cost_pages_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Qwen2's kind: a channel is nearly constant within a sub-page, whatever its size."""
    folder = write_model(tmp_path, 200.0, channel=SLOW)
    assert warnings_of(folder, caplog, "int4") == warnings_of(folder, caplog, "int8") == []
    assert divergence(folder, "int4") <= 0.02
    assert divergence(folder, "int8") <= 0.001


def test_key_biases_that_4_bit_pages_cannot_hold_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    plain, biased = write_model(tmp_path / "plain", 0.0), write_model(tmp_path / "biased", 200.0)
    (warning,) = warnings_of(biased, caplog, "int4")
    assert "biases of up to 200 in the keys of layer 1 leave pages an error" in warning
    assert warning.endswith("--kv-dtype int8")
    assert "\n" not in warning
    assert warnings_of(biased, caplog, "int8") == warnings_of(biased, caplog, "auto") == []
    assert warnings_of(plain, caplog, "int4") == []
    # It is true: with these biases, 4 bits lose what they hold without them, and 8 bits hold it.
    lost = divergence(biased, "int4")
    assert lost > 5 * divergence(plain, "int4")
    assert lost > 5 * divergence(biased, "int8")


@pytest.mark.parametrize(
    ("bias", "kv_dtype", "advice"),
    [
        (2.0, "int4", None),
        (2000.0, "int4", "auto"),
        (200.0, "int8", None),
        (2000.0, "int8", "auto"),
        (2000.0, "float32", None),
    ],
)
def test_the_advice_is_a_type_that_holds_the_keys(
    bias: float, kv_dtype: str, advice: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    found = warnings_of(write_model(tmp_path, bias, layers=(0, 2)), caplog, kv_dtype)
    assert len(found) == (advice is not None)
    for line in found:
        assert f"kv_dtype {kv_dtype} does not suit this model" in line
        assert "in the keys of layers 0, 2 leave" in line
        assert line.endswith(f"--kv-dtype {advice}")


def test_norms_of_keys_are_taken_into_account(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """A norm after the bias makes keys that have a large one equal but for it."""
    assert len(warnings_of(write_model(tmp_path / "biased", 200.0, family="qwen3"), caplog, "int4")) == 1
    assert warnings_of(write_model(tmp_path / "plain", 1.0, family="qwen3"), caplog, "int4") == []
