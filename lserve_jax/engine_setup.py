"""Deprecated name of `lserve_jax.engine.setup`; `prepare` and `Setup` are names of `lserve_jax` itself."""

import warnings

from lserve_jax.engine.setup import DEFAULT_MODEL, IMPLEMENTATIONS, Setup, default_sampling_params, prepare

__all__ = ["DEFAULT_MODEL", "IMPLEMENTATIONS", "Setup", "default_sampling_params", "prepare"]

warnings.warn("lserve_jax.engine_setup is deprecated: import prepare from lserve_jax", FutureWarning, stacklevel=2)
