import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lserve_jax.config.sampling import SamplingParams
from lserve_jax.runtime.sampling import (
    SamplingState,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    sample,
    temper,
    token_logprobs,
)


@jax.jit
def SAMPLE(logits: jax.Array, positions: jax.Array, state: SamplingState) -> tuple[jax.Array, jax.Array]:  # noqa: N802
    """The sampled tokens and their log-probabilities."""
    tokens = sample(logits, positions, state)
    return tokens, token_logprobs(logits, tokens)


KEEP_TOP_K, KEEP_TOP_P = jax.jit(keep_top_k), jax.jit(keep_top_p)
VOCABULARY = 300
# Every combination of on and off, and the values at which "on" does nothing or everything.
SETTINGS = [
    {"temperature": t, "top_k": k, "top_p": p, "min_p": m}
    for t in (0.3, 1.0, 2.5)
    for k in (0, 1, 7, VOCABULARY, VOCABULARY + 1)
    for p in (1.0, 0.9, 0.4, 1e-6)
    for m in (0.0, 0.1, 1.0)
]


def kept_by_sorting(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Which tokens temperature, top-k, top-p and min-p leave, by the textbook: sort, cut, renormalise, sort, cut."""
    x = logits.astype(np.float64)
    x = (x - x.max()) / params.temperature
    order = np.argsort(-x, kind="stable")
    kept = order[: params.top_k] if 0 < params.top_k < len(x) else order
    weights = np.exp(x[kept])
    before = np.concatenate([[0.0], np.cumsum(weights / weights.sum())[:-1]])
    kept = kept[before < params.top_p] if params.top_p < 1 else kept
    kept = kept[np.exp(x[kept]) >= params.min_p]
    return np.isin(np.arange(len(x)), kept)


def kept_by_bisection(logits: np.ndarray, params: list[SamplingParams]) -> np.ndarray:
    state = SamplingState.from_params(params)
    scaled = temper(jnp.asarray(logits), jnp.asarray(state.temperature))
    k = np.where(state.top_k > 0, state.top_k, logits.shape[-1]).astype(np.int32)
    kept = KEEP_TOP_P(scaled, KEEP_TOP_K(scaled, jnp.asarray(k)), jnp.asarray(state.top_p))
    return np.asarray(kept & keep_min_p(scaled, jnp.asarray(state.min_p)))


def random_logits(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return (3 * rng.standard_normal(shape)).astype(np.float32)


def test_bisection_keeps_what_sorting_keeps(rng: np.random.Generator):
    logits = random_logits(rng, len(SETTINGS), VOCABULARY)
    params = [SamplingParams(**setting) for setting in SETTINGS]
    kept = kept_by_bisection(logits, params)
    wanted = np.array([kept_by_sorting(row, one) for row, one in zip(logits, params, strict=True)])
    assert kept.any(axis=1).all()
    for row, one, got in zip(wanted, params, kept, strict=True):
        assert (row == got).all(), (one, row.sum(), got.sum())


@settings(max_examples=60)
@given(
    logits=st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=8),
    k=st.integers(1, 9),
    p=st.floats(0.001, 1.0),
)
def test_top_k_and_top_p_keep_at_least_one_and_no_more_than_their_ties(logits: list[float], k: int, p: float):
    row = np.zeros(8, np.float32)
    row[: len(logits)] = logits
    scaled = temper(jnp.asarray(row[None]), jnp.ones(1, jnp.float32))
    row = np.asarray(scaled)[0]  # where logits closer than rounding are equal
    by_k = np.asarray(KEEP_TOP_K(scaled, jnp.array([k], jnp.int32)))[0]
    lowest = np.sort(row)[-min(k, 8)]
    assert (by_k == (row >= lowest)).all()
    by_p = np.asarray(KEEP_TOP_P(scaled, jnp.ones((1, 8), bool), jnp.array([p], jnp.float32)))[0]
    weights = np.exp(row.astype(np.float64))
    weights /= weights.sum()
    assert by_p[row.argmax()]
    assert weights[by_p].sum() >= p - 1e-5
    assert weights[by_p & (row > row[by_p].min())].sum() < p + 1e-5  # without the least likely kept it is not enough


def test_tokens_that_tie_at_the_threshold_are_all_kept():
    row = jnp.array([[1.0, 3.0, 2.0, 2.0, 2.0, -0.0, 0.0]], jnp.float32)
    assert keep_top_k(row - 3, jnp.array([2], jnp.int32)).tolist() == [[False, True, True, True, True, False, False]]
    assert keep_top_k(row - 3, jnp.array([6], jnp.int32)).all()


def test_temperature_zero_takes_the_first_of_the_likeliest(rng: np.random.Generator):
    logits = random_logits(rng, 3, 50)
    logits[1, [4, 9]] = 40
    tokens, _ = SAMPLE(logits, np.zeros(3, np.int32), SamplingState.from_params([SamplingParams(), None, None]))
    assert tokens.tolist() == [logits[0].argmax(), 4, logits[2].argmax()]


def test_every_setting_of_one_batch_draws_from_what_it_keeps(rng: np.random.Generator):
    params = [SamplingParams(**setting, seed=i) for i, setting in enumerate(SETTINGS)]
    params[::5] = [SamplingParams()] * len(params[::5])  # greedy requests in between
    logits = random_logits(rng, len(params), VOCABULARY)
    state = SamplingState.from_params(params)
    for position in range(20):
        tokens = np.asarray(SAMPLE(logits, np.full(len(params), position, np.int32), state)[0])
        for row, one, token in zip(logits, params, tokens, strict=True):
            if one.temperature == 0:
                assert token == row.argmax()
            else:
                assert kept_by_sorting(row, one)[token], one


def test_a_request_gets_the_same_token_in_any_slot_of_any_batch(rng: np.random.Generator):
    logits = random_logits(rng, 8, VOCABULARY)
    mixes = [{}, {"top_k": 20}, {"top_p": 0.8}, {"min_p": 0.05}, {"top_k": 30, "top_p": 0.9}]
    params = [SamplingParams(temperature=0.5 + i / 8, seed=100 + i, **mixes[i % 5]) for i in range(8)]
    positions = np.arange(40, 48, dtype=np.int32)
    together = np.asarray(SAMPLE(logits, positions, SamplingState.from_params(params))[0])
    alone = [
        int(SAMPLE(logits[i : i + 1], positions[i : i + 1], SamplingState.from_params([params[i]]))[0][0])
        for i in range(8)
    ]
    assert together.tolist() == alone
    order = rng.permutation(8)
    shuffled = SAMPLE(logits[order], positions[order], SamplingState.from_params([params[i] for i in order]))[0]
    assert np.asarray(shuffled).tolist() == together[order].tolist()
    # Batch-mates that ask for nothing, or only for greedy, change which work is done but no result.
    padded = SamplingState.from_params([params[1], None, None, None])
    assert int(SAMPLE(logits[[1, 0, 0, 0]], positions[[1, 0, 0, 0]], padded)[0][0]) == alone[1]


def test_a_row_keeps_everything_though_its_batch_mate_cuts(rng: np.random.Generator):
    # The tail weighs less than the rounding of the sum, but belongs to a request without top_p all the same.
    row = np.concatenate([np.zeros(1), np.full(999, -30.0)]).astype(np.float32)
    kept = keep_top_p(jnp.asarray([row, row]), jnp.ones((2, 1000), bool), jnp.array([1.0, 0.5], jnp.float32))
    assert kept.sum(axis=1).tolist() == [1000, 1]


def test_seed_and_position_both_change_the_draw():
    logits = np.zeros((64, 1000), np.float32)
    positions = np.arange(64, dtype=np.int32)

    def draw(seed: int) -> list[int]:
        state = SamplingState.from_params([SamplingParams(temperature=1.0, seed=seed)] * 64)
        return np.asarray(SAMPLE(logits, positions, state)[0]).tolist()

    first = draw(0)
    assert draw(0) == first
    assert len(set(first)) > 50
    assert sum(a == b for a, b in zip(first, draw(1), strict=True)) < 5
    assert sum(a == b for a, b in zip(first, draw(2**32 - 1), strict=True)) < 5


def test_requests_without_a_seed_differ():
    logits = np.zeros((64, 1000), np.float32)
    state = SamplingState.from_params([SamplingParams(temperature=1.0)] * 64)
    assert len(set(state.seed.tolist())) == 64
    assert len(set(np.asarray(SAMPLE(logits, np.zeros(64, np.int32), state)[0]).tolist())) > 50


@pytest.mark.parametrize("setting", [{}, {"top_k": 4}, {"top_p": 0.7}, {"min_p": 0.2}, {"top_k": 5, "top_p": 0.85}])
def test_frequencies_are_those_of_the_distribution(setting: dict):
    draws = 4000
    row = np.array([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -3.0], np.float32)
    params = SamplingParams(temperature=0.8, **setting)
    weights = np.where(kept_by_sorting(row, params), np.exp(row.astype(np.float64) / 0.8), 0)
    expected = draws * weights / weights.sum()
    state = SamplingState.from_params([SamplingParams(temperature=0.8, seed=i, **setting) for i in range(draws)])
    tokens = SAMPLE(np.tile(row, (draws, 1)), np.full(draws, 7, np.int32), state)[0]
    counts = np.bincount(np.asarray(tokens), minlength=8)
    assert (counts[expected == 0] == 0).all()
    drawn = expected > 0
    chi_squared = ((counts[drawn] - expected[drawn]) ** 2 / expected[drawn]).sum()
    assert chi_squared < 24.3  # the 99.9th percentile for 7 degrees of freedom, the most there are


def test_log_probabilities_are_those_of_the_raw_logits(rng: np.random.Generator):
    logits = random_logits(rng, 4, VOCABULARY)
    params = [None, SamplingParams(temperature=3.0, seed=1), SamplingParams(temperature=0.1, top_k=2, seed=2), None]
    tokens, logprobs = SAMPLE(logits, np.zeros(4, np.int32), SamplingState.from_params(params))
    x = logits.astype(np.float64)
    expected = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(logprobs, expected[np.arange(4), np.asarray(tokens)], atol=1e-5)
    assert logprobs.dtype == jnp.float32
    assert tokens.dtype == jnp.int32


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=1.0, top_k=3, top_p=0.9, min_p=0.01)])
def test_nan_and_minus_infinity_are_never_chosen(params: SamplingParams):
    row = np.full(40, -np.inf, np.float32)
    row[10:20] = np.nan
    row[[3, 30]] = 1.0
    logits = np.tile(row, (50, 1))
    tokens, logprobs = SAMPLE(logits, np.arange(50, dtype=np.int32), SamplingState.from_params([params] * 50))
    assert set(np.asarray(tokens).tolist()) <= {3, 30}
    assert np.isnan(logprobs).all()  # which shows that something is wrong
    clean = np.where(np.isnan(logits), -np.inf, logits)
    _, logprobs = SAMPLE(clean, np.arange(50, dtype=np.int32), SamplingState.from_params([params] * 50))
    np.testing.assert_allclose(logprobs, -np.log(2), atol=1e-6)


def test_plus_infinity_is_chosen_and_a_row_of_nothing_gives_token_0():
    logits = np.zeros((2, 10), np.float32)
    logits[0, 6] = np.inf
    logits[1] = np.nan
    params = [SamplingParams(temperature=1.0, top_p=0.9, seed=0)] * 2
    tokens, _ = SAMPLE(logits, np.zeros(2, np.int32), SamplingState.from_params(params))
    assert tokens.tolist() == [6, 0]


def test_sampling_compiles_once_for_all_settings(rng: np.random.Generator):
    traces = []

    @jax.jit
    def counted(logits: jax.Array, positions: jax.Array, state: SamplingState) -> jax.Array:
        traces.append(1)
        return sample(logits, positions, state)

    logits = random_logits(rng, 2, 30)
    for params in ([None, None], [SamplingParams(temperature=1.0, top_k=3, seed=1), SamplingParams(top_p=0.5)]):
        counted(logits, np.zeros(2, np.int32), SamplingState.from_params(params))
    assert len(traces) == 1


def test_minus_one_switches_top_k_off(rng: np.random.Generator):
    assert SamplingState.from_params([SamplingParams(top_k=-1), SamplingParams(top_k=2**40)]).top_k.tolist() == [
        0,
        2**31 - 1,
    ]
