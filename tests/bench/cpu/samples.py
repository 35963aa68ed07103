"""Measurements as `bench.cpu` writes them."""

from typing import Any


def sample(system: str, length: int, rate: float, ms: float, **labels: Any) -> dict[str, Any]:
    kind = {"part": "single", "batch": 1, "cache": "warm", "library": "ours", "sources": "new", "round": 0, **labels}
    facts = {"model": "m", "threads": 2, "jax": "1", "commit": "c", "date": "d", "tokens": [length], "peak_bytes": 2040}
    numbers = {"prefill_tok_per_s": rate, "ms_per_token": ms}
    plan = {"base_bytes": 1000, "plan_bytes": 1000, "plan_weight_bytes": 400, "plan_cache_bytes": 600}
    return {"kind": "sample", "system": system, "length": length, **kind, **facts, **numbers, "facts": plan}


RESULTS = [
    sample("lserve", 1024, 3000, 9, sources="old"),
    *(sample("dense", length, 2000, ms) for length, ms in ((1024, 20), (2048, 22), (8192, 30))),
    *(
        sample("lserve", length, rate, ms)
        for length, rate, ms in ((1024, 2400, 18), (2048, 2500, 20), (8192, 2400, 25))
    ),
    sample("transformers bf16", 2048, 2600, 40, library="transformers"),
    sample("transformers f32", 2048, 600, 50, library="transformers"),
    sample("llama.cpp F16", 2048, 400, 25, library="llama.cpp"),
    sample("llama.cpp F16 flash", 2048, 500, 30, library="llama.cpp"),
    sample("lserve", 8192, 2400, 25, part="long"),
]
