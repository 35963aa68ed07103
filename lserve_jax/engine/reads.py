"""How many pages decoding reads, computed from lengths alone: selections vary in content but not in size."""

from dataclasses import dataclass

import numpy as np

from lserve_jax.config.attention import AttentionConfig

__all__ = ["PageReads"]


@dataclass(frozen=True, kw_only=True)
class PageReads:
    """Page reads of a model for one decoded token, summed over KV heads and layers.

    Attributes:
      attention: the sparsity policy.
      heads: per layer, the numbers of retrieval heads and of streaming heads, and whether pages are selected.
    """

    attention: AttentionConfig
    heads: tuple[tuple[int, int, bool], ...]

    def ratio(self, prompt_length: int, decode_steps: int) -> float | None:
        """Returns the pages read during a sequence's decode steps, relative to dense attention; None without a step.

        Step t attends from token ``prompt_length + t``. It reads the pages selected at the last step that is a multiple
        of the interval, and those that have begun since.
        """
        if decode_steps < 1:
            return None
        steps = np.arange(decode_steps)
        lengths = prompt_length + 1 + steps
        held = self._pages(lengths)
        every, windows = int(held.sum()), int((held - self._between(lengths)).sum())
        chosen = every
        if any(is_selecting for *_, is_selecting in self.heads):
            before = self._pages(lengths - steps % self.attention.selector_interval)
            chosen = int((np.minimum(self.attention.budgets(before), before) + held - before).sum())
        read = sum(
            retrieval * (chosen if is_selecting else every) + streaming * windows
            for retrieval, streaming, is_selecting in self.heads
        )
        return read / (sum(retrieval + streaming for retrieval, streaming, _ in self.heads) * every)

    def _pages(self, lengths: np.ndarray) -> np.ndarray:
        return -(-lengths // self.attention.page_size)

    def _between(self, lengths: np.ndarray) -> np.ndarray:
        """Returns the pages between sink and window, which a streaming head leaves out.

        Of a sequence of n tokens, ``n - local`` lie before the window. The pages that these fill, less those of the
        sink, are left out.
        """
        sink, size = self._pages(np.asarray(self.attention.sink)), self.attention.page_size
        return np.maximum(np.maximum(lengths - self.attention.local, 0) // size - sink, 0)
