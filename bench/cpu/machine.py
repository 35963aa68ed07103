"""The machine of a run on a CPU."""

import argparse
import os
import platform
from pathlib import Path
from typing import Any

from bench.provenance import provenance


def environment(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the machine of a run."""
    cpuinfo = Path("/proc/cpuinfo")
    fields = (
        [line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line] if cpuinfo.exists() else []
    )
    info = {name.strip(): value.strip() for name, value in fields}
    return {
        "kind": "environment",
        "cpu": info.get("model name", platform.processor()),
        "instructions": [flag for flag in info.get("flags", "").split() if flag.startswith(("avx", "amx", "fma"))],
        "cores": os.cpu_count(),
        "threads": args.threads,
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "load": os.getloadavg(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        **provenance(),
    }
