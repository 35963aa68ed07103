"""Model families: stateless Flax modules that receive their attention as a callable."""

from lserve_jax.models.llama import Llama, abstract_params

__all__ = ["Llama", "abstract_params"]
