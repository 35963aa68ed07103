"""Checks and times one op."""

from dataclasses import asdict
from typing import Any, NamedTuple

import jax
import numpy as np

from bench.kernels.cases import Case, evaluated
from bench.kernels.chain import LONGEST_CHAIN, LONGEST_CHAIN_OF_XLA, chain, rotation
from bench.kernels.cupti import kernel_times
from bench.kernels.launches import Launch, launches
from bench.kernels.ops import OPS
from bench.measure import L2_BYTES, is_gpu, sampled, starting_seconds
from bench.text import one_line
from pallas_kernels.core.workloads import Workload


def check(case: Case, implementation: str) -> str:
    """Returns what the values of an implementation were compared with, "nothing" if there is nothing else.

    Raises:
      AssertionError: if they differ.
    """
    found = [(name, expected) for name, expected in case.references if name != implementation]
    if not found:
        return "nothing"
    name, expected = found[0]
    actual = jax.block_until_ready(evaluated(case.call, implementation, case.shared, case.own[0]))
    case.compare(actual, expected(case.shared, case.own[0]))
    return name


class Measurement(NamedTuple):
    """The measurement of one case: seconds per call, and how they were measured."""

    seconds: np.ndarray
    labels: dict[str, Any]
    found: list[Launch]


def measure(
    op: str, w: Workload, implementation: str, *, repeats: int = 30, overrides: Any = None, has_kernels: bool = False
) -> Measurement:
    """Checks and times one op.

    Args:
      op: a name of `OPS`.
      w: the workload.
      implementation: the op's implementation.
      repeats: samples.
      overrides: launch configurations to use (`launches`).
      has_kernels: whether the GPU's own times of each kernel are wanted.

    Raises:
      NotImplementedError: if the implementation refuses.
      AssertionError: if values are wrong.
      MemoryError: if the workload does not fit.
    """
    sizes = OPS[op].sizes(w)
    calls, sets = rotation(sizes, longest=LONGEST_CHAIN if implementation == "mosaic_gpu" else LONGEST_CHAIN_OF_XLA)
    case = OPS[op].case(w, calls, sets)
    with launches(overrides) as found:
        checked_against = check(case, implementation)
        run = chain(case, implementation)
    labels: dict[str, Any] = {
        "config": asdict(found[0].chosen) if found else None,
        "checked_against": checked_against,
        "calls": calls,
        "is_cold": is_gpu() and min(calls * sizes.moved, sets * sizes.pools) >= 2 * L2_BYTES,
    }
    if has_kernels:
        try:
            labels["kernels_us"] = kernel_times(run, calls)
        except (RuntimeError, AttributeError) as error:
            labels["kernels_us"] = one_line(error)
    seconds = sampled(run, repeats) / calls
    labels["host_us"] = round(starting_seconds(run) / calls * 1e6, 3)
    return Measurement(seconds, labels, found)
