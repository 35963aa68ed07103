"""What models, sparsity and sizes are: plain Python, hashable, without jax."""

from lserve_jax.config.model import ModelConfig, RopeConfig

__all__ = ["ModelConfig", "RopeConfig"]
