"""The prefix cache: pages of prompts that were read before, for prompts that begin alike.

An entry is one whole prefill chunk. A prompt that hits entries replays exactly the remaining calls of a cold run, so
its logits are the same bit for bit, also with quantised pages: what a chunk reads and writes depends on the chunks
before it and on nothing else. Tails of prompts and generated tokens are not entered: other programs wrote them.

Retrieval heads need the pages of all entries. Streaming heads need sink and window at the boundary where the prompt
goes on; such a window is kept and evicted as one thing. Windows are kept at the last two boundaries of a prompt and
where a prompt leaves the entries that it found (a junction), because the next prompt is likely to leave them there too.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from lserve_jax.engine.pools import PagePool


@dataclass(eq=False)
class Entry:
    """One whole chunk of prompts that begin alike.

    Attributes:
      digest: identifies the tokens up to the end of this chunk, and the salt.
      parent: the chunk before; None for the first one.
      retrieval: physical retrieval pages of the chunk.
      window: the physical page of each logical streaming page that the next token sees; None if it is not kept.
      children: how many entries have this one as their parent.
    """

    digest: bytes
    parent: "Entry | None"
    retrieval: tuple[int, ...]
    window: dict[int, int] | None = None
    children: int = 0


@dataclass(frozen=True)
class Hit:
    """What the cache has of a prompt.

    Attributes:
      num_chunks: chunks from the start of the prompt that need not be computed.
      reach: how many these could have been if the windows of all boundaries were kept.
      entries: the chunks whose retrieval pages are needed; the last one is that of the window.
    """

    num_chunks: int = 0
    reach: int = 0
    entries: tuple[Entry, ...] = ()

    @property
    def retrieval(self) -> list[int]:
        """Returns the physical retrieval pages of all chunks."""
        return [page for entry in self.entries for page in entry.retrieval]

    @property
    def window(self) -> dict[int, int]:
        """Returns the streaming pages at the end of the last chunk."""
        return (self.entries[-1].window or {}) if self.entries else {}


@dataclass
class CacheCounts:
    """What the cache has done.

    Attributes:
      queries: prompt tokens that were looked up.
      hits: prompt tokens that were found.
      evicted_entries, evicted_windows: how many were given up for other pages.
    """

    queries: int = 0
    hits: int = 0
    evicted_entries: int = 0
    evicted_windows: int = 0


@dataclass
class PrefixCache:
    """Entries by digest, the least recently used first. It holds the pages of its entries in their pools.

    Attributes:
      chunk: tokens per entry.
      retrieval, streaming: the pools; None for a pool that the model does not have.
    """

    chunk: int
    retrieval: PagePool | None
    streaming: PagePool | None
    counts: CacheCounts = field(default_factory=CacheCounts)
    _entries: dict[bytes, Entry] = field(default_factory=dict)
    _windows: dict[bytes, Entry] = field(default_factory=dict)

    @property
    def num_entries(self) -> int:
        """Returns how many chunks are cached."""
        return len(self._entries)

    @property
    def num_windows(self) -> int:
        """Returns at how many boundaries streaming heads can go on."""
        return len(self._windows)

    def digests(self, tokens: Sequence[int], salt: bytes) -> tuple[bytes, ...]:
        """Returns the digest of each whole chunk of a prompt, a chain of SHA-256 that begins with the salt."""
        ids = np.asarray(tokens, "<i4")
        digest, found = hashlib.sha256(salt).digest(), []
        for begin in range(0, len(ids) - self.chunk + 1, self.chunk):
            digest = hashlib.sha256(digest + ids[begin : begin + self.chunk].tobytes()).digest()
            found.append(digest)
        return tuple(found)

    def chain(self, digests: Iterable[bytes]) -> list[Entry]:
        """Returns the entries of a prompt's chunks from its start, as far as they exist."""
        found = []
        for digest in digests:
            entry = self._entries.get(digest)
            if entry is None:
                break
            found.append(entry)
        return found

    def match(self, digests: Sequence[bytes], length: int) -> Hit:
        """Returns what a prompt of ``length`` tokens need not compute; at least its last token is computed."""
        digests = digests[: (length - 1) // self.chunk]
        if self.retrieval is None:  # then nothing but the window is needed
            counts = range(len(digests), 0, -1)
            count = next((count for count in counts if digests[count - 1] in self._windows), 0)
            return Hit(count, count, (self._windows[digests[count - 1]],)) if count else Hit()
        chain = self.chain(digests)
        reach = len(chain)
        while chain and self.streaming is not None and chain[-1].window is None:
            chain.pop()
        return Hit(len(chain), reach, tuple(chain))

    def use(self, hit: Hit, length: int) -> None:
        """Counts a hit of a prompt of ``length`` tokens, and makes its entries the most recently used."""
        self.counts.queries += length
        self.counts.hits += hit.num_chunks * self.chunk
        self._touch(hit.entries)

    def _touch(self, entries: Sequence[Entry]) -> None:
        """Makes entries the most recently used; a child stays less recent than its parent, so that it goes first."""
        for table in (self._entries, self._windows):
            for entry in reversed(entries):
                if table.pop(entry.digest, None) is not None:
                    table[entry.digest] = entry

    def insert(self, digest: bytes, parent: Entry | None, retrieval: Sequence[int]) -> Entry:
        """Returns the entry of a chunk: the one that exists, or a new one that shares ``retrieval`` with the caller.

        ``parent`` is the entry of the chunk before, which the caller holds.
        """
        entry = self._entries.get(digest) or self._windows.get(digest)
        if entry is None:
            entry = Entry(digest, parent, tuple(retrieval))
            if self.retrieval is not None:
                self.retrieval.share(retrieval, is_cached=True)
                self._entries[digest] = entry
            if parent is not None:
                parent.children += 1
        self._touch([entry] if parent is None else [parent, entry])
        return entry

    def keep_window(self, entry: Entry, window: dict[int, int]) -> None:
        """Shares the streaming pages at the end of a chunk with the caller, if they are not kept yet."""
        if entry.window is None and self.streaming is not None:
            self.streaming.share(window.values(), is_cached=True)
            entry.window = dict(window)
            self._windows[entry.digest] = entry

    def evict(self, pool: PagePool, count: int) -> None:
        """Frees at least ``count`` pages of a pool, if so many are held by the cache alone."""
        before = pool.num_free
        if pool is self.streaming:
            for entry in list(self._windows.values()):
                if pool.num_free - before >= count:
                    break
                if pool.count_evictable((entry.window or {}).values()):
                    self._drop_window(entry)
                    self.counts.evicted_windows += 1
            return
        while pool.num_free - before < count and (leaf := self._first_leaf(pool)) is not None:
            self._remove(leaf)
            self.counts.evicted_entries += 1

    def _first_leaf(self, pool: PagePool) -> Entry | None:
        """Returns the least recently used of the chunks that nothing follows and nobody uses."""
        entries = self._entries.values()
        return next((one for one in entries if not one.children and pool.count_evictable(one.retrieval)), None)

    def clear(self) -> None:
        """Removes all entries."""
        for entry in list(self._windows.values()):
            self._drop_window(entry)
        for entry in list(self._entries.values()):
            self._remove(entry)

    def _remove(self, entry: Entry) -> None:
        assert self.retrieval is not None
        self._drop_window(entry)
        del self._entries[entry.digest]
        self.retrieval.give_back(entry.retrieval, is_cached=True)
        if entry.parent is not None:
            entry.parent.children -= 1

    def _drop_window(self, entry: Entry) -> None:
        if entry.window is not None:
            assert self.streaming is not None
            self.streaming.give_back(entry.window.values(), is_cached=True)
            del self._windows[entry.digest]
            entry.window = None
