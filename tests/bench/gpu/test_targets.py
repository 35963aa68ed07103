"""The table of targets for an H200."""

from typing import Any

from bench.gpu.targets import table, targets


def result(kind: str, op: str, implementation: str, workload: str, ms: float, **fields: Any) -> dict[str, Any]:
    line = {"kind": kind, "op": op, "implementation": implementation, "workload": workload, "median_ms": ms}
    return {**line, "bytes": round(ms * 80e6), "limit_gb_per_s": 100.0, "flops": 1000, **fields}  # 80 GB/s


def test_the_table_has_the_worst_of_each_target():
    lines = [
        result("kernel", "prefill_dense", "mosaic_gpu", "llama3_8b_32k_whole", 10.0),
        result("kernel", "prefill_dense", "mosaic_gpu", "llama3_8b_128k_chunk8k", 11.0),
        result("peer", "prefill_dense", "fa3", "llama3_8b_32k_whole", 9.9),
        result("peer", "prefill_dense", "fa3", "llama3_8b_128k_chunk8k", 9.9),
        result("kernel", "prefill_attention", "mosaic_gpu", "llama3_8b_32k_whole", 5.3, flops=500),
        result("kernel", "decode_dense", "mosaic_gpu", "llama3_8b_32k_b8_int8", 1.0, bytes=84 * 10**6),
        result("kernel", "decode_dense", "mosaic_gpu", "llama3_8b_32k_b8", 1.0, bytes=90 * 10**6),
        result("kernel", "decode_dense", "mosaic_gpu", "llama3_8b_32k_int4", 1.0),  # a single sequence
        result("kernel", "decode_dense", "xla", "llama3_8b_32k_b8_int4", 1.0),
        result("kernel", "page_select", "mosaic_gpu", "llama3_8b_128k", 0.02, kernels_us={"score": 9.0, "choose": 5.0}),
        result("kernel", "kv_write_decode", "mosaic_gpu", "llama3_8b_128k_int8", 0.0035, kernels_us="no CUPTI"),
        result("kernel", "kv_write_prefill", "mosaic_gpu", "llama3_8b_128k_chunk8k_int8", 0.01),
    ]
    found = {target.name.split(":")[0]: target for target in targets(lines)}
    met = {name: target.is_met for name, target in found.items()}
    assert met == {
        "prefill, dense": False,
        "prefill, half streaming": True,
        "decode, bf16, batch >= 8": True,
        "decode, int8, batch >= 8": False,
        "decode, int4, batch >= 8": None,
        "page selector, 128K": True,
        "page selector, 128K, batch 1": True,
        "kv write, decode, batch 1": False,
        "kv write, prefill of 8K": True,
        "(no target) decode, selected pages": None,
    }
    assert found["prefill, dense"].measured == "0.9 (llama3_8b_128k_chunk8k; worst of 2)"
    tests = [{"kind": "test", "key": ["test", "a"], "outcome": "passed"}, {"kind": "error", "key": ["test", "b"]}]
    assert table([*lines, *tests]).startswith("values: 1 crashed, 1 passed; 0 benches had wrong values")
