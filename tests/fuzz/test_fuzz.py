"""A sample of the damaged inputs of `python -m tests.fuzz`: each is taken, or refused in one line of our own."""

from pathlib import Path

import pytest

from tests.fuzz.kinds import KINDS, outcome

SAMPLE = 40


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] if kind == "http" else []) for kind in KINDS]
)
def test_damaged_inputs_are_taken_or_refused_in_one_line(kind: str, tmp_path: Path):
    found = []
    for seed in range(SAMPLE):
        folder = tmp_path / str(seed)
        folder.mkdir()
        found.append(outcome(kind, seed, folder))
    assert any(line != "taken" for line in found), "nothing was damaged"
