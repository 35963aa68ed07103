"""Times of what others have for the same work: `python -m bench.peers [--peer NAME] [--workload-set SET] [--out FILE]`.

Dense attention in bfloat16 over the same heads and tokens: of one new token a sequence (`decode_dense`), of a prompt's
last chunk or of a whole prompt (`prefill_dense`). A peer that is missing is a line that says why. Peers of torch are
timed as CUDA graphs, those of JAX like our own kernels (`bench.kernels.chain`).
"""

import argparse
import importlib
import importlib.util
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bench.kernels import OPS, WORKLOADS, Case, Sizes, chain, compare_rows, dense, rotation
from bench.measure import Limits, Log, device_limits, is_gpu, result, sampled, show
from pallas_kernels.core.workloads import Workload

_LONGEST_CHAIN = 20


class RefusedError(Exception):
    """A peer does not offer what is asked for."""


class Peer(NamedTuple):
    """Somebody else's attention.

    Attributes:
      missing: returns in one line why it cannot run here, None if it can.
      attend: by op: makes of a workload the function of q [B, T, N, H] and k, v [B, S, K, H] that is timed, or raises
        `RefusedError`; and what there is to say of it.
      is_torch: whether arrays are torch's.
      laid_out: turns q, k, v into what the function takes, before the clock runs.
    """

    missing: Callable[[], str | None]
    attend: dict[str, Callable[[Workload], tuple[Callable[..., Any], dict[str, Any]]]]
    is_torch: bool = False
    laid_out: Callable[[Workload, Any, Any, Any], tuple[Any, ...]] = lambda _, q, k, v: (q, k, v)


# JAX.


def _needs_gpu() -> str | None:
    return None if is_gpu() else "JAX sees no GPU"


def _jax_attention(w: Workload, *, implementation: str, is_decode: bool) -> tuple[Callable[..., Any], dict[str, Any]]:
    if not is_decode and w.chunk != w.context:
        raise RefusedError("its causal mask begins at the first key: no chunk after a history")
    options: dict[str, Any] = {"is_causal": not is_decode, "implementation": implementation}
    return partial(jax.nn.dot_product_attention, **options), {}


def _cudnn_paged(w: Workload) -> tuple[Callable[..., Any], dict[str, Any]]:
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, paged_attention

    lengths = jnp.full(w.batch, w.context, jnp.int32)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, table: jax.Array) -> jax.Array:
        return paged_attention(
            *(q, k, v, jnp.ones_like(lengths), lengths, table, table),
            scale=w.head_dim**-0.5,
            mask_type=MaskType.PADDING,
        )

    return attend, {"page_size": w.page_size}


def _paged(w: Workload, q: Any, k: Any, v: Any) -> tuple[Any, ...]:
    """Returns q, pages [B · pages, page_size, K, H] in order, and cuDNN's page table [B, 1, pages, 1]."""
    pages = [x.reshape(-1, w.page_size, *x.shape[2:]) for x in (k, v)]
    return q, *pages, jnp.arange(w.batch * w.max_pages, dtype=jnp.int32).reshape(w.batch, 1, -1, 1)


def _jax_mosaic(w: Workload) -> tuple[Callable[..., Any], dict[str, Any]]:
    if w.chunk != w.context:
        raise RefusedError("its causal mask begins at the first key: no chunk after a history")
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    fields = {"block_q": 64, "block_kv": 128, "max_concurrent_steps": 2 if w.head_dim > 64 else 4, "causal": True}
    return partial(attention_mgpu.attention, config=attention_mgpu.TuningConfig(**fields)), fields


# torch.


def _needs_torch() -> str | None:
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch  # pyright: ignore[reportMissingImports]

    return None if torch.cuda.is_available() else "torch sees no GPU"


@cache
def _flash_attention() -> tuple[Any, dict[str, bool]]:
    """Returns the module of FlashAttention-3 and what its build left out.

    Raises:
      ImportError: if there is none.
    """
    for name in ("flash_attn_interface", "fa3_fwd_interface"):
        if importlib.util.find_spec(name) is not None:
            module = importlib.import_module(name)
            config = name.replace("interface", "config")
            has_config = importlib.util.find_spec(config) is not None
            flags = importlib.import_module(config).CONFIG["build_flags"] if has_config else {}
            return module, flags
    raise ImportError("FlashAttention-3 is not installed (pip install --no-deps fa3-fwd)")


