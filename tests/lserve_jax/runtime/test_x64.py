"""The steps under ``jax_enable_x64``: no equation of 64 bits, and the results of any other program."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lserve_jax import SamplingParams, attention_recall, init_cache
from lserve_jax.config.errors import InputError
from lserve_jax.runtime.adjustments import Adjustments, History
from lserve_jax.runtime.density import density_step
from lserve_jax.runtime.recall import recall_step
from lserve_jax.runtime.sampling import SamplingState
from lserve_jax.runtime.steps import DecodeState, decode_loop, decode_step, prefill_step, sample_first, score_step
from tests import x64
from tests.lserve_jax.runtime.tiny_steps import Stepper, classes, tiny_config
from tests.pallas_kernels.cases import assert_same_bits

HALF = classes((0, 1), (1, 0), num_retrieval=(1, 1))
STORED = ("float32", "bfloat16", "int8", "int4")
PRESETS = ("dense", "streaming", "quest", "qserve", "minference")
CASES = [("lserve", kind) for kind in STORED] + [(name, "int4") for name in PRESETS]
SLOTS, STEPS = 2, 3


def stepper(preset: str = "lserve", kv_dtype: str = "float32") -> Stepper:
    fields: dict[str, Any] = {"token_budget": 96} if preset == "lserve" else {}
    fields |= {"token_budget": 64} if preset == "quest" else {}
    config = tiny_config(preset, HALF if preset == "lserve" else None, kv_dtype=kv_dtype, **fields)
    return Stepper(config, 12, slots=SLOTS)


def sampling() -> SamplingState:
    drawn = SamplingParams(temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, seed=7, logprobs=True, top_logprobs=3)
    return SamplingState.from_params([drawn, SamplingParams()])


def adjustments() -> Adjustments:
    penalised = SamplingParams(repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.2, min_tokens=2)
    biased = SamplingParams(logit_bias={5: 1.5}, suppress_tokens=[7], stop_token_ids=[9])
    return Adjustments.of([History(penalised, [4, 5, 6], [8]), History(biased, [4], [])], 128)


def calls(one: Stepper) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Every step with NumPy arrays of the documented dtypes: two prompts of 120 and 90 tokens, then their decoding."""
    tokens = np.random.default_rng(0).integers(3, 128, (SLOTS, 120)).astype(np.int32)
    starts, counts = np.zeros(SLOTS, np.int32), np.array([120, 90], np.int32)
    cache, lengths, steps = one.cache(), counts + 1, np.zeros(SLOTS, np.int32)
    limits, stops = np.full(SLOTS, STEPS, np.int32), np.full((SLOTS, 4), -1, np.int32)
    columns: list[Any] = [tokens[:, 0], lengths, steps, limits, stops]
    state = DecodeState(*columns)
    forced = np.full((STEPS, SLOTS), -1, np.int32)
    forced[1, 1] = 9
    logits = np.random.default_rng(1).normal(size=(SLOTS, 128)).astype(np.float32)
    decoding = (one.params, cache, tokens[:, 0], lengths, steps, one.tables)
    config = {"config": one.config}
    return {
        "prefill_step": (
            partial(prefill_step, **config),
            (one.params, cache, tokens, starts, counts, one.tables, counts),
        ),
        "decode_step": (partial(decode_step, **config), decoding),
        "recall_step": (partial(recall_step, **config), decoding),
        "decode_loop": (
            partial(decode_loop, **config, max_steps=STEPS),
            (one.params, cache, state, one.tables, sampling(), np.int32(STEPS), forced, adjustments()),
        ),
        "density_step": (
            partial(density_step, **config),
            (one.params, cache, tokens, starts, counts, one.tables, counts),
        ),
        "sample_first": (sample_first, (logits, lengths, sampling(), forced[0], adjustments())),
        "score_step": (
            partial(score_step, **config),
            (one.params, cache, tokens, starts, counts, one.tables, counts, tokens, np.bool_(True)),
        ),
    }


@pytest.mark.parametrize(("preset", "kv_dtype"), CASES)
def test_no_equation_of_a_step_has_64_bits(preset: str, kv_dtype: str):
    for function, arguments in calls(stepper(preset, kv_dtype)).values():
        assert x64.wide(x64.traced(function, *arguments)) == set()


@pytest.mark.parametrize("kv_dtype", STORED)
def test_an_empty_cache_has_the_same_dtypes(kv_dtype: str):
    config = stepper(kv_dtype=kv_dtype).config
    sizes = {"max_num_seqs": np.int64(2), "retrieval_pages": np.int64(4), "streaming_pages": 4}
    without, within = x64.both(lambda: jax.eval_shape(partial(init_cache, config, **sizes)))
    assert within == without


def _run(one: Stepper, convert: Any) -> list[Any]:
    """What a program gets that calls the steps itself, with its integers and numbers as ``convert`` makes them."""
    found: list[Any] = []
    prepared, cache = calls(one), one.cache()
    for name in ("prefill_step", "decode_step", "recall_step", "decode_loop", "score_step"):
        function, (params, _, *rest) = prepared[name]
        *results, cache = function(params, cache, *jax.tree.map(convert, rest))
        found.append((name, jax.tree.map(np.asarray, results)))
    function, arguments = prepared["sample_first"]
    found.append(("sample_first", jax.tree.map(np.asarray, function(*jax.tree.map(convert, arguments)))))
    return found


def test_integers_of_64_bits_give_the_same_results():
    """``jnp.array([120, 90])`` is int64 there, and so are NumPy's integers."""

    def wide(x: Any) -> Any:
        if x.dtype == bool:
            return x
        kind = {"int32": np.int64, "float32": np.float64, "uint32": np.uint64}[str(x.dtype)]
        return int(x) if x.ndim == 0 else jnp.asarray(x, kind)

    one = stepper(kv_dtype="int4")
    expected = _run(one, lambda x: x)
    with x64.enabled():
        found = _run(one, wide)
    assert [name for name, _ in found] == [name for name, _ in expected]
    for (_, mine), (_, theirs) in zip(found, expected, strict=True):
        assert_same_bits(mine, theirs)


def test_attention_recall_is_the_same():
    rng = np.random.default_rng(0)
    one = stepper()
    kv = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), one.cache()[0].kv)
    q, lengths = rng.normal(size=(SLOTS, 2, 16)).astype(np.float32), np.array([100, 0])
    selected = np.array([[[0, 2, -1]], [[-1, -1, -1]]])
    tables = jax.tree.map(lambda table: table[:SLOTS], one.tables)
    arguments = (q, kv, tables, lengths, selected)  # NumPy's integers have 64 bits
    without, within = x64.both(lambda: np.asarray(attention_recall(*arguments)))
    assert_same_bits(within, without)
    assert np.isnan(without).tolist() == [[False], [True]]


def test_a_size_that_is_an_array_is_refused():
    with x64.enabled(), pytest.raises(InputError, match="max_num_seqs="):
        init_cache(stepper().config, max_num_seqs=jnp.array(2), retrieval_pages=4, streaming_pages=4)  # type: ignore[arg-type]
