"""How many pages decoding reads, computed from lengths alone: selections vary in content but not in size."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lserve_jax.config.pages import most_streaming_pages, visible_pages

__all__ = ["PageReads"]


@dataclass(frozen=True, kw_only=True)
class PageReads:
    """Page reads of a model for one decoded token, summed over KV heads and layers.

    Attributes:
      page_size, sink, local, selector_interval: as in `AttentionConfig`.
      heads: per layer, the numbers of retrieval heads, of streaming heads, and of pages per selection (None for all).
    """

    page_size: int
    sink: int
    local: int
    selector_interval: int
    heads: tuple[tuple[int, int, int | None], ...]

    def ratio(self, prompt_length: int, decode_steps: int) -> float | None:
        """Returns the pages read during a sequence's decode steps, relative to dense attention; None without a step.

        Step t attends from token ``prompt_length + t``. It reads the pages selected at the last step that is a multiple
        of the interval, and those that have begun since.
        """
        if decode_steps < 1:
            return None
        steps = np.arange(decode_steps)
        lengths = prompt_length + 1 + steps
        held = -(-lengths // self.page_size)
        at_selection = -(-(lengths - steps % self.selector_interval) // self.page_size)
        streaming = self._streaming(lengths)
        read = sum(
            retrieval * (held if chosen is None else np.minimum(chosen, at_selection) + held - at_selection).sum()
            + streaming_heads * streaming.sum()
            for retrieval, streaming_heads, chosen in self.heads
        )
        return float(read / (sum(retrieval + other for retrieval, other, _ in self.heads) * held.sum()))

    def _streaming(self, lengths: NDArray[np.int_]) -> NDArray[np.int_]:
        """Returns the pages that a streaming head reads from each length, sink and window together."""
        return np.array([self._streaming_at(int(length)) for length in lengths])

    def _streaming_at(self, length: int) -> int:
        num_pages = -(-length // self.page_size)
        seen = visible_pages(
            length - 1, 1, sink=self.sink, window=self.local, page_size=self.page_size, num_pages=num_pages
        )
        assert seen.sum() <= most_streaming_pages(self.sink, self.local, 1, self.page_size)
        return int(seen.sum())
