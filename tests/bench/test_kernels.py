"""The bench of the ops checks values before it times them, and writes what results promise."""

import json
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from bench import kernels
from pallas_kernels.core.workloads import SERVING, TINY, Workload

SMALL = {
    "plain": TINY["mixed"],
    "int8": Workload(context=256, retrieval=1, streaming=1, group=2, head_dim=16, num_selected=5, bits=(8, 4)),
}


@pytest.mark.parametrize("op", kernels.CASES)
@pytest.mark.parametrize("workload", SMALL)
def test_the_xla_implementation_has_the_values_that_are_timed(op: str, workload: str):
    kernels.check(kernels.CASES[op](SMALL[workload]), "xla")


def test_wrong_values_are_not_timed():
    case = kernels.CASES["decode_attention"](SMALL["plain"])

    def wrong(*args: Any, implementation: str) -> Any:
        return case.call(*args, implementation=implementation) + (0.1 if implementation == "xla" else 0.0)

    with pytest.raises(AssertionError):
        kernels.check(case._replace(call=wrong), "xla")


def test_a_run_appends_one_complete_json_line_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(SERVING, "small", SMALL["int8"])
    monkeypatch.setattr("bench.measure.copy_bandwidth", lambda: 1e9)
    monkeypatch.setattr("bench.measure.product_rate", lambda: 1e9)
    out = tmp_path / "results.jsonl"
    arguments = ["--workload", "small", "--op", "decode_attention", "--op", "prefill_attention", "--repeats", "3"]
    monkeypatch.setattr(sys, "argv", ["kernels", *arguments, "--out", str(out)])
    kernels.main()
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["op"] for line in lines] == ["decode_attention", "prefill_attention"]
    for line in lines:
        assert line["median_ms"] > 0
        assert line["is_checked"]
        assert {
            "implementation",
            "workload",
            "quartiles_ms",
            "gb_per_s",
            "share_of_limit",
            "device",
            "jax",
            "commit",
        } <= set(line)


def test_bytes_count_every_stored_number_of_a_token():
    w = SMALL["int8"]
    assert kernels._token_bytes(w) == (16 + 8) + (8 + 8)
    assert kernels._token_bytes(TINY["mixed"]) == 2 * 8 * jnp.dtype("float32").itemsize
