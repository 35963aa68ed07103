"""A budget for the rendering of templates that come with a checkpoint and are not trusted.

Everything that a template does has a cost, in units of about ten nanoseconds on a slow core: the nodes of each block
that runs, items that are iterated over, characters that are searched, compared or written. A rendering ends when its
units are spent. Results larger than a limit are refused before they are made, which bounds the memory.
"""

from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from jinja2.sandbox import SecurityError
from jinja2.utils import Namespace

STEP = 100
"""Units of a call, an operator, a filter or a test, and of an item that a loop or a filter takes."""
ITEM = 40
"""Units of an item of a list or mapping that is compared, copied or made text; an item counts as 8 characters."""
COPIES = 4
"""Characters that are copied for one unit: few, because copies may be kept, and the units also bound their memory."""
MAX_BITS = 10_000
"""Size of the largest whole number."""

_CONTAINERS = (list, tuple, set, frozenset, KeysView, ValuesView, ItemsView)
_current: ContextVar["Budget"] = ContextVar("budget of the rendering")


class Budget:
    """What one rendering may still use; every method raises `SecurityError` if that does not suffice.

    Args:
      units: what all its work may cost.
      characters: the most that it may write, into the result and into variables, and the largest text or list that it
        may make on the way.
    """

    def __init__(self, *, units: int, characters: int):
        self.units = units
        self._left = units
        self._characters = characters
        self._unwritten = characters

    @property
    def spent(self) -> int:
        """The units spent so far."""
        return self.units - self._left

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Makes this the budget of the renderings of this thread."""
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)

    def spend(self, units: int) -> None:
        """Counts work."""
        self._left -= units
        if self._left < 0:
            raise SecurityError(f"more work than the {self.units:,} units allowed for a conversation of this size")

    def make(self, characters: int) -> None:
        """Checks the size of a text or list before it is made, and counts the work of making it."""
        if characters > self._characters:
            raise SecurityError(f"a value of {characters:,} characters where {self._characters:,} are allowed")
        self.spend(characters // COPIES)

    def write(self, characters: int) -> None:
        """Counts what an expression writes into the result or into a variable."""
        self._unwritten -= characters
        if self._unwritten < 0:
            raise SecurityError(f"more than {self._characters:,} characters written")
        self.spend(characters // COPIES)

    def bounded(self, parts: Iterable[str]) -> Iterator[str]:
        """Yields the parts of the result while they fit."""
        total = 0
        for part in parts:
            total += len(part)
            if total > self._characters:
                raise SecurityError(f"more than {self._characters:,} characters written")
            yield part

    def counted(self, values: Iterable[Any], units: int = STEP) -> Iterable[Any]:
        """Returns the values, whose iteration is counted at once if their number is known, else one by one."""
        if hasattr(values, "__len__"):
            self.spend(units * len(values))  # type: ignore[arg-type]
            return values
        return self._counted_one_by_one(values, units)

    def _counted_one_by_one(self, values: Iterable[Any], units: int) -> Iterator[Any]:
        for value in values:
            self.spend(units)
            yield value

    def read(self, value: Any) -> tuple[int, int]:
        """Counts the reading of a value with all its parts; a part that it has twice is counted twice.

        Returns:
          The characters of the value as text, roughly, and how deep it is nested.
        """
        characters, depth, level = 0, 0, [value]
        while level:
            depth += 1
            parts: list[Any] = []
            for one in level:
                if isinstance(one, str):
                    self.spend(len(one))
                    characters += len(one)
                    continue
                characters += 8
                if inner := _parts(one):
                    self.spend(ITEM * len(inner))
                    parts.extend(inner)
            level = parts
        return characters, depth


def current() -> Budget:
    """Returns the budget of the rendering at work.

    Raises:
      LookupError: if none is: when Jinja computes constants as it compiles, which it then leaves to the rendering.
    """
    return _current.get()


def check_bits(bits: int) -> None:
    """Refuses a whole number with which every operation would take long."""
    if bits > MAX_BITS:
        raise SecurityError(f"a whole number of more than {MAX_BITS:,} bits")


def _parts(value: Any) -> Any:
    """Returns the parts of a value, with a length; refuses a large number."""
    if isinstance(value, int):
        check_bits(value.bit_length())
        return ()
    if type(value) in (list, tuple) or value is None:  # first, because there may be many
        return value
    if isinstance(value, Mapping):
        return [*value.keys(), *value.values()]
    if isinstance(value, Namespace):
        return [*value._Namespace__attrs.values()]  # its text has all of them
    return value if isinstance(value, (*_CONTAINERS, range, bytes)) else ()
