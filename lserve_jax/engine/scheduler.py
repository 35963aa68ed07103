"""Plans the next device call: the next chunk of a prompt, or decode steps for all decoding sequences.

Requests are served first come, first served, and nothing is ever preempted: a request is admitted only if a slot is
free and both pools have room for its prompt and its whole generation. That wastes pages on generations that stop early,
but a sequence's pages never move, no work is ever repeated, and later requests do not affect a sequence's time. No
request overtakes one that waits for pages, so none starves.
"""

from collections import deque
from dataclasses import dataclass

from lserve_jax.config.attention import AttentionConfig
from lserve_jax.config.errors import InputError
from lserve_jax.config.sizes import PoolSizes, Sizes, most_pages
from lserve_jax.engine.allocator import PageAllocator, PagePool
from lserve_jax.engine.request import Request, Sequence, Status, require_room


@dataclass(frozen=True)
class Prefill:
    """One call: tokens ``start … start + count - 1`` of one sequence's prompt."""

    sequence: Sequence
    start: int
    count: int

    @property
    def is_last(self) -> bool:
        """Returns whether this chunk ends the prompt, so that its last logits yield the first generated token."""
        return self.start + self.count == self.sequence.prompt_length


@dataclass(frozen=True)
class Decode:
    """One call: up to ``num_steps`` decode steps of every decoding sequence, at most ``limits[i]`` of sequence i."""

    sequences: tuple[Sequence, ...]
    limits: tuple[int, ...]

    @property
    def num_steps(self) -> int:
        """Returns the largest of the limits."""
        return max(self.limits, default=0)


