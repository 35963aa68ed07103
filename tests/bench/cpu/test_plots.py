"""Curves of the bench on a CPU."""

import pytest

from bench.spread import Spread


def test_speed_over_dense_counts_times_and_rates_the_same_way():
    pytest.importorskip("matplotlib")
    from bench.cpu import plots

    found = {"dense": {8: Spread(10, 9, 11, 3), 16: Spread(20, 19, 21, 3)}, "lserve": {8: Spread(5, 4, 6, 3)}}
    assert plots.over_dense(found, is_rate=False)["lserve"][8].median == 2.0
    assert plots.over_dense(found, is_rate=True)["lserve"][8].median == 0.5
    assert plots.over_dense({"lserve": found["lserve"]}, is_rate=True) == {}
