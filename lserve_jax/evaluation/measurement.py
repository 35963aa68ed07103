"""What a run measures: prompts that are a function of (length, index), and a model's results on them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lserve_jax.config.errors import InputError
from lserve_jax.engine.outputs import RequestMetrics, ScoreOutput
from lserve_jax.evaluation.sample import Sample
from lserve_jax.llm import LLM

type Row = Mapping[str, Any]
"""A result of one prompt and variant, as in results.jsonl."""

BINS = 16
"""Number of equal parts into which positions are grouped."""

_SHORTER = 0.98
"""A prompt that would fill the context is shortened for its answer, but at most to this share of its length."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """A prompt ready for a model.

    Attributes:
      task, length, index: the prompt's key.
      prompt: [T] int32.
      continuation: tokens to score after the prompt; may be empty.
      room: tokens after the prompt for which the context must have room.
      record: further fields of the line in prompts.jsonl.
      sample: the task's sample, if the prompt is one of a task.
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
        """Task, length and index of the prompt."""
        return self.task, self.length, self.index

    @property
    def line(self) -> dict[str, Any]:
        """The line of prompts.jsonl."""
        return {"task": self.task, "length": self.length, "index": self.index, **self.record}


class Reference(Protocol):
    """What a measurement compares with: the results of the reference variant."""

    def row(self, item: Item) -> Row | None:
        """Returns the reference's row for a prompt; None while the reference itself is measured."""
        ...

    def compare(self, item: Item, score: ScoreOutput) -> Mapping[str, float]:
        """Returns the fields to store about the distributions of a scored continuation, whose logits it needs."""
        ...


class Measurement(Protocol):
    """A row of the table of results: a task, perplexity or drift."""

    @property
    def name(self) -> str:
        """Name on the command line."""
        ...

    def count(self, length: int) -> int | None:
        """Returns the number of prompts of a length; None if unlimited."""
        ...

    def make(self, length: int, index: int) -> Item:
        """Returns a prompt; raises InputError, in one line, if the length or the context has no room for it."""
        ...

    def measure(self, llm: LLM, items: Sequence[Item], reference: Reference) -> list[dict[str, Any]]:
        """Returns the fields to store for each item."""
        ...


def prompt_length(name: str, length: int, room: int, context: int) -> int:
    """Returns the length of a prompt that leaves ``room`` tokens in the context: ``length`` or slightly less.

    Raises:
      InputError: if it would have to be clearly less than ``length``.
    """
    longest = context - room
    if longest < _SHORTER * length:
        raise InputError(
            f"{name} at length {length} takes {room} tokens more, but the model's context is {context}: "
            f"the longest length that it can have is {max(longest, 0)}"
        )
    return min(length, longest)


def by_position(values: Sequence[float] | NDArray[np.floating]) -> list[float]:
    """Returns the means of `BINS` parts of equal length, or of as many as there are values."""
    parts = np.array_split(np.asarray(values, np.float64), min(BINS, len(values)))
    return [round(float(part.mean()), 6) for part in parts]


def mean(values: Sequence[float] | NDArray[Any], *, digits: int = 6) -> float:
    """Returns the mean as rows store it."""
    return round(float(np.mean(np.asarray(values, np.float64))), digits)


def decoding(metrics: RequestMetrics) -> dict[str, float | None]:
    """Returns the fields of a row about decoding."""
    return {"pages_read_ratio": metrics.pages_read_ratio, "attention_recall": metrics.attention_recall}
