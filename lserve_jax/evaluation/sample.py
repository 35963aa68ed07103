"""What a task gives to a run: a prompt, and what counts as its answer."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

type Render = Callable[[str, str], list[int]]
"""User's text and beginning of the answer → token ids of the whole prompt, in the model's chat format or raw."""

type Metric = Callable[[str, tuple[str, ...]], float]
"""Answer and references → score, 0 … 1."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One prompt.

    Attributes:
      text: the user's message, or the raw prompt.
      answer_prefix: the given beginning of the model's answer; may be empty.
      references: the texts that the metric looks for.
      target: the right continuation after ``answer_prefix``, for its log-likelihood and token accuracy; None if there
        is no single one.
      max_tokens: most tokens of an answer.
      stop: strings that end an answer.
      info: further values for the results, such as the needle's ``depth`` (0 … 1).
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
      length: tokens of the rendered prompt; a task fills them to within 2% and never exceeds them.
      index: number of the sample of the task and length.
      seed: seed of the run.
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
        """Name on the command line."""
        ...

    @property
    def metric(self) -> Metric:
        """The function that scores an answer."""
        ...

    def make(self, request: Request) -> Sample:
        """Returns a sample; raises InputError if the length has no room for it."""
        ...
