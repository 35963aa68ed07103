"""Sampling of the next token: greedy, or drawn with the temperature, top-k, top-p and min-p of each request.

Nothing sorts the vocabulary. Top-k and top-p are the same search for the highest threshold such that the tokens at or
above it have enough weight, where the weight of a token is 1 or its probability. Bisection over the bits of the logits
finds the threshold in 32 sums.
"""

import secrets
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lserve_jax.config.checks import LARGEST_INT
from lserve_jax.config.sampling import MOST_TOP_LOGPROBS, SamplingParams
from pallas_kernels.core.dtypes import counted_loop


class SamplingState(NamedTuple):
    """The sampling parameters of a batch, one row per slot.

    Attributes:
      temperature: [B] float32.
      top_p: [B] float32; 1 is off.
      top_k: [B] int32; 0 is off.
      min_p: [B] float32; 0 is off.
      seed: [B] uint32.
      num_top: [B] int32, how many of the likeliest tokens are reported.
    """

    temperature: Array
    top_p: Array
    top_k: Array
    min_p: Array
    seed: Array
    num_top: Array

    @classmethod
    def from_params(cls, params: Sequence[SamplingParams | None]) -> "SamplingState":
        """Returns NumPy arrays of the parameters; None is an empty slot, which is greedy.

        A request without a seed gets a new one on every call.
        """
        rows = [SamplingParams() if one is None else one for one in params]
        # Only requests that sample need a seed, and a random seed costs a call of the operating system.
        seeds = [secrets.randbits(32) if row.seed is None and row.temperature > 0 else row.seed or 0 for row in rows]
        columns: dict[str, Any] = {  # NumPy: programs take it directly, so nothing is copied to a device here
            "temperature": np.array([row.temperature for row in rows], np.float32),
            "top_p": np.array([row.top_p for row in rows], np.float32),
            "top_k": np.array([max(0, min(row.top_k, LARGEST_INT)) for row in rows], np.int32),
            "min_p": np.array([row.min_p for row in rows], np.float32),
            "seed": np.array(seeds, np.uint32),
            "num_top": np.array([row.top_logprobs if row.logprobs else 0 for row in rows], np.int32),
        }
        return cls(**columns)


def sample(logits: Array, positions: Array, state: SamplingState) -> Array:
    """Returns the chosen tokens [B] int32.

    For each row, with ``x`` the logits: ``argmax(x)`` if the temperature is 0, else
    ``argmax(kept(x / temperature) + gumbel)``, which is a draw from the softmax of what top-k, then top-p, then min-p
    keep. Tokens that tie with the last one kept are kept too. The noise is a function of (seed, position) alone, so the
    result depends on neither the slot nor the other rows.

    A NaN logit is never chosen (it counts as minus infinity; a row of only NaN gives token 0). See `token_logprobs`.

    Args:
      logits: [B, V] float32, the model's output (see `lserve_jax.runtime.adjustments` for changes of it).
      positions: [B] int32, the position in the sequence that each new token will have.
      state: the parameters, B rows.
    """
    clean = jnp.nan_to_num(logits, nan=-jnp.inf, posinf=jnp.finfo(jnp.float32).max, neginf=-jnp.inf)
    greedy = jax.lax.argmax(clean, 1, jnp.int32)
    is_drawn = state.temperature > 0
    return jax.lax.cond(
        jnp.any(is_drawn),
        lambda: jnp.where(is_drawn, _draw(clean, positions, state), greedy),
        lambda: greedy,
    )


def token_logprobs(logits: Array, tokens: Array) -> Array:
    """Returns the log-probabilities [...] float32 of tokens [...] int32 under logits [..., V].

    If any logit is NaN or infinite, the log-probability of every token is not finite.
    """
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def likeliest(logits: Array, is_wanted: Array) -> tuple[Array, Array]:
    """Returns the likeliest tokens [..., N] int32, best first, and their log-probabilities [..., N] float32.

    N is `MOST_TOP_LOGPROBS`, or the vocabulary if that is smaller. Without ``is_wanted`` (a scalar), all are 0.
    """
    shape = (*logits.shape[:-1], min(MOST_TOP_LOGPROBS, logits.shape[-1]))

    def found() -> tuple[Array, Array]:
        values, tokens = jax.lax.top_k(logits, shape[-1])
        return tokens.astype(jnp.int32), values - jax.nn.logsumexp(logits, axis=-1, keepdims=True)

    return jax.lax.cond(is_wanted, found, lambda: (jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)))


