"""The device that an engine runs on, or that a memory plan is made for; and why one that was asked for is not there."""

import importlib.metadata
import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path

import jax

from lserve_jax.config.errors import InputError
from lserve_jax.engine import memory

NVIDIA_DEVICES = (Path("/dev/nvidiactl"), Path("/dev/nvidia0"), Path("/dev/dxg"), Path("/proc/driver/nvidia/version"))
"""Files of which one exists where an NVIDIA GPU is visible."""

_CUDA_EXTRA = "pip install 'lserve_jax[cuda13]' (for CUDA 12: cuda12)"
_GPU_FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"


@dataclass(frozen=True, kw_only=True)
class Device:
    """What settings and plans depend on.

    Attributes:
      platform: "cpu", "gpu" or "tpu".
      free_bytes: memory for weights and cache; None if it is not known.
      is_here: whether it is a device of this process; if not, a setup is only a plan.
    """

    platform: str
    free_bytes: int | None
    is_here: bool = True


def this_device() -> Device:
    """Returns the default device.

    Raises:
      InputError: if jax has none of the platform that JAX_PLATFORMS names, or cannot start any.
    """
    try:
        platform = jax.default_backend()
    except (RuntimeError, AssertionError) as error:  # jax asserts where the only platform asked for has no device
        raise InputError(_why_absent(error)) from None
    return Device(platform=platform, free_bytes=memory.free_memory())


def device_elsewhere(total_bytes: int | None = None) -> Device:
    """Returns a device of another machine, to plan for: a GPU, unless JAX_PLATFORMS names the CPU.

    Args:
      total_bytes: its memory, of which jax takes a share on a GPU; None if it is not known.
    """
    if jax.config.jax_platforms == "cpu":
        return Device(platform="cpu", free_bytes=total_bytes, is_here=False)
    free = None if total_bytes is None else int(total_bytes * _gpu_fraction())
    return Device(platform="gpu", free_bytes=free, is_here=False)


def overlooked_gpu(device: Device) -> str | None:
    """Returns a line if the CPU computes where a GPU was meant to, and JAX_PLATFORMS does not ask for the CPU."""
    if device.platform != "cpu" or jax.config.jax_platforms:
        return None
    is_visible, has_plugin = any(path.exists() for path in NVIDIA_DEVICES), "cuda" in installed_platforms()
    if is_visible and not has_plugin:
        return f"the CPU computes: an NVIDIA GPU is here, but jax has no CUDA plugin: {_CUDA_EXTRA}"
    if has_plugin and not is_visible:
        return (
            "the CPU computes: jax has a CUDA plugin, but no NVIDIA GPU is visible "
            "(JAX_PLATFORMS=cpu says that this is meant)"
        )
    return None


def installed_platforms() -> tuple[str, ...]:
    """Returns the platforms that this jax could start: "cpu", and those of its plugins."""
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    names = {re.sub(r"^xla_|\d+$", "", plugin.name) for plugin in plugins}
    if importlib.util.find_spec("libtpu") is not None:
        names.add("tpu")
    return ("cpu", *sorted(names))


def _why_absent(error: Exception) -> str:
    asked, installed = jax.config.jax_platforms, installed_platforms()
    reason = re.sub(r"^Unable to initialize backend '\w+': | \(.*JAX_PLATFORMS.*$", "", str(error)).rstrip(".")
    if not asked:
        return f"jax cannot start a device ({reason}); JAX_PLATFORMS=cpu computes on the CPU"
    named = asked.split(",")
    if not {"cuda", "gpu"}.isdisjoint(named) and "cuda" not in installed:
        remedy = f"for an NVIDIA GPU: {_CUDA_EXTRA}"
    elif "gpu" in named:
        remedy = "an NVIDIA GPU is named cuda"
    elif "cuda" in named:
        remedy = f"does nvidia-smi list a GPU here? {reason}".strip()
    else:
        remedy = reason
    return f"JAX_PLATFORMS={asked}: there is no such device here; this jax has {', '.join(installed)}; {remedy}"


def _gpu_fraction() -> float:
    """Returns the share of a GPU's memory that jax takes."""
    text = os.environ.get(_GPU_FRACTION, "0.75")
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{_GPU_FRACTION}={text!r} must be a number") from None
