"""How a task fills a prompt to the length asked for."""

from collections.abc import Callable

from lserve_jax.evaluation.sample import Request, Sample

_SLACK = 0.005
"""A prompt shorter than asked for by this share is full."""


def fit(
    task: str, request: Request, build: Callable[[int], Sample], *, least: int = 0, tokens_a_unit: float = 0.25
) -> int:
    """Returns the number of units with which a sample's prompt is as long as asked for, or just shorter.

    Tokens grow about linearly with units, but not exactly: the next number to try comes from the line through the two
    that enclose the goal, and where it misses, in turn from their middle. A prompt is rendered a handful of times.

    Args:
      task: name, for the message.
      request: the length asked for, and how to render.
      build: units (characters, words, lines: the task's own) → sample.
      least: units that the task cannot do without.
      tokens_a_unit: a guess, for the first step.

    Raises:
      ValueError: the prompt with the least units is already too long.
    """

    def count(units: int) -> int:
        sample = build(units)
        return len(request.render(sample.text, sample.answer_prefix))

    length = request.length
    low, low_tokens = least, count(least)
    if low_tokens > length:
        raise ValueError(f"task {task}: a prompt needs at least {low_tokens} tokens, got a length of {length}")
    high = high_tokens = None
    is_bisecting = False
    while low_tokens < length * (1 - _SLACK) and high != low + 1:
        wanted = length * (1 - _SLACK / 2) - low_tokens
        if high is None or high_tokens is None:
            units = low + max(1, int(wanted / tokens_a_unit))
        elif is_bisecting:
            units = (low + high) // 2
        else:
            line = low + int(wanted * (high - low) / (high_tokens - low_tokens))
            units = min(max(line, low + 1), high - 1)
        is_bisecting = high is not None and not is_bisecting
        tokens = count(units)
        if tokens > length:
            high, high_tokens = units, tokens
        else:
            if tokens > low_tokens:
                tokens_a_unit = (tokens - low_tokens) / (units - low)
            low, low_tokens = units, tokens
    return low
