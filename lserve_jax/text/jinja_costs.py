"""What the filters, tests, operators and methods of a template cost, see `lserve_jax.text.jinja_budget`.

Unless a table says otherwise, whatever gets a value reads all of it once.
"""

import functools
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

from jinja2.sandbox import SecurityError

from lserve_jax.text.jinja_budget import COPIES, ITEM, STEP, Budget, check_bits, current

MAX_NUMBER = 10_000
"""Largest whole number passed to a filter or a text method: a width, a count, an indent."""
MAX_NAME = 100
"""Longest text that says which attribute a filter takes, or how a date is written."""

# What takes more time than any count of its arguments says, or cannot be bounded by them.
REMOVED_FILTERS = ("urlize", "wordwrap", "xmlattr", "striptags", "pprint")
REMOVED_METHODS = frozenset({"expandtabs", "translate", "striptags", "encode", "decode"})

# Filters and tests that look at no part of their value, or only pass it on.
CONSTANT_FILTERS = frozenset({"count", "length", "d", "default", "first", "last", "random"})
CONSTANT_TESTS = frozenset(
    {"defined", "undefined", "none", "boolean", "false", "true", "integer", "float", "string", "mapping", "number"}
    | {"sequence", "iterable", "callable", "sameas", "escaped", "filter", "test"}
)
# Filters that take the items of a value one by one.
ITEMWISE = frozenset(
    {"list", "items", "reverse", "batch", "slice", "map", "select", "reject", "selectattr", "rejectattr"}
)
# Filters that compare items; each is read as often as a sort looks at it.
SORTING = frozenset({"sort", "groupby", "unique", "dictsort", "min", "max"})
# Where the filters that take an attribute may have it among their arguments, if it is not named.
_ATTRIBUTE_AT = {"selectattr": slice(1), "rejectattr": slice(1), "sum": slice(1), "join": slice(1, 2)}
_ATTRIBUTE_AT |= dict.fromkeys(SORTING, slice(None))
ANY_NUMBER = frozenset({"default", "d"})  # filters that only pass their arguments on
# How many times longer a filter works on a character than others do.
SLOW = {
    "title": 20,
    "indent": 8,
    "wordcount": 10,
    "urlencode": 50,
    "tojson": 8,
    "escape": 4,
    "e": 4,
    "forceescape": 4,
    "float": 10,
}

COPYING = frozenset(("strip", "lstrip", "rstrip", "startswith", "endswith", "removeprefix", "removesuffix", "join"))
SEARCHING = frozenset({"count", "find", "index", "partition", "replace", "split"})
SEARCHING_BACKWARD = frozenset({"rfind", "rindex", "rpartition", "rsplit", "strip", "lstrip", "rstrip"})
_LONGEST_NAIVE = 100  # Python searches forward for longer patterns in linear time

_BRACE_FORMAT = re.compile(r"\{[^{}]*(?:\d{3}|\{)")  # a width of three digits, or one taken from an argument
_PERCENT_FORMAT = re.compile(r"%(?:\([^)]*\))?[^a-zA-Z%]*(?:\d{3}|\*)")
_COMPARE = {
    "eq": operator.eq,
    "ne": operator.ne,
    "gt": operator.gt,
    "gteq": operator.ge,
    "lt": operator.lt,
    "lteq": operator.le,
    "in": lambda item, values: item in values,
    "notin": lambda item, values: item not in values,
}


def charged(name: str, function: Callable[..., Any], *, is_constant: bool) -> Callable[..., Any]:
    """Returns a filter or test of Jinja that counts its work before it begins, unless that is constant."""
    own = 1 if hasattr(function, "jinja_pass_arg") else 0  # the context or the environment

    @functools.wraps(function)  # copies the mark of a filter that takes the context
    def run(*args: Any, **kwargs: Any) -> Any:
        budget, given = current(), list(args)
        budget.spend(STEP)
        others = (*given[own + 1 :], *kwargs.values())
        _check_attribute(name, given[own + 1 :], kwargs)
        if name not in ANY_NUMBER:
            check_numbers(others)
        if len(given) > own and not is_constant:
            given[own] = _prepared(budget, name, given[own], others)
        _CHECKS.get(name, _no_check)(budget, *given[own:], **kwargs)
        return taken(budget, function(*given, **kwargs))

    return run


