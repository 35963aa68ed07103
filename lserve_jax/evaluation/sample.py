"""What a task hands to a run: one prompt with what counts as its answer."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

type Render = Callable[[str, str], list[int]]
"""User's text and the beginning of the answer → token ids of the whole prompt, in the model's chat format or raw."""

type Metric = Callable[[str, tuple[str, ...]], float]
"""Answer and references → score, 0 … 1."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One prompt.

    Attributes:
      text: the user's message, or the raw prompt.
      answer_prefix: how the model's answer begins, given to it; may be empty.
      references: what the metric looks for.
      target: the right continuation after ``answer_prefix``, for its log-likelihood and token accuracy; None where
        there is no single one.
      max_tokens: tokens that an answer may take.
      stop: strings at which an answer ends.
      info: what the task wants to have in the results, such as the needle's ``depth`` (0 … 1).
    """

    text: str
    answer_prefix: str = ""
    references: tuple[str, ...]
    target: str | None = None
    max_tokens: int
    stop: tuple[str, ...] = ()
    info: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a task makes a sample from; the sample is a function of this alone.

    Attributes:
      length: tokens of the rendered prompt: a task fills them to within 2% and never exceeds them.
      index: which sample of the task and length.
      seed: of the run.
      render: see `Render`.
      haystack: seed → an endless stream of sentences, for tasks that hide things in prose.
    """

    length: int
    index: int
    seed: int
    render: Render
    haystack: Callable[[random.Random], Any]


class Task(Protocol):
    """A row of the table of tasks."""

    @property
    def name(self) -> str:
        """Returns what the command line calls it."""
        ...

    @property
    def metric(self) -> Metric:
        """Returns how an answer is scored."""
        ...

    def make(self, request: Request) -> Sample:
        """Returns a sample; ValueError where the length has no room for it."""
        ...
