"""How one request is continued: length, sampling, penalties, tokens that may not come, ends, log-probabilities."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from lserve_jax.config.checks import LARGEST_INT, LARGEST_NUMBER
from lserve_jax.config.errors import InputError, shown
from lserve_jax.config.settings import Texts, TextsOrTokens, TokenBiases

MAX_SEED = 2**32 - 1
MOST_TOP_LOGPROBS = 20
_ID_LISTS = ("stop_token_ids", "suppress_tokens", "begin_suppress_tokens")
_SWITCHES = ("ignore_eos", "skip_special_tokens", "logprobs", "prompt_logprobs")
_OF_MODEL = "the model's own, else {}"


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request is continued. The "help" of a field says what the field does; ``--help`` prints it.

    Logits are changed in this order: ``logit_bias``, ``repetition_penalty``, ``frequency_penalty``,
    ``presence_penalty``; then ``bad_words``, ``min_tokens`` and the suppressed tokens are removed; then
    ``temperature``, ``top_k``, ``top_p`` and ``min_p`` draw. Log-probabilities are the model's, before all of these.

    Attributes:
      logit_bias: a mapping from token ids to biases, or pairs of them.
      bad_words: texts, lists of token ids, or both.
      stop: one string is accepted as well.
      stop_token_ids: tokens at which the text ends, in addition to the model's end tokens; any number of them. Here and
        in the other lists of ids, one id is accepted as well.

    Raises:
      InputError: if values are out of range; the message lists all of them.
    """

    max_tokens: int = field(
        default=256, metadata={"help": "the most tokens to generate, at least 1", "default": _OF_MODEL}
    )
    min_tokens: int = field(
        default=0,
        metadata={
            "help": "stop tokens and the model's end tokens come after this many tokens at the earliest; "
            "stop strings end a text at any time",
            "default": _OF_MODEL,
        },
    )
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
    repetition_penalty: float = field(
        default=1.0,
        metadata={
            "help": "makes tokens of the prompt and of the text less likely: divides their positive logits and "
            "multiplies their negative ones; 1 is off",
            "default": _OF_MODEL,
        },
    )
    presence_penalty: float = field(
        default=0.0, metadata={"help": "subtracted from the logits of tokens that the text has already, -2 to 2"}
    )
    frequency_penalty: float = field(
        default=0.0, metadata={"help": "subtracted from a token's logit as often as the text has the token, -2 to 2"}
    )
    logit_bias: TokenBiases = field(
        default=(), metadata={"help": "added to the logits of tokens", "metavar": "ID=X,ID=X", "default": _OF_MODEL}
    )
    suppress_tokens: Sequence[int] = field(
        default=(), metadata={"help": "tokens that never come", "default": _OF_MODEL}
    )
    begin_suppress_tokens: Sequence[int] = field(
        default=(), metadata={"help": "tokens that do not come first", "default": _OF_MODEL}
    )
    bad_words: TextsOrTokens = field(
        default=(),
        metadata={
            "help": "a text that never comes, as its tokens write it with and without a space before it; "
            "may be given several times",
            "metavar": "TEXT",
            "default": _OF_MODEL,
        },
    )
    seed: int | None = field(
        default=None,
        metadata={"help": "draws are a function of seed and position alone", "default": "a fresh one per request"},
    )
    stop: Texts = field(
        default=(),
        metadata={
            "help": "end before this text, which may contain control tokens; may be given several times; "
            "in a shell, a newline is written $'\\n'",
            "metavar": "TEXT",
        },
    )
    stop_token_ids: Sequence[int] = field(default=(), metadata={"help": "end with any of these tokens"})
    ignore_eos: bool = field(default=False, metadata={"help": "go on after the model's end-of-sequence tokens"})
    skip_special_tokens: bool = field(
        default=True, metadata={"help": "leave control tokens such as <|im_start|> out of the text"}
    )
    logprobs: bool = field(default=False, metadata={"help": "report the log-probabilities of the text's tokens"})
    prompt_logprobs: bool = field(
        default=False, metadata={"help": "report the log-probabilities of the prompt's tokens"}
    )
    top_logprobs: int = field(
        default=0,
        metadata={
            "help": f"where log-probabilities are reported, also those of this many likeliest tokens, up to "
            f"{MOST_TOP_LOGPROBS}"
        },
    )

    def __post_init__(self) -> None:
        """Checks the values; sequences become tuples, and ``logit_bias`` becomes pairs."""
        for name in ("stop", "bad_words"):
            given: Any = getattr(self, name)
            given = () if given is None else given
            object.__setattr__(self, name, (given,) if isinstance(given, str) else _as_tuple(given))
        object.__setattr__(self, "bad_words", tuple(_as_tuple(x) if _is_list(x) else x for x in self.bad_words))
        for name in _ID_LISTS:
            object.__setattr__(self, name, _as_tuple(getattr(self, name)))
        biases: Any = self.logit_bias
        object.__setattr__(self, "logit_bias", tuple(biases.items()) if isinstance(biases, Mapping) else _pairs(biases))
        problems = [
            f"{name} must be {what}, got {shown(getattr(self, name), 200)}" for name, what in self._wrong_values()
        ]
        if problems:
            raise InputError("; ".join(problems))
        for name in _ID_LISTS:
            object.__setattr__(self, name, tuple(map(int, getattr(self, name))))
        words = (word if isinstance(word, str) else tuple(map(int, word)) for word in self.bad_words)
        object.__setattr__(self, "bad_words", tuple(words))
        pairs: Any = self.logit_bias
        object.__setattr__(self, "logit_bias", tuple((int(token), float(bias)) for token, bias in pairs))

    def _wrong_values(self) -> list[tuple[str, str]]:
        """Returns each field whose value is wrong, with what it must be."""
        wanted = {
            "max_tokens": (_is_whole(self.max_tokens, 1, LARGEST_INT), "a whole number from 1"),
            "min_tokens": (_is_whole(self.min_tokens, 0, LARGEST_INT), "a whole number from 0"),
            "temperature": (_is_real(self.temperature, 0.0, math.inf), "a finite number from 0"),
            "top_p": (_is_real(self.top_p, 0.0, 1.0) and self.top_p > 0, "a number above 0 and up to 1"),
            "top_k": (_is_whole(self.top_k, -1), "a whole number from -1 (0 and -1 keep all)"),
            "min_p": (_is_real(self.min_p, 0.0, 1.0), "a number from 0 to 1"),
            "repetition_penalty": (
                _is_real(self.repetition_penalty, 0.0, math.inf) and self.repetition_penalty > 0,
                "a finite number above 0",
            ),
            "presence_penalty": (_is_real(self.presence_penalty, -2.0, 2.0), "a number from -2 to 2"),
            "frequency_penalty": (_is_real(self.frequency_penalty, -2.0, 2.0), "a number from -2 to 2"),
            "logit_bias": (
                all(map(_is_bias, self.logit_bias)),
                "a mapping from token ids to numbers (or -inf)",
            ),
            "bad_words": (all(map(_is_bad_word, self.bad_words)), "non-empty texts or lists of token ids"),
            "seed": (
                self.seed is None or _is_whole(self.seed, 0, MAX_SEED),
                f"None or a whole number from 0 to {MAX_SEED}",
            ),
            "stop": (all(isinstance(text, str) and text for text in self.stop), "non-empty strings"),
            **{name: (all(map(_is_id, getattr(self, name))), "whole numbers from 0") for name in _ID_LISTS},
            **{name: (isinstance(getattr(self, name), bool), "True or False") for name in _SWITCHES},
            "top_logprobs": (
                _is_whole(self.top_logprobs, 0, MOST_TOP_LOGPROBS if self.logprobs or self.prompt_logprobs else 0),
                f"a whole number from 0 to {MOST_TOP_LOGPROBS}, and 0 without logprobs or prompt_logprobs",
            ),
        }
        return [(name, what) for name, (is_met, what) in wanted.items() if not is_met]

    @property
    def is_stepwise(self) -> bool:
        """Returns whether the host must act after every token: it finds where a bad word of several tokens begins."""
        return any(not isinstance(word, str) and len(word) > 1 for word in self.bad_words)

    @property
    def has_penalties(self) -> bool:
        """Returns whether the tokens before matter for the logits."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)

    @property
    def is_adjusted(self) -> bool:
        """Returns whether logits are changed before a token is chosen."""
        changes = (self.logit_bias, self.suppress_tokens, self.begin_suppress_tokens, self.bad_words, self.min_tokens)
        return any(changes) or self.has_penalties

    def require_vocabulary(self, size: int) -> None:
        """Raises `InputError` if a field names a token that a model of this vocabulary lacks, or no token is left."""
        pairs: Any = self.logit_bias
        named = {
            "logit_bias": [token for token, _ in pairs],
            "bad_words": [token for word in self.bad_words if not isinstance(word, str) for token in word],
            **{name: getattr(self, name) for name in _ID_LISTS},
        }
        for name, ids in named.items():
            if beyond := [token for token in ids if token >= size]:
                raise InputError(f"{name}: token {beyond[0]} is outside the model's vocabulary of {size} tokens")
        words = (word for word in self.bad_words if not isinstance(word, str) and len(word) == 1)
        removed = {*self.suppress_tokens, *(token for token, bias in pairs if bias == -math.inf)}
        if len(removed.union(*words)) >= size:
            raise InputError("suppress_tokens, logit_bias and bad_words leave no token of the model to choose")


def _as_tuple(values: Any) -> tuple[Any, ...]:
    """Returns the values as a tuple; a value that is no list becomes a tuple of one, which the checks may refuse."""
    return tuple(values) if _is_list(values) else (values,)


def _pairs(values: Any) -> tuple[Any, ...]:
    return tuple(map(_as_tuple, _as_tuple(values)))


def _is_list(value: Any) -> bool:
    """Returns whether a value has items; an array of no dimension has none."""
    return (
        isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping) and getattr(value, "ndim", 1) > 0
    )


def _is_id(value: Any) -> bool:
    return _is_whole(value, 0)


def _is_bad_word(value: Any) -> bool:
    is_text = isinstance(value, str) and bool(value.strip())
    return is_text or (isinstance(value, tuple) and bool(value) and all(map(_is_id, value)))


def _is_bias(pair: Any) -> bool:
    if len(pair) != 2 or not _is_id(pair[0]):
        return False
    bias = pair[1]
    return _is_real(bias, -math.inf, math.inf) or (isinstance(bias, Real) and bias == -math.inf)


def _is_whole(value: Any, low: int, high: float = math.inf) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and low <= int(value) <= high


def _is_real(value: Any, low: float, high: float) -> bool:
    # Not as a float before the comparison: a whole number of any length may come from a file.
    number: Any = value
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    return is_number and bool(max(low, -LARGEST_NUMBER) <= number <= min(high, LARGEST_NUMBER))
