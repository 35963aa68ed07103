"""Allocates physical pages of the two KV-cache pools to sequences (LServe, arXiv 2502.14866).

The retrieval pool keeps every page of a sequence. The streaming pool keeps only pages that the attention sink or the
local window of a future query can touch. A page id is valid in all layers at once.
"""

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from lserve_jax.config.pages import NO_PAGE, visible_pages
from lserve_jax.engine.pools import PagePool
from lserve_jax.engine.prefix_cache import Entry, PrefixCache
from lserve_jax.engine.request import Sequence


class PageAllocator:
    """The allocator of both pools; only it writes the page tables of sequences.

    A pool is None if the model has no heads of that class; the tables of that class then stay empty. The prefix cache,
    if there is one, gives up pages when a pool has none left.
    """

    def __init__(
        self,
        *,
        retrieval: PagePool | None,
        streaming: PagePool | None,
        sink: int,
        page_size: int,
        cache: PrefixCache | None = None,
    ) -> None:
        self.retrieval = retrieval
        self.streaming = streaming
        self.sink = sink
        self.page_size = page_size
        self.cache = cache

    @property
    def pools(self) -> tuple[tuple[str, PagePool], ...]:
        """Returns the pools that there are, by name."""
        pools = ("retrieval", self.retrieval), ("streaming", self.streaming)
        return tuple((name, pool) for name, pool in pools if pool is not None)

    def reserve(self, sequence: Sequence, start: int, count: int, window: int) -> bool:
        """Returns whether the tables have the pages for a call of queries ``start … start + count - 1``.

        If True, the retrieval table has every page up to the last query's, and the streaming table exactly the pages
        that one of the queries sees. False means that a pool lacks pages, and that no page has been taken. Pages that
        no query sees are given back in both cases.

        During a prefill, ``window`` must be ``max(prefill_local, local)``: with a shorter prefill window, pages that
        the first decode step reads would be freed before the prefill ends.
        """
        assert count >= 1 and window >= 1, (count, window)
        assert start + count <= sequence.retrieval_table.size * self.page_size, "past the sequence's own last page"
        new = []
        for pool, table, wanted in self._wanted(sequence, start, count, window):
            _give_back(pool, table, np.flatnonzero(~wanted & (table != NO_PAGE)))
            new.append((pool, table, np.flatnonzero(wanted & (table == NO_PAGE))))
        if not all(self.has_room(pool, logical.size) for pool, _, logical in new):
            return False
        for pool, table, logical in new:
            table[logical] = self._take(pool, logical.size)
        return True

    def has_room(self, pool: PagePool, count: int) -> bool:
        """Returns whether a pool has ``count`` pages that are free or that the prefix cache can give up."""
        return count <= pool.num_free or count <= pool.num_free + pool.num_evictable

    def _take(self, pool: PagePool, count: int) -> list[int]:
        if count > pool.num_free:
            assert self.cache is not None
            self.cache.evict(pool, count - pool.num_free)
        return pool.take(count)

    def share(self, sequence: Sequence, retrieval: Iterable[int], window: Mapping[int, int]) -> None:
        """Gives a sequence without pages those that the prefix cache has of its prompt.

        Args:
          sequence: the sequence.
          retrieval: physical pages of its first logical pages.
          window: the physical page of each logical streaming page.
        """
        if self.retrieval is not None:
            self._hold(self.retrieval, sequence.retrieval_table, dict(enumerate(retrieval)))
        if self.streaming is not None:
            self._hold(self.streaming, sequence.streaming_table, window)

    def adopt(self, sequence: Sequence, entry: Entry, first: int) -> None:
        """Replaces a sequence's own retrieval pages from the logical page ``first`` on by the same ones of an entry.

        Two prompts that begin alike and run at once compute the same chunks; one copy of the pages is enough.
        """
        logical = np.arange(first, first + len(entry.retrieval))
        if self.retrieval is None or tuple(sequence.retrieval_table[logical].tolist()) == entry.retrieval:
            return
        _give_back(self.retrieval, sequence.retrieval_table, logical)
        self._hold(self.retrieval, sequence.retrieval_table, dict(zip(logical.tolist(), entry.retrieval, strict=True)))

    def _hold(self, pool: PagePool, table: NDArray[np.int32], pages: Mapping[int, int]) -> None:
        pool.share(pages.values())
        assert (table[list(pages)] == NO_PAGE).all(), "these pages would be lost"
        table[list(pages)] = list(pages.values())

    def window(self, sequence: Sequence, position: int, window: int) -> dict[int, int]:
        """Returns the physical page of each logical streaming page before ``position`` that the query there sees."""
        table = sequence.streaming_table
        seen = visible_pages(
            position, 1, sink=self.sink, window=window, page_size=self.page_size, num_pages=position // self.page_size
        )
        logical = np.flatnonzero(seen)
        assert (table[logical] != NO_PAGE).all(), "a window is kept before its pages are given back"
        return dict(zip(logical.tolist(), table[logical].tolist(), strict=True))

    def take_for(self, sequence: Sequence, retrieval: NDArray[np.intp], streaming: NDArray[np.intp]) -> None:
        """Gives a sequence new pages for these logical pages; there must be room."""
        logical = {id(self.retrieval): retrieval, id(self.streaming): streaming}
        for pool, table in self._tables(sequence):
            table[logical[id(pool)]] = self._take(pool, logical[id(pool)].size)

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
    rows: list[Sequence | None] = [None] * max_num_seqs
    for sequence in sequences:
        assert sequence.slot is not None
        rows[sequence.slot] = sequence
    return stack_rows(rows, num_pages)


def stack_rows(rows: list[Sequence | None], num_pages: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Returns new page tables [rows, num_pages] as `stack_tables` does, one row per sequence, -1 where none is."""
    retrieval, streaming = np.full((2, len(rows), num_pages), NO_PAGE, np.int32)
    for row, sequence in enumerate(rows):
        if sequence is not None:
            retrieval[row, : sequence.retrieval_table.size] = sequence.retrieval_table
            streaming[row, : sequence.streaming_table.size] = sequence.streaming_table
    return retrieval, streaming
