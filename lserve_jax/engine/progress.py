"""What one call of a compiled program brings for one sequence."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

import numpy as np

from lserve_jax.config.errors import InputError
from lserve_jax.engine.outputs import TopLogprobs
from lserve_jax.engine.request import Sequence as EngineSequence


def not_finite(prompt: int, decoded: int = 0) -> InputError:
    """Returns the error of logits that are no numbers, after ``decoded`` generated tokens."""
    where = f"decoding, after {decoded} tokens" if decoded else "prefill"
    return InputError(
        f"the model's logits are not finite in {where} (prompt of {prompt} tokens): its weights are damaged, or its "
        "values overflow; check the checkpoint, or try dtype float32"
    )


@dataclass(frozen=True, kw_only=True)
class Taken:
    """Tokens of one sequence, in order, and what the model thinks of them.

    Attributes:
      tokens: the tokens.
      logprobs: their log-probabilities under the model's unmodified distribution.
      choices: the sampled tokens, which differ from ``tokens`` only where those were forced.
      top_logprobs: the likeliest tokens at each place, if the request asks for them; else empty.
      logits: [V] float32 at each place, if the request asks for them; else empty.
    """

    tokens: list[int]
    logprobs: list[float]
    choices: list[int]
    top_logprobs: list[TopLogprobs]
    logits: list[np.ndarray]

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Returns the tokens of all parts, in order; of no part, no tokens."""
        names = [one.name for one in fields(cls)]
        return cls(**{name: [value for part in parts for value in getattr(part, name)] for name in names})

    @classmethod
    def of(cls, generated: Sequence[np.ndarray], slot: int, num_top: int, *, has_logits: bool = False) -> Self:
        """Returns the tokens of a slot; ``generated`` are the arrays [steps, B, ...] of `Generated`."""
        count = int((generated[0][:, slot] >= 0).sum())
        tokens, logprobs, choices, top_tokens, top_logprobs, *logits = (x[:count, slot] for x in generated)
        return cls(
            tokens=tokens.tolist(),
            logprobs=logprobs.tolist(),
            choices=choices.tolist(),
            top_logprobs=top_rows(top_tokens, top_logprobs, num_top),
            # Copies, since a part of an array keeps the whole of it: the logits of all slots.
            logits=[row.copy() for row in logits[0]] if has_logits else [],
        )

    def first(self, count: int) -> Self:
        """Returns the first ``count`` of the tokens."""
        return type(self)(**{name: values[:count] for name, values in vars(self).items()})


def top_rows(tokens: np.ndarray, logprobs: np.ndarray, count: int) -> list[TopLogprobs]:
    """Returns the ``count`` likeliest tokens of each row [T, N]; an empty list if the count is 0."""
    if not count:
        return []
    rows = zip(tokens[:, :count].tolist(), logprobs[:, :count].tolist(), strict=True)
    return [tuple(zip(*row, strict=True)) for row in rows]


@dataclass(frozen=True, kw_only=True)
class PromptScores:
    """Scores of the tokens of a prompt chunk, each given all tokens before it.

    Attributes:
      logprobs: log-probabilities of the tokens that follow the chunk's tokens, as far as the prompt goes.
      top_logprobs: the likeliest tokens at these places, if the request asks for them; else empty.
    """

    logprobs: list[float]
    top_logprobs: list[TopLogprobs]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The result of a call for one sequence.

    Attributes:
      sequence: the sequence, already advanced.
      taken: the new tokens that it generated.
      seconds: wall time of the call without compilation.
      is_prefill: whether it was a prefill call.
      pages_held: pages per pool, retrieval and streaming, that the sequence used during the call.
      scores: of the prompt chunk, if the request asks for them.
      recall: [L] of the call's first decode step (see `recall_step`), if it is measured.
    """

    sequence: EngineSequence
    taken: Taken
    seconds: float
    is_prefill: bool
    pages_held: tuple[int, int]
    scores: PromptScores | None = None
    recall: np.ndarray | None = None
