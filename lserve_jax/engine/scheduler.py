"""Plans the next device call: a chunk of a prompt, or decode steps for all decoding sequences.

Prefill and decode calls take turns while anybody decodes, so that a long prompt does not stop the others' streams. A
prompt that needs one call only may pass between the chunks of a longer one. Requests are admitted by priority, then
first come, first served; none overtakes one that waits for pages or a slot, so none starves. Who runs when affects no
result.
"""

from bisect import insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, count, islice

import numpy as np

from lserve_jax.config.attention import AttentionConfig
from lserve_jax.config.errors import InputError
from lserve_jax.config.pages import NO_PAGE
from lserve_jax.config.sizes import PoolSizes, Sizes
from lserve_jax.engine.allocator import PageAllocator
from lserve_jax.engine.plans import Chunk, Decode, Plan, Prefill, Swap
from lserve_jax.engine.pools import PagePool
from lserve_jax.engine.prefix_cache import Entry, Hit, PrefixCache
from lserve_jax.engine.request import RANK, Request, Sequence, Status, Swapped, require_room
from lserve_jax.engine.room import Room

_LOOKED_AT = 64
"""How many waiting requests are looked at for one that may pass a long prompt."""


@dataclass(frozen=True, kw_only=True)
class Turns:
    """How calls take turns.

    Attributes:
      prefill_calls: prefill calls between two decode calls, while anybody decodes.
      busy_steps: decode steps per call while a prompt is read or waits; None takes as many as otherwise.
      short_chunk: the longest prompt that may share a prefill call with others.
      short_rows: how many such prompts share one.
      has_tails: whether the last chunk of a prompt of several chunks has smaller programs of its own.
    """

    prefill_calls: int = 1
    busy_steps: int | None = None
    short_chunk: int = 64
    short_rows: int = 1
    has_tails: bool = True


