"""What callers pass as prompts: text, lists of token ids, arrays, one or several of them."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from numbers import Real
from operator import index
from typing import Any

import numpy as np

from lserve_jax.config.errors import InputError, shown
from lserve_jax.config.sampling import SamplingParams
from lserve_jax.text.tokenizer import Tokenizer


def each_prompt(prompts: Any) -> list[Any]:
    """Returns the prompts of a call that names one or several; a list or array of numbers is one prompt.

    Raises:
      InputError: if it is neither text nor anything with items.
    """
    if isinstance(prompts, str | bytes | bytearray):
        return [prompts]
    if hasattr(prompts, "__array__") and np.asarray(prompts).dtype.kind in "iu":
        array = np.asarray(prompts)
        if array.ndim > 2:
            raise InputError(f"an array of prompts must have one or two dimensions, got {array.ndim}")
        return [array] if array.ndim < 2 else list(array)
    if not isinstance(prompts, Iterable) or isinstance(prompts, Mapping):
        raise InputError(f"prompts must be text, lists of token ids or several of these, got {_kind(prompts)}")
    given = list(prompts)
    return [given] if given and _is_number(given[0]) else given


def each_conversation(messages: Any) -> tuple[list[Any], bool]:
    """Returns the conversations of a call, and whether it names one alone: a list of messages.

    Raises:
      InputError: if it is no list.
    """
    if not isinstance(messages, Iterable) or isinstance(messages, str | bytes | bytearray | Mapping):
        raise InputError(f"messages must be a list of {{'role': …, 'content': …}}, or several, got {_kind(messages)}")
    given = list(messages)
    is_one = not given or isinstance(given[0], Mapping)
    return ([given], True) if is_one else (given, False)


def each_params(params: Any, count: int) -> list[SamplingParams]:
    """Returns the settings of each of ``count`` prompts, from one for all or one per prompt.

    Raises:
      InputError: if they are no `SamplingParams`, or not as many as there are prompts.
    """
    if isinstance(params, SamplingParams):
        return [params] * count
    is_list = isinstance(params, Iterable) and not isinstance(params, str | bytes | Mapping)
    found: list[Any] = list(params) if is_list else [params]
    wrong = [one for one in found if not isinstance(one, SamplingParams)]
    if wrong:
        raise InputError(f"sampling_params must be one SamplingParams, or one per prompt, got {_kind(wrong[0])}")
    if len(found) != count:
        raise InputError(f"{count} prompts need as many sampling_params, got {len(found)}")
    return found


@contextmanager
def naming_the_prompt(number: int, count: int) -> Iterator[None]:
    """Lets an `InputError` say which of several prompts it is about; ``number`` is counted from 1."""
    try:
        yield
    except InputError as error:
        raise InputError(f"prompt {number} of {count}: {error}" if count > 1 else str(error)) from None


def require_ids(ids: Any, vocabulary: int) -> tuple[int, ...]:
    """Returns token ids as plain integers.

    Args:
      ids: integers of any kind in a list, an array of NumPy or JAX, or the like.
      vocabulary: the model's number of tokens.

    Raises:
      InputError: if it is no list, is empty, or holds anything but ids below ``vocabulary``.
    """
    is_list = isinstance(ids, Iterable) and not isinstance(ids, str | bytes | bytearray | Mapping)
    if not is_list and not hasattr(ids, "__array__"):
        raise InputError(f"a prompt must be text or a list of token ids, got {_kind(ids)}")
    values = np.asarray(ids).reshape(-1).tolist() if hasattr(ids, "__array__") else list(ids)
    if not values:
        raise InputError("the prompt is empty: give at least one token")
    found = []
    for value in values:
        token = _as_index(value)
        if token is None:
            raise InputError(f"a prompt must be text or a list of token ids, got a list with {shown(value)}")
        if not 0 <= token < vocabulary:
            raise InputError(
                f"prompt token {shown(value, 80)} is outside the model's vocabulary of {vocabulary} tokens"
            )
        found.append(token)
    return tuple(found)


def _as_index(value: Any) -> int | None:
    """Returns an integer of any kind as an `int`; None for everything else."""
    if isinstance(value, bool):
        return None
    try:
        return index(value)
    except TypeError:
        return None


def _is_number(value: Any) -> bool:
    is_scalar = hasattr(value, "__array__") and np.ndim(value) == 0 and not isinstance(value, str)
    return isinstance(value, Real) or is_scalar


def _kind(value: Any) -> str:
    return "None" if value is None else f"{type(value).__name__} {shown(value, 40)}"


def with_bad_words_spelled(params: SamplingParams, tokenizer: Tokenizer | None, vocabulary: int) -> SamplingParams:
    """Returns settings whose bad words are lists of ids: each text as the tokenizer writes it, alone and after a space.

    Args:
      params: the settings.
      tokenizer: the model's; None only if no bad word is a text.
      vocabulary: the model's number of tokens; a spelling with tokens beyond it cannot come anyway.

    Raises:
      InputError: if the tokenizer has no tokens for a text.
    """
    if not params.bad_words:
        return params
    words: list[tuple[int, ...]] = []
    for word in params.bad_words:
        if not isinstance(word, str):
            words.append(tuple(word))
            continue
        assert tokenizer is not None
        bare = word.lstrip()
        found = {tuple(tokenizer.encode(text, add_special_tokens=False)) for text in (bare, f" {bare}")}
        spellings = [ids for ids in found if ids and max(ids) < vocabulary]
        if not spellings:
            raise InputError(f"bad_words: the model has no tokens for {shown(word)}")
        words += spellings
    # What ends in another bad word cannot come without it.
    needed = [ids for ids in dict.fromkeys(words) if not any(ids[at:] in words for at in range(1, len(ids)))]
    return replace(params, bad_words=needed)
