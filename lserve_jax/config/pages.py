"""How many pages, and which, the heads of a sequence keep."""

import numpy as np
from numpy.typing import NDArray

NO_PAGE = -1


def retrieval_pages(length: int, page_size: int) -> int:
    """Returns how many retrieval pages hold ``length`` tokens."""
    return -(-length // page_size)


def most_streaming_pages(sink: int, window: int, in_flight: int, page_size: int) -> int:
    """Returns the most streaming pages that one call of ``in_flight`` queries can touch, over all its positions.

    The queries' windows together cover ``window + in_flight - 1`` successive positions. These straddle the most pages
    if the first position is the last of its page. The sink's pages are added once the window has left them. The bound
    is tight: a long sequence reaches it. It is 7 for a decode step at the defaults (sink 128, window 256, page 64).
    """
    span = window + in_flight - 1
    return -(-sink // page_size) + (span + page_size - 2) // page_size + 1


def visible_pages(
    start: int, count: int, *, sink: int, window: int, page_size: int, num_pages: int
) -> NDArray[np.bool_]:
    """Returns which of ``num_pages`` logical pages queries ``start … start + count - 1`` of a streaming head see.

    A page counts if it holds a position ``j <= start + count - 1`` with ``j < sink`` or ``j > start - window``. This
    covers all queries: the window of the first begins earliest, and that of the last ends latest.
    """
    first = np.arange(num_pages) * page_size
    last = first + page_size - 1
    return (first < start + count) & ((first < sink) | (last > start - window))
