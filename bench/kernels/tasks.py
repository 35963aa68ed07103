"""What `bench.kernels` measures, and the line that each task leaves."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from bench.kernels.ops import OPS, WORKLOADS, inapplicable
from bench.kernels.timing import measure
from bench.log import Log
from bench.measure import Limits, result
from bench.text import one_line
from pallas_kernels.core.workloads import PRODUCTS


class Task(NamedTuple):
    """One line of the results, before it is measured."""

    op: str
    implementation: str
    workload: str


_TARGETS: tuple[tuple[str, str], ...] = (
    *(("decode_attention", f"llama3_8b_128k_b8{bits}") for bits in ("", "_int8", "_int4")),
    *(("decode_dense", f"llama3_8b_32k_b8{bits}") for bits in ("", "_int8", "_int4")),
    ("page_select", "llama3_8b_128k"),
    ("page_select", "llama3_8b_128k_b8"),
    ("kv_write_decode", "llama3_8b_128k_int8"),
    ("kv_write_prefill", "llama3_8b_128k_chunk8k_int8"),
    ("prefill_dense", "llama3_8b_32k_whole"),
    ("prefill_attention", "llama3_8b_32k_whole"),
    ("prefill_dense", "llama3_8b_128k_chunk8k"),
    ("prefill_attention", "llama3_8b_128k_chunk8k"),
    ("prefill_attention", "llama3_8b_128k_chunk8k_int8"),
    ("decode_attention", "llama3_8b_128k_int8"),
    ("decode_dense", "llama3_8b_128k_int8"),
    ("prefill_dense", "llama3_8b_128k_whole"),
    *(("quantized_matmul", f"llama3_8b_gate_up_b1_{weights}") for weights in ("w4g128", "w8", "w8a8", "w4g32")),
)
"""The rows of the targets, those with the least known results first."""


def _full() -> Iterator[tuple[str, str]]:
    yield from _TARGETS
    for context in (128, 32, 256, 512, 64, 8):
        for batch in ("", "_b8", "_b32"):
            for bits in ("_int8", "", "_int4"):
                name = f"llama3_8b_{context}k{batch}{bits}"
                yield from ((op, name) for op in ("decode_attention", "decode_dense", "page_select", "kv_write_decode"))
    for name in ("llama2_7b_64k_int8", "llama2_7b_16k_b8", "llama2_7b_64k_b32_int4", "smollm2_135m_8k"):
        yield from ((op, name) for op in ("decode_attention", "decode_dense", "page_select", "kv_write_decode"))
    for name in ("8k_chunk2k", "64k_chunk8k", "256k_chunk8k", "128k_chunk2k"):
        for bits in ("", "_int8", "_int4"):
            yield from ((op, f"llama3_8b_{name}{bits}") for op in ("prefill_attention", "kv_write_prefill"))
    yield from ((op, "smollm2_135m_8k_chunk2k") for op in ("prefill_attention", "prefill_dense", "kv_write_prefill"))
    yield from (("quantized_matmul", name) for name in PRODUCTS)
    yield from (("kv_write_prefill", f"llama3_8b_128k{bits}") for bits in ("", "_int8", "_int4"))  # of 512 tokens


WORKLOAD_SETS: dict[str, tuple[tuple[str, str], ...]] = {
    "targets": _TARGETS,
    "full": tuple(dict.fromkeys(_full())),
    "tiny": (
        *((op, "tiny_mixed") for op in ("decode_attention", "page_select", "kv_write_prefill", "prefill_attention")),
        ("quantized_matmul", "tiny_w4g32"),
    ),
}


def tasks(workload_set: str, implementations: list[str] | None = None) -> list[Task]:
    """Returns what a set measures, the rows of the targets first."""
    pairs = WORKLOAD_SETS[workload_set]
    if implementations:
        return [Task(op, name, workload) for name in implementations for op, workload in pairs]
    if workload_set == "tiny":
        return [Task(op, "xla", workload) for op, workload in pairs]
    # Of XLA what takes it no minutes.
    by_xla = [pair for pair in pairs if pair in _TARGETS and pair[0] not in ("prefill_attention", "prefill_dense")]
    found = [("mosaic_gpu", pairs[: len(_TARGETS)]), ("xla", by_xla), ("mosaic_gpu", pairs[len(_TARGETS) :])]
    return [Task(op, name, workload) for name, some in found for op, workload in some]


def perform(task: Task, limits: Limits, repeats: int, *, has_kernels: bool = False) -> dict[str, Any]:
    """Returns the line of a task: a result, or why there is none."""
    labels = task._asdict()
    w = WORKLOADS[task.workload]
    if reason := inapplicable(task.op, w):
        return {"kind": "skip", **labels, "reason": reason}
    try:
        found = measure(task.op, w, task.implementation, repeats=repeats, has_kernels=has_kernels)
    except MemoryError as error:
        return {"kind": "skip", **labels, "reason": str(error)}
    except NotImplementedError as error:
        return {"kind": "refusal", **labels, "reason": str(error)}
    except Exception as error:  # noqa: BLE001  what else a kernel can do must not cost the other results
        reason = one_line(error)
        return {"kind": "wrong" if isinstance(error, AssertionError) else "error", **labels, "reason": reason}
    sizes = OPS[task.op].sizes(w)
    return {
        "kind": "kernel",
        **result(found.seconds, limits, bytes_moved=sizes.moved, flops=sizes.flops, **labels, **found.labels),
    }


def show(line: Mapping[str, Any]) -> None:
    """Prints a short form of a result, a refusal or an error."""
    name = f"{line['op']:<17} {line['implementation']:<15} {line['workload']:<26}"
    if "median_ms" in line:
        spread = (line["quartiles_ms"][1] - line["quartiles_ms"][0]) / line["median_ms"]
        print(
            f"{name} {line['median_ms']:>10.4f} ms ±{spread:<5.1%} {line['share_of_limit']:>6.1%} of {line['limit']}",
            flush=True,
        )
    else:
        print(f"{name} {line['kind']}: {line['reason']}", flush=True)


def run_tasks(kind: str, tasks: Iterable[Task], log: Log, perform: Callable[[Task], dict[str, Any]]) -> None:
    """Performs the tasks whose outcome the log lacks; each one's line is written at once and shown."""
    for task in tasks:
        key = [kind, *task]
        if log.begin(key):
            line = perform(task)
            log.end(key, line)
            show(line)
