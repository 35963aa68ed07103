"""Sampling of the next token: greedy, or drawn with the temperature, top-k, top-p and min-p of each request.

Nothing sorts the vocabulary. Top-k and top-p are the same search for the highest threshold such that the tokens at or
above it have enough weight, where the weight of a token is 1 or its probability. Bisection over the bits of the logits
finds the threshold in 32 sums.
"""

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lserve_jax.config.errors import InputError
from pallas_kernels.core.dtypes import counted_loop

MAX_SEED = 2**32 - 1
_OF_MODEL = "the model's own, else {}"


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request is continued. The "help" of a field says what the field does; ``--help`` prints it.

    Attributes:
      stop: one string is accepted as well.
      stop_token_ids: tokens at which the text ends, in addition to the model's end tokens.
      logprobs: whether the output has the log-probabilities of its tokens.

    Raises:
      InputError: if values are out of range; the message lists all of them.
    """

    max_tokens: int = field(default=256, metadata={"help": "the most tokens to generate, at least 1"})
    temperature: float = field(
        default=0.0, metadata={"help": "divides the logits; 0 takes the likeliest token", "default": _OF_MODEL}
    )
    top_p: float = field(
        default=1.0,
        metadata={
            "help": "sample from the likeliest tokens that together have at least this probability (after top-k), "
            "above 0 and up to 1",
            "default": _OF_MODEL,
        },
    )
    top_k: int = field(
        default=0,
        metadata={"help": "sample from this many likeliest tokens; 0 or -1 keeps all", "default": _OF_MODEL},
    )
    min_p: float = field(
        default=0.0,
        metadata={
            "help": "drop tokens less likely than this share of the likeliest token's probability, 0 to 1",
            "default": _OF_MODEL,
        },
    )
    seed: int | None = field(
        default=None,
        metadata={"help": "draws are a function of seed and position alone", "default": "a fresh one per request"},
    )
    stop: str | Sequence[str] = field(
        default=(), metadata={"help": "end before this text; may be given several times", "metavar": "TEXT"}
    )
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = field(default=False, metadata={"help": "go on after the model's end-of-sequence tokens"})
    logprobs: bool = False

    def __post_init__(self):
        """Checks the values; ``stop`` and ``stop_token_ids`` become tuples."""
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else _as_tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", _as_tuple(self.stop_token_ids))
        has_seed = self.seed is None or _is_whole(self.seed, 0, MAX_SEED)
        wanted = [
            (_is_whole(self.max_tokens, 1), "max_tokens", "a whole number from 1"),
            (_is_real(self.temperature, 0.0, math.inf), "temperature", "a finite number from 0"),
            (_is_real(self.top_p, 0.0, 1.0) and self.top_p > 0, "top_p", "a number above 0 and up to 1"),
            (_is_whole(self.top_k, -1), "top_k", "a whole number from 0 (0 keeps all)"),
            (_is_real(self.min_p, 0.0, 1.0), "min_p", "a number from 0 to 1"),
            (has_seed, "seed", f"None or a whole number from 0 to {MAX_SEED}"),
            (all(isinstance(text, str) and text for text in self.stop), "stop", "non-empty strings"),
            (all(_is_whole(token, 0) for token in self.stop_token_ids), "stop_token_ids", "whole numbers from 0"),
        ]
        problems = [
            f"{name} must be {what}, got {getattr(self, name)!r}" for is_met, name, what in wanted if not is_met
        ]
        if problems:
            raise InputError("; ".join(problems))
        object.__setattr__(self, "stop_token_ids", tuple(map(int, self.stop_token_ids)))


class SamplingState(NamedTuple):
    """The sampling parameters of a batch, one row per slot.

    Attributes:
      temperature: [B] float32.
      top_p: [B] float32; 1 is off.
      top_k: [B] int32; 0 is off.
      min_p: [B] float32; 0 is off.
      seed: [B] uint32.
    """

    temperature: Array
    top_p: Array
    top_k: Array
    min_p: Array
    seed: Array

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
            "top_k": np.array([max(0, min(row.top_k, 2**31 - 1)) for row in rows], np.int32),
            "min_p": np.array([row.min_p for row in rows], np.float32),
            "seed": np.array(seeds, np.uint32),
        }
        return cls(**columns)


def sample(logits: Array, positions: Array, state: SamplingState) -> tuple[Array, Array]:
    """Returns the chosen tokens [B] int32 and their log-probabilities [B] float32 under the unmodified distribution.

    For each row, with ``x`` the logits: ``argmax(x)`` if the temperature is 0, else
    ``argmax(kept(x / temperature) + gumbel)``, which is a draw from the softmax of what top-k, then top-p, then min-p
    keep. Tokens that tie with the last one kept are kept too. The noise is a function of (seed, position) alone, so the
    result depends on neither the slot nor the other rows.

    A NaN logit is never chosen (it counts as minus infinity; a row of only NaN gives token 0), but it makes the
    log-probability NaN.

    Args:
      logits: [B, V] float32, the model's output.
      positions: [B] int32, the position in the sequence that each new token will have.
      state: the parameters, B rows.
    """
    clean = jnp.nan_to_num(logits, nan=-jnp.inf, posinf=jnp.finfo(jnp.float32).max, neginf=-jnp.inf)
    greedy = jax.lax.argmax(clean, 1, jnp.int32)
    is_drawn = state.temperature > 0
    tokens = jax.lax.cond(
        jnp.any(is_drawn),
        lambda: jnp.where(is_drawn, _draw(clean, positions, state), greedy),
        lambda: greedy,
    )
    return tokens, token_logprobs(logits, tokens)


def token_logprobs(logits: Array, tokens: Array) -> Array:
    """Returns the log-probabilities [...] float32 of tokens [...] int32 under logits [..., V]."""
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


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


def _as_tuple(values: Sequence) -> tuple:
    """Returns the values as a tuple; a value that is not a sequence becomes a tuple that the checks refuse."""
    return tuple(values) if isinstance(values, (Sequence, np.ndarray)) else (values,)


def _is_whole(value: Any, low: int, high: float = math.inf) -> bool:
    is_number = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    return is_number and bool(low <= value <= high)


def _is_real(value: Any, low: float, high: float) -> bool:
    is_number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and bool(low <= value <= high)
