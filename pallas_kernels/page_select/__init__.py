"""Query-aware selection of the KV pages that retrieval heads read."""

from pallas_kernels.page_select.api import page_select, selection_width

__all__ = ["page_select", "selection_width"]
