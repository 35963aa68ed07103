"""Attention of a chunk of prompt tokens over paged history and itself."""

from pallas_kernels.prefill_attention.api import prefill_attention, visible_walk
from pallas_kernels.prefill_attention.blocks import BlockList, BlockMeans, BlockRanges, Walk

__all__ = ["BlockList", "BlockMeans", "BlockRanges", "Walk", "prefill_attention", "visible_walk"]
