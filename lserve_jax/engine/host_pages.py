"""Pages of the KV cache in host memory, and what moves them there and back."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from numpy.typing import NDArray

from lserve_jax.runtime.cache import KVCache
from lserve_jax.runtime.pages import (
    BLOCK,
    Pages,
    PoolName,
    SlotRows,
    pools_of,
    read_pages,
    read_slot,
    slots_in,
    write_pages,
    write_slot,
)
from lserve_jax.runtime.programs import Call, Programs
from pallas_kernels import NO_PAGE


class HostPages(NamedTuple):
    """Pages in host memory: the leaves of every layer's pools are NumPy arrays, one row per page.

    ``retrieval`` and ``streaming`` each have any number of pages, and the order in which they were read.
    """

    retrieval: Pages
    streaming: Pages

    @property
    def nbytes(self) -> int:
        """Returns the bytes of all arrays."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


class PageMover:
    """Copies pages, and what slots hold beside them, between a cache and host memory, bit by bit.

    `write` and `write_slot` donate the cache that they are given: use the returned one.
    """

    def __init__(self, programs: Programs) -> None:
        self._programs = programs

    def calls(self, cache: KVCache) -> list[Call]:
        """Returns a call of every program, to compile them before they are needed; the cache may be abstract."""
        nothing = np.full(BLOCK, NO_PAGE, np.int32)
        found = []
        for pool in _pools_in(cache):
            block = jax.tree.map(lambda x: jax.ShapeDtypeStruct((BLOCK, *x.shape[1:]), x.dtype), pools_of(cache, pool))
            found += [_read_call(cache, nothing, pool), _write_call(cache, block, nothing, pool)]
        rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), slots_in(cache))
        return [*found, _read_slot_call(cache, 0), _write_slot_call(cache, rows, 0)]

    def read(self, cache: KVCache, retrieval_ids: Sequence[int], streaming_ids: Sequence[int]) -> HostPages:
        """Returns copies of pages in host memory; a pool that no layer has must have no ids."""
        return HostPages(
            retrieval=self._read(cache, retrieval_ids, "retrieval"),
            streaming=self._read(cache, streaming_ids, "streaming"),
        )

    def write(
        self, cache: KVCache, host: HostPages, retrieval_ids: Sequence[int], streaming_ids: Sequence[int]
    ) -> KVCache:
        """Returns the cache with the pages of ``host`` written to as many distinct pages of each pool."""
        _check_written(cache, host.retrieval, retrieval_ids, "retrieval")
        _check_written(cache, host.streaming, streaming_ids, "streaming")
        cache = self._write(cache, host.retrieval, retrieval_ids, "retrieval")
        return self._write(cache, host.streaming, streaming_ids, "streaming")

    def read_slot(self, cache: KVCache, slot: int) -> SlotRows:
        """Returns the open page and the page selections of a slot as NumPy arrays."""
        return jax.tree.map(np.array, self._programs.run(_read_slot_call(cache, slot)))

    def write_slot(self, cache: KVCache, rows: SlotRows, slot: int) -> KVCache:
        """Returns the cache with ``rows`` at a slot."""
        return self._programs.run(_write_slot_call(cache, rows, slot))

    def _read(self, cache: KVCache, ids: Sequence[int], pool: PoolName) -> Pages:
        _check_ids(cache, ids, pool)
        host = jax.tree.map(lambda x: np.empty((len(ids), *x.shape[1:]), x.dtype), pools_of(cache, pool))
        for rows, block in _blocks(ids):
            found = self._programs.run(_read_call(cache, block, pool))
            jax.tree.map(lambda to, x, rows=rows: np.copyto(to[rows], np.asarray(x)[: len(to[rows])]), host, found)
        return host

    def _write(self, cache: KVCache, host: Pages, ids: Sequence[int], pool: PoolName) -> KVCache:
        for rows, block in _blocks(ids):
            pages = jax.tree.map(lambda x, rows=rows: _padded(x[rows]), host)
            cache = self._programs.run(_write_call(cache, pages, block, pool))
        return cache


def _check_ids(cache: KVCache, ids: Sequence[int], pool: PoolName) -> None:
    """An id outside the pool would be clipped, or silently not be written."""
    num_pages = min(_lengths(cache, pool), default=0)
    assert all(0 <= page < num_pages for page in ids), f"{pool} pages {list(ids)} of a pool of {num_pages}"


def _check_written(cache: KVCache, host: Pages, ids: Sequence[int], pool: PoolName) -> None:
    """Called before the first write, which donates the cache."""
    _check_ids(cache, ids, pool)
    assert len(set(ids)) == len(ids), f"{pool} pages are written twice: {list(ids)}"
    assert {len(leaf) for leaf in jax.tree.leaves(host)} <= {len(ids)}, f"not as many {pool} pages as {len(ids)} ids"


def _lengths(cache: KVCache, pool: PoolName) -> Iterator[int]:
    return (leaf.shape[0] for leaf in jax.tree.leaves(pools_of(cache, pool)))


def _pools_in(cache: KVCache) -> list[PoolName]:
    names: tuple[PoolName, ...] = ("retrieval", "streaming")
    return [name for name in names if any(_lengths(cache, name))]


def _blocks(ids: Sequence[int]) -> Iterator[tuple[slice, NDArray[np.int32]]]:
    """Yields the places of each block of pages, and their ids [BLOCK], padded with `NO_PAGE`."""
    for start in range(0, len(ids), BLOCK):
        rows = slice(start, min(start + BLOCK, len(ids)))
        block = np.full(BLOCK, NO_PAGE, np.int32)
        block[: rows.stop - start] = ids[rows]
        yield rows, block


def _padded(x: np.ndarray) -> np.ndarray:
    """Returns an array with BLOCK rows, of which the last ones are zero."""
    if len(x) == BLOCK:
        return x
    padded = np.zeros((BLOCK, *x.shape[1:]), x.dtype)
    padded[: len(x)] = x
    return padded


def _read_call(cache: KVCache, ids: NDArray[np.int32], pool: PoolName) -> Call:
    return Call(f"read_{pool}_pages", read_pages, (cache, ids), {"pool": pool})


def _write_call(cache: KVCache, pages: Pages, ids: NDArray[np.int32], pool: PoolName) -> Call:
    return Call(f"write_{pool}_pages", write_pages, (cache, pages, ids), {"pool": pool})


def _read_slot_call(cache: KVCache, slot: int) -> Call:
    return Call("read_slot", read_slot, (cache, np.int32(slot)), {})


def _write_slot_call(cache: KVCache, rows: SlotRows, slot: int) -> Call:
    return Call("write_slot", write_slot, (cache, rows, np.int32(slot)), {})
