"""Compiled code: pure functions of pytrees over the paged KV cache."""
