"""Results of kernels as `bench.kernels` writes them."""

from typing import Any


def kernel(op: str, workload: str, **fields: Any) -> dict[str, Any]:
    about = {"device": "NVIDIA H200", "date": "2026-11-21T12:00:00+00:00", "implementation": "mosaic_gpu"}
    return {"op": op, "workload": workload, "median_ms": 0.1, **about, **fields}


KERNELS = [
    kernel("decode_attention", "8k", gb_per_s=3600.0, tflop_per_s=14.4, share_of_limit=0.84, limit="bandwidth"),
    kernel("prefill_attention", "32k", gb_per_s=400.0, tflop_per_s=600.0, share_of_limit=0.77, limit="product"),
    kernel("kv_write", "8k", gb_per_s=2000.0, tflop_per_s=0.0, share_of_limit=0.47, limit="bandwidth"),
]
