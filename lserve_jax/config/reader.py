"""Reads typed values from a parsed ``config.json`` and records every problem instead of stopping at the first."""

from collections.abc import Mapping
from typing import Any

from lserve_jax.config.errors import InputError, shown
from lserve_jax.config.model import LARGEST_INT, is_positive_number


def _whole(value: object) -> int | None:
    """Returns the whole number that a JSON value is, also if it is written as a float (32768.0); None if it is none."""
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


class Reader:
    """Reads typed values from one mapping; a null counts as absent.

    After a problem, methods return a harmless value; `raise_problems` keeps it from being used.

    Attributes:
      config: the mapping.
      missing: the names of required keys that are absent.
      problems: every other problem, as text.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        prefix: str = "",
        *,
        parent: "Reader | None" = None,
        names: Mapping[str, str] | None = None,
    ) -> None:
        """Reads ``config``.

        Args:
          config: the mapping.
          prefix: with which the names of its keys begin in messages.
          parent: the reader to whose problems this one adds.
          names: full names of keys that stand elsewhere in the file.
        """
        self.config = config
        self._prefix = prefix
        self._names = names or {}
        self.missing: list[str] = parent.missing if parent else []
        self.problems: list[str] = parent.problems if parent else []

    def section(self, key: str) -> "Reader":
        """Returns a reader of the mapping under ``key`` (empty if absent or null) that records its problems here."""
        value = self.config.get(key) or {}
        if not isinstance(value, Mapping):
            value = self._wrong(key, "a mapping", value, {})
        return Reader(value, f"{self.name(key)}.", parent=self)

    def name(self, key: str) -> str:
        """Returns the name of a key in messages."""
        return self._names.get(key, self._prefix + key)

    def size(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        """Returns the integer under ``key``, at least ``least``; required if ``default`` is None."""
        value = self.config.get(key)
        if value is None:
            return self._absent(key, default, 1)
        whole = _whole(value)
        if whole is None or not least <= whole <= LARGEST_INT:
            return self._wrong(key, "a positive integer" if least else "an integer from 0", value, 1)
        return whole

    def number(self, key: str, default: float | None = None) -> float:
        """Returns the positive number under ``key``, required if ``default`` is None."""
        value = self.config.get(key)
        if value is None:
            return self._absent(key, default, 1.0)
        if not is_positive_number(value):
            return self._wrong(key, "a positive number", value, 1.0)
        return float(value)

    def optional_number[T](self, key: str, default: T, *, zero_is_absent: bool = False) -> float | T:
        """Returns the positive number under ``key``, or ``default`` if it is absent, or 0 where that counts as absent.

        transformers has ``get(key) or default`` for some numbers.
        """
        value = self.config.get(key)
        is_zero = zero_is_absent and value == 0 and not isinstance(value, bool)
        return default if value is None or is_zero else self.number(key)

    def flag(self, key: str, default: bool) -> bool:
        """Returns the boolean under ``key``."""
        value = self.config.get(key)
        if value is None:
            return default
        return value if isinstance(value, bool) else self._wrong(key, "true or false", value, default)

    def text(self, key: str, default: str) -> str:
        """Returns the string under ``key``."""
        value = self.config.get(key)
        if value is None:
            return default
        return value if isinstance(value, str) else self._wrong(key, "a string", value, default)

    def token_ids(self, key: str, default: int | None) -> tuple[int | None, ...]:
        """Returns the token ids under ``key``, a number or a list; ``(default,)`` if it is absent or null."""
        value = self.config.get(key)
        if value is None:
            return (default,)
        ids = [_whole(item) for item in (value if isinstance(value, list) else [value])]
        if not ids or any(token is None or not 0 <= token <= LARGEST_INT for token in ids):
            return self._wrong(key, "a token id or a list of them", value, (default,))
        return tuple(ids)

    def raise_problems(self, source: str) -> None:
        """Raises one `InputError` that begins with ``source`` and names every missing key and every problem."""
        problems = [f"missing required keys: {', '.join(dict.fromkeys(self.missing))}"] if self.missing else []
        problems += dict.fromkeys(self.problems)
        if problems:
            raise InputError(f"{source}: {'; '.join(problems)}")

    def _absent[T](self, key: str, default: T | None, stand_in: T) -> T:
        if default is None:
            self.missing.append(self.name(key))
            return stand_in
        return default

    def _wrong[T](self, key: str, expected: str, value: object, stand_in: T) -> T:
        self.problems.append(f"{self.name(key)} must be {expected}, got {shown(value)}")
        return stand_in
