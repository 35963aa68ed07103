"""Checkpoints: opening them, checking them, loading their tensors into the parameter tree."""

from lserve_jax.weights.load import Checkpoint, open_checkpoint

__all__ = ["Checkpoint", "open_checkpoint"]
