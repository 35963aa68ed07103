"""Decides who may hold pages: which sequence may start or come back, and which must leave when pages run out.

A sequence *needs* pages for its prompt and its whole generation. Where the pools hold the needs of all, pages never run
out. Where they do not, more sequences may run than fit at their longest, as long as host memory has room for the pages
of all but one of them: whoever came last leaves when pages run out, and comes back before anyone new starts. The first
of those that run never leaves, so each ends at some time.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from lserve_jax.config.attention import AttentionConfig
from lserve_jax.config.errors import InputError
from lserve_jax.config.pages import retrieval_pages
from lserve_jax.config.sizes import Sizes, most_pages
from lserve_jax.engine.allocator import PageAllocator
from lserve_jax.engine.pools import PagePool
from lserve_jax.engine.request import RANK
from lserve_jax.engine.request import Sequence as EngineSequence

MARGIN = 256
"""Tokens for which a running sequence should have pages, where the pools cannot hold all sequences at their longest. It
lies between two moves of the same pages."""


@dataclass(frozen=True)
class Room:
    """The room in the pools of an allocator.

    Attributes:
      sizes: sequences, context and calls.
      attention: page size and windows.
      allocator: of the pools.
      swap: retrieval pages for which host memory has room.
    """

    sizes: Sizes
    attention: AttentionConfig
    allocator: PageAllocator
    swap: int = 0

    def refuse_what_never_fits(self, sequence: EngineSequence) -> None:
        """Raises `InputError` if the pools are too small for one sequence alone."""
        for name, pool in self.allocator.pools:
            need = self._need(pool, sequence)
            if need > pool.num_pages:
                raise InputError(
                    f"prompt has {sequence.prompt_length} tokens and may grow to {sequence.max_length}, which takes "
                    f"{need} {name} pages of {self.attention.page_size} tokens, but the {name} pool has "
                    f"{pool.num_pages}: shorten the prompt, lower max_tokens or use more pages"
                )

    def may_run(self, running: Sequence[EngineSequence], new: EngineSequence, shared: Sequence[int]) -> bool:
        """Returns whether a sequence may run beside others.

        Args:
          running: the sequences that run; if pages run out, all but the first can leave.
          new: the sequence, which has no pages yet.
          shared: retrieval pages that the prefix cache has for it.
        """
        streaming, retrieval = self.allocator.streaming, self.allocator.retrieval
        together = [*running, new]
        # Of windows that sequences share, each has a copy of its own when they have moved on.
        if streaming is not None and sum(self._need(streaming, one) for one in together) > streaming.num_pages:
            return False
        if retrieval is None:
            return True
        room = retrieval.num_free + retrieval.num_evictable - retrieval.count_evictable(shared) + len(shared)
        held = [_num_held(one) for one in running] + [0]
        wanted = [self._need(retrieval, one) for one in together]
        if sum(wanted) - sum(held) <= room:
            return True
        soon = [min(need, self._soon(one)) for need, one in zip(wanted, together, strict=True)]
        growth = sum(max(0, pages - had) for pages, had in zip(soon, held, strict=True))
        return growth <= room and (new.swapped is not None or self._can_swap(wanted))

    def _can_swap(self, needs: Sequence[int]) -> bool:
        """Returns whether host memory has room for the pages of all sequences but any one of them."""
        return sum(needs) - min(needs) <= self.swap

    def victim(self, running: Sequence[EngineSequence]) -> EngineSequence:
        """Returns the running sequence that leaves when pages run out: the last one in the order of service."""
        assert len(running) > 1, "a request that fits alone has room when it is alone"
        return max(running, key=RANK)

    def _soon(self, sequence: EngineSequence) -> int:
        """Returns how many retrieval pages a sequence holds after `MARGIN` more generated tokens, or a longer call."""
        more = max(MARGIN, self.sizes.steps_per_call)  # else whoever comes back might leave before the next call
        return retrieval_pages(max(sequence.prompt_length, sequence.num_cached) + more, self.attention.page_size)

    def _need(self, pool: PagePool, sequence: EngineSequence) -> int:
        """Returns the most pages of a pool that a sequence will use from now on; its last token is never cached."""
        prompt = 0 if sequence.num_cached >= sequence.prompt_length else sequence.prompt_length
        length = sequence.max_length - 1
        return most_pages(self.attention, self.sizes, length, prompt, keeps_all=pool.keeps_all)


def _num_held(sequence: EngineSequence) -> int:
    return int((sequence.retrieval_table >= 0).sum())
