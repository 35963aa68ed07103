"""The pages of one pool of the KV cache: which are free, and how many hold each of the others."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from lserve_jax.config.checks import require_whole


class PagePool:
    """Pages with ids ``0 … num_pages - 1``. Sequences and the prefix cache hold them; one that nobody holds is free.

    The page freed last is taken first.

    Attributes:
      num_pages: pages of the pool.
      keeps_all: whether the pool keeps every page of a sequence; else only those that its sink and window touch.
    """

    def __init__(self, num_pages: int, *, keeps_all: bool) -> None:
        self.num_pages = require_whole("num_pages", num_pages)
        self.keeps_all = keeps_all
        self._free = list(range(num_pages - 1, -1, -1))
        self._holders = np.zeros(num_pages, np.int32)
        self._cached = np.zeros(num_pages, np.int32)  # how many of the holders are the prefix cache's

    @property
    def num_free(self) -> int:
        """Returns how many pages are free."""
        return len(self._free)

    @property
    def num_evictable(self) -> int:
        """Returns how many pages only the prefix cache holds."""
        return int(_is_evictable(self._cached, self._holders).sum())

    def count_evictable(self, pages: Iterable[int]) -> int:
        """Returns how many of some pages only the prefix cache holds."""
        some = list(pages)
        return int(_is_evictable(self._cached[some], self._holders[some]).sum())

    def take(self, count: int) -> list[int]:
        """Returns ``count`` free pages. The caller must ensure that there are enough."""
        if not 0 <= count <= self.num_free:
            raise ValueError(f"cannot take {count} pages: {self.num_free} of {self.num_pages} are free")
        pages = [self._free.pop() for _ in range(count)]
        self._holders[pages] = 1
        return pages

    def share(self, pages: Iterable[int], *, is_cached: bool = False) -> None:
        """Adds a holder to each of ``pages``, which somebody holds already; ``is_cached`` if it is the prefix cache.

        Raises:
          ValueError: if a page is not of this pool, free, or given twice; nothing has changed.
        """
        pages = self._held(pages, "shared")
        self._holders[pages] += 1
        self._cached[pages] += is_cached

    def give_back(self, pages: Iterable[int], *, is_cached: bool = False) -> None:
        """Takes a holder from each of ``pages``; a page without any is free.

        Raises:
          ValueError: if a page is not of this pool, already free, or given twice; nothing has changed.
        """
        pages = self._held(pages, "given back")
        if is_cached and (self._cached[pages] < 1).any():
            raise ValueError(f"the prefix cache does not hold all of these pages: {pages}")
        if not is_cached and (self._holders[pages] == self._cached[pages]).any():
            raise ValueError(f"only the prefix cache holds some of these pages: {pages}")
        self._holders[pages] -= 1
        self._cached[pages] -= is_cached
        self._free += [page for page in pages if not self._holders[page]]

    def _held(self, pages: Iterable[int], what: str) -> list[int]:
        pages = list(pages)
        if len(set(pages)) != len(pages):
            raise ValueError(f"pages are {what} twice in one call: {pages}")
        for page in pages:
            if not 0 <= page < self.num_pages:
                raise ValueError(f"page {page} is not of this pool, whose ids are 0 to {self.num_pages - 1}")
            if not self._holders[page]:
                raise ValueError(f"page {page} is {what}, but it is free already")
        return pages


def _is_evictable(cached: NDArray[np.int32], holders: NDArray[np.int32]) -> NDArray[np.bool_]:
    return (cached > 0) & (cached == holders)
