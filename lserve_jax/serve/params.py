"""A request's settings as `SamplingParams`: the model's recommendations, the request's own values, the room left."""

import hashlib
from dataclasses import replace
from typing import Any

from lserve_jax.config.errors import InputError, shown
from lserve_jax.config.sampling import MAX_SEED, SamplingParams
from lserve_jax.serve.errors import ApiError, bad_request
from lserve_jax.serve.protocol import ChatRequest, CompletionRequest

_PLAIN = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("min_tokens", "bad_words", "suppress_tokens", "begin_suppress_tokens", "stop", "stop_token_ids", "ignore_eos"),
    "skip_special_tokens",
)
"""Fields that have the name and the meaning of `SamplingParams`."""


def sampling_params(request: ChatRequest | CompletionRequest, base: SamplingParams, max_tokens: int) -> SamplingParams:
    """Returns the settings of a request.

    Args:
      request: what the request says.
      base: what counts where it says nothing.
      max_tokens: the most tokens of the answer, at least 1.

    Raises:
      ApiError: if a value is out of range; ``param`` is its field.
    """
    values: dict[str, Any] = {name: value for name in _PLAIN if (value := getattr(request, name)) is not None}
    if request.logit_bias is not None:
        values["logit_bias"] = [(_token_id(key), bias) for key, bias in request.logit_bias.items()]
    top = 0
    if isinstance(request, ChatRequest):
        values["logprobs"] = bool(request.logprobs)
        top = request.top_logprobs or 0
    elif request.logprobs is not None:
        values["logprobs"] = True
        top = request.logprobs
    values["prompt_logprobs"] = wants_prompt_logprobs(request)
    values["top_logprobs"] = max(top, request.prompt_logprobs or 0)
    values["seed"] = None if request.seed is None else request.seed % (MAX_SEED + 1)
    try:
        return replace(base, **values, max_tokens=max_tokens)
    except InputError as error:
        raise naming_the_field(error) from None


def wants_prompt_logprobs(request: ChatRequest | CompletionRequest) -> bool:
    """Returns whether the answer has log-probabilities of the prompt."""
    is_echo = isinstance(request, CompletionRequest) and request.echo and request.logprobs is not None
    return is_echo or request.prompt_logprobs is not None


def naming_the_field(error: InputError, otherwise: str | None = None) -> ApiError:
    """Returns the error of a setting, with whose name the message begins; else of the field ``otherwise``."""
    name = str(error).split(" ", 1)[0].rstrip(":,")
    return bad_request(str(error), name if name in SamplingParams.__dataclass_fields__ else otherwise)


def _token_id(key: str) -> int:
    if not (key.isascii() and key.isdigit() and len(key) < 12):
        raise bad_request(f"logit_bias: {shown(key)} is no token id", "logit_bias")
    return int(key)


def seeded(params: SamplingParams, index: int) -> SamplingParams:
    """Returns the settings of one of several answers to a prompt: the seed goes up by one, none stays none."""
    return params if params.seed is None else replace(params, seed=(params.seed + index) % (MAX_SEED + 1))


def room(prompt_tokens: int, wanted: int | None, default: int | None, context: int) -> int:
    """Returns how many tokens the answer may have.

    Args:
      prompt_tokens: tokens of the prompt.
      wanted: what the request asks for; None takes ``default``, and if that is None too, the rest of the context.
      default: the server's default, which is cut to the rest of the context.
      context: tokens of prompt and answer together.

    Raises:
      ApiError: if they do not fit, with the code and the words by which clients know to shorten their prompt.
    """
    least = 1 if wanted is None else wanted
    if prompt_tokens + least > context:
        raise bad_request(
            f"This model's maximum context length is {context} tokens, however you requested {prompt_tokens + least} "
            f"tokens ({prompt_tokens} in the prompt, {least} for the answer): shorten the prompt or lower max_tokens",
            "max_tokens" if prompt_tokens < context else "prompt",
            "context_length_exceeded",
        )
    rest = context - prompt_tokens
    return wanted if wanted is not None else min(rest, default or rest)


def salt(request: ChatRequest | CompletionRequest, api_key: str | None) -> bytes:
    """Returns what keeps cached prefixes apart: nothing if the request names no salt, else a digest of it."""
    named = request.cache_salt or request.prompt_cache_key
    if not named:
        return b""
    return hashlib.sha256(f"{api_key or ''}\0{named}".encode()).digest()
