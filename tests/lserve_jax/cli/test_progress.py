"""Progress bars: what is counted has its unit, and a speed is shown where one was measured."""

import re

import pytest

from lserve_jax.cli.common import ProgressBars


def shown(capsys: pytest.CaptureFixture[str], *reports: tuple[str, int, int]) -> list[str]:
    """The last state of each bar, and the other lines."""
    with ProgressBars(is_shown=True) as bars:
        for report in reports:
            bars.report(*report)
    return [line.rpartition("\r")[2].strip() for line in capsys.readouterr().err.split("\n")[:-1]]


@pytest.mark.parametrize(
    ("stage", "total", "pattern"),
    [
        ("weights", 98_400_000, r"weights: 100%\|█+\| 98\.4M/98\.4MB \[\d\d:\d\d<00:00, [\d.]+[kMGT]?B/s\]"),
        ("prefill", 4500, r"prefill: 100%\|█+\| 4500/4500 tokens \[\d\d:\d\d<00:00, [\d.]+ tokens/s\]"),
        ("training", 20, r"training: 100%\|█+\| 20/20 steps \[\d\d:\d\d<00:00, [\d.]+ steps/s\]"),
        ("scores", 12, r"scores: 100%\|█+\| 12/12 \[\d\d:\d\d<00:00\]"),
        ("dense (1/2)", 40, r"dense \(1/2\): 100%\|█+\| 40/40 \[\d\d:\d\d<00:00\]"),
    ],
)
def test_a_stage_counts_in_its_unit(stage: str, total: int, pattern: str, capsys: pytest.CaptureFixture[str]):
    (line,) = shown(capsys, (stage, 0, total), (stage, total // 2, total), (stage, total, total))
    assert re.fullmatch(pattern, line)


def test_a_stage_that_is_done_when_it_is_first_reported_has_no_speed(capsys: pytest.CaptureFixture[str]):
    lines = shown(capsys, ("prefill", 45, 45), ("prefill", 30, 30), ("compile decode", 0, 1))
    assert [re.sub("█+", "…", line) for line in lines] == [
        "prefill: 100%|…| 45/45 tokens",
        "prefill: 100%|…| 30/30 tokens",
        "compile decode …",
    ]


def test_what_was_done_before_the_first_report_is_not_in_the_speed(capsys: pytest.CaptureFixture[str]):
    with ProgressBars(is_shown=True) as bars:
        bars.report("prefill", 4000, 4500)
    assert re.search(r"4000/4500 tokens \[00:00<\?, \? tokens/s\]", capsys.readouterr().err)


def test_bars_that_are_not_shown_write_nothing(capsys: pytest.CaptureFixture[str]):
    with ProgressBars(is_shown=False) as bars:
        bars.report("prefill", 45, 45)
    assert capsys.readouterr().err == ""
