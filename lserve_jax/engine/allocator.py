"""Allocates physical pages of the two KV-cache pools to sequences (LServe, arXiv 2502.14866).

The retrieval pool keeps every page of a sequence. The streaming pool keeps only pages that the attention sink or the
local window of a future query can touch. A page id is valid in all layers at once.
"""

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from lserve_jax.config.checks import require_whole
from lserve_jax.config.pages import NO_PAGE, visible_pages
from lserve_jax.engine.request import Sequence


class PagePool:
    """The free list of one pool's pages, ids ``0 … num_pages - 1``; the page freed last is taken first.

    Attributes:
      num_pages: pages of the pool.
      keeps_all: whether the pool keeps every page of a sequence; else only those that its sink and window touch.
    """

    def __init__(self, num_pages: int, *, keeps_all: bool) -> None:
        self.num_pages = require_whole("num_pages", num_pages)
        self.keeps_all = keeps_all
        self._free = list(range(num_pages - 1, -1, -1))
        self._is_free = [True] * num_pages

    @property
    def num_free(self) -> int:
        """Returns how many pages are free."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Returns ``count`` free pages. The caller must ensure that there are enough."""
        if not 0 <= count <= self.num_free:
            raise ValueError(f"cannot take {count} pages: {self.num_free} of {self.num_pages} are free")
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._is_free[page] = False
        return pages

    def give_back(self, pages: Iterable[int]) -> None:
        """Frees all of ``pages``, or none if it raises.

        Raises:
          ValueError: if a page is not of this pool, already free, or given twice.
        """
        pages = list(pages)
        if len(set(pages)) != len(pages):
            raise ValueError(f"pages are given back twice in one call: {pages}")
        for page in pages:
            if not 0 <= page < self.num_pages:
                raise ValueError(f"page {page} is not of this pool, whose ids are 0 to {self.num_pages - 1}")
            if self._is_free[page]:
                raise ValueError(f"page {page} is given back, but it is free already")
        for page in pages:
            self._is_free[page] = True
        self._free += pages


class PageAllocator:
    """The allocator of both pools; only it writes the page tables of sequences.

    A pool is None if the model has no heads of that class; the tables of that class then stay empty.
    """

    def __init__(self, *, retrieval: PagePool | None, streaming: PagePool | None, sink: int, page_size: int) -> None:
        self.retrieval = retrieval
        self.streaming = streaming
        self.sink = sink
        self.page_size = page_size

    def reserve(self, sequence: Sequence, start: int, count: int, window: int) -> bool:
        """Returns whether the tables have the pages for a call of queries ``start … start + count - 1``.

        If True, the retrieval table has every page up to the last query's, and the streaming table exactly the pages
        that one of the queries sees; its other pages are freed. False means that a pool lacks pages and that nothing
        has changed.

        During a prefill, ``window`` must be ``max(prefill_local, local)``: with a shorter prefill window, pages that
        the first decode step reads would be freed before the prefill ends.
        """
        assert count >= 1 and window >= 1, (count, window)
        assert start + count <= sequence.retrieval_table.size * self.page_size, "past the sequence's own last page"
        changes = [
            (pool, table, np.flatnonzero(wanted & (table == NO_PAGE)), np.flatnonzero(~wanted & (table != NO_PAGE)))
            for pool, table, wanted in self._wanted(sequence, start, count, window)
        ]
        if any(new.size > pool.num_free + unseen.size for pool, _, new, unseen in changes):
            return False
        for pool, table, new, unseen in changes:
            _give_back(pool, table, unseen)
            table[new] = pool.take(new.size)
        return True

    def release_unseen(self, sequence: Sequence, position: int, window: int) -> None:
        """Frees the pages that the next query, at ``position``, cannot see.

        Those are streaming pages that its sink and window no longer touch, and pages of both pools beyond ``position``
        that the last call reserved and did not fill because it ended early.
        """
        for pool, table, wanted in self._wanted(sequence, position, 1, window):
            _give_back(pool, table, np.flatnonzero(~wanted & (table != NO_PAGE)))

    def free(self, sequence: Sequence) -> None:
        """Frees all pages of ``sequence``."""
        for pool, table in self._tables(sequence):
            _give_back(pool, table, np.flatnonzero(table != NO_PAGE))

    def _tables(self, sequence: Sequence) -> Iterator[tuple[PagePool, NDArray[np.int32]]]:
        if self.retrieval is not None:
            yield self.retrieval, sequence.retrieval_table
        if self.streaming is not None:
            yield self.streaming, sequence.streaming_table

    def _wanted(
        self, sequence: Sequence, start: int, count: int, window: int
    ) -> Iterator[tuple[PagePool, NDArray[np.int32], NDArray[np.bool_]]]:
        """Yields each pool with the sequence's table and the logical pages that the queries need in it."""
        for pool, table in self._tables(sequence):
            # A window as long as the context keeps every page.
            reach = start + count if pool.keeps_all else window
            yield (
                pool,
                table,
                visible_pages(
                    start, count, sink=self.sink, window=reach, page_size=self.page_size, num_pages=table.size
                ),
            )


def _give_back(pool: PagePool, table: NDArray[np.int32], logical: NDArray[np.intp]) -> None:
    pool.give_back(table[logical].tolist())
    table[logical] = NO_PAGE


def stack_tables(
    sequences: Iterable[Sequence], max_num_seqs: int, num_pages: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Returns new retrieval and streaming page tables [max_num_seqs, num_pages] of a batch, one row per slot.

    Rows of other slots and columns past the end of a sequence's table are -1. The arrays are copies, so that a running
    device call never sees a later change.
    """
    retrieval, streaming = np.full((2, max_num_seqs, num_pages), NO_PAGE, np.int32)
    for sequence in sequences:
        assert sequence.slot is not None
        retrieval[sequence.slot, : sequence.retrieval_table.size] = sequence.retrieval_table
        streaming[sequence.slot, : sequence.streaming_table.size] = sequence.streaming_table
    return retrieval, streaming