def _needs_flash_attention() -> str | None:
    if reason := _needs_torch():
        return reason
    try:
        _flash_attention()
    except (ImportError, OSError, RuntimeError) as error:
        return str(error).split("\n")[0][:200]
    return None


def _flash_decode(w: Workload) -> tuple[Callable[..., Any], dict[str, Any]]:
    import torch  # pyright: ignore[reportMissingImports]

    module, flags = _flash_attention()
    lengths = torch.full((w.batch,), w.context, dtype=torch.int32, device="cuda")
    options = {"cache_seqlens": lengths, "causal": True}
    is_paged = not flags.get("FLASHATTENTION_DISABLE_PAGEDKV", False)
    if not is_paged:
        return lambda q, k, v: module.flash_attn_with_kvcache(q, k, v, **options), {"is_paged": False}
    table = torch.arange(w.batch * w.max_pages, dtype=torch.int32, device="cuda").reshape(w.batch, -1)

    def attend(q: Any, k: Any, v: Any) -> Any:
        pages = (x.view(-1, w.page_size, *x.shape[2:]) for x in (k, v))
        return module.flash_attn_with_kvcache(q, *pages, page_table=table, **options)

    return attend, {"is_paged": True, "page_size": w.page_size}


def _flash_prefill(w: Workload) -> tuple[Callable[..., Any], dict[str, Any]]:
    del w  # its causal mask ends at the last key
    return partial(_flash_attention()[0].flash_attn_func, causal=True), {}


def _sdpa(w: Workload, *, is_decode: bool) -> tuple[Callable[..., Any], dict[str, Any]]:
    from torch.nn.attention.bias import causal_lower_right  # pyright: ignore[reportMissingImports]
    from torch.nn.functional import scaled_dot_product_attention  # pyright: ignore[reportMissingImports]

    if is_decode:
        options = {}
    elif w.chunk == w.context:
        options = {"is_causal": True}
    else:
        options = {"attn_mask": causal_lower_right(w.chunk, w.context)}

    def attend(q: Any, k: Any, v: Any) -> Any:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(q, k, v, enable_gqa=w.group > 1, **options).transpose(1, 2)

    return attend, {}


def _heads_first(_: Workload, q: Any, k: Any, v: Any) -> tuple[Any, ...]:
    """Returns arrays of the same shapes that lie in memory heads first, as torch wants them."""
    return tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))


PEERS: dict[str, Peer] = {
    "fa3": Peer(
        _needs_flash_attention, {"decode_dense": _flash_decode, "prefill_dense": _flash_prefill}, is_torch=True
    ),
    "jax_cudnn": Peer(
        _needs_gpu,
        {
            "decode_dense": partial(_jax_attention, implementation="cudnn", is_decode=True),
            "prefill_dense": partial(_jax_attention, implementation="cudnn", is_decode=False),
        },
    ),
    "jax_cudnn_paged": Peer(_needs_gpu, {"decode_dense": _cudnn_paged}, laid_out=_paged),
    "torch_sdpa": Peer(
        _needs_torch,
        {"decode_dense": partial(_sdpa, is_decode=True), "prefill_dense": partial(_sdpa, is_decode=False)},
        is_torch=True,
        laid_out=_heads_first,
    ),
    "jax_mosaic": Peer(_needs_gpu, {"prefill_dense": _jax_mosaic}),
    "jax_xla": Peer(lambda: None, {"decode_dense": partial(_jax_attention, implementation="xla", is_decode=True)}),
}


# Measuring.


def _shapes(op: str, w: Workload) -> tuple[tuple[int, ...], tuple[int, ...]]:
    tokens = 1 if op == "decode_dense" else w.chunk
    return (w.batch, tokens, w.num_heads, w.head_dim), (w.batch, w.context, w.num_kv_heads, w.head_dim)


def _sizes(op: str, w: Workload) -> Sizes:
    """Every call has its own keys and values: there is no page table to take others from."""
    sizes = OPS[op].sizes(w)
    keys = 2 * math.prod(_shapes(op, w)[1]) * jnp.dtype(w.dtype).itemsize
    return sizes._replace(pools=1, own=sizes.own + keys)


