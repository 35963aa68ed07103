"""Ops on arrays."""

import numpy as np

from bench.kernels.cases import attended_rows
from bench.kernels.compare import compare_rows
from bench.kernels.ops import OPS
from tests.bench.kernels.workloads import SMALL, case


def test_rows_of_a_long_prefill_are_those_of_the_reference():
    w, rows = SMALL["int8"], np.array([0, 17, 63])
    found = case("prefill_attention", w)
    expected = found.call(found.shared, found.own[0], implementation="reference")[:1, rows]
    compare_rows(attended_rows(w, rows, found.shared, found.own[0]), expected)


def test_pages_of_different_sets_of_tables_are_different():
    tables = [own[1].retrieval for own in OPS["decode_attention"].case(SMALL["plain"], 2, 2).own]
    assert not set(np.asarray(tables[0]).ravel()) & set(np.asarray(tables[1]).ravel())
