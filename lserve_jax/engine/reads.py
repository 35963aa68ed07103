"""How many pages decoding reads, computed from lengths alone: selections vary in content but not in size."""

from dataclasses import dataclass

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
        of the interval, and those that have begun since. The time does not grow with either length.
        """
        if decode_steps < 1:
            return None
        held = self._pages(prompt_length, decode_steps, 1)
        streaming = held - self._between(prompt_length, decode_steps)
        chosen = {None: held} | {
            count: held - self._left_out(prompt_length, decode_steps, count)
            for *_, count in self.heads
            if count is not None
        }
        read = sum(retrieval * chosen[count] + others * streaming for retrieval, others, count in self.heads)
        return read / (sum(retrieval + others for retrieval, others, _ in self.heads) * held)

    def _pages(self, before: int, count: int, stride: int) -> int:
        """Returns the sum of the pages of ``count`` lengths: ``before + 1``, and every ``stride`` tokens from there."""
        return _floor_sum(count, stride, before + self.page_size, self.page_size)

    def _between(self, prompt: int, steps: int) -> int:
        """Returns the pages between sink and window, summed over the steps: those that a streaming head leaves out.

        Of a sequence of n tokens, ``n - local`` lie before the window. The pages that these fill, less those of the
        sink, are left out.
        """
        sink = -(-self.sink // self.page_size) * self.page_size
        first = prompt + 1 - self.local - sink
        short = min(max(-first, 0), steps)  # steps at which sink and window are everything
        return _floor_sum(steps - short, 1, first + short, self.page_size)

    def _left_out(self, prompt: int, steps: int, chosen: int) -> int:
        """Returns the pages beyond the ``chosen`` ones at the last selection of each step, summed over the steps."""
        interval = self.selector_interval
        selections, rest = divmod(steps, interval)  # `rest` steps follow the last whole interval
        # The first selection with more than `chosen` pages is made from at least chosen · page_size + 1 tokens.
        first = min(-(-max(chosen * self.page_size - prompt, 0) // interval), selections)
        count, before = selections - first, prompt + first * interval
        whole = self._pages(before, count, interval) - count * chosen
        last = self._pages(prompt + selections * interval, 1, 1)
        return interval * whole + rest * max(last - chosen, 0)


def _floor_sum(count: int, slope: int, offset: int, divisor: int) -> int:
    """Returns the sum of ``(offset + slope · i) // divisor`` over i from 0 to ``count - 1``, for numbers of at least 0.

    It counts the lattice points below a line as Euclid's algorithm does, in a number of rounds logarithmic in slope and
    divisor: whole multiples of the divisor are summed at once; what is left is counted along the other axis.
    """
    total = 0
    while count > 0:
        total += count * (count - 1) // 2 * (slope // divisor) + count * (offset // divisor)
        end = slope % divisor * count + offset % divisor
        count, slope, offset, divisor = end // divisor, divisor, end % divisor, slope % divisor
    return total
