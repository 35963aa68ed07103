"""What a prompt leaves out of its history: settings of a whole model, and what follows from them."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from numpy.typing import NDArray

from lserve_jax import InputError, from_preset
from lserve_jax.config.inference import InferenceConfig
from lserve_jax.engine.memory import page_bytes
from lserve_jax.runtime.density import density_step
from lserve_jax.runtime.steps import prefill_step
from tests.lserve_jax.runtime.tiny_steps import Stepper, classes, tiny_config

HEADS = classes((1, 0), (0, 1), num_retrieval=(1, 2))
PROMPT = np.random.default_rng(0).integers(3, 128, 700).astype(np.int32)
CHUNK = 256
FEW: dict[str, Any] = {
    "prefill_sparsity": "blocks",
    "prefill_block": 32,
    "prefill_from": 0,
    "prefill_near": 30,
    "prefill_last": 0,
    "prefill_first_layer": 0,
    "token_budget": "all",
}


def stepper(**fields: Any) -> Stepper:
    return Stepper(tiny_config("lserve", HEADS, **{**FEW, **fields}), max_pages=48)


def logits(**fields: Any) -> NDArray[np.float32]:
    one = stepper(**fields)
    return one.prefill(one.cache(), PROMPT, CHUNK)[0]


@pytest.mark.parametrize("dtype", ["float32", "int8", "int4"])
def test_a_threshold_near_zero_is_dense_attention(dtype: str):
    np.testing.assert_allclose(
        logits(prefill_threshold=1e-30, kv_dtype=dtype),
        logits(prefill_sparsity="none", kv_dtype=dtype),
        rtol=0,
        atol=2e-4,
    )


def test_blocks_and_triangle_leave_something_out_behind_their_position_alone():
    whole = logits(prefill_sparsity="none")
    for fields in ({}, {"is_prefill_corrected": False}, {"prefill_sparsity": "triangle"}):
        found = logits(prefill_from=384, prefill_threshold=0.9, **fields)
        np.testing.assert_allclose(found[:384], whole[:384], rtol=0, atol=2e-4)
        assert (np.abs(found[400:] - whole[400:]).max(axis=-1) > 1e-3).mean() > 0.9


def test_means_bring_the_logits_nearer_to_those_of_dense_attention():
    whole = logits(prefill_sparsity="none")
    corrected, not_corrected, in_one_layer = (
        np.abs(logits(prefill_threshold=0.9, **fields) - whole)[CHUNK:].mean()
        for fields in ({}, {"is_prefill_corrected": False}, {"uncorrected_layers": (1,)})
    )
    assert corrected < in_one_layer < not_corrected


def density(one: Stepper, prompt: NDArray[np.int32], start: int, end: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """The pairs that a prompt's tokens from ``start`` on read, and all pairs, of each layer."""
    cache = one.cache()
    tables = type(one.tables)(*(table[:1] for table in one.tables if table is not None))
    rows = jnp.asarray(prompt)[None]
    _, cache = prefill_step(
        one.params,
        cache,
        rows[:, :start],
        jnp.zeros(1, jnp.int32),
        jnp.full(1, start, jnp.int32),
        tables,
        jnp.full(1, end, jnp.int32),
        config=one.config,
    )
    span = (np.array([start], np.int32), np.array([len(prompt) - start], np.int32))
    found, _ = density_step(
        *(one.params, cache, rows[:, start:], *span, tables, np.array([end], np.int32)), config=one.config
    )
    return np.asarray(found.read)[:, 0], np.asarray(found.all)[:, 0]


def test_density_counts_tiles_and_blocks():
    """Without scores: sink of 20 tokens and 30 tokens before each tile, in blocks of 32."""
    one = stepper(prefill_sparsity="triangle")
    read, every = density(one, PROMPT[:512], 256, 10_000)
    # Two tiles, after 8 blocks: the first block, and for the first tile the last one.
    assert read.tolist() == [3, 2 * 3] and every.tolist() == [2 * 8, 2 * 2 * 8]
    read, every = density(stepper(prefill_sparsity="triangle", prefill_last=None), PROMPT[:512], 256, 512)
    # The last 128 tokens are the second tile, which reads all.
    assert read.tolist() == [2 + 8, 2 * (2 + 8)] and every.tolist() == [16, 32]
    read, every = density(stepper(prefill_first_layer=1), PROMPT[:512], 256, 10_000)
    assert read[0] == every[0] == 0 and 0 < read[1] <= every[1] == 32


def config(**fields: Any) -> InferenceConfig:
    return tiny_config("lserve", HEADS, **{**FEW, **fields})


def test_pages_have_means_where_they_are_needed():
    def has_means(**fields: Any) -> list[bool]:
        kinds = config(**fields).kinds
        assert not any(kind.streaming is not None and kind.streaming.has_means for kind in kinds)
        return [kind.retrieval is not None and kind.retrieval.has_means for kind in kinds]

    assert has_means() == has_means(is_prefill_corrected=False) == [True, True]
    assert has_means(prefill_first_layer=1) == has_means(dense_layers=(0,)) == [False, True]
    assert has_means(prefill_sparsity="none") == has_means(prefill_sparsity="triangle") == [False, False]
    plain, _ = page_bytes(config(prefill_sparsity="none"))
    means, _ = page_bytes(config())
    assert means - plain == 3 * 2 * 16 * 4  # heads, keys and values, channels, bytes


def test_layers_that_read_everything():
    def sparse(**fields: Any) -> list[bool]:
        return [kind.prefill.blocks is not None for kind in config(**fields).kinds]

    assert sparse() == [True, True]
    assert sparse(prefill_first_layer=None) == [False, False]  # 2 of 2
    assert sparse(prefill_first_layer=None, prefill_sparsity="triangle") == [False, True]
    assert sparse(dense_layers=(1,)) == [True, False]
    rules = [kind.prefill.blocks for kind in config(uncorrected_layers=(1,)).kinds]
    assert [rule is not None and rule.has_means for rule in rules] == [True, False]


def test_contexts_that_never_come_so_far_take_the_programs_without_it():
    policy = from_preset("lserve", prefill_sparsity="blocks", prefill_from=1000)
    assert policy.capped(1000).prefill_sparsity == "none" and policy.capped(1001) == policy


def test_defaults_and_the_rival():
    assert from_preset("lserve", prefill_sparsity="blocks").num_last == 1024
    assert from_preset("lserve", prefill_sparsity="triangle").num_last == 128
    rival = from_preset("minference")
    assert (rival.prefill_sparsity, rival.prefill_from, rival.is_prefill_corrected) == ("blocks", 0, False)
    assert from_preset(rival.preset, **rival.options()) == rival


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prefill_sparsity": "some"}, "prefill_sparsity='some' must be one of none, triangle, blocks"),
        ({"prefill_threshold": 0.0}, "prefill_threshold=0.0 must be a number above 0"),
        ({"prefill_threshold": float("nan")}, "prefill_threshold=nan must be a number above 0"),
        ({"prefill_block": 40}, "prefill_block=40 must be a multiple of page_size=16"),
        ({"prefill_last": -1}, "prefill_last=-1 must be a whole number from 0"),
        ({"is_prefill_corrected": 1}, "is_prefill_corrected=1 must be true or false"),
        ({"prefill_first_layer": 2}, r"prefill_first_layer=\[2\] do not exist"),
        ({"uncorrected_layers": (2,)}, r"uncorrected_layers=\[2\] do not exist"),
    ],
)
def test_bad_settings_are_refused(fields: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        config(**fields)
