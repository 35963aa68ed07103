"""Model families in Flax: stateless modules that hold no cache."""

import importlib
import warnings
from typing import Any

from lserve_jax.models.llama import Llama

__all__ = ["Llama"]


def __getattr__(name: str) -> Any:
    """Returns a name that has moved to another module."""
    if name == "abstract_params":
        warnings.warn(
            "lserve_jax.models.abstract_params is deprecated: import it from lserve_jax.weights",
            FutureWarning,
            stacklevel=2,
        )
        # Imported by name, because `lserve_jax.weights` imports this package.
        return importlib.import_module("lserve_jax.weights").abstract_params
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
