"""Attention that JAX offers: cuDNN plain and paged, its Mosaic kernel, XLA."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.kernels.cases import Case
from bench.kernels.chain import chain, rotation
from bench.kernels.compare import compare_rows
from bench.measure import is_gpu, sampled
from bench.peers.peer import LONGEST_CHAIN, Peer, RefusedError, shapes, sizes
from pallas_kernels.core.workloads import Workload


def needs_gpu() -> str | None:
    """Returns why peers that need a GPU cannot run; None if they can."""
    return None if is_gpu() else "JAX sees no GPU"


def jax_attention(w: Workload, *, implementation: str, is_decode: bool) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Returns JAX's attention by cuDNN or XLA."""
    if not is_decode and w.chunk != w.context:
        raise RefusedError("its causal mask begins at the first key: no chunk after a history")
    options: dict[str, Any] = {"is_causal": not is_decode, "implementation": implementation}
    return partial(jax.nn.dot_product_attention, **options), {}


def cudnn_paged(w: Workload) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Returns cuDNN's attention over pages, from JAX's private wrapper."""
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, paged_attention

    lengths = jnp.full(w.batch, w.context, jnp.int32)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, table: jax.Array) -> jax.Array:
        return paged_attention(
            *(q, k, v, jnp.ones_like(lengths), lengths, table, table),
            scale=w.head_dim**-0.5,
            mask_type=MaskType.PADDING,
        )

    return attend, {"page_size": w.page_size}


def paged(w: Workload, q: Any, k: Any, v: Any) -> tuple[Any, ...]:
    """Returns q, pages [B · pages, page_size, K, H] in order, and cuDNN's page table [B, 1, pages, 1]."""
    pages = [x.reshape(-1, w.page_size, *x.shape[2:]) for x in (k, v)]
    return q, *pages, jnp.arange(w.batch * w.max_pages, dtype=jnp.int32).reshape(w.batch, 1, -1, 1)


def jax_mosaic(w: Workload) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Returns the Mosaic GPU example of JAX's repository."""
    if w.chunk != w.context:
        raise RefusedError("its causal mask begins at the first key: no chunk after a history")
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    fields = {"block_q": 64, "block_kv": 128, "max_concurrent_steps": 2 if w.head_dim > 64 else 4, "causal": True}
    return partial(attention_mgpu.attention, config=attention_mgpu.TuningConfig(**fields)), fields


def time_jax(op: str, w: Workload, peer: Peer, repeats: int) -> tuple[np.ndarray, dict[str, Any]]:
    """Returns the seconds of a call in each sample, timed like our ops, and how they were measured."""
    attend, labels = peer.attend[op](w)
    calls, _ = rotation(sizes(op, w), longest=LONGEST_CHAIN)
    queries, keys = shapes(op, w)
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
