"""Parts without a separate command: the environment, and the kernels' tests, run natively."""

import subprocess
from pathlib import Path
from typing import Any

from bench.gpu.parts import RESULTS
from bench.kernels.cupti import kernel_times
from bench.log import Log, is_outcome
from bench.measure import copy_bandwidth, is_gpu, product_rate
from bench.provenance import ROOT, provenance
from bench.text import one_line


def measure_environment(out: Path) -> None:
    """Writes the device's properties and limits."""
    log = Log(out / RESULTS)
    driver = ""
    try:
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem", "--format=csv"]
        driver = subprocess.run(query, capture_output=True, text=True, check=False, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        pass
    log.write({"kind": "environment", "is_gpu": is_gpu(), "nvidia_smi": driver, **provenance()})
    line = {"kind": "limits", "bandwidth": copy_bandwidth(), "product": product_rate(), **provenance()}
    log.write(line)
    print(f"copy {line['bandwidth'] / 1e9:.0f} GB/s, product {line['product'] / 1e12:.1f} TFLOP/s", flush=True)
    if log.begin(["environment", "cupti"]):
        log.end(["environment", "cupti"], {"kind": "cupti", **_probe_cupti()})


def _probe_cupti() -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    if not is_gpu():
        return {"is_working": False, "reason": "no GPU"}
    x, double = jnp.ones(2**20), jax.jit(lambda x: 2 * x)
    try:
        return {"is_working": True, "kernels_us": kernel_times(lambda: double(x), 1)}
    except (ImportError, AttributeError, RuntimeError) as error:
        return {"is_working": False, "reason": one_line(error)}


class _Recorder:
    """A pytest plugin that writes one line per test and runs no test twice."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.outcome, self.reason = "passed", ""

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        done = [line["key"] for line in self.log.lines() if is_outcome(line)]
        items[:] = [item for item in items if ["test", item.nodeid] not in done]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.outcome, self.reason = "passed", ""
        self.log.begin(["test", nodeid])

    def pytest_runtest_logreport(self, report: Any) -> None:
        if not report.passed:
            self.outcome, self.reason = report.outcome, str(report.longrepr).strip().split("\n")[-1][:300]
        if report.when == "teardown":
            line = {"kind": "test", "outcome": self.outcome, "reason": self.reason}
            self.log.end(["test", report.nodeid], line)


def run_tests(out: Path) -> None:
    """Runs the kernels' tests on this device."""
    import pytest

    options = ["-q", "-k", "hopper", "-W", "default", "-p", "no:cacheprovider"]
    pytest.main([str(ROOT / "tests" / "pallas_kernels"), *options], plugins=[_Recorder(Log(out / RESULTS))])


WORKERS = {"environment": measure_environment, "values": run_tests}
