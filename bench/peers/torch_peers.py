"""Attention that torch offers: FlashAttention-3 and SDPA, timed as CUDA graphs."""

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np

from bench.kernels.chain import rotation
from bench.kernels.compare import compare_rows
from bench.measure import MOST_SECONDS, calls_of_sample, samples_within
from bench.peers.peer import LONGEST_CHAIN, Peer, shapes, sizes
from pallas_kernels.core.workloads import Workload


def needs_torch() -> str | None:
    """Returns why torch cannot run here; None if it can."""
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


def needs_flash_attention() -> str | None:
    """Returns why FlashAttention-3 cannot run here; None if it can."""
    if reason := needs_torch():
        return reason
    try:
        _flash_attention()
    except (ImportError, OSError, RuntimeError) as error:
        return str(error).split("\n")[0][:200]
    return None


def flash_decode(w: Workload) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Returns FlashAttention-3's decoding, over pages if its build supports them."""
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


def flash_prefill(w: Workload) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Returns FlashAttention-3 of a chunk: its causal mask ends at the last key."""
    del w
    return partial(_flash_attention()[0].flash_attn_func, causal=True), {}


def sdpa(w: Workload, *, is_decode: bool) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Returns torch's scaled_dot_product_attention."""
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


def heads_first(_: Workload, q: Any, k: Any, v: Any) -> tuple[Any, ...]:
    """Returns arrays of the same shapes with heads first in memory, as torch needs them."""
    return tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))


def time_torch(op: str, w: Workload, peer: Peer, repeats: int) -> tuple[np.ndarray, dict[str, Any]]:
    """Returns the seconds of a call in each sample, and how they were measured."""
    import torch  # pyright: ignore[reportMissingImports]

    attend, labels = peer.attend[op](w)
    calls, _ = rotation(sizes(op, w), longest=LONGEST_CHAIN)
    torch.manual_seed(0)
    queries, keys = shapes(op, w)
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

    run, labels["timed_as"] = _recorded(loop)
    estimate = min(_event_seconds(run, 1) for _ in range(3))
    inner = calls_of_sample(estimate)
    samples = samples_within(MOST_SECONDS, estimate * inner, repeats)
    return np.array([_event_seconds(run, inner) for _ in range(samples)]) / calls, {"calls": calls, **labels}


def _recorded(loop: Callable[[], None]) -> tuple[Callable[[], None], str]:
    """Returns a function that starts the loop, as a CUDA graph or, if impossible, kernel by kernel; and which it is."""
    import torch  # pyright: ignore[reportMissingImports]

    loop()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            loop()
    except RuntimeError:
        torch.cuda.synchronize()
        return loop, "stream"
    return graph.replay, "graph"


def _event_seconds(run: Callable[[], None], inner: int) -> float:
    """Returns the seconds of one of ``inner`` runs, measured by CUDA events."""
    import torch  # pyright: ignore[reportMissingImports]

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(inner):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3 / inner
