"""What callers pass as prompts: text, lists of token ids, arrays, one or several of them."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from operator import index
from typing import Any

import numpy as np

from lserve_jax.config.errors import InputError, shown


def each_prompt(prompts: Any) -> list[Any]:
    """Returns the prompts of a call that names one or several; a list or array of numbers is one prompt.

    Raises:
      InputError: if it is neither text nor anything with items.
    """
    if isinstance(prompts, str | bytes | bytearray):
        return [prompts]
    if hasattr(prompts, "__array__"):
        array = np.asarray(prompts)
        return [array] if array.ndim < 2 else list(array)
    if not isinstance(prompts, Iterable) or isinstance(prompts, Mapping):
        raise InputError(f"prompts must be text, lists of token ids or several of these, got {_kind(prompts)}")
    given = list(prompts)
    return [given] if given and _is_number(given[0]) else given


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
        if token is None or not 0 <= token < vocabulary:
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
    return isinstance(value, Real) or (hasattr(value, "__array__") and np.ndim(value) == 0)


def _kind(value: Any) -> str:
    return "None" if value is None else f"{type(value).__name__} {shown(value, 40)}"
