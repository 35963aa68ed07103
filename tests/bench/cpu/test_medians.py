"""Medians and quartiles."""

from bench.cpu.medians import Point, medians
from bench.spread import Spread
from tests.bench.cpu.samples import RESULTS, sample


def test_medians_are_of_the_newest_sources():
    rounds = [sample("lserve", 8, rate, 1) for rate in (1, 2, 3, 4, 9)]
    number = medians([*RESULTS, *rounds])[Point("single", "lserve", 8, 1, "warm", "prefill_tok_per_s")]
    assert number == Spread(3, 2, 4, 5)
    assert medians(RESULTS)[Point("single", "lserve", 1024, 1, "warm", "ms_per_token")].median == 18
