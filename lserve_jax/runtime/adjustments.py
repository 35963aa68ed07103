"""What requests change in the logits before a token is chosen: biases, penalties, tokens that may not come (yet).

The host makes the rows of the requests that change something, once per call; what a call itself generates is counted on
the device. If no request of a batch changes anything, the device skips all of it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lserve_jax.config.checks import LARGEST_INT
from lserve_jax.config.sampling import SamplingParams


class History(NamedTuple):
    """The settings and the tokens of one request."""

    params: SamplingParams
    prompt: Sequence[int]
    generated: Sequence[int]


class Adjustments(NamedTuple):
    """The changes of a batch, one row per slot.

    Attributes:
      is_on: [B] bool, whether a row changes anything.
      bias: [B, V] float32, added to the logits; minus infinity removes a token.
      in_prompt: [B, V] bool, the tokens of the prompt, where the repetition penalty counts them.
      counts: [B, V] int32, how often each token was generated before this call, where a penalty counts them.
      ends: [B, V] bool, the tokens that may not come before position ``ends_from``.
      ends_from: [B] int32.
      repetition: [B] float32; 1 is off.
      presence: [B] float32; 0 is off.
      frequency: [B] float32; 0 is off.
    """

    is_on: Array
    bias: Array
    in_prompt: Array
    counts: Array
    ends: Array
    ends_from: Array
    repetition: Array
    presence: Array
    frequency: Array

    @classmethod
    def of(cls, rows: Sequence[History | None], vocabulary: int) -> "Adjustments":
        """Returns NumPy arrays of the rows; None is an empty slot.

        Args:
          rows: one per slot. The ids in the settings are below ``vocabulary``, and bad words are lists of ids.
          vocabulary: V.
        """
        batch = len(rows)
        dense: dict[str, Any] = {
            "bias": np.zeros((batch, vocabulary), np.float32),
            "in_prompt": np.zeros((batch, vocabulary), bool),
            "counts": np.zeros((batch, vocabulary), np.int32),
            "ends": np.zeros((batch, vocabulary), bool),
        }
        params = [SamplingParams() if row is None else row.params for row in rows]
        for slot, row in enumerate(rows):
            if row is not None and row.params.is_adjusted:
                _fill(row, *(array[slot] for array in dense.values()))
        return cls(
            is_on=_column([one.is_adjusted for one in params], bool),
            ends_from=_column([0 if row is None else _ends_from(row) for row in rows], np.int32),
            repetition=_column([one.repetition_penalty for one in params], np.float32),
            presence=_column([one.presence_penalty for one in params], np.float32),
            frequency=_column([one.frequency_penalty for one in params], np.float32),
            **dense,
        )


def _ends_from(row: History) -> int:
    return min(len(row.prompt) + row.params.min_tokens, LARGEST_INT)


def _column(values: Sequence[Any], dtype: Any) -> Any:
    return np.array(values, dtype)


def _fill(row: History, bias: np.ndarray, in_prompt: np.ndarray, counts: np.ndarray, ends: np.ndarray) -> None:
    """Writes the rows [V] of one request."""
    params = row.params
    for token, value in cast(Sequence[tuple[int, float]], params.logit_bias):
        bias[token] += value
    first = () if row.generated else params.begin_suppress_tokens
    bias[np.array([*params.suppress_tokens, *first, *_last_tokens(row)], np.int32)] = -np.inf
    ends[np.asarray(params.stop_token_ids, np.int32)] = True
    if params.has_penalties:
        in_prompt[np.asarray(row.prompt, np.int32)] = True
        counts += np.bincount(np.asarray(row.generated, np.int32), minlength=len(counts)).astype(np.int32)


def _last_tokens(row: History) -> list[int]:
    """Returns the tokens that would complete a bad word now; a single end token is no bad word, as in transformers."""
    ends = {(token,) for token in row.params.stop_token_ids}
    words = [word for word in row.params.bad_words if not isinstance(word, str) and word not in ends]
    longest = max(map(len, words), default=1) - 1
    missing = max(longest - len(row.generated), 0)
    tail = [*(row.prompt[-missing:] if missing else ()), *row.generated[len(row.generated) - longest + missing :]]
    return [word[-1] for word in words if len(word) - 1 <= len(tail) and _ends_with(tail, word[:-1])]


def _ends_with(tail: Sequence[int], beginning: Sequence[int]) -> bool:
    return list(tail[len(tail) - len(beginning) :]) == list(beginning)


def adjust(logits: Array, positions: Array, adjustments: Adjustments, new: Array) -> Array:
    """Returns the logits [B, V] float32 from which tokens are chosen.

    For each row, with ``c`` the counts of generated tokens: ``x = logits + bias``; ``x / repetition`` where x is
    positive and ``x * repetition`` elsewhere, for tokens of prompt and text (CTRL, arXiv:1909.05858, section 4.1);
    ``x - frequency c - presence [c > 0]``; and minus infinity for ends before their time. Rows without a change stay as
    they are, bit for bit.

    Args:
      logits: [B, V] float32.
      positions: [B] int32, the position in the sequence that each new token will have.
      adjustments: B rows.
      new: [S, B] int32, the tokens that this call has generated; -1 where there is none.
    """
    return jax.lax.cond(
        jnp.any(adjustments.is_on), lambda: _adjusted(logits, positions, adjustments, new), lambda: logits
    )


def _adjusted(logits: Array, positions: Array, on: Adjustments, new: Array) -> Array:
    vocabulary = logits.shape[-1]
    slots = jnp.broadcast_to(jnp.arange(new.shape[1], dtype=jnp.int32), new.shape)
    counts = on.counts.at[slots, jnp.where(new >= 0, new, vocabulary)].add(1, mode="drop")
    is_generated = counts > 0
    x = logits + on.bias
    penalty = jnp.where(is_generated | on.in_prompt, on.repetition[:, None], 1.0)
    x = jnp.where(x > 0, x / penalty, x * penalty)
    x = x - on.frequency[:, None] * counts.astype(x.dtype) - on.presence[:, None] * is_generated.astype(x.dtype)
    is_early = (positions < on.ends_from)[:, None]
    x = jnp.where(on.ends & is_early, -jnp.inf, x)
    return jnp.where(on.is_on[:, None], x, logits)
