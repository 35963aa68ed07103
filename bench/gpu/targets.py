"""The targets for an H200, and whether the results meet them."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from bench.kernels.ops import WORKLOADS


class Target(NamedTuple):
    """A row of the table: the target, the measurement, and whether it meets the target (None if there is none)."""

    name: str
    measured: str
    is_met: bool | None


def _times(lines: list[dict[str, Any]], op: str, implementation: str = "mosaic_gpu") -> dict[str, dict[str, Any]]:
    """Returns the newest result of an op by workload."""
    return {
        line["workload"]: line
        for line in lines
        if line["kind"] in ("kernel", "peer") and (line["op"], line["implementation"]) == (op, implementation)
    }


def _worst(name: str, found: dict[str, float], *, least: float | None = None, most: float | None = None) -> Target:
    """Returns the row of a lower or upper bound for all workloads, with the workload that is furthest off."""
    if not found:
        return Target(name, "not measured", None)
    worst = min(found, key=lambda workload: found[workload]) if most is None else max(found, key=lambda w: found[w])
    value = found[worst]
    is_met = value >= least if least is not None else most is None or value <= most
    return Target(name, f"{value:.3g} ({worst}; worst of {len(found)})", is_met)


def _kernel_us(line: dict[str, Any]) -> float:
    """Returns the microseconds of a call: CUPTI's time of its kernels, or else the timing with its gaps."""
    kernels_us = line.get("kernels_us")
    return sum(kernels_us.values()) if isinstance(kernels_us, dict) else line["median_ms"] * 1e3


def _share(line: dict[str, Any]) -> float:
    """Returns the share of the copy bandwidth that the kernels of a call reach."""
    return line["bytes"] / _kernel_us(line) / (line["limit_gb_per_s"] * 1e3)


def targets(lines: list[dict[str, Any]]) -> Iterator[Target]:
    """Returns the targets for an H200, and what the lines show."""
    dense, half = _times(lines, "prefill_dense"), _times(lines, "prefill_attention")
    theirs = _times(lines, "prefill_dense", "fa3")
    ratios = {name: theirs[name]["median_ms"] / dense[name]["median_ms"] for name in theirs.keys() & dense.keys()}
    yield _worst("prefill, dense: >= 0.95x of FlashAttention-3's speed", ratios, least=0.95)
    excess = {
        name: half[name]["median_ms"] / dense[name]["median_ms"] / (half[name]["flops"] / dense[name]["flops"])
        for name in half.keys() & dense.keys()
    }
    yield _worst("prefill, half streaming: <= 1.08x of dense x visible share", excess, most=1.08)

    for bits in ("bf16", "int8", "int4"):
        shares = {}
        for op in ("decode_attention", "decode_dense"):
            for name, line in _times(lines, op).items():
                w = WORKLOADS[name]
                read = w.batch * (w.context if op == "decode_dense" else w.num_selected * w.page_size)
                stored = name.rpartition("_")[2] if "_int" in name else "bf16"
                if w.batch >= 8 and w.context >= 2**15 and read >= 2**15 and stored == bits:
                    shares[f"{op} {name}"] = _share(line)
        yield _worst(f"decode, {bits}, batch >= 8: >= 0.85 of the copy bandwidth", shares, least=0.85)

    select = _times(lines, "page_select")
    shares = {name: _share(select[name]) for name in ("llama3_8b_128k", "llama3_8b_128k_b8") if name in select}
    yield _worst("page selector, 128K: >= 0.70 of the copy bandwidth", shares, least=0.70)
    alone = {name: _kernel_us(line) for name, line in select.items() if name == "llama3_8b_128k"}
    yield _worst("page selector, 128K, batch 1: <= 15 us", alone, most=15.0)

    writes = {
        name: _kernel_us(line) for name, line in _times(lines, "kv_write_decode").items() if WORKLOADS[name].batch == 1
    }
    yield _worst("kv write, decode, batch 1: <= 3 us", writes, most=3.0)
    chunks = {
        name: 1 / _share(line)
        for name, line in _times(lines, "kv_write_prefill").items()
        if WORKLOADS[name].chunk >= 8192
    }
    yield _worst("kv write, prefill of 8K: <= 1.3x of its bytes' time", chunks, most=1.3)

    ours, dense = _times(lines, "decode_attention"), _times(lines, "decode_dense", "fa3")
    ours = {name: line for name, line in ours.items() if name in dense}
    speedups = {name: dense[name]["median_ms"] / line["median_ms"] for name, line in ours.items()}
    yield _worst("(no target) decode, selected pages: times FlashAttention-3 over all of them", speedups)


def table(lines: list[dict[str, Any]]) -> str:
    """Returns the table of targets, below a line that says what was tested."""
    ended = [line for line in lines if line.get("key", [""])[0] == "test" and line["kind"] != "begin"]
    tests = {line["key"][1]: line.get("outcome", "crashed") for line in ended}
    counts = [f"{list(tests.values()).count(outcome)} {outcome}" for outcome in sorted(set(tests.values()))]
    wrong = sum(line["kind"] == "wrong" for line in lines)
    rows = [f"values: {', '.join(counts) or 'no test was run'}; {wrong} benches had wrong values"]
    verdicts = {True: "met", False: "MISSED", None: ""}
    rows += [f"{row.name:<78} {row.measured:<64} {verdicts[row.is_met]}".rstrip() for row in targets(lines)]
    return "\n".join(rows)
