"""The KL divergence to a reference's distributions of the next token, of which only the likeliest tokens are kept."""

from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

LIKELIEST = 512
"""How many of the reference's tokens are told apart at each place; all others count as one."""


class Distributions(NamedTuple):
    """The distributions of the next token at T places.

    Attributes:
      tokens: [T, N] int32 the likeliest tokens, best first.
      logprobs: [T, N] float32 their log-probabilities (natural logarithms).
      rest: [T] float32 the log-probability of all other tokens together; minus infinity if there are none.
    """

    tokens: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    rest: NDArray[np.float32]

    @classmethod
    def of(cls, logits: NDArray[np.float32], count: int = LIKELIEST) -> Self:
        """Returns the distributions of logits [T, V], with ``count`` tokens told apart, or all if there are fewer."""
        count = min(count, logits.shape[1])
        rows = []
        for row in logits:  # one by one: whole tables in float64 would take several times the memory of the logits
            best = np.argpartition(-row, count - 1)[:count]
            best = best[np.lexsort((best, -row[best]))]
            rows.append((best, *_grouped(row, best)))
        tokens, logprobs, rest = zip(*rows, strict=True)
        return cls(np.array(tokens, np.int32), np.array(logprobs, np.float32), np.array(rest, np.float32))

    def divergences(self, logits: NDArray[np.float32]) -> NDArray[np.float64]:
        """Returns the KL divergences [T] of these distributions p from those of logits [T, V], q, in nats.

        That is ``Σ_v p(v) · ln(p(v) / q(v))``, where v runs over the tokens told apart and one that stands for all
        others. It is a lower bound of the divergence over all tokens. What it leaves out is the probability of the
        others under p times the divergence among them; with all tokens told apart it is exact.
        """
        found = np.zeros(len(logits))
        for place, (row, tokens) in enumerate(zip(logits, self.tokens, strict=True)):
            p = np.append(self.logprobs[place], self.rest[place]).astype(np.float64)
            q = np.append(*_grouped(row, tokens))
            p, q = p[p > -np.inf], q[p > -np.inf]
            found[place] = np.sum(np.exp(p) * (p - q))
        return np.maximum(found, 0)  # rounding may leave a little less


def _grouped(logits: NDArray[np.float32], tokens: NDArray[np.integer]) -> tuple[NDArray[np.float64], float]:
    """Returns the log-probabilities [N] of tokens [N] under logits [V], and that of all others together."""
    x = logits.astype(np.float64)
    x -= _log_sum(x)
    known = x[tokens]
    x[tokens] = -np.inf
    return known, _log_sum(x)


def _log_sum(x: NDArray[np.float64]) -> float:
    """Returns ``ln Σ exp(x)``; minus infinity if all of ``x`` is."""
    highest = x.max()
    return float(highest if np.isinf(highest) else highest + np.log(np.exp(x - highest).sum()))
