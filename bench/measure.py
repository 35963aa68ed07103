"""How a bench measures: repeated timings, limits of the device taken in the same run, and a JSON line a result."""

import datetime
import importlib.metadata
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from typing import Any, TextIO

import jax
import jax.numpy as jnp
import numpy as np


def timings(call: Callable[[], Any], repeats: int) -> np.ndarray:
    """Returns the seconds of each of ``repeats`` calls after one that does not count."""
    jax.block_until_ready(call())
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - begin)
    return np.array(seconds)


@cache
def copy_bandwidth() -> float:
    """Returns the bytes a second, read and written, of a copy of 256 MiB on this device."""
    x, copy = jnp.zeros(2**26, jnp.float32), jax.jit(lambda x: x + 1)
    seconds = np.median(timings(lambda: copy(x), 15))
    return 2 * x.nbytes / float(seconds)


@cache
def product_rate() -> float:
    """Returns the FLOP/s of a bfloat16 matrix product on this device."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    x, product = jnp.ones((size, size), jnp.bfloat16), jax.jit(jnp.matmul)
    return 2 * size**3 / float(np.median(timings(lambda: product(x, x), 15)))


@cache
def provenance() -> dict[str, str]:
    """Returns device, versions, commit and date: what a number needs to mean anything."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "device": jax.devices()[0].device_kind,
        "jax": importlib.metadata.version("jax"),
        "python": sys.version.split()[0],
        "commit": commit.stdout.strip() or "unknown",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def result(seconds: np.ndarray, *, bytes_read: int, flops: int, **labels: Any) -> dict[str, Any]:
    """Returns one result: median and spread in ms, and the achieved share of the nearer of the device's two limits."""
    median = float(np.median(seconds))
    low, high = np.percentile(seconds, [25, 75])
    shares = {"bandwidth": bytes_read / median / copy_bandwidth(), "product": flops / median / product_rate()}
    nearer = max(shares, key=lambda name: shares[name])
    return {
        **labels,
        "median_ms": round(median * 1e3, 4),
        "quartiles_ms": [round(float(low) * 1e3, 4), round(float(high) * 1e3, 4)],
        "gb_per_s": round(bytes_read / median / 1e9, 2),
        "tflop_per_s": round(flops / median / 1e12, 4),
        "limit": nearer,
        "share_of_limit": round(shares[nearer], 4),
        **provenance(),
    }


def write(line: dict[str, Any], file: TextIO | None) -> None:
    """Prints a short form of a result, and appends it to the file at once: what has finished is never lost."""
    print(
        f"{line['op']:<18} {line['implementation']:<10} {line['workload']:<22} {line['median_ms']:>10.3f} ms  "
        f"{line['share_of_limit']:>6.1%} of {line['limit']}",
        flush=True,
    )
    if file is not None:
        file.write(json.dumps(line) + "\n")
        file.flush()
