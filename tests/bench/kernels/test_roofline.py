"""Kernels under the device's limits."""

import pytest

from tests.bench.kernels.lines import KERNELS

pytest.importorskip("matplotlib")

from bench.kernels import roofline


def test_the_roof_is_what_was_measured_or_what_the_shares_imply():
    assert roofline.intensity(KERNELS[0]) == pytest.approx(4.0)
    assert roofline.intensity(KERNELS[2]) is None
    bandwidth, product = roofline.limits(KERNELS)
    assert (bandwidth, product) == (pytest.approx(4270, rel=0.01), pytest.approx(600 / 0.77))
    assert roofline.limits([KERNELS[0] | {"limit_gb_per_s": 4300.0, "limit_tflop_per_s": 780.0}]) == (4300.0, 780.0)
    figure = roofline.roofline(KERNELS)
    assert figure is not None
    roof, shares = figure.axes
    assert roof.get_title().endswith("at the right alone: 1")
    assert len(shares.patches) == 3
