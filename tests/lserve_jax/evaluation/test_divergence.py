"""KL divergences of distributions of which the likeliest tokens are kept, against those of whole distributions."""

import numpy as np
import pytest

from lserve_jax.evaluation.divergence import LIKELIEST, Distributions


def direct(p_logits: np.ndarray, q_logits: np.ndarray) -> np.ndarray:
    """The KL divergence of each row, over all tokens."""
    p, q = (
        np.exp(x.astype(np.float64)) / np.exp(x.astype(np.float64)).sum(-1, keepdims=True) for x in (p_logits, q_logits)
    )
    return np.sum(p * np.log(p / q), axis=-1)


def pair(rng: np.random.Generator, vocabulary: int, spread: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    """Logits [6, V] of two models that resemble each other."""
    logits = spread * rng.normal(size=(6, vocabulary))
    return logits.astype(np.float32), (logits + 0.3 * rng.normal(size=logits.shape)).astype(np.float32)


@pytest.mark.parametrize("vocabulary", [2, 100, LIKELIEST])
def test_a_small_vocabulary_is_compared_exactly(vocabulary: int, rng: np.random.Generator):
    reference, other = pair(rng, vocabulary)
    kept = Distributions.of(reference)
    assert kept.tokens.shape == (6, vocabulary)
    assert (kept.rest == -np.inf).all()
    np.testing.assert_allclose(kept.divergences(other), direct(reference, other), atol=1e-6)


def test_of_a_large_one_the_divergence_is_a_lower_bound_exact_to_what_the_rest_hides(rng: np.random.Generator):
    reference, other = pair(rng, 4 * LIKELIEST, spread=1.0)
    whole = direct(reference, other)
    kept = Distributions.of(reference)
    found = kept.divergences(other)
    rest = np.ones(reference.shape, bool)
    np.put_along_axis(rest, kept.tokens, False, axis=-1)
    hidden = [direct(p[mine], q[mine]) for p, q, mine in zip(reference, other, rest, strict=True)]
    assert (np.exp(kept.rest) > 0.2).all()
    assert (found < whole - 1e-3).all()
    np.testing.assert_allclose(found + np.exp(kept.rest) * hidden, whole, atol=1e-6)
    more = Distributions.of(reference, count=2 * LIKELIEST).divergences(other)
    assert ((found < more) & (more < whole)).all()


def test_a_model_does_not_diverge_from_itself(rng: np.random.Generator):
    logits, _ = pair(rng, 2 * LIKELIEST)
    found = Distributions.of(logits).divergences(logits + np.float32(2.5))  # the same distributions
    assert ((found >= 0) & (found < 2e-6)).all()


def test_the_likeliest_come_first_and_of_equals_the_lowest(rng: np.random.Generator):
    logits = np.round(rng.normal(size=(4, 2000))).astype(np.float32)  # many equals
    kept = Distributions.of(logits)
    np.testing.assert_array_equal(kept.tokens[:, 0], logits.argmax(-1))  # as greedy decoding chooses
    values = np.take_along_axis(logits, kept.tokens, axis=-1)
    np.testing.assert_array_equal(values, -np.sort(-logits, axis=-1)[:, :LIKELIEST])
    assert all(len(set(row)) == LIKELIEST for row in kept.tokens.tolist())
    assert [x.dtype for x in kept] == [np.int32, np.float32, np.float32]


def test_tokens_that_cannot_come_add_nothing(rng: np.random.Generator):
    reference, other = pair(rng, 50)
    reference[:, 7] = other[:, 7] = reference[:, 8] = -np.inf
    possible = [token for token in range(50) if token not in (7, 8)]
    q = other.astype(np.float64)
    lost = np.log(1 - np.exp(q[:, 8]) / np.exp(q).sum(-1))  # what q gives to a token that p never has
    expected = direct(reference[:, possible], other[:, possible]) - lost
    np.testing.assert_allclose(Distributions.of(reference).divergences(other), expected, atol=1e-6)