class Scheduler:
    """Orders requests and manages their pages. The caller repeats `schedule`, a run of the plan, and `record_…`.

    Attributes:
      waiting: sequences that have not begun, in the order of service.
      running: sequences with a slot.
      swapped: sequences whose pages are in host memory, in the order of service.
      num_swaps: how often a sequence has left.
    """

    def __init__(
        self,
        sizes: Sizes,
        attention: AttentionConfig,
        pools: PoolSizes,
        *,
        turns: Turns | None = None,
        has_prefix_cache: bool = True,
    ) -> None:
        """Creates a scheduler without requests; the prefix cache needs chunks of whole pages, else there is none."""
        self.sizes = sizes
        self.attention = attention
        self.turns = turns or Turns()
        retrieval = PagePool(pools.retrieval, keeps_all=True) if pools.retrieval else None
        streaming = PagePool(pools.streaming, keeps_all=False) if pools.streaming else None
        can_cache = has_prefix_cache and sizes.prefill_chunk % attention.page_size == 0
        self.cache = PrefixCache(sizes.prefill_chunk, retrieval, streaming) if can_cache else None
        self.allocator = PageAllocator(
            retrieval=retrieval,
            streaming=streaming,
            sink=attention.sink,
            page_size=attention.page_size,
            cache=self.cache,
        )
        self.room = Room(sizes, attention, self.allocator, pools.swap)
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.swapped: list[Sequence] = []
        self.num_swaps = 0
        self._live: dict[int, Sequence] = {}
        self._numbers = count()
        self._free_slots = list(range(sizes.max_num_seqs - 1, -1, -1))
        self._prefills = 0  # since the last decode call
        self._has_passed = False

    @property
    def num_free_slots(self) -> int:
        """Returns how many slots no sequence has."""
        return len(self._free_slots)

    @property
    def is_idle(self) -> bool:
        """Returns whether every request has finished."""
        return not self._live

    def add(self, request: Request) -> Sequence:
        """Returns the waiting sequence of ``request``, behind all of its priority.

        Raises:
          InputError: if its id is in use, its prompt exceeds the context, or the pools are too small for it alone.
        """
        if request.id in self._live:
            raise InputError(f"request {request.id}: this id is in use by an unfinished request")
        limit = self.sizes.max_model_len
        require_room(len(request.prompt), limit)
        sequence = Sequence.from_request(request, max_model_len=limit, page_size=self.attention.page_size)
        sequence.number = next(self._numbers)
        self.room.refuse_what_never_fits(sequence)
        insort(self.waiting, sequence, key=RANK)
        self._live[request.id] = sequence
        return sequence

    def schedule(self) -> Plan | None:
        """Returns the next device call with its pages reserved; None if nothing is left to do.

        A `Swap` makes room, or uses it: the caller moves the pages and asks again.
        """
        if (swap := self._swap_in()) is not None:
            return swap
        decoding = [one for one in self.running if one.status is Status.DECODING]
        if not decoding or self._prefills < self.turns.prefill_calls:
            chunks = self._next_chunks()
            if chunks:
                return self._reserved([(chunk.sequence, chunk.count) for chunk in chunks]) or self._prefill(chunks)
        if not decoding:
            assert self.is_idle, "a request that fits alone must be admitted when nothing runs"
            return None
        limits = [self._most_steps(one) for one in decoding]
        return self._reserved(list(zip(decoding, limits, strict=True))) or self._decode(decoding, limits)

    def _prefill(self, chunks: list[Chunk]) -> Prefill:
        self._prefills += 1
        return Prefill(tuple(chunks))

    def _decode(self, sequences: list[Sequence], limits: list[int]) -> Decode:
        self._prefills = 0
        return Decode(tuple(sequences), tuple(limits))

    def _most_steps(self, sequence: Sequence) -> int:
        """Returns how many tokens a call may add to a sequence."""
        is_busy = self.waiting or self.swapped or self._reading()
        most = self.turns.busy_steps if is_busy and self.turns.busy_steps else self.sizes.steps_per_call
        return 1 if sequence.request.sampling.is_stepwise else min(most, self.sizes.steps_per_call, sequence.remaining)

    def record_prefill(self, chunk: Chunk, token: int | None = None, finish_reason: str | None = None) -> None:
        """Records that the chunk is in the cache; the prompt's last chunk yields the first generated ``token``.

        The sequence finishes with ``finish_reason`` if given, else with "length" if it may have no more tokens.
        """
        sequence = chunk.sequence
        assert sequence.status is Status.PREFILLING and sequence.num_cached == chunk.start
        assert chunk.is_last == (token is not None), "the last chunk of a prompt, and no other, yields a token"
        sequence.num_cached += chunk.count
        self._enter(chunk)
        if token is None:
            self._advance(sequence, [], self.attention.prefill_window)
        else:
            sequence.status = Status.DECODING
            self._advance(sequence, [token], self.attention.local)
            self._finish_if(sequence, finish_reason)

    def record_decode(self, sequence: Sequence, tokens: list[int], finish_reason: str | None = None) -> None:
        """Records the ``tokens`` that ``sequence`` generated in a decode call, one per step; it may have ended early.

        The sequence finishes with ``finish_reason`` if given, else with "length" if it may have no more tokens.
        """
        assert sequence.status is Status.DECODING and 1 <= len(tokens) <= sequence.remaining
        sequence.decode_steps += len(tokens)
        sequence.num_cached += len(tokens)
        self._advance(sequence, tokens, self.attention.local)
        self._finish_if(sequence, finish_reason)

    def finish(self, sequence: Sequence, reason: str) -> None:
        """Ends ``sequence`` and frees its pages and its slot."""
        assert sequence.status is not Status.FINISHED, "finished twice"
        if sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
        elif sequence.status is Status.SWAPPED:
            self.swapped.remove(sequence)
        else:
            self._leave(sequence)
        del self._live[sequence.request.id]
        sequence.swapped = None
        sequence.status = Status.FINISHED
        sequence.finish_reason = reason

    def abort(self, request_id: int) -> bool:
        """Ends a request between two calls; returns False if it has already finished or was never added."""
        if request_id not in self._live:
            return False
        self.finish(self._live[request_id], "abort")
        return True

    def abort_all(self) -> None:
        """Ends every request between two calls."""
        for sequence in list(self._live.values()):
            self.finish(sequence, "abort")

    def forget_pages(self) -> None:
        """Empties the prefix cache, because the contents of the pages are lost; no request may be open."""
        assert self.is_idle
        if self.cache is not None:
            self.cache.clear()

    # Prefill: who reads next.

    def _next_chunks(self) -> list[Chunk]:
        """Returns the chunks of the next prefill call, of sequences that are admitted here if they are new.

        At most every second call goes to prompts that pass a longer one.
        """
        reading = min(self._reading(), key=RANK, default=None)
        if reading is not None and not self._has_passed:
            passing = next(self._admitted(self._needs_one_call), None)
            if passing is not None:
                self._has_passed = True
                return self._with_others(passing)
        self._has_passed = False
        reading = reading or next(self._admitted(lambda sequence: True), None)
        return [] if reading is None else self._with_others(reading)

    def _reading(self) -> list[Sequence]:
        return [one for one in self.running if one.status is Status.PREFILLING]

    def _with_others(self, sequence: Sequence) -> list[Chunk]:
        """Returns the next chunk of a sequence, and those of other short prompts that share its call."""
        chunks = [self._chunk(sequence)]
        if self._may_share_call(sequence):
            begun = [one for one in self._reading() if one is not sequence and self._may_share_call(one)]
            others = chain(begun, self._admitted(self._may_share_call))
            chunks += map(self._chunk, islice(others, self.turns.short_rows - 1))
        return chunks

    def _chunk(self, sequence: Sequence) -> Chunk:
        rest = sequence.prompt_length - sequence.num_cached
        return Chunk(sequence, sequence.num_cached, min(self.sizes.prefill_chunk, rest))

    def _is_short(self, sequence: Sequence) -> bool:
        return sequence.prompt_length <= self.turns.short_chunk

    def _may_share_call(self, sequence: Sequence) -> bool:
        return self._is_short(sequence) and sequence.request.is_cacheable

    def _needs_one_call(self, sequence: Sequence) -> bool:
        hit = self._hit(sequence).num_chunks * self.sizes.prefill_chunk
        return sequence.prompt_length - hit <= self.sizes.prefill_chunk

    def _admitted(self, is_wanted: Callable[[Sequence], bool]) -> Iterator[Sequence]:
        """Yields waiting sequences of one kind, each moved to a slot, until one in the queue has to wait for room."""
        for sequence in self.waiting[:_LOOKED_AT]:
            if self.swapped or not self._free_slots:
                return
            hit = self._hit(sequence)
            if not self.room.may_run(self.running, sequence, hit.retrieval):
                return
            if is_wanted(sequence):
                self._admit(sequence, hit)
                yield sequence

    def _admit(self, sequence: Sequence, hit: Hit) -> None:
        self.waiting.remove(sequence)
        self._enter_slot(sequence, Status.PREFILLING)
        if self.cache is None or not sequence.request.is_cacheable:
            return
        self.cache.use(hit, sequence.prompt_length)
        self.allocator.share(sequence, hit.retrieval, hit.window)
        whole, prefix = len(self._digests(sequence)), sequence.prefix
        prefix.entry, prefix.num_chunks = (hit.entries[-1] if hit.entries else None), hit.num_chunks
        prefix.windows = frozenset({whole, whole - 1, hit.reach})
        sequence.num_cached = prefix.num_hit = hit.num_chunks * self.sizes.prefill_chunk

    # The prefix cache.

    def _digests(self, sequence: Sequence) -> tuple[bytes, ...]:
        """Returns the digests of the chunks that may be shared; another program reads a short prompt."""
        if self.cache is None or not sequence.request.is_cacheable or self._is_short(sequence):
            return ()
        if sequence.prefix.digests is None:
            request = sequence.request
            # A longer prompt may read less in the chunk with which this one ends.
            ends_apart = self.attention.prefill_sparsity != "none" and not request.is_context
            prompt = request.prompt[:-1] if ends_apart else request.prompt
            sequence.prefix.digests = self.cache.digests(prompt, request.salt)
        return sequence.prefix.digests

    def _hit(self, sequence: Sequence) -> Hit:
        return self.cache.match(self._digests(sequence), sequence.prompt_length) if self.cache is not None else Hit()

    def _enter(self, chunk: Chunk) -> None:
        """Enters a whole chunk into the prefix cache, if the sequence shares all chunks before it."""
        sequence, prefix = chunk.sequence, chunk.sequence.prefix
        digests, number = self._digests(sequence), chunk.start // self.sizes.prefill_chunk
        if self.cache is None or number >= len(digests) or prefix.num_chunks != number:
            return
        first = chunk.start // self.attention.page_size
        pages = sequence.retrieval_table[first : first + chunk.count // self.attention.page_size]
        entry = self.cache.insert(digests[number], prefix.entry, pages.tolist())
        self.allocator.adopt(sequence, entry, first)
        prefix.entry, prefix.num_chunks = entry, number + 1
        if prefix.num_chunks in prefix.windows and self.allocator.streaming is not None:
            window = self.allocator.window(sequence, chunk.end, self.attention.prefill_window)
            self.cache.keep_window(entry, window)

    # Pages and slots.

    def _reserved(self, calls: list[tuple[Sequence, int]]) -> Swap | None:
        """Reserves pages for some more tokens of each sequence; returns what must move first if there is no room."""
        for sequence, tokens in calls:
            is_prefill = sequence.status is Status.PREFILLING
            window = self.attention.prefill_window if is_prefill else self.attention.local
            if not self.allocator.reserve(sequence, sequence.num_cached, tokens, window):
                return self._swap_out(self.room.victim(self.running))
        return None

    def _swap_out(self, sequence: Sequence) -> Swap:
        tables = sequence.retrieval_table, sequence.streaming_table
        logical = [np.flatnonzero(table != NO_PAGE) for table in tables]
        pages = [tuple(table[held].tolist()) for table, held in zip(tables, logical, strict=True)]
        slot = sequence.slot
        assert slot is not None
        plan = Swap(sequence=sequence, is_out=True, slot=slot, retrieval=pages[0], streaming=pages[1])
        self._leave(sequence)
        sequence.swapped = Swapped(retrieval=logical[0], streaming=logical[1])
        sequence.status = Status.SWAPPED
        insort(self.swapped, sequence, key=RANK)
        self.num_swaps += 1
        return plan

    def _swap_in(self) -> Swap | None:
        """Returns the way back of the first swapped sequence, if there is room for it to stay."""
        if not self.swapped or not self._free_slots:
            return None
        sequence = self.swapped[0]
        entries = self._still_cached(sequence)
        shared = Hit(entries=entries).retrieval
        if not self.room.may_run(self.running, sequence, shared):
            return None
        left = sequence.swapped
        assert left is not None
        self.swapped.remove(sequence)
        is_prefilling = sequence.num_cached < sequence.prompt_length
        self._enter_slot(sequence, Status.PREFILLING if is_prefilling else Status.DECODING)
        # What is in the prefix cache is what was written then, bit for bit.
        self.allocator.share(sequence, shared, {})
        sequence.prefix.entry, sequence.prefix.num_chunks = (entries[-1] if entries else None), len(entries)
        own = left.retrieval[len(shared) :]
        self.allocator.take_for(sequence, own, left.streaming)
        slot = sequence.slot
        assert slot is not None
        return Swap(
            sequence=sequence,
            is_out=False,
            slot=slot,
            retrieval=tuple(sequence.retrieval_table[own].tolist()),
            streaming=tuple(sequence.streaming_table[left.streaming].tolist()),
            num_shared=len(shared),
        )

    def _still_cached(self, sequence: Sequence) -> tuple[Entry, ...]:
        """Returns the entries of the chunks that a swapped sequence had read, as far as they are still cached."""
        if self.cache is None or self.allocator.retrieval is None:
            return ()
        return tuple(self.cache.chain(self._digests(sequence)[: sequence.num_cached // self.sizes.prefill_chunk]))

    def _enter_slot(self, sequence: Sequence, status: Status) -> None:
        self.running.append(sequence)
        sequence.slot = self._free_slots.pop()
        sequence.status = status

    def _leave(self, sequence: Sequence) -> None:
        """Takes slot and pages from a running sequence."""
        assert sequence.slot is not None
        self.running.remove(sequence)
        self._free_slots.append(sequence.slot)
        self.allocator.free(sequence)
        sequence.slot = None

    def _advance(self, sequence: Sequence, tokens: list[int], window: int) -> None:
        sequence.tokens += tokens
        self.allocator.release_unseen(sequence, sequence.num_cached, window)

    def _finish_if(self, sequence: Sequence, reason: str | None) -> None:
        if reason is not None or sequence.remaining == 0:
            self.finish(sequence, reason or "length")
