"""Attention of one new token a sequence over selected pages (retrieval heads) and sink + window pages (streaming heads)."""

from pallas_kernels.decode_attention.api import decode_attention

__all__ = ["decode_attention"]