def _time_jax(op: str, w: Workload, peer: Peer, repeats: int) -> tuple[np.ndarray, dict[str, Any]]:
    attend, labels = peer.attend[op](w)
    calls, _ = rotation(_sizes(op, w), longest=_LONGEST_CHAIN)
    queries, keys = _shapes(op, w)
    own = []
    for i in range(calls):
        seeds = jax.random.split(jax.random.key(i), 3)
        arrays = (jax.random.normal(s, shape, w.dtype) for s, shape in zip(seeds, (queries, keys, keys), strict=True))
        own.append(peer.laid_out(w, *arrays))

    def call(shared: Any, own: Any, *, implementation: str) -> jax.Array:
        del shared, implementation
        return attend(*own)

    run = chain(Case(call, None, own, [], is_writing=False, compare=compare_rows), "peer")
    q, k, v, *_ = own[0]
    k, v = (x.reshape(keys)[0].astype(jnp.float32) for x in (k, v))
    q = q[0, -1].astype(jnp.float32).reshape(w.num_kv_heads, w.group, w.head_dim)
    weights = jax.nn.softmax(jnp.einsum("kgh,skh->kgs", q, k, precision="highest") * w.head_dim**-0.5, axis=-1)
    expected = jnp.einsum("kgs,skh->kgh", weights, v, precision="highest").reshape(w.num_heads, w.head_dim)
    compare_rows(run()[0][0, -1], expected)
    return sampled(run, repeats) / calls, {"calls": calls, **labels}


def _time_torch(op: str, w: Workload, peer: Peer, repeats: int) -> tuple[np.ndarray, dict[str, Any]]:
    import torch  # pyright: ignore[reportMissingImports]

    attend, labels = peer.attend[op](w)
    calls, _ = rotation(_sizes(op, w), longest=_LONGEST_CHAIN)
    torch.manual_seed(0)
    queries, keys = _shapes(op, w)
    random = partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    own = [peer.laid_out(w, random(queries), random(keys), random(keys)) for _ in range(calls)]

    q, k, v = (x.float() for x in (own[0][0][0, -1], own[0][1][0], own[0][2][0]))
    scores = torch.einsum("kgh,skh->kgs", q.reshape(w.num_kv_heads, w.group, w.head_dim), k) * w.head_dim**-0.5
    expected = torch.einsum("kgs,skh->kgh", scores.softmax(-1), v).reshape(w.num_heads, w.head_dim)
    out = attend(*own[0])
    compare_rows((out[0] if isinstance(out, tuple) else out)[0, -1].float().cpu().numpy(), expected.cpu().numpy())

    def loop() -> None:
        for arguments in own:
            attend(*arguments)

    loop()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            loop()
        run, labels["timed_as"] = graph.replay, "graph"
    except RuntimeError:
        torch.cuda.synchronize()
        run, labels["timed_as"] = loop, "stream"

    def seconds(inner: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(inner):
            run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3 / inner

    estimate = min(seconds(1) for _ in range(3))
    inner = max(1, math.ceil(2e-3 / estimate))
    repeats = max(min(repeats, 5), min(repeats, int(4.0 / (estimate * inner))))
    return np.array([seconds(inner) for _ in range(repeats)]) / calls, {"calls": calls, **labels}


class Task(NamedTuple):
    """One line of the results to be."""

    op: str
    implementation: str
    workload: str

    @property
    def key(self) -> list[str]:
        """The key in the log."""
        return ["peer", *self]


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
        time = _time_torch if peer.is_torch else _time_jax
        seconds, said = time(task.op, w, peer, repeats)
    except (RefusedError, MemoryError) as refusal:
        return {"kind": "refusal", **labels, "reason": str(refusal)}
    except Exception as error:  # noqa: BLE001  what a peer can do must not cost the other results
        return {"kind": "error", **labels, "reason": f"{type(error).__name__}: {error}".split("\n")[0][:300]}
    sizes = OPS[task.op].sizes(w)
    return {
        "kind": "peer",
        **result(seconds, limits, bytes_moved=sizes.moved, flops=sizes.flops, **labels, checked_against="rows", **said),
    }


def main(arguments: list[str] | None = None) -> None:
    """Times what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=tuple(PEERS), action="append", help="repeatable; all unless given")
    parser.add_argument("--workload-set", choices=tuple(WORKLOAD_SETS), default="tiny")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--out", type=Path, help="JSON lines are appended to this file")
    args = parser.parse_args(arguments)
    log = Log(args.out)
    limits = device_limits(log.lines())
    for task in tasks(args.workload_set, args.peer):
        if log.begin(task.key):
            line = perform(task, limits, args.repeats)
            log.end(task.key, line)
            show(line)


if __name__ == "__main__":
    main()
