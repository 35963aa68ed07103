"""Choice of an implementation for an op."""

from collections.abc import Callable, Mapping
from typing import Any

NAMES = ("mosaic_gpu", "triton", "xla", "reference")
"""Every backend name, in the order in which `dispatch` tries those that an op has; ``reference`` only by name."""


def dispatch[T](
    op: str, table: Mapping[str, Callable[..., T]], implementation: str | None, *args: Any, **options: Any
) -> T:
    """Returns the op's result from the named implementation, or from the first that accepts when none is named.

    Args:
      op: the op's name, for messages.
      table: the op's implementations by backend name.
      implementation: a name of `NAMES`, or None to choose.
      *args: the op's arrays.
      **options: the op's keyword options.

    Raises:
      ValueError: if the name is no backend.
      NotImplementedError: if the named implementation refuses or is absent; it never falls back to another.
    """
    if implementation is None:
        return _first_accepting(op, table, *args, **options)
    if implementation not in NAMES:
        raise ValueError(f"{implementation=} must be None or one of {', '.join(NAMES)}")
    if implementation not in table:
        raise NotImplementedError(f"{op} has no {implementation!r} implementation; it has {', '.join(table)}")
    return table[implementation](*args, **options)


def _first_accepting[T](op: str, table: Mapping[str, Callable[..., T]], *args: Any, **options: Any) -> T:
    refusals = []
    for name in NAMES:
        if name == "reference" or name not in table:
            continue
        try:
            return table[name](*args, **options)
        except NotImplementedError as refusal:
            refusals.append(f"{name}: {refusal}")
    raise NotImplementedError(f"no implementation of {op} accepts these arguments: {'; '.join(refusals)}")
