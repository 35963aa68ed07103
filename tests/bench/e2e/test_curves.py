"""Curves of whole models over context."""

import pytest

from bench.e2e.peer import TRANSFORMERS
from tests.bench.e2e.synthetic import synthetic

pytest.importorskip("matplotlib")

from matplotlib.axes import Axes

from bench.e2e import curves
from bench.figures import of_newest_device


def texts(axes: Axes) -> list[str]:
    legend = axes.get_legend()
    assert legend is not None
    return [text.get_text() for text in legend.get_texts()]


def test_pictures_name_device_date_presets_and_units():
    figure = curves.latency(synthetic())
    assert figure is not None
    assert all(part in figure.get_suptitle() for part in ("NVIDIA H200", "2026-11-21", "llama-3.1-8b"))
    decode, prefill = figure.axes
    assert (decode.get_ylabel(), prefill.get_ylabel()) == ("decode, ms a token", "prefill, s")
    legend = texts(decode)
    assert {"dense", "lserve", "lserve, batch 8", TRANSFORMERS} <= set(legend)
    assert "hollow: interpolated from chunks" in texts(prefill)
    assert [tick.get_text() for tick in decode.get_xticklabels()] == ["8K", "32K", "128K", "512K"]


def test_speedups_are_dense_over_preset_at_the_same_batch():
    by_name = {
        curve.name: curve.values for curve in curves.over_dense(curves.series(synthetic(), curves.QUANTITIES[0]))
    }
    assert by_name["lserve, batch 8"][131072] == pytest.approx((4 + 64) / (4 + 8))
    assert "dense" not in by_name
    assert by_name[TRANSFORMERS] == {8192: pytest.approx(4.5 / 25.0)}
    assert 2**20 not in by_name["lserve"]


def test_the_newest_device_and_the_newest_result_of_a_point_count():
    old = {"device": "old", "date": "2026-01-01", "part": "decode", "preset": "dense", "context": 1024, "batch": 1}
    new = old | {"device": "new", "date": "2026-02-01", "ms_per_token": 2.0}
    lines = [new | {"date": "2026-03-01", "ms_per_token": 3.0}, old | {"ms_per_token": 1.0}, new]
    (curve,) = curves.series(of_newest_device(lines), curves.QUANTITIES[0])
    assert curve.values == {1024: 3.0}