def _prepared(budget: Budget, name: str, value: Any, others: Sequence[Any]) -> Any:
    """Returns the value for a filter or test whose reading is counted; a list of what it can only read once."""
    for other in others:
        budget.read(other)
    if name in ITEMWISE:
        budget.spend(ITEM * len(value) if hasattr(value, "__len__") else 0)
        return value
    if isinstance(value, Iterator) and (name in SORTING or name in ("sum", "join")):
        value = list(value)
    weight = SLOW.get(name, 1)
    if name in SORTING and isinstance(value, Sized):
        weight += 2 * len(value).bit_length()
    before = budget.spent
    budget.read(value)
    budget.spend((weight - 1) * (budget.spent - before))
    return value


def _check_attribute(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuses long names of attributes, ``a.b.c…``, which are looked up for every item."""
    positional = args[_ATTRIBUTE_AT[name]] if name in _ATTRIBUTE_AT else ()
    names = (kwargs.get("attribute"), *positional)
    if any(isinstance(one, str) and len(one) > MAX_NAME for one in names):
        raise SecurityError(f"an attribute's name of more than {MAX_NAME} characters")


def taken(budget: Budget, result: Any) -> Any:
    """Returns a result whose size, or if it is an iterator whose iteration, is counted."""
    if isinstance(result, str):
        budget.make(len(result))
    elif isinstance(result, list | tuple):
        budget.make(8 * len(result))
    elif isinstance(result, Iterator):
        return budget.counted(result)
    return result


def check_numbers(values: Iterable[Any]) -> None:
    """Refuses large whole numbers."""
    for value in values:
        if isinstance(value, int) and abs(value) > MAX_NUMBER:
            raise SecurityError(f"the number {value:.6g} passed to a function where at most {MAX_NUMBER:,} is allowed")


# Checks of filters whose results may be much larger than their arguments: budget, the filter's value, its arguments.


def _no_check(*args: Any, **kwargs: Any) -> None:
    del args, kwargs


def _check_join(budget: Budget, value: Any, d: Any = "", attribute: Any = None) -> None:
    del attribute
    if hasattr(value, "__len__"):
        budget.make(budget.read(value)[0] + len(value) * len(str(d)))


def _check_replace(budget: Budget, value: Any, old: Any, new: Any, count: Any = None) -> None:
    del count
    text, pattern = str(value), str(old)
    search(budget, "replace", text, pattern)
    budget.make(len(text) + text.count(pattern) * len(str(new)))


def _check_indent(budget: Budget, value: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> None:
    del first, blank
    text, margin = str(value), len(width) if isinstance(width, str) else width
    budget.make(len(text) + (len(text.splitlines()) + 1) * (margin + 1))


def _check_format(budget: Budget, value: Any, *args: Any, **kwargs: Any) -> None:
    check_percent(budget, str(value), (args, kwargs))


def _check_sum(budget: Budget, value: Any, attribute: Any = None, start: Any = 0) -> None:
    del budget, attribute
    if not isinstance(start, int | float) or any(isinstance(one, list | tuple) for one in value):
        raise SecurityError("the sum of what are no numbers")


def _check_tojson(
    budget: Budget,
    value: Any,
    ensure_ascii: Any = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: Any = 0,
) -> None:
    del ensure_ascii, sort_keys
    characters, depth = budget.read(value)
    margin = depth * (len(indent) if isinstance(indent, str) else indent or 0)
    between = sum(len(one) for one in separators) if separators else 2
    budget.make(characters + characters // 8 * (margin + between))


def _check_trim(budget: Budget, value: Any, chars: Any = None) -> None:
    search(budget, "strip", str(value), chars)


def _check_in(budget: Budget, value: Any, values: Any) -> None:
    if isinstance(values, str):
        search(budget, "find", values, value)


_CHECKS: dict[str, Callable[..., None]] = {
    "join": _check_join,
    "replace": _check_replace,
    "indent": _check_indent,
    "format": _check_format,
    "sum": _check_sum,
    "tojson": _check_tojson,
    "trim": _check_trim,
    "in": _check_in,
}


def compared(first: Any, *others: Any) -> bool:
    """Returns the value of a chain of comparisons ``first op1 second op2 third …``; the operators are Jinja's names."""
    budget, left = current(), first
    for name, given in zip(others[::2], others[1::2], strict=True):
        budget.spend(STEP)
        right = list(given) if name in ("in", "notin") and isinstance(given, Iterator) else given
        budget.read(left)
        budget.read(right)
        _check_in(budget, left, right)
        if not _COMPARE[name](left, right):
            return False
        left = right
    return True


def concatenated(parts: list[Any]) -> str:
    """Returns the parts as one text."""
    budget = current()
    budget.spend(STEP)
    budget.make(sum(len(part) if isinstance(part, str) else budget.read(part)[0] for part in parts))
    return "".join(map(str, parts))


def check_operation(budget: Budget, name: str, left: Any, right: Any) -> None:
    """Refuses an arithmetic operation whose result would be too large, and counts its work."""
    budget.spend(STEP)
    if name == "%" and isinstance(left, str):
        check_percent(budget, left, right)
        return
    numbers = [value for value in (left, right) if isinstance(value, int)]
    for number in numbers:
        check_bits(number.bit_length())
    size = _size(left) + _size(right)
    if name == "+":
        budget.make(size)
    elif name == "*" and len(numbers) == 2:
        check_bits(left.bit_length() + right.bit_length())
    elif name == "*" and numbers:
        budget.make(size * max(numbers[0], 0))
    elif name == "**" and len(numbers) == 2:
        check_bits(left.bit_length() * abs(right))


def _size(value: Any) -> int:
    """Returns the characters of a text, eight per item of a list, 0 for anything else."""
    if isinstance(value, str | bytes):
        return len(value)
    return 8 * len(value) if isinstance(value, list | tuple) else 0


def check_percent(budget: Budget, form: str, values: Any) -> None:
    """Refuses ``form % values`` if the result would be too large."""
    budget.spend(4 * len(form))
    _check_width(_PERCENT_FORMAT, form)
    budget.make(len(form) + form.count("%") * (budget.read(values)[0] + 100))


def check_braces(budget: Budget, form: str, values: Any) -> None:
    """Refuses ``form.format(values)`` if the result would be too large."""
    budget.spend(4 * len(form))
    _check_width(_BRACE_FORMAT, form)
    budget.make(len(form) + form.count("{") * (budget.read(values)[0] + 100))


def _check_width(pattern: re.Pattern[str], form: str) -> None:
    if pattern.search(form):
        raise SecurityError("a format with a width above 99 or taken from an argument")


def check_method(budget: Budget, owner: Any, name: str, args: list[Any]) -> None:
    """Counts the work of a method of Python's own types, and refuses results that would be too large.

    Args:
      budget: the rendering's.
      owner: the value whose method it is.
      name: the method.
      args: its arguments; an iterator among them becomes a list.
    """
    budget.spend(STEP)
    check_numbers(args)
    for index, value in enumerate(args):
        args[index] = list(value) if isinstance(value, Iterator) else value
        budget.read(args[index])
    if isinstance(owner, str | bytes):
        budget.spend(len(owner) // (COPIES if name in COPYING | SEARCHING | SEARCHING_BACKWARD else 1))
        search(budget, name, owner, args[0] if args else None)
        _check_text_method(budget, owner, name, args)
    elif name in ("index", "count"):
        budget.read(owner)
    elif hasattr(owner, "__len__"):
        budget.spend(len(owner))


def _check_text_method(budget: Budget, text: Any, name: str, args: Sequence[Any]) -> None:
    if name == "replace" and len(args) >= 2 and all(isinstance(arg, str | bytes) for arg in args[:2]):
        budget.make(len(text) + text.count(args[0]) * len(args[1]))
    elif name == "join" and args and hasattr(args[0], "__len__"):
        budget.make(len(text) * len(args[0]) + budget.read(args[0])[0])
    elif name in ("split", "rsplit", "splitlines"):
        separator = args[0] if args and isinstance(args[0], type(text)) and args[0] else None
        pieces = 1 + (text.count(separator) if separator else len(text) // 2 if name != "splitlines" else len(text))
        budget.spend(ITEM * min(pieces, 1 + len(text)))


def search(budget: Budget, name: str, text: Any, pattern: Any) -> None:
    """Counts the search for a pattern, or for its characters: Python may compare all of it at each place."""
    length = len(pattern) if isinstance(pattern, str | bytes) else 0
    if name in SEARCHING:
        length = min(length, _LONGEST_NAIVE)
    elif name not in SEARCHING_BACKWARD and name != "find":
        return
    budget.spend(len(text) * (length + 1) // COPIES)
