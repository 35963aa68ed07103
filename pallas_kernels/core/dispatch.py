"""Choice of an implementation for an op, and a record of what was chosen."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

from pallas_kernels.core.dtypes import narrowed

BACKENDS = ("mosaic_gpu", "triton", "xla", "reference")
"""Every backend name, in the order in which `dispatch` tries those that an op has; ``reference`` only by name."""


class Choice(NamedTuple):
    """What one call of an op ran.

    Attributes:
      op: the op's name.
      implementation: the backend name.
      refusals: (backend name, reason) of each implementation that was tried before and refused, in the order of
        `BACKENDS`; empty where the caller named the implementation.
    """

    op: str
    implementation: str
    refusals: tuple[tuple[str, str], ...]


_observers: ContextVar[tuple[list[Choice], ...]] = ContextVar("observers", default=())


@contextmanager
def observe_choices() -> Iterator[list[Choice]]:
    """Yields a list that receives one `Choice` per call of an op that succeeds while the context is open.

    Calls are counted where they are traced: a program that `jax.jit` has in its cache makes none. Contexts nest, and
    each gets all choices made inside of it. A thread sees only the choices of its own context (see `contextvars`).
    """
    choices: list[Choice] = []
    token = _observers.set((*_observers.get(), choices))
    try:
        yield choices
    finally:
        _observers.reset(token)


def dispatch[T](
    op: str, table: Mapping[str, Callable[..., T]], implementation: str | None, *args: Any, **options: Any
) -> T:
    """Returns the op's result from the named implementation, or from the first that accepts when none is named.

    Implementations get no array of more than 32 bits (see `narrowed`).

    Args:
      op: the op's name, for messages.
      table: the op's implementations by backend name.
      implementation: a name of `BACKENDS`, or None to choose.
      *args: the op's arrays.
      **options: the op's keyword options.

    Raises:
      ValueError: if the name is no backend.
      NotImplementedError: if the named implementation refuses or is absent; it never falls back to another.
    """
    args, options = narrowed((args, options))
    if implementation is None:
        return _first_accepting(op, table, *args, **options)
    if implementation not in BACKENDS:
        raise ValueError(f"{implementation=} must be None or one of {', '.join(BACKENDS)}")
    if implementation not in table:
        offered = (name for name in table if name != "reference")  # which is a specification and no choice of users
        raise NotImplementedError(f"{op} has no {implementation!r} implementation; it has {', '.join(offered)}")
    result = table[implementation](*args, **options)
    _record(Choice(op, implementation, ()))
    return result


def _first_accepting[T](op: str, table: Mapping[str, Callable[..., T]], *args: Any, **options: Any) -> T:
    refusals: list[tuple[str, str]] = []
    for name in BACKENDS:
        if name == "reference" or name not in table:
            continue
        try:
            result = table[name](*args, **options)
        except NotImplementedError as refusal:
            refusals.append((name, str(refusal)))
        else:
            _record(Choice(op, name, tuple(refusals)))
            return result
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refusals)
    raise NotImplementedError(f"no implementation of {op} accepts these arguments: {reasons}")


def _record(choice: Choice) -> None:
    for choices in _observers.get():
        choices.append(choice)
