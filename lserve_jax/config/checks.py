"""The one check of whole numbers for all settings."""

from numbers import Integral
from typing import Any

from lserve_jax.config.errors import InputError


def require_whole(name: str, value: Any, least: int = 1) -> int:
    """Returns the value as a plain `int`; raises `InputError` unless it is a whole number from ``least``."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise InputError(f"{name}={value!r} must be a whole number from {least}")
    return int(value)
