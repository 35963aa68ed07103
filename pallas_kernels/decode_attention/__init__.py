"""Attention of one new token per sequence: selected pages (retrieval heads), sink and window (streaming heads)."""

from pallas_kernels.decode_attention.api import decode_attention

__all__ = ["decode_attention"]
