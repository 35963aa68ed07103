"""Results of whole models as `bench.e2e` writes them."""

from typing import Any

from bench.e2e.peer import TRANSFORMERS


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
        "peer": TRANSFORMERS,
        "context": 8192,
        "batch": 1,
        "ms_per_token": 25.0,
        "prefill_s": 0.4,
    }
    return [line | about for line in (*lines, peer)]
