"""A short soak; `python -m tests.soak` makes long ones."""

import pytest

from tests.soak.run import OPEN_STREAMS, soak

REQUESTS = 250


@pytest.mark.slow
def test_nothing_is_lost_nothing_is_held_and_every_answer_is_that_of_the_lone_model():
    found = soak(requests=REQUESTS, seconds=None, clients=OPEN_STREAMS, seed=1)
    assert found.findings.problems == []
    assert found.findings.outcomes.total() == REQUESTS
    assert {"answered", "streamed", "left", "damaged, refused"} <= found.findings.outcomes.keys()
    assert found.compared > 20
    held = found.held
    assert held["swaps"] > 0 and held["hit_tokens"] > 0 and held["evicted"] > 0, held
