"""Choice of the history blocks that a chunk of prompt tokens reads."""

from pallas_kernels.block_select.api import block_select

__all__ = ["block_select"]
