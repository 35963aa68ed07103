"""The one check of whole numbers for all settings, and the largest numbers."""

from numbers import Integral
from typing import Any

from lserve_jax.config.errors import InputError, shown

LARGEST_INT = 2**31 - 1
"""The largest setting: positions and page numbers have 32 bits."""
LARGEST_NUMBER = 1e30
"""The largest real number of a setting or a file, above any in use: its products still fit into a float32."""


def require_whole(name: str, value: Any, least: int = 1) -> int:
    """Returns the value as an `int`; raises `InputError` unless it is whole and from ``least`` to `LARGEST_INT`."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise InputError(f"{name}={shown(value)} must be a whole number from {least}")
    if int(value) > LARGEST_INT:
        raise InputError(f"{name}={shown(value)} must be at most {LARGEST_INT}")
    return int(value)
