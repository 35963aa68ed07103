"""Intervals against published numbers, and by how often they hold the truth."""

import itertools
import math

import numpy as np
import pytest

from lserve_jax.evaluation.statistics import agreement, average, difference, proportion


def pairs(both: int, first: int, second: int, neither: int) -> tuple[list[float], list[float]]:
    """Scores of two variants: so many pairs where both, only one, or none is right."""
    counts = {(1.0, 1.0): both, (1.0, 0.0): first, (0.0, 1.0): second, (0.0, 0.0): neither}
    rows = [pair for pair, count in counts.items() for _ in range(count)]
    return [row[0] for row in rows], [row[1] for row in rows]


def test_wilsons_interval_is_the_published_one():
    # Newcombe (1998), table I, method 3.
    for hits, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        found = proportion([1.0] * hits + [0.0] * (n - hits))
        assert (found.low, found.high) == pytest.approx((low, high), abs=1e-4)


def test_paired_hits_have_tangos_interval():
    # Complete response before and after consolidation therapy (Cavo 2012), in Fagerland, Lydersen & Laake, chapter 8.
    found = difference(*pairs(59, 6, 16, 80), is_score=True)
    assert (found.mean, found.low, found.high) == pytest.approx((-0.0621, -0.1240, -0.0054), abs=1e-4)
    mirrored = difference(*pairs(59, 16, 6, 80), is_score=True)
    assert (mirrored.mean, mirrored.low, mirrored.high) == pytest.approx((0.0621, 0.0054, 0.1240), abs=1e-4)


@pytest.mark.parametrize("n", [1, 20, 100])
@pytest.mark.parametrize("score", [1.0, 0.5])
def test_pairs_that_never_differ_still_leave_doubt(n: int, score: float):
    found = difference([score] * n, [score] * n, is_score=True)
    widest = 1.959964**2 / (n + 1.959964**2)
    assert (found.mean, found.low, found.high) == pytest.approx((0, -widest, widest), abs=1e-6)


@pytest.mark.parametrize(("value", "reference"), [(1.0, 0.0), (0.0, 1.0)])
def test_pairs_that_all_differ_have_an_interval_up_to_the_end(value: float, reference: float):
    found = difference([value] * 9, [reference] * 9, is_score=True)
    low, high = sorted((abs(found.low or 0), abs(found.high or 0)))
    assert high == pytest.approx(1)
    assert 0.1 < low < 0.9


@pytest.mark.parametrize("n", [20, 40])
def test_intervals_of_paired_hits_hold_the_truth_often_enough(n: int):
    """Exact, over all tables: the share of the time that the true difference lies inside."""
    gained = range(n + 1)
    tables = [(b, c) for b, c in itertools.product(gained, gained) if b + c <= n]
    intervals = [difference(*pairs(n - b - c, b, c, 0), is_score=True) for b, c in tables]
    low, high = (np.array([getattr(one, end) for one in intervals]) for end in ("low", "high"))
    log = [math.lgamma(k + 1) for k in range(n + 1)]
    ways = np.array([log[n] - log[b] - log[c] - log[n - b - c] for b, c in tables])
    held = []
    for p, q in itertools.product((0.005, 0.02, 0.05, 0.1, 0.2, 0.4), repeat=2):
        b, c = np.array(tables).T
        chance = np.exp(ways + b * np.log(p) + c * np.log(q) + (n - b - c) * np.log(1 - p - q))
        assert chance.sum() == pytest.approx(1)
        held.append(chance[(low <= p - q) & (p - q <= high)].sum())
    assert min(held) > 0.925
    assert np.mean(held) > 0.95


def test_likelihoods_have_students_interval():
    # Student (1908): the extra sleep of ten patients under two drugs; 95% interval of the mean difference.
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    found = difference(second, first, is_score=False)
    assert (found.mean, found.low, found.high) == pytest.approx((1.58, 0.7001, 2.4599), abs=1e-4)


def test_scores_with_parts_of_a_point_have_students_interval_once_enough_pairs_differ(rng: np.random.Generator):
    first, second = rng.uniform(size=(2, 30))
    assert difference(first, second, is_score=True) == difference(first, second, is_score=False)
    second[9:] = first[9:]
    few = difference(first, second, is_score=True)
    assert few != difference(first, second, is_score=False)
    assert few.low is not None and few.high is not None
    assert few.low < few.mean < few.high


def test_a_mean_by_itself_has_students_interval(rng: np.random.Generator):
    values = rng.exponential(size=12).tolist()
    assert average(values) == difference(values, [0.0] * 12, is_score=False)
    assert average([0.25]).low is None


def test_shares_of_agreement_have_an_interval_that_ends_at_one(rng: np.random.Generator):
    all_agree = agreement([1.0] * 50)
    assert (all_agree.mean, all_agree.high) == (1, 1)
    assert all_agree.low == pytest.approx(1 - 0.0714, abs=1e-3)  # as if one more of 50 pairs of hits might differ
    nearly = [1.0] * 30 + [0.98] * 20
    found = agreement(nearly)
    assert found.low is not None and found.high is not None
    assert found.mean == pytest.approx(0.992)
    assert 0.989 < found.low < found.mean < found.high < 0.995, "far narrower than that of hits and misses"


def test_one_pair_of_likelihoods_has_no_interval():
    found = difference([1.0], [0.5], is_score=False)
    assert (found.mean, found.low, found.high) == (0.5, None, None)
