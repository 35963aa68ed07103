"""The command line of the ops' bench."""

import json
from pathlib import Path

import pytest

from bench.kernels.__main__ import main
from bench.kernels.ops import WORKLOADS
from tests.bench.kernels.workloads import SMALL


def test_a_run_appends_one_complete_json_line_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("bench.measure.copy_bandwidth", lambda: 1e9)
    monkeypatch.setattr("bench.measure.product_rate", lambda: 1e9)
    monkeypatch.setitem(WORKLOADS, "small", SMALL["int8"])
    out = tmp_path / "results.jsonl"
    arguments = ["--workload", "small", "--op", "decode_dense", "--op", "prefill_attention", "--repeats", "3"]
    main([*arguments, "--out", str(out)])
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["begin", "kernel"] * 2
    assert [line["op"] for line in lines[1::2]] == ["decode_dense", "prefill_attention"]
    for line in lines[1::2]:
        assert 0 < line["quartiles_ms"][0] <= line["median_ms"] <= line["quartiles_ms"][1]
        assert line["checked_against"] == "reference" and line["samples"] == 3 and line["calls"] == 2
        assert not line["is_cold"] and line["config"] is None
        assert line["share_of_limit"] == pytest.approx(
            max(line["bytes"], line["flops"]) / line["median_ms"] / 1e6, rel=0.01, abs=1e-4
        )
        assert {"implementation", "workload", "limit", "limit_gb_per_s", "device", "jax", "commit", "date"} <= set(line)
