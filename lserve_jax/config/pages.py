"""How many pages, and which, hold what the heads of a sequence keep."""

import numpy as np
from numpy.typing import NDArray

NO_PAGE = -1


def retrieval_pages(length: int, page_size: int) -> int:
    """Returns how many retrieval pages hold `length` tokens."""
    return -(-length // page_size)


def most_streaming_pages(sink: int, window: int, in_flight: int, page_size: int) -> int:
    """Returns the most streaming pages that one call of `in_flight` queries can touch, over all its positions.

    The queries' windows together are `window + in_flight - 1` successive positions, which straddle the most pages when
    the first of them is the last of its page; the sink's pages come on top once the window has left them. Tight: a
    long sequence does hold this many. 7 for a decode step at the defaults (sink 128, window 256, page 64).
    """
    span = window + in_flight - 1
    return -(-sink // page_size) + (span + page_size - 2) // page_size + 1


def visible_pages(
    start: int, count: int, *, sink: int, window: int, page_size: int, num_pages: int
) -> NDArray[np.bool_]:
    """Returns which of `num_pages` logical pages queries `start … start + count - 1` of a streaming head see.

    A page counts when it holds a position `j <= start + count - 1` with `j < sink` or `j > start - window`: what any of
    the queries sees, as the first one's window begins earliest and the last one's ends latest.
    """
    first = np.arange(num_pages) * page_size
    last = first + page_size - 1
    return (first < start + count) & ((first < sink) | (last > start - window))
