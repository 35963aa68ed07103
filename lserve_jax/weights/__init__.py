"""Checkpoints: opens them, checks them, and loads their tensors into the parameter tree."""

from lserve_jax.weights.load import Checkpoint, open_checkpoint
from lserve_jax.weights.tensors import abstract_params

__all__ = ["Checkpoint", "abstract_params", "open_checkpoint"]
