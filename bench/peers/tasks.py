"""The peers by name, their tasks, and the line of each task's result."""

from dataclasses import replace
from functools import partial
from typing import Any

from bench.kernels.ops import OPS, WORKLOADS
from bench.kernels.sizes import dense
from bench.kernels.tasks import Task
from bench.measure import Limits, result
from bench.peers.jax_peers import cudnn_paged, jax_attention, jax_mosaic, needs_gpu, paged, time_jax
from bench.peers.peer import Peer, RefusedError
from bench.peers.torch_peers import (
    flash_decode,
    flash_prefill,
    heads_first,
    needs_flash_attention,
    needs_torch,
    sdpa,
    time_torch,
)
from bench.text import one_line

PEERS: dict[str, Peer] = {
    "fa3": Peer(needs_flash_attention, {"decode_dense": flash_decode, "prefill_dense": flash_prefill}, is_torch=True),
    "jax_cudnn": Peer(
        needs_gpu,
        {
            "decode_dense": partial(jax_attention, implementation="cudnn", is_decode=True),
            "prefill_dense": partial(jax_attention, implementation="cudnn", is_decode=False),
        },
    ),
    "jax_cudnn_paged": Peer(needs_gpu, {"decode_dense": cudnn_paged}, laid_out=paged),
    "torch_sdpa": Peer(
        needs_torch,
        {"decode_dense": partial(sdpa, is_decode=True), "prefill_dense": partial(sdpa, is_decode=False)},
        is_torch=True,
        laid_out=heads_first,
    ),
    "jax_mosaic": Peer(needs_gpu, {"prefill_dense": jax_mosaic}),
    "jax_xla": Peer(lambda: None, {"decode_dense": partial(jax_attention, implementation="xla", is_decode=True)}),
}


_TARGETS = (
    ("prefill_dense", "llama3_8b_32k_whole"),
    ("prefill_dense", "llama3_8b_128k_chunk8k"),
    ("decode_dense", "llama3_8b_128k_b8"),
    ("decode_dense", "llama3_8b_128k"),
    ("decode_dense", "llama3_8b_32k_b8"),
    ("prefill_dense", "llama3_8b_128k_whole"),
)
_OTHERS = (
    *(
        ("decode_dense", f"llama3_8b_{context}k{batch}")
        for context in (8, 32, 64, 256)
        for batch in ("", "_b8", "_b32")
    ),
    ("decode_dense", "llama3_8b_128k_b32"),
    ("decode_dense", "llama3_8b_512k"),
    ("decode_dense", "llama2_7b_16k_b8"),
    ("decode_dense", "smollm2_135m_8k"),
    ("prefill_dense", "llama3_8b_8k_whole"),
    ("prefill_dense", "smollm2_135m_8k_whole"),
)
WORKLOAD_SETS = {
    "targets": _TARGETS,
    "full": (*_TARGETS, *_OTHERS),
    "tiny": (("decode_dense", "tiny_mixed"), ("prefill_dense", "tiny_mixed")),
}


def tasks(workload_set: str, peers: list[str] | None = None) -> list[Task]:
    """Returns what a set measures, by peer."""
    names = peers or [name for name in PEERS if workload_set == "tiny" or name != "jax_xla"]
    pairs = WORKLOAD_SETS[workload_set]
    return [Task(op, name, workload) for op, workload in pairs for name in names if op in PEERS[name].attend]


def perform(task: Task, limits: Limits, repeats: int) -> dict[str, Any]:
    """Returns the line of a task: a result, or why there is none."""
    labels, peer = task._asdict(), PEERS[task.implementation]
    w = replace(dense(WORKLOADS[task.workload]), bits=(None, None))
    try:
        if reason := peer.missing():
            return {"kind": "missing", **labels, "reason": reason}
        time = time_torch if peer.is_torch else time_jax
        seconds, said = time(task.op, w, peer, repeats)
    except (RefusedError, MemoryError) as refusal:
        return {"kind": "refusal", **labels, "reason": str(refusal)}
    except Exception as error:  # noqa: BLE001  what a peer can do must not cost the other results
        return {"kind": "error", **labels, "reason": one_line(error)}
    sizes = OPS[task.op].sizes(w)
    return {
        "kind": "peer",
        **result(seconds, limits, bytes_moved=sizes.moved, flops=sizes.flops, **labels, checked_against="rows", **said),
    }
