"""Whole runs: what is written, and that a run goes on where it stopped."""

from pathlib import Path
from typing import Any

import jax
import pytest

from bench.e2e.decode import Decode
from tests.bench.e2e.runs import TINY_CHECKPOINT, lines_of, run


def test_a_run_of_all_parts_writes_a_line_a_result_and_a_second_run_measures_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    everything = ("--contexts", "200", "--values-model", TINY_CHECKPOINT)
    assert run(tmp_path, *everything) == 0
    lines = lines_of(tmp_path)
    said = capsys.readouterr().out
    measured = {(line["part"], line["preset"], line.get("batch")) for line in lines}
    assert measured == {
        ("values", "lserve", None),
        ("compile", "dense", None),
        *(("decode", preset, 1) for preset in ("dense", "lserve")),
        *(("prefill", preset, 1) for preset in ("dense", "lserve")),
    }
    assert not [line["error"] for line in lines if "error" in line]
    assert "everything asked for" in said
    assert "the peer's process" in said
    for line in lines:
        assert {"device", "jax", "commit", "date", "copy_gb_per_s", "implementation", "id"} <= line.keys()
        if line["part"] in ("decode", "prefill"):
            assert {
                "compile_s",
                "cache_bytes",
                "weight_bytes",
                "attention_share",
                "measured",
                "attention",
            } <= line.keys()
    decode = next(line for line in lines if line["part"] == "decode" and line["preset"] == "dense")
    read = decode["weight_bytes_read"] + decode["cache_bytes_read"]
    assert decode["over_limit"] == pytest.approx(decode["ms_per_token"] * 1e-3 / (read / 1e9), rel=1e-3)
    compilation = next(line for line in lines if line["part"] == "compile")
    assert 0 < compilation["cached_s"] < compilation["cold_s"]

    assert run(tmp_path, *everything) == 0
    assert lines_of(tmp_path) == lines


def test_a_run_without_time_lists_what_is_left_and_the_next_one_does_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    one = ("--contexts", "200", "--presets", "lserve", "--batch", "2", "--parts", "decode")
    assert run(tmp_path, *one, "--minutes", "0") == 0
    assert "left for another run: decode lserve 200 x2" in capsys.readouterr().out
    assert run(tmp_path, *one) == 0
    assert [line["part"] for line in lines_of(tmp_path)] == ["decode"]


def test_a_failing_point_is_recorded_and_the_others_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    measure = Decode.measure

    def fails_for_lserve(self: Decode, *args: Any) -> dict[str, Any]:
        if self.point.preset == "lserve":
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nmore of it")
        return measure(self, *args)

    monkeypatch.setattr(Decode, "measure", fails_for_lserve)
    decode = ("--parts", "decode", "--presets", "lserve,dense")
    assert run(tmp_path, *decode, "--contexts", "200,2000000000") == 0
    found = {(line["preset"], line["context"]): line.get("error", "") for line in lines_of(tmp_path)}
    assert found.pop(("dense", 200)) == ""
    assert found.pop(("lserve", 200)) == "JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory"
    assert all("the largest context that fits" in error for error in found.values())
    assert len(found) == 2

    monkeypatch.setattr(Decode, "measure", measure)
    assert run(tmp_path, *decode, "--contexts", "200") == 0
    assert len(lines_of(tmp_path)) == 4, "a recorded failure is not tried again"
    assert run(tmp_path, *decode, "--contexts", "200", "--retry") == 0
    assert lines_of(tmp_path)[-1]["preset"] == "lserve"
    assert "error" not in lines_of(tmp_path)[-1]


def test_wrong_values_end_with_status_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    compared = {"relative_error": 0.2, "is_within_bf16_error": False}
    monkeypatch.setattr("bench.e2e.run.compared", lambda *args: compared)
    assert run(tmp_path, "--parts", "values") == 1
