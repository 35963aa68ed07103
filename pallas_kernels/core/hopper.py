"""The device that Mosaic GPU kernels are traced for: Hopper (H100, H200), or a refusal in one line."""

import re
from typing import NamedTuple

import jax

SHARED_MEMORY = 227 * 1024
"""Bytes of shared memory that one program may ask for."""

_HOPPER = re.compile(r"\b(G?H(20|100|200|800))\b")


class Device(NamedTuple):
    """A Hopper GPU: its name, and its number of multiprocessors."""

    kind: str
    multiprocessors: int


def require_hopper() -> Device:
    """Returns the device that is traced for: that of the abstract mesh in force, else the first of the default backend.

    Raises:
      NotImplementedError: if it is no Hopper GPU.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind, cores = (device.device_kind, device.num_cores) if device is not None else _first_device()
    if not _HOPPER.search(kind):
        raise NotImplementedError(f"Mosaic GPU kernels need a Hopper GPU (H100, H200); this device is {kind!r}")
    return Device(kind, cores or 132)


def _first_device() -> tuple[str, int | None]:
    device = (jax.local_devices() or jax.devices())[0]
    return device.device_kind, getattr(device, "core_count", None)


def refuse_unless(condition: bool, reason: str) -> None:
    """Refuses arguments that a kernel is not made for.

    Raises:
      NotImplementedError: with the reason, if the condition does not hold.
    """
    if not condition:
        raise NotImplementedError(reason)
