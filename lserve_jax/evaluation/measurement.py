"""What a run measures: prompts that are a function of (length, index), and what is read off a model at work on them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lserve_jax.engine.outputs import RequestMetrics
from lserve_jax.evaluation.sample import Sample
from lserve_jax.llm import LLM

type Row = Mapping[str, Any]
"""A result of one prompt and variant, as it stands in results.jsonl."""

BINS = 16
"""Parts of equal length into which positions are gathered."""

_SHORTER = 0.98
"""A prompt that is asked to fill the context gives way to its answer, but no further than this share of its length."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """A prompt ready for a model.

    Attributes:
      task, length, index: which it is.
      prompt: [T] int32.
      continuation: tokens to be scored after the prompt; empty where there are none.
      room: tokens after the prompt that the context must hold too.
      record: what prompts.jsonl says of it besides.
      sample: where it came from, if from a task.
    """

    task: str
    length: int
    index: int
    prompt: NDArray[np.int32]
    continuation: tuple[int, ...]
    room: int
    record: Mapping[str, Any]
    sample: Sample | None = None

    @property
    def key(self) -> tuple[str, int, int]:
        """Which prompt this is."""
        return self.task, self.length, self.index

    @property
    def line(self) -> dict[str, Any]:
        """The line of prompts.jsonl."""
        return {"task": self.task, "length": self.length, "index": self.index, **self.record}


class Measurement(Protocol):
    """A row of the table of results: a task, perplexity, drift."""

    @property
    def name(self) -> str:
        """Returns what the command line calls it."""
        ...

    def count(self, length: int) -> int | None:
        """Returns how many prompts of a length there are; None if there is no end of them."""
        ...

    def make(self, length: int, index: int) -> Item:
        """Returns a prompt; ValueError, in one line, where the length or the context has no room for it."""
        ...

    def measure(self, llm: LLM, items: Sequence[Item], reference: Callable[[Item], Row | None]) -> list[dict[str, Any]]:
        """Returns what is to be kept of each item.

        ``reference`` gives the row of the variant that the others are compared with; None if that is the one at work.
        """
        ...


def prompt_length(name: str, length: int, room: int, context: int) -> int:
    """Returns how many tokens a prompt may have for ``room`` more to go into the context; hardly fewer than asked for.

    Raises:
      ValueError: where it would have to be clearly shorter than ``length``.
    """
    longest = context - room
    if longest < _SHORTER * length:
        raise ValueError(
            f"{name} at length {length} takes {room} tokens more, but the model's context is {context}: "
            f"the longest length that it can have is {max(longest, 0)}"
        )
    return min(length, longest)


def by_position(values: Sequence[float] | NDArray[np.floating]) -> list[float]:
    """Returns the means of `BINS` parts of equal length, or of as many as there are values."""
    parts = np.array_split(np.asarray(values, np.float64), min(BINS, len(values)))
    return [round(float(part.mean()), 6) for part in parts]


def mean(values: Sequence[float] | NDArray[np.floating]) -> float:
    """Returns the mean as it is kept."""
    return round(float(np.mean(np.asarray(values, np.float64))), 6)


def decoding(metrics: RequestMetrics) -> dict[str, float | None]:
    """Returns what a row says of decoding."""
    return {"pages_read_ratio": metrics.pages_read_ratio, "attention_recall": metrics.attention_recall}