def _draw(logits: Array, positions: Array, state: SamplingState) -> Array:
    """Returns a sampled token for each row; that of rows with temperature 0 has no meaning."""
    scaled = temper(logits, state.temperature)
    is_drawn = state.temperature > 0
    vocabulary = logits.shape[-1]
    use_top_k = is_drawn & (state.top_k > 0) & (state.top_k < vocabulary)
    use_top_p = is_drawn & (state.top_p < 1)
    k = jnp.where(use_top_k, state.top_k, vocabulary)
    p = jnp.where(use_top_p, state.top_p, 1.0)
    everything = jnp.ones(logits.shape, bool)
    kept = jax.lax.cond(jnp.any(use_top_k), lambda: keep_top_k(scaled, k), lambda: everything)
    kept = jax.lax.cond(jnp.any(use_top_p), lambda: keep_top_p(scaled, kept, p), lambda: kept)
    kept = kept & keep_min_p(scaled, state.min_p)
    noise = jax.vmap(_gumbel, in_axes=(0, 0, None))(state.seed, positions, vocabulary)
    return jax.lax.argmax(jnp.where(kept, scaled + noise, -jnp.inf), 1, jnp.int32)


def temper(logits: Array, temperature: Array) -> Array:
    """Returns ``(logits - max) / temperature``, at most 0; a temperature of 0 counts as 1."""
    highest = jnp.max(logits, axis=-1, keepdims=True)
    # A row without one finite logit has no maximum to subtract.
    shifted = jnp.where(jnp.isfinite(highest), logits - highest, logits)
    return shifted / jnp.where(temperature > 0, temperature, 1.0)[:, None]


def keep_top_k(scaled: Array, k: Array) -> Array:
    """Returns a mask of the ``k`` highest values of each row, and of those equal to the lowest of them."""
    keys = _ordered_keys(scaled)
    return keys >= _lowest_kept(keys, jnp.ones_like(scaled), k.astype(jnp.float32))[:, None]


def keep_top_p(scaled: Array, kept: Array, p: Array) -> Array:
    """Returns a mask of the likeliest kept values that together have share ``p`` of the kept weight; never empty."""
    keys = _ordered_keys(jnp.where(kept, scaled, -jnp.inf))
    weights = jnp.where(kept, jnp.exp(scaled), 0.0)
    # The same sum as in the search, so that rounding cannot make the target unreachable.
    total = _weight_from(keys, weights, jnp.zeros(p.shape, jnp.uint32))
    target = jnp.maximum(p * total, jnp.finfo(jnp.float32).tiny)
    is_likely = keys >= _lowest_kept(keys, weights, target)[:, None]
    # With p = 1, the sum reaches the target before the last tokens, because rounding loses their weights.
    return kept & (is_likely | (p >= 1)[:, None])


def keep_min_p(scaled: Array, min_p: Array) -> Array:
    """Returns a mask of tokens with at least ``min_p`` times the highest probability; ``scaled`` has maximum 0."""
    return scaled >= jnp.log(min_p)[:, None]


def _ordered_keys(values: Array) -> Array:
    """Returns unsigned integers in the order of the values (no NaN; both zeros are equal)."""
    bits = jax.lax.bitcast_convert_type(jnp.where(values == 0, 0.0, values), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _lowest_kept(keys: Array, weights: Array, target: Array) -> Array:
    """Returns, per row, the largest ``u`` with ``sum(weights where keys >= u) >= target``, which must be reachable.

    The sum falls as ``u`` rises, so the search finds the bits of ``u`` from the highest to the lowest.
    """

    def try_bit(step: Array, found: Array) -> Array:
        candidate = found | (jnp.uint32(1 << 31) >> step.astype(jnp.uint32))
        return jnp.where(_weight_from(keys, weights, candidate) >= target, candidate, found)

    return counted_loop(32, try_bit, jnp.zeros(target.shape, jnp.uint32))


def _weight_from(keys: Array, weights: Array, lowest: Array) -> Array:
    return jnp.sum(jnp.where(keys >= lowest[:, None], weights, 0.0), axis=-1)


def _gumbel(seed: Array, position: Array, count: int) -> Array:
    return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), position), (count,), jnp.float32)
