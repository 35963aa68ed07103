"""Collects and replaces the launch configurations that kernels ask for."""

import dataclasses
import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

KERNEL_MODULES = tuple(
    f"pallas_kernels.{op}.mosaic_gpu"
    for op in ("decode_attention", "kv_write", "page_select", "prefill_attention", "quantized_matmul")
)


class Launch(NamedTuple):
    """A launch configuration that a kernel asked for: its op, the shape by which it is tuned, and the configuration."""

    op: str
    shape: str
    default: Any
    chosen: Any


@contextmanager
def launches(overrides: Mapping[str, Mapping[str, int]] | None = None) -> Iterator[list[Launch]]:
    """Collects the launch configurations of kernels traced inside, and may change them.

    Args:
      overrides: fields to replace in the heuristic's choice, by op; what was tuned before does not count then.
    """
    from pallas_kernels.core.launch import configure

    found: list[Launch] = []

    def collect(op: str, device: str, shape: str, default: Any) -> Any:
        # Of an op's launches (streaming heads beside 4-bit pages have their own) the first is changed.
        first = next((launch.shape for launch in found if launch.op == op), shape)
        changed = (overrides or {}).get(op) if shape == first else None
        chosen = configure(op, device, shape, default) if changed is None else dataclasses.replace(default, **changed)
        found.append(Launch(op, shape, default, chosen))
        return chosen

    modules = [importlib.import_module(name) for name in KERNEL_MODULES]
    modules = [module for module in modules if hasattr(module, "configure")]
    for module in modules:
        setattr(module, "configure", collect)  # noqa: B010
    _forget_traces(modules)
    try:
        yield found
    finally:
        for module in modules:
            setattr(module, "configure", configure)  # noqa: B010
        _forget_traces(modules)


def _forget_traces(modules: list[Any]) -> None:
    """Clears the caches of jitted kernels, since a traced kernel would not ask for its configuration again."""
    for function in [value for module in modules for value in vars(module).values()]:
        if hasattr(function, "clear_cache"):
            function.clear_cache()
