"""Fills a task's prompt to the requested length."""

from collections.abc import Callable

from lserve_jax.config.errors import InputError
from lserve_jax.evaluation.sample import Request, Sample

_SLACK = 0.005
"""A prompt is full if it is shorter than requested by at most this share."""


def fit(
    task: str, request: Request, build: Callable[[int], Sample], *, least: int = 0, tokens_a_unit: float = 0.25
) -> int:
    """Returns the number of units with which a sample's prompt has the requested length, or is just shorter.

    Tokens grow about linearly with units. So the search alternates between the line through the two numbers of units
    that enclose the goal and their middle, and renders the prompt only a few times.

    Args:
      task: name, for the message.
      request: the requested length, and how to render.
      build: units (characters, words or lines, as the task defines) → sample.
      least: least units that the task needs.
      tokens_a_unit: tokens per unit, a guess for the first step.

    Raises:
      InputError: if the prompt with the least units is already too long.
    """

    def count(units: int) -> int:
        sample = build(units)
        return len(request.render(sample.text, sample.answer_prefix))

    length = request.length
    low, low_tokens = least, count(least)
    if low_tokens > length:
        raise InputError(f"task {task}: a prompt needs at least {low_tokens} tokens, got a length of {length}")
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
