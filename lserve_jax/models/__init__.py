"""Model families in Flax: stateless, without a cache of their own."""

import importlib
import warnings
from typing import Any

from lserve_jax.models.llama import Llama

__all__ = ["Llama"]


def __getattr__(name: str) -> Any:
    """Returns what has moved."""
    if name == "abstract_params":
        warnings.warn(
            "lserve_jax.models.abstract_params is deprecated: import it from lserve_jax.weights",
            FutureWarning,
            stacklevel=2,
        )
        # By name: checkpoints stand above models.
        return importlib.import_module("lserve_jax.weights").abstract_params
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