class Scheduler:
    """Orders requests and manages their pages. The caller repeats `schedule`, a run of the plan, and `record_…`."""

    def __init__(self, sizes: Sizes, attention: AttentionConfig, pools: PoolSizes) -> None:
        self.sizes = sizes
        self.attention = attention
        self.allocator = PageAllocator(
            retrieval=PagePool(pools.retrieval, keeps_all=True) if pools.retrieval else None,
            streaming=PagePool(pools.streaming, keeps_all=False) if pools.streaming else None,
            sink=attention.sink,
            page_size=attention.page_size,
        )
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._live: dict[int, Sequence] = {}
        self._free_slots = list(range(sizes.max_num_seqs - 1, -1, -1))

    @property
    def num_free_slots(self) -> int:
        """Returns how many slots no sequence has."""
        return len(self._free_slots)

    @property
    def is_idle(self) -> bool:
        """Returns whether every request has finished."""
        return not self.waiting and not self.running

    def add(self, request: Request) -> Sequence:
        """Returns the waiting sequence of ``request``, which joins the end of the queue.

        Raises:
          InputError: if its id is in use, its prompt exceeds the context, or the pools are too small for it alone.
        """
        if request.id in self._live:
            raise InputError(f"request {request.id}: this id is in use by an unfinished request")
        limit = self.sizes.max_model_len
        require_room(len(request.prompt), limit)
        sequence = Sequence.from_request(request, max_model_len=limit, page_size=self.attention.page_size)
        self._refuse_what_never_fits(sequence)
        self.waiting.append(sequence)
        self._live[request.id] = sequence
        return sequence

    def schedule(self) -> Prefill | Decode | None:
        """Returns the next device call with its pages reserved; None if nothing is left to do.

        A prefill goes first: every sequence that it adds fills the batch of all later decode calls. The number of slots
        bounds how many prefills can delay a decode call.
        """
        sequence = self._prefilling() or self._admit()
        if sequence is not None:
            count = min(self.sizes.prefill_chunk, sequence.prompt_length - sequence.num_cached)
            self._reserve(sequence, count, self.attention.prefill_window)
            return Prefill(sequence, sequence.num_cached, count)
        if not self.running:
            assert not self.waiting, "a request that fits alone must be admitted when nothing runs"
            return None
        limits = tuple(map(self._most_steps, self.running))
        for sequence, limit in zip(self.running, limits, strict=True):
            self._reserve(sequence, limit, self.attention.local)
        return Decode(tuple(self.running), limits)

    def _most_steps(self, sequence: Sequence) -> int:
        """Returns how many tokens a call may add to a sequence."""
        return 1 if sequence.request.sampling.is_stepwise else min(self.sizes.steps_per_call, sequence.remaining)

    def record_prefill(self, plan: Prefill, token: int | None = None, finish_reason: str | None = None) -> None:
        """Records that the chunk is in the cache; the prompt's last chunk yields the first generated ``token``.

        The sequence finishes with ``finish_reason`` if given, else with "length" if it may have no more tokens.
        """
        sequence = plan.sequence
        assert sequence.status is Status.PREFILLING and sequence.num_cached == plan.start
        assert plan.is_last == (token is not None), "the last chunk of a prompt, and no other, yields a token"
        if token is None:
            self._advance(sequence, plan.count, [], self.attention.prefill_window)
        else:
            sequence.status = Status.DECODING
            self._advance(sequence, plan.count, [token], self.attention.local)
            self._finish_if(sequence, finish_reason)

    def record_decode(self, sequence: Sequence, tokens: list[int], finish_reason: str | None = None) -> None:
        """Records the ``tokens`` that ``sequence`` generated in a decode call, one per step; it may have ended early.

        The sequence finishes with ``finish_reason`` if given, else with "length" if it may have no more tokens.
        """
        assert sequence.status is Status.DECODING and 1 <= len(tokens) <= sequence.remaining
        sequence.decode_steps += len(tokens)
        self._advance(sequence, len(tokens), tokens, self.attention.local)
        self._finish_if(sequence, finish_reason)

    def finish(self, sequence: Sequence, reason: str) -> None:
        """Ends ``sequence`` and frees its pages and its slot."""
        assert sequence.status is not Status.FINISHED, "finished twice"
        if sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
        else:
            assert sequence.slot is not None
            self.running.remove(sequence)
            self._free_slots.append(sequence.slot)
            self.allocator.free(sequence)
        del self._live[sequence.request.id]
        sequence.slot = None
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

    def _prefilling(self) -> Sequence | None:
        return next((sequence for sequence in self.running if sequence.status is Status.PREFILLING), None)

    def _admit(self) -> Sequence | None:
        """Returns the head of the queue, moved to a free slot, if uncommitted pages suffice for its whole length."""
        if not self.waiting or not self._free_slots:
            return None
        sequence = self.waiting[0]
        committed = [*self.running, sequence]
        for _, pool in self._pools():
            if sum(self._need(pool, one) for one in committed) > pool.num_pages:
                return None
        self.waiting.popleft()
        self.running.append(sequence)
        sequence.slot = self._free_slots.pop()
        sequence.status = Status.PREFILLING
        return sequence

    def _reserve(self, sequence: Sequence, count: int, window: int) -> None:
        is_reserved = self.allocator.reserve(sequence, sequence.num_cached, count, window)
        assert is_reserved, "admission has committed the pages of every running sequence"

    def _advance(self, sequence: Sequence, count: int, tokens: list[int], window: int) -> None:
        sequence.num_cached += count
        sequence.tokens += tokens
        self.allocator.release_unseen(sequence, sequence.num_cached, window)

    def _finish_if(self, sequence: Sequence, reason: str | None) -> None:
        if reason is not None or sequence.remaining == 0:
            self.finish(sequence, reason or "length")

    def _refuse_what_never_fits(self, sequence: Sequence) -> None:
        for name, pool in self._pools():
            need = self._need(pool, sequence)
            if need > pool.num_pages:
                raise InputError(
                    f"prompt has {sequence.prompt_length} tokens and may grow to {sequence.max_length}, which takes "
                    f"{need} {name} pages of {self.attention.page_size} tokens, but the {name} pool has "
                    f"{pool.num_pages}: shorten the prompt, lower max_tokens or use more pages"
                )

    def _pools(self) -> list[tuple[str, PagePool]]:
        pools = ("retrieval", self.allocator.retrieval), ("streaming", self.allocator.streaming)
        return [(name, pool) for name, pool in pools if pool is not None]

    def _need(self, pool: PagePool, sequence: Sequence) -> int:
        """Returns the most pages of a pool that a sequence will use from now on; its last token is never cached."""
        prompt = 0 if sequence.status is Status.DECODING else sequence.prompt_length
        length = sequence.max_length - 1
        return most_pages(self.attention, self.sizes, length, prompt, keeps_all=pool.keeps_all)
