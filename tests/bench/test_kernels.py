"""The bench of the ops checks values before it times them, and writes what results promise."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench import kernels, measure, peers, tune
from pallas_kernels import QuantizedArray
from pallas_kernels.core.workloads import TINY, Workload
from tests.pallas_kernels.hopper import on_h200

SMALL = {
    "plain": TINY["mixed"],
    "int8": Workload(
        context=512, retrieval=1, streaming=1, group=2, head_dim=16, num_selected=5, bits=(8, 4), chunk=64
    ),
}
LLAMA = kernels.WORKLOADS["llama3_8b_128k_b8_int8"]


def case(op: str, w: Workload) -> kernels.Case:
    return kernels.OPS[op].case(w, 2, 1)


@pytest.mark.parametrize("op", kernels.OPS)
@pytest.mark.parametrize("workload", SMALL)
def test_the_xla_implementation_has_the_values_that_are_timed(op: str, workload: str):
    assert kernels.check(case(op, SMALL[workload]), "xla") == "reference"


def falsified(result: Any) -> Any:
    """An op's result with one thing wrong: a token's head, a page of a list, a stored number."""
    if isinstance(result, jax.Array) and result.dtype == jnp.int32:
        return jnp.sort(result.at[0, 0, 1:4].set(jnp.arange(1, 4)), axis=-1)
    if isinstance(result, jax.Array):
        return result.at[-1, ..., -1, :].multiply(jnp.asarray(1.1, result.dtype))
    assert isinstance(result.retrieval.v, QuantizedArray)
    pages = result.retrieval.v
    wrong = replace(pages, codes=pages.codes ^ jnp.uint8(0x24))
    return result._replace(retrieval=result.retrieval._replace(v=wrong))


@pytest.mark.parametrize("op", ["decode_attention", "page_select", "kv_write_prefill", "prefill_attention"])
def test_wrong_values_are_not_timed(op: str):
    right = case(op, SMALL["int8"])

    def wrong(*args: Any, implementation: str) -> Any:
        result = right.call(*args, implementation=implementation)
        return falsified(result) if implementation == "xla" else result

    with pytest.raises(AssertionError):
        kernels.check(right._replace(call=wrong), "xla")


def test_rows_of_a_long_prefill_are_those_of_the_reference():
    w, rows = SMALL["int8"], np.array([0, 17, 63])
    found = case("prefill_attention", w)
    expected = found.call(found.shared, found.own[0], implementation="reference")[:1, rows]
    kernels.compare_rows(kernels._attended_rows(w, rows, found.shared, found.own[0]), expected)


def test_calls_of_a_chain_are_all_made_each_on_its_own_arguments():
    found = case("decode_attention", SMALL["plain"])
    results = kernels.chain(found, "xla")()
    assert len(results) == 2
    for own, result in zip(found.own, results, strict=True):
        np.testing.assert_allclose(result, found.call(found.shared, own, implementation="xla"), atol=1e-6)
    written = case("kv_write_decode", SMALL["plain"])
    before = jax.device_get(written.shared)
    run = kernels.chain(written, "xla")
    after = jax.device_get(run())
    assert not np.array_equal(before.retrieval.k, after.retrieval.k)
    run()  # the donated pools of the call before


def test_pages_of_different_sets_of_tables_are_different():
    tables = [own[1].retrieval for own in kernels.OPS["decode_attention"].case(SMALL["plain"], 2, 2).own]
    assert not set(np.asarray(tables[0]).ravel()) & set(np.asarray(tables[1]).ravel())


def test_bytes_count_every_number_that_must_move():
    w = SMALL["int8"]
    token = (16 + 8) + (8 + 8)
    assert kernels._stored_bytes(w, 3, 2) == 5 * token
    assert kernels._stored_bytes(TINY["mixed"], 1, 0) == 2 * 8 * 4
    four = kernels.WORKLOADS["llama3_8b_128k_b8_int4"]
    assert kernels._stored_bytes(four, 1, 10) == 2 * (64 + 8) + 10 * 2 * (128 + 8)
    vectors = 2 * 4 * 16 * 2
    assert kernels.OPS["decode_attention"].sizes(w).moved == (5 * 64 + 128 + 256) * token + vectors
    assert kernels.OPS["decode_dense"].sizes(LLAMA).moved == 8 * (8 * 2**17 * (2 * (128 + 8)) + 2 * 32 * 128 * 2)
    selected, window = 4 * 64 * 64, 4 * (128 + 256)
    assert kernels.OPS["decode_attention"].sizes(LLAMA).moved == 8 * ((selected + window) * 272 + 2 * 32 * 128 * 2)
    statistics = 8 * 4 * 2 * 2**13 * 128 * 2
    assert kernels.OPS["page_select"].sizes(LLAMA).moved == statistics + 8 * 16 * 128 * 2
    assert kernels.OPS["kv_write_decode"].sizes(LLAMA).moved == 8 * (8 * (512 + 272) + 4 * 4 * 256)


def test_flops_of_prefill_are_those_of_visible_keys():
    w = kernels.WORKLOADS["llama3_8b_32k_whole"]
    assert kernels.OPS["prefill_dense"].sizes(w).flops == 4 * 32 * 128 * (2**15 * (2**15 + 1) // 2)
    seen = sum(min(i + 1, w.sink + w.prefill_local) for i in range(2**15))
    half = 4 * 16 * 128 * (2**15 * (2**15 + 1) // 2 + seen)
    assert kernels.OPS["prefill_attention"].sizes(w).flops == half


def test_inputs_rotate_until_the_cache_of_a_gpu_is_cold_and_fit_its_memory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("bench.kernels.is_gpu", lambda: True)
    gpu = 140 * 2**30
    for op in kernels.OPS:
        sizes = kernels.OPS[op].sizes(LLAMA)
        calls, sets = kernels.rotation(sizes, memory=gpu)
        assert sizes.pools * sets + 2 * sizes.own * calls <= gpu
        if op != "kv_write_decode":  # so little that 40 calls do not fill the cache
            assert min(calls * sizes.moved, sets * sizes.pools) >= 2 * measure.L2_BYTES
    with pytest.raises(MemoryError, match=r"bytes, 1.72e\+09 are free"):
        kernels.rotation(kernels.OPS["decode_dense"].sizes(LLAMA), memory=2**31)


def test_what_does_not_fit_or_is_refused_is_a_line_that_says_why(monkeypatch: pytest.MonkeyPatch):
    limits = measure.Limits(1e9, 1e9)
    refused = kernels.perform(kernels.Task("decode_dense", "mosaic_gpu", "tiny_mixed"), limits, 1)
    assert refused["kind"] == "refusal" and "Hopper" in refused["reason"]
    skipped = kernels.perform(kernels.Task("page_select", "xla", "tiny_all_streaming"), limits, 1)
    assert (skipped["kind"], skipped["reason"]) == ("skip", "no head selects pages")
    monkeypatch.setattr("bench.kernels.free_memory", lambda: 1000)
    full = kernels.perform(kernels.Task("decode_dense", "xla", "tiny_mixed"), limits, 1)
    assert full["kind"] == "skip" and "are free" in full["reason"]


def test_every_set_names_ops_and_workloads_that_are_there():
    for sets in (kernels.WORKLOAD_SETS, peers.WORKLOAD_SETS, tune.WORKLOAD_SETS):
        assert sets.keys() == kernels.WORKLOAD_SETS.keys()
        for op, workload in (pair for pairs in sets.values() for pair in pairs):
            assert op in kernels.OPS and workload in kernels.WORKLOADS
    for op, workload in kernels.WORKLOAD_SETS["targets"]:
        assert kernels.inapplicable(op, kernels.WORKLOADS[workload]) is None


def test_batches_and_chunks_are_in_the_names():
    assert (LLAMA.batch, LLAMA.bits, LLAMA.context) == (8, (8, 8), 2**17)
    assert kernels.WORKLOADS["llama3_8b_512k_b32"].batch == 32
    chunked, whole = (kernels.WORKLOADS[f"llama3_8b_128k_{name}"] for name in ("chunk8k_int4", "whole"))
    assert (chunked.chunk, chunked.bits, whole.chunk) == (8192, (4, 4), 2**17)


def test_a_run_appends_one_complete_json_line_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("bench.measure.copy_bandwidth", lambda: 1e9)
    monkeypatch.setattr("bench.measure.product_rate", lambda: 1e9)
    monkeypatch.setitem(kernels.WORKLOADS, "small", SMALL["int8"])
    out = tmp_path / "results.jsonl"
    arguments = ["--workload", "small", "--op", "decode_dense", "--op", "prefill_attention", "--repeats", "3"]
    kernels.main([*arguments, "--out", str(out)])
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


def test_configurations_that_kernels_ask_for_are_collected_and_replaced():
    from pallas_kernels import PageTables, decode_attention
    from tests.pallas_kernels.cases import abstract, abstract_pools

    w = kernels.WORKLOADS["llama3_8b_8k_int8"]
    arguments = (
        abstract(1, w.num_heads, w.head_dim, dtype=jnp.bfloat16),
        abstract_pools(w, w.max_pages),
        PageTables(abstract(1, w.max_pages), abstract(1, w.max_pages)),
        abstract(1),
    )

    def trace() -> None:
        def call(q: Any, kv: Any, tables: Any, lengths: Any) -> jax.Array:
            return decode_attention(
                q, kv, tables, lengths, None, sink=w.sink, local=w.local, implementation="mosaic_gpu"
            )

        jax.eval_shape(call, *arguments)

    with on_h200():
        with measure.launches() as found:
            trace()
        with measure.launches({"decode_attention": {"splits": 7}}) as changed:
            trace()
        trace()
    assert (len(found), len(changed)) == (1, 1)
    assert found[0].op == "decode_attention" and found[0].chosen == found[0].default
    assert changed[0] == found[0]._replace(chosen=replace(found[0].default, splits=7))
    for change in tune.NEIGHBOURS["decode_attention"](asdict(found[0].default)):
        replace(found[0].default, **change)


def tuned(workload: str, change: dict[str, int], median: float, spread: float = 0.01) -> dict[str, Any]:
    quartiles = [median * (1 - spread / 2), median * (1 + spread / 2)]
    labels = {"kind": "tune", "kernel": "op", "shape": "s", "workload": workload, "change": change}
    return {**labels, "median_ms": median, "quartiles_ms": quartiles}


def test_only_what_beats_the_heuristic_by_more_than_the_noise_goes_into_the_table(tmp_path: Path):
    faster = {"splits": 4}
    assert tune.choose([tuned("a", {}, 1.0), tuned("a", faster, 0.9)]) == {"op": {"s": faster}}
    assert tune.choose([tuned("a", {}, 1.0), tuned("a", faster, 0.985)]) == {}
    assert tune.choose([tuned("a", {}, 1.0, spread=0.2), tuned("a", faster, 0.9)]) == {}
    assert tune.choose([tuned("a", faster, 0.9)]) == {}
    # Another workload of the same shape, where it is not measured, and where it is slower.
    both = [tuned("a", {}, 1.0), tuned("a", faster, 0.8), tuned("b", {}, 1.0)]
    assert tune.choose(both) == {}
    assert tune.choose([*both, tuned("b", faster, 1.1)]) == {}
    assert tune.choose([*both, tuned("b", faster, 0.99)]) == {"op": {"s": faster}}
    file = tmp_path / "tuned" / "device.json"
    tune.merge({"op": {"s": faster}}, file)
    tune.merge({"op": {"t": {"stages": 2}}}, file)
    assert json.loads(file.read_text()) == {"op": {"s": faster, "t": {"stages": 2}}}
