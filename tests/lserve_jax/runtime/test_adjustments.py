"""Biases, penalties and removed tokens: against `transformers`' processors, and by their definitions."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lserve_jax.config.sampling import SamplingParams
from lserve_jax.runtime.adjustments import Adjustments, History, adjust
from lserve_jax.runtime.sampling import SamplingState, keep_min_p, keep_top_k, keep_top_p, sample, temper

GOLDEN = Path(__file__).parents[2] / "golden"
VOCABULARY = 61
ADJUST, SAMPLE = jax.jit(adjust), jax.jit(sample)
NONE = np.zeros((0, 1), np.int32)
WARPERS = ("temperature", "top_k", "top_p", "min_p")


@cache
def golden() -> list[tuple[str, History, dict[str, np.ndarray]]]:
    """Name, request and transformers' arrays of every case."""
    cases = json.loads((GOLDEN / "sampling.json").read_text(encoding="utf-8"))
    with np.load(GOLDEN / "sampling.npz") as arrays:
        held = {name: arrays[name] for name in arrays}
    found = []
    for at, case in enumerate(cases):
        values = case["params"]
        if "logit_bias" in values:
            values["logit_bias"] = {int(token): bias for token, bias in values["logit_bias"].items()}
        history = History(SamplingParams(**values), case["prompt"], case["generated"])
        found.append((case["name"], history, {name: array[at] for name, array in held.items()}))
    return found


def adjusted(rows: list[History | None], logits: np.ndarray, new: np.ndarray | None = None) -> np.ndarray:
    positions = np.array([0 if row is None else len(row.prompt) + len(row.generated) for row in rows], np.int32)
    none = np.zeros((0, len(rows)), np.int32)
    return np.asarray(ADJUST(logits, positions, Adjustments.of(rows, logits.shape[-1]), none if new is None else new))


def test_the_golden_cases_cover_every_setting():
    off = SamplingParams()
    names = {
        *("repetition_penalty", "logit_bias", "suppress_tokens", "begin_suppress_tokens", "bad_words", "min_tokens"),
        *WARPERS,
    }
    for name in names:
        assert sum(getattr(row.params, name) != getattr(off, name) for _, row, _ in golden()) >= 3, name


def test_adjusted_logits_equal_those_of_transformers_processors():
    for name, row, held in golden():
        found = adjusted([row], held["logits"][None])[0]
        assert (np.isneginf(found) == np.isneginf(held["processed"])).all(), name
        finite = np.isfinite(found)
        np.testing.assert_allclose(found[finite], held["processed"][finite], rtol=1e-6, atol=1e-6, err_msg=name)


def test_the_token_is_that_of_transformers_and_draws_keep_what_its_warpers_keep():
    for name, row, held in golden():
        logits = adjusted([row], held["logits"][None])
        params, state = row.params, SamplingState.from_params([row.params])
        if params.temperature == 0:
            assert SAMPLE(logits, np.zeros(1, np.int32), state).tolist() == [held["greedy"]], name
            continue
        scaled = temper(jnp.asarray(logits), state.temperature)
        k = jnp.where(state.top_k > 0, state.top_k, VOCABULARY)
        kept = keep_top_p(scaled, keep_top_k(scaled, k), state.top_p) & keep_min_p(scaled, state.min_p)
        kept = np.asarray(kept)[0] & np.isfinite(logits[0])
        assert (kept == np.isfinite(held["final"])).all(), name


def test_a_request_gets_the_same_logits_in_any_slot_of_any_batch_and_others_keep_theirs_bit_for_bit():
    rows = [row for _, row, _ in golden()]
    logits = np.stack([held["logits"] for _, _, held in golden()])
    logits[:, 0] = -0.0
    alone = [adjusted([row], one[None])[0] for row, one in zip(rows, logits, strict=True)]
    mixed: list[History | None] = [row if at % 3 else None for at, row in enumerate(rows)]
    together = adjusted(mixed, logits)
    for at, row in enumerate(mixed):
        wanted = logits[at] if row is None else alone[at]
        assert together[at].tobytes() == wanted.tobytes()


def test_tokens_of_this_call_count_like_those_before_it(rng: np.random.Generator):
    logits = rng.standard_normal((2, VOCABULARY)).astype(np.float32)
    params = SamplingParams(repetition_penalty=1.4, presence_penalty=0.5, frequency_penalty=-0.25)
    whole = [History(params, [3, 4], [5, 5, 9, 7]), History(params, [3], [8, 1])]
    cut: list[History | None] = [History(params, [3, 4], [5]), History(params, [3], [8, 1])]
    new = np.array([[5, -1], [9, -1], [7, -1], [-1, -1]], np.int32)
    positions = np.zeros(2, np.int32)
    found = ADJUST(logits, positions, Adjustments.of(cut, VOCABULARY), new)
    wanted = ADJUST(logits, positions, Adjustments.of(whole, VOCABULARY), np.full_like(new, -1))
    assert np.asarray(found).tobytes() == np.asarray(wanted).tobytes()


def test_presence_counts_a_generated_token_once_and_frequency_every_time_and_both_leave_the_prompt_alone():
    logits = np.zeros((1, 10), np.float32)
    found = adjusted([History(SamplingParams(presence_penalty=1.5), [1, 1], [2, 2, 3])], logits)[0]
    assert found.tolist() == [0, 0, -1.5, -1.5, 0, 0, 0, 0, 0, 0]
    found = adjusted([History(SamplingParams(frequency_penalty=0.5), [1, 1], [2, 2, 3])], logits)[0]
    assert found.tolist() == [0, 0, -1.0, -0.5, 0, 0, 0, 0, 0, 0]
    found = adjusted([History(SamplingParams(frequency_penalty=-2, presence_penalty=2), [1], [2, 2])], logits)[0]
    assert found.tolist() == [0, 0, 2.0, 0, 0, 0, 0, 0, 0, 0]


def test_ends_come_from_the_first_position_after_min_tokens_on():
    row = History(SamplingParams(min_tokens=3, stop_token_ids=[4, 7]), [1, 2], [])
    logits = np.zeros((1, 9), np.float32)
    for position in range(2, 8):
        found = ADJUST(logits, np.array([position], np.int32), Adjustments.of([row], 9), NONE)
        removed = np.flatnonzero(np.isneginf(np.asarray(found)[0])).tolist()
        assert removed == ([4, 7] if position < 5 else [])


def test_a_bad_word_may_begin_in_the_prompt_and_an_end_token_alone_is_none():
    logits = np.zeros((1, 9), np.float32)

    def removed(prompt: list[int], generated: list[int], **settings: Any) -> list[int]:
        found = adjusted([History(SamplingParams(**settings), prompt, generated)], logits)[0]
        return np.flatnonzero(np.isneginf(found)).tolist()

    words = {"bad_words": [[5, 6, 7], [6, 8], [3]]}
    assert removed([5], [6], **words) == [3, 7, 8]
    assert removed([5, 6], [], **words) == [3, 7, 8]
    assert removed([6], [5], **words) == [3]
    assert removed([1], [], **words) == [3]
    assert removed([1], [2], bad_words=[[3], [4]], stop_token_ids=[3]) == [4]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_stay_so(value: float):
    logits = np.zeros((1, 5), np.float32)
    logits[0, 2] = value
    found = adjusted([History(SamplingParams(repetition_penalty=2.0), [2], [])], logits)[0]
    assert not np.isfinite(found[2])
