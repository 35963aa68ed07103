"""Prompts whose time is summed over chunks."""

from pathlib import Path

import numpy as np
import pytest

from bench.e2e.prefill import interpolated
from tests.bench.e2e.runs import lines_of, run


def test_a_prompt_that_is_too_long_for_the_time_is_marked_as_interpolated(tmp_path: Path):
    assert run(tmp_path, "--parts", "prefill", "--contexts", "200", "--presets", "lserve", "--whole-seconds", "0") == 0
    (line,) = lines_of(tmp_path)
    assert line["measured"] == "chunks"
    assert line["prefill_s"] == line["interpolated_s"] > 0
    assert list(line["chunk_ms"]) == ["0", "64", "128", "192"]


def test_sums_of_interpolated_chunks_find_a_linear_growth_exactly():
    seconds = {start: 1.0 + start / 64 for start in range(0, 640, 64)}
    assert interpolated({n: seconds[n] for n in (0, 128, 320, 576)}, np.arange(0, 640, 64)) == pytest.approx(
        sum(seconds.values())
    )
