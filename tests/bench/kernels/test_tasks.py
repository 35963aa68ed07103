"""Tasks and the lines that they leave."""

import pytest

from bench import tune
from bench.kernels.ops import OPS, WORKLOADS, inapplicable
from bench.kernels.tasks import WORKLOAD_SETS, Task, perform
from bench.measure import Limits
from bench.peers import tasks as peers


def test_what_does_not_fit_or_is_refused_is_a_line_that_says_why(monkeypatch: pytest.MonkeyPatch):
    limits = Limits(1e9, 1e9)
    refused = perform(Task("decode_dense", "mosaic_gpu", "tiny_mixed"), limits, 1)
    assert refused["kind"] == "refusal" and "Hopper" in refused["reason"]
    skipped = perform(Task("page_select", "xla", "tiny_all_streaming"), limits, 1)
    assert (skipped["kind"], skipped["reason"]) == ("skip", "no head selects pages")
    for op, workload, reason in (
        ("quantized_matmul", "tiny_mixed", "it is an attention layer"),
        ("decode_dense", "tiny_w8", "it is a projection"),
    ):
        other = perform(Task(op, "xla", workload), limits, 1)
        assert (other["kind"], other["reason"]) == ("skip", reason)
    monkeypatch.setattr("bench.kernels.chain.free_memory", lambda: 1000)
    full = perform(Task("decode_dense", "xla", "tiny_mixed"), limits, 1)
    assert full["kind"] == "skip" and "are free" in full["reason"]


def test_every_set_names_ops_and_workloads_that_are_there():
    for sets in (WORKLOAD_SETS, peers.WORKLOAD_SETS, tune.WORKLOAD_SETS):
        assert sets.keys() == WORKLOAD_SETS.keys()
        for op, workload in (pair for pairs in sets.values() for pair in pairs):
            assert op in OPS and workload in WORKLOADS
    for op, workload in WORKLOAD_SETS["targets"]:
        assert inapplicable(op, WORKLOADS[workload]) is None
