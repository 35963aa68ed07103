"""The end-to-end bench: what it counts, what it writes, that it goes on where it stopped; and the pictures of it."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench import e2e
from lserve_jax.engine.memory import PoolSizes
from pallas_kernels import dequantize

TINY_CHECKPOINT = str(Path(__file__).parents[1] / "golden" / "tiny" / "llama3")
SIZES = ["--model", "tiny", "--presets", "dense,lserve", "--batch", "1", "--chunk", "64", "--steps", "4"]


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "e2e.jsonl").read_text(encoding="utf-8").splitlines()]


def run(folder: Path, *arguments: str) -> int:
    return e2e.main(["--out", str(folder), *SIZES, *arguments])


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(e2e.TINY_MODEL, "num_hidden_layers", 1)
    monkeypatch.setattr(e2e, "MEASURE_SECONDS", 0.0)
    monkeypatch.setattr(e2e, "copy_bandwidth", lambda: 1e9)
    monkeypatch.setattr(e2e, "peer_process", lambda args: print("the peer's process"))
    monkeypatch.setattr(e2e, "VALUES_PROMPT", 600)
    monkeypatch.setattr(e2e, "VALUES_STEPS", 6)
    monkeypatch.delitem(e2e.VALUES_ATTENTION, "dense")
    _forget_configurations()
    yield
    _forget_configurations()


def _forget_configurations() -> None:
    e2e.model_config.cache_clear()
    e2e.inference_config.cache_clear()


# --- whole runs -------------------------------------------------------------------------------------------------------


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
    measure = e2e.Decode.measure

    def fails_for_lserve(self: e2e.Decode, *args: Any) -> dict[str, Any]:
        if self.point.preset == "lserve":
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nmore of it")
        return measure(self, *args)

    monkeypatch.setattr(e2e.Decode, "measure", fails_for_lserve)
    decode = ("--parts", "decode", "--presets", "lserve,dense")
    assert run(tmp_path, *decode, "--contexts", "200,2000000000") == 0
    found = {(line["preset"], line["context"]): line.get("error", "") for line in lines_of(tmp_path)}
    assert found.pop(("dense", 200)) == ""
    assert found.pop(("lserve", 200)) == "JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory"
    assert all("the largest context that fits" in error for error in found.values())
    assert len(found) == 2

    monkeypatch.setattr(e2e.Decode, "measure", measure)
    assert run(tmp_path, *decode, "--contexts", "200") == 0
    assert len(lines_of(tmp_path)) == 4, "a recorded failure is not tried again"
    assert run(tmp_path, *decode, "--contexts", "200", "--retry") == 0
    assert lines_of(tmp_path)[-1]["preset"] == "lserve"
    assert "error" not in lines_of(tmp_path)[-1]


def test_a_prompt_that_is_too_long_for_the_time_is_marked_as_interpolated(tmp_path: Path):
    assert run(tmp_path, "--parts", "prefill", "--contexts", "200", "--presets", "lserve", "--whole-seconds", "0") == 0
    (line,) = lines_of(tmp_path)
    assert line["measured"] == "chunks"
    assert line["prefill_s"] == line["interpolated_s"] > 0
    assert list(line["chunk_ms"]) == ["0", "64", "128", "192"]


def test_wrong_values_end_with_status_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    compared = {"relative_error": 0.2, "is_within_bf16_error": False}
    monkeypatch.setattr(e2e, "compared", lambda *args: compared)
    assert run(tmp_path, "--parts", "values") == 1


def test_the_peer_is_left_out_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    e2e.peer(argparse.Namespace(model="tiny", out=tmp_path, retry=False))
    said = capsys.readouterr().out
    assert said.startswith("peer: left out: ")
    assert said.count("\n") == 1


# --- what is counted --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["dense", "lserve", "qserve", "lserve:int8", "lserve:int4"])
def test_bytes_read_are_those_of_llama_3_8b_counted_by_hand(preset: str):
    config = e2e.inference_config("llama-3.1-8b", preset, "auto")
    assert e2e.weight_bytes_read(config) == pytest.approx(2 * 7.504e9, rel=1e-3)
    four, eight = 2 * (64 + 8.0), 2 * (128 + 8.0)
    token = {"dense": 512.0, "lserve": 512.0, "qserve": four, "lserve:int8": eight, "lserve:int4": four}[preset]
    first, steps = 128 * 1024 - 7, 8
    read = e2e.cache_bytes_read(config, range(first, first + steps))
    pages = 2048
    if config.attention.token_budget is None:
        assert read == pytest.approx(32 * 8 * pages * 64 * token)
        return
    statistics = pages * 2 * 4 * 128 * 2 / 4  # 4 sub-pages, min and max, every fourth step
    retrieval, streaming = 64 * 64 * token + statistics, 6.5 * 64 * (eight if preset == "lserve:int4" else token)
    assert read == pytest.approx(32 * 4 * (retrieval + streaming), rel=0.01 if preset == "lserve:int4" else 0.02)


def test_flops_of_a_prompt_are_two_a_weight_and_the_visible_products():
    dense, lserve = (e2e.inference_config("llama-3.1-8b", preset, "auto") for preset in ("dense", "lserve"))
    tokens = 32 * 1024
    layers = 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    attention = 4 * 32 * 32 * 128 * tokens * (tokens + 1) / 2
    assert e2e.prefill_flops(dense, tokens) == pytest.approx(2 * layers * tokens + attention)
    assert e2e.prefill_flops(lserve, tokens) < 2 * layers * tokens + 0.75 * attention


@pytest.mark.parametrize("slots", [1, 3])
def test_streaming_pages_stay_where_they_are_while_successive_chunks_see_them(slots: int):
    config, context, chunk = e2e.inference_config("tiny", "lserve", "auto"), 1000, 48
    window = config.attention.prefill_local
    pools = PoolSizes(retrieval=slots * 63, streaming=slots * 12)
    before = None
    for start in range(0, context - chunk, chunk):
        span = range(start, start + chunk)
        tables = e2e.page_tables(config, pools, slots=slots, context=context, span=span, window=window)
        assert sorted(np.asarray(tables.retrieval).ravel()) == list(range(slots * 63))
        streaming = np.asarray(tables.streaming)
        held = streaming[streaming >= 0]
        assert len(set(held.tolist())) == held.size, "two pages in one place"
        assert held.max() < pools.streaming
        if before is not None:
            both = (before >= 0) & (streaming >= 0)
            assert both.any()
            assert (before[both] == streaming[both]).all()
        before = streaming


def test_random_pages_are_finite_and_their_statistics_ordered():
    config = e2e.inference_config("tiny", "lserve:int4", "auto")
    subject = e2e.Decode(e2e.Point("decode", "lserve:int4", 256), config, chunk=64, steps=4)
    filled = e2e.random_cache(subject.template)
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), (filled, subject.template))
    assert shapes[0] == shapes[1]
    pool = filled[0].kv.retrieval
    assert pool is not None
    assert bool(jnp.all(jnp.asarray(pool.k_min) <= jnp.asarray(pool.k_max)))
    assert bool(jnp.all(jnp.isfinite(dequantize(pool.k, jnp.dtype(jnp.float32)))))


def test_contexts_are_named_in_k_and_m_and_the_longest_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    args = e2e.parse(["--out", str(tmp_path), *SIZES])
    subject = SimpleNamespace(plan=lambda available_bytes: SimpleNamespace(largest_context=300_000))
    fake: Any = SimpleNamespace(args=args, available=0, subject=lambda point: subject)
    assert [e2e.Run.context(fake, name, "dense", 1) for name in ("8k", "1m", "300", "longest")] == [
        8192,
        2**20,
        300,
        4 * 65536,
    ]


def test_sums_of_interpolated_chunks_find_a_linear_growth_exactly(monkeypatch: pytest.MonkeyPatch):
    seconds = {start: 1.0 + start / 64 for start in range(0, 640, 64)}
    assert e2e.interpolated({n: seconds[n] for n in (0, 128, 320, 576)}, np.arange(0, 640, 64)) == pytest.approx(
        sum(seconds.values())
    )


# --- pictures ---------------------------------------------------------------------------------------------------------


def synthetic() -> list[dict[str, Any]]:
    about = {"device": "NVIDIA H200", "date": "2026-11-21T12:00:00+00:00", "commit": "abc1234", "model": "llama-3.1-8b"}
    lines = []
    for preset, slope in (("dense", 8.0), ("lserve", 1.0), ("lserve:int8", 0.7), ("qserve", 3.0)):
        for context in (8192, 32768, 131072, 524288):
            for batch in (1, 8):
                ms = 4 + slope * batch * context / 131072
                lines.append(
                    {"part": "decode", "preset": preset, "context": context, "batch": batch, "ms_per_token": ms}
                )
            seconds = context / 30000 + slope * (context / 131072) ** 2
            measured = "chunks" if context > 131072 else "whole"
            lines.append({"part": "prefill", "preset": preset, "context": context, "batch": 1, "prefill_s": seconds})
            lines[-1]["measured"] = measured
    lines.append({"part": "decode", "preset": "dense", "context": 2**20, "batch": 1, "error": "out of memory"})
    peer = {
        "part": "peer",
        "peer": e2e.TRANSFORMERS,
        "context": 8192,
        "batch": 1,
        "ms_per_token": 25.0,
        "prefill_s": 0.4,
    }
    return [line | about for line in (*lines, peer)]


def kernel(op: str, workload: str, **fields: Any) -> dict[str, Any]:
    about = {"device": "NVIDIA H200", "date": "2026-11-21T12:00:00+00:00", "implementation": "mosaic_gpu"}
    return {"op": op, "workload": workload, "median_ms": 0.1, **about, **fields}


KERNELS = [
    kernel("decode_attention", "8k", gb_per_s=3600.0, tflop_per_s=14.4, share_of_limit=0.84, limit="bandwidth"),
    kernel("prefill_attention", "32k", gb_per_s=400.0, tflop_per_s=600.0, share_of_limit=0.77, limit="product"),
    kernel("kv_write", "8k", gb_per_s=2000.0, tflop_per_s=0.0, share_of_limit=0.47, limit="bandwidth"),
]


@pytest.fixture
def plots() -> Any:
    pytest.importorskip("matplotlib")
    from bench import plots

    return plots


def test_all_pictures_are_drawn_of_synthetic_results(plots: Any, tmp_path: Path):
    (tmp_path / "e2e.jsonl").write_text("".join(json.dumps(line) + "\n" for line in synthetic()), encoding="utf-8")
    (tmp_path / "kernels.jsonl").write_text("".join(json.dumps(line) + "\n" for line in KERNELS), encoding="utf-8")
    assert plots.main([str(tmp_path)]) == 0
    for name in ("latency.png", "speedup.png", "roofline.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_no_picture_without_data(plots: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert plots.main([str(tmp_path)]) == 1
    assert capsys.readouterr().out.count("not drawn") == 3
    (tmp_path / "kernels.jsonl").write_text(json.dumps(KERNELS[0]) + "\n{half a li", encoding="utf-8")
    assert plots.main([str(tmp_path)]) == 0
    assert [file.name for file in tmp_path.glob("*.png")] == ["roofline.png"]


def test_pictures_name_device_date_presets_and_units(plots: Any):
    figure = plots.latency(synthetic())
    assert all(part in figure.get_suptitle() for part in ("NVIDIA H200", "2026-11-21", "llama-3.1-8b"))
    decode, prefill = figure.axes
    assert (decode.get_ylabel(), prefill.get_ylabel()) == ("decode, ms a token", "prefill, s")
    legend = [text.get_text() for text in decode.get_legend().get_texts()]
    assert {"dense", "lserve", "lserve, batch 8", e2e.TRANSFORMERS} <= set(legend)
    assert "hollow: interpolated from chunks" in [text.get_text() for text in prefill.get_legend().get_texts()]
    assert [tick.get_text() for tick in decode.get_xticklabels()] == ["8K", "32K", "128K", "512K"]


def test_speedups_are_dense_over_preset_at_the_same_batch(plots: Any):
    by_name = {curve.name: curve.values for curve in plots.over_dense(plots.series(synthetic(), plots.QUANTITIES[0]))}
    assert by_name["lserve, batch 8"][131072] == pytest.approx((4 + 64) / (4 + 8))
    assert "dense" not in by_name
    assert by_name[e2e.TRANSFORMERS] == {8192: pytest.approx(4.5 / 25.0)}
    assert 2**20 not in by_name["lserve"]


def test_the_newest_device_and_the_newest_result_of_a_point_count(plots: Any):
    old = {"device": "old", "date": "2026-01-01", "part": "decode", "preset": "dense", "context": 1024, "batch": 1}
    new = old | {"device": "new", "date": "2026-02-01", "ms_per_token": 2.0}
    lines = [new | {"date": "2026-03-01", "ms_per_token": 3.0}, old | {"ms_per_token": 1.0}, new]
    (curve,) = plots.series(plots.of_newest_device(lines), plots.QUANTITIES[0])
    assert curve.values == {1024: 3.0}


def test_the_roof_is_what_was_measured_or_what_the_shares_imply(plots: Any):
    assert plots.intensity(KERNELS[0]) == pytest.approx(4.0)
    assert plots.intensity(KERNELS[2]) is None
    bandwidth, product = plots.limits(KERNELS)
    assert (bandwidth, product) == (pytest.approx(4270, rel=0.01), pytest.approx(600 / 0.77))
    assert plots.limits([KERNELS[0] | {"limit_gb_per_s": 4300.0, "limit_tflop_per_s": 780.0}]) == (4300.0, 780.0)
    roof, shares = plots.roofline(KERNELS).axes
    assert roof.get_title().endswith("at the right alone: 1")
    assert len(shares.patches) == 3
