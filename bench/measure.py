"""How a bench measures: repeated timings, and the limits of the device, measured in the same run."""

import math
import time
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bench.provenance import provenance
from bench.spread import spread

L2_BYTES = 60 * 2**20
"""L2 cache of an H200; inputs that rotate among twice as much are cold."""
_SAMPLE_SECONDS = 2e-3
"""Least time of a sample on a GPU, since waiting for the device costs some 20 µs."""
MOST_SECONDS = 4.0
"""Most time that all samples of one call should take."""


def is_gpu() -> bool:
    """Whether JAX runs on a GPU."""
    return jax.default_backend() == "gpu"


def timings(call: Callable[[], Any], repeats: int, inner: int = 1) -> np.ndarray:
    """Returns the seconds of a call in each of ``repeats`` samples after one that does not count.

    Args:
      call: starts work on the device and returns its results.
      repeats: samples.
      inner: calls of a sample, started one after another and waited for together.
    """
    jax.block_until_ready(call())
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        for _ in range(inner - 1):
            call()
        jax.block_until_ready(call())
        seconds.append((time.perf_counter() - begin) / inner)
    return np.array(seconds)


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Returns the seconds of one call, waiting for its results, and the results."""
    begin = time.perf_counter()
    results = jax.block_until_ready(call())
    return time.perf_counter() - begin, results


def starting_seconds(call: Callable[[], Any]) -> float:
    """Returns the least time in which a call starts its work; if a whole call takes no longer, the device waits."""
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        started = call()
        seconds.append(time.perf_counter() - begin)
        jax.block_until_ready(started)
    return min(seconds)


def sampled(call: Callable[[], Any], repeats: int, most_seconds: float = MOST_SECONDS) -> np.ndarray:
    """Returns `timings` with samples as long as the device needs, and fewer of them (at least 5) if they are slow."""
    estimate = float(np.min(timings(call, 2)))
    inner = calls_of_sample(estimate) if is_gpu() else 1
    return timings(call, samples_within(most_seconds, estimate * inner, repeats), inner)


def calls_of_sample(seconds: float) -> int:
    """Returns the number of calls of ``seconds`` that a sample on a GPU needs."""
    return max(1, math.ceil(_SAMPLE_SECONDS / seconds))


def samples_within(most_seconds: float, sample_seconds: float, repeats: int) -> int:
    """Returns ``repeats``, or as many samples as fit the time if that is fewer, but at least 5 of them."""
    return max(min(repeats, 5), min(repeats, int(most_seconds / sample_seconds)))


@cache
def copy_bandwidth() -> float:
    """Returns the bytes per second, read and written, of a large copy (4 GiB on a GPU, 128 MiB elsewhere)."""
    size = 2**30 if is_gpu() else 2**25
    x, copy = jnp.arange(size, dtype=jnp.float32), jax.jit(lambda x: x + 1)
    return 2 * x.nbytes / float(np.median(sampled(lambda: copy(x), 15)))


@cache
def product_rate() -> float:
    """Returns the FLOP/s of a bfloat16 matrix product of random numbers (zeros and ones run faster)."""
    size = 8192 if is_gpu() else 1024
    x, y = (jax.random.normal(jax.random.key(seed), (size, size), jnp.bfloat16) for seed in range(2))
    product = jax.jit(jnp.matmul)
    return 2 * size**3 / float(np.median(sampled(lambda: product(x, y), 15)))


class Limits(NamedTuple):
    """The device's limits: bytes per second, read and written, and FLOPs per second of bfloat16 products."""

    bandwidth: float
    product: float


def device_limits(lines: list[dict[str, Any]]) -> Limits:
    """Returns the limits from the log of a run, or else measures them."""
    for line in reversed(lines):
        if line["kind"] == "limits" and line["device"] == jax.devices()[0].device_kind:
            return Limits(line["bandwidth"], line["product"])
    return Limits(copy_bandwidth(), product_rate())


def result(seconds: np.ndarray, limits: Limits, *, bytes_moved: int, flops: int, **labels: Any) -> dict[str, Any]:
    """Returns one result: median and spread in ms, and the achieved share of the nearer of the device's two limits."""
    median, low, high, samples = spread(seconds)
    shares = {"bandwidth": bytes_moved / median / limits.bandwidth, "product": flops / median / limits.product}
    nearer = max(shares, key=lambda name: shares[name])
    return {
        **labels,
        "median_ms": round(median * 1e3, 6),
        "quartiles_ms": [round(low * 1e3, 6), round(high * 1e3, 6)],
        "samples": samples,
        "bytes": bytes_moved,
        "flops": flops,
        "gb_per_s": round(bytes_moved / median / 1e9, 2),
        "tflop_per_s": round(flops / median / 1e12, 4),
        "limit": nearer,
        "share_of_limit": round(shares[nearer], 4),
        "limit_gb_per_s": round(limits.bandwidth / 1e9, 1),
        "limit_tflop_per_s": round(limits.product / 1e12, 2),
        **provenance(),
    }
