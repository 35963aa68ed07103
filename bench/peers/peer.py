"""A peer: what it can run, and what a call of it moves."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from bench.kernels.ops import OPS
from bench.kernels.sizes import Sizes
from pallas_kernels.core.workloads import Workload

LONGEST_CHAIN = 20


class RefusedError(Exception):
    """Raised if a peer does not support a workload."""


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


def shapes(op: str, w: Workload) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the shapes of a call's queries, and of its keys and values."""
    tokens = 1 if op == "decode_dense" else w.chunk
    return (w.batch, tokens, w.num_heads, w.head_dim), (w.batch, w.context, w.num_kv_heads, w.head_dim)


def sizes(op: str, w: Workload) -> Sizes:
    """Returns what a call moves; each call has separate keys and values, since no page table selects others."""
    found = OPS[op].sizes(w)
    keys = 2 * math.prod(shapes(op, w)[1]) * jnp.dtype(w.dtype).itemsize
    return found._replace(pools=1, own=found.own + keys)
