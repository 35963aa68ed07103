"""Query-aware selection of the KV pages that retrieval heads read."""

from pallas_kernels.page_select.api import page_select, selection_width
from pallas_kernels.page_select.selection import Selection, choose_pages

__all__ = ["Selection", "choose_pages", "page_select", "selection_width"]
