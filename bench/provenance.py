"""The conditions of a measurement: device, versions, commit, and a digest of the sources."""

import datetime
import hashlib
import importlib
import importlib.metadata
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import jax

ROOT = Path(__file__).parents[1]


@cache
def provenance() -> dict[str, str]:
    """Returns the conditions of a measurement: device, versions, commit and date."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.client.platform_version.split("\n")[0][:80],
        "jax": importlib.metadata.version("jax"),
        "jaxlib": importlib.metadata.version("jaxlib"),
        "python": sys.version.split()[0],
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


@cache
def sources() -> str:
    """Returns a short digest of the Python sources; results of other sources do not count.

    A run passes its digest to the processes that it starts, so that an edit in between does not divide the run.
    """
    if given := os.environ.get("BENCH_SOURCES"):
        return given
    files = sorted(
        file for folder in ("bench", "lserve_jax", "pallas_kernels") for file in (ROOT / folder).rglob("*.py")
    )
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


@cache
def commit() -> str:
    """Returns the commit of this checkout, with a plus if files differ from it; "unknown" without git."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        return "unknown"
    return described.stdout.strip() or "unknown"
