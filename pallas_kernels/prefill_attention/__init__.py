"""Attention of a chunk of prompt tokens over paged history and itself."""

from pallas_kernels.prefill_attention.api import prefill_attention

__all__ = ["prefill_attention"]
