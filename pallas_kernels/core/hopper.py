"""The device for which Mosaic GPU kernels are traced: Hopper (H100, H200), or a refusal in one line."""

import re
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.core.paging import PagedKV
from pallas_kernels.core.quantization import QuantizedArray, QuantizedKeys

SHARED_MEMORY = 227 * 1024
"""Bytes of shared memory that one program may ask for."""

_HOPPER = re.compile(r"\b(G?H(20|100|200|800))\b")


class Device(NamedTuple):
    """A Hopper GPU: its name, and its number of multiprocessors."""

    kind: str
    multiprocessors: int


def require_hopper() -> Device:
    """Returns the traced program's device: that of the current abstract mesh, or the default backend's first one.

    Raises:
      NotImplementedError: if it is not a Hopper GPU.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind, cores = (device.device_kind, device.num_cores) if device is not None else _first_device()
    if not _HOPPER.search(kind):
        raise NotImplementedError(f"Mosaic GPU kernels need a Hopper GPU (H100, H200); this device is {kind!r}")
    return Device(kind, cores or 132)


def on_hopper(api: str) -> Callable[..., Any]:
    """Returns the Mosaic GPU kernel of an op, whose module is imported by the first call on a Hopper GPU.

    On other devices it refuses, without the time of Pallas' imports (a sixth of a second).

    The kernel is traced as without ``jax_enable_x64``. No array that comes in or goes out has 64 bits (see `dispatch`),
    and under the flag Pallas would count its loops (`pl.loop`) in 64 bits, which takes registers.

    Args:
      api: ``__name__`` of the op's `api` module; its `mosaic_gpu` is in the same package.
    """
    package = api.removesuffix(".api")

    def run(*args: Any, **options: Any) -> Any:
        require_hopper()
        kernel = getattr(import_module(f"{package}.mosaic_gpu"), package.rpartition(".")[2])
        with jax.enable_x64(False):
            return kernel(*args, **options)

    return run


def refuse_pools(pools: list[PagedKV]) -> None:
    """Refuses pools of a layer that the attention kernels do not support.

    Raises:
      NotImplementedError: with the reason.
    """
    for pool in pools:
        for stored in (pool.k, pool.v):
            if not isinstance(stored, QuantizedArray | QuantizedKeys):
                refuse_unless(stored.dtype == jnp.bfloat16, f"pages must be bfloat16, int8 or int4, not {stored.dtype}")
        refuse_unless(pool.page_size in (16, 32, 64, 128), f"page_size must be 16, 32, 64 or 128, not {pool.page_size}")


def _first_device() -> tuple[str, int | None]:
    device = (jax.local_devices() or jax.devices())[0]
    return device.device_kind, getattr(device, "core_count", None)


def refuse_unless(condition: bool, reason: str) -> None:
    """Refuses arguments that a kernel does not support.

    Raises:
      NotImplementedError: with the reason, if the condition does not hold.
    """
    if not condition:
        raise NotImplementedError(reason)
