"""A Jinja sandbox with a budget, for templates that come with a checkpoint and are not trusted.

Jinja's sandbox keeps a template out of the interpreter's internals. This module bounds what a template may use: loop
iterations and calls, the text that it writes (also into a variable), the size of results of ``+``, ``*``, ``**``,
``%``, ``~``, ``join``, ``replace``, ``indent`` and ``format``, and the numbers that it passes to filters and text
methods. It does not bound text that stands literally inside a captured block inside a loop, nor the time that one
operation takes on text of an allowed size.
"""

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.filters import do_format, do_indent, do_replace, sync_do_join
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

MAX_STEPS = 1_000_000  # loop iterations and calls per rendering
MAX_NUMBER = 10_000  # largest whole number passed to a filter or a text method: a width, a count, an indent

_BUDGET = " budget"  # the variable that holds a rendering's budget: no template can spell a name with a blank
_UNBOUNDED_METHODS = frozenset({"expandtabs", "translate"})  # no argument bounds what these return
_UNBOUNDED_FILTERS = ("urlize", "wordwrap", "xmlattr")
_ANY_NUMBER = frozenset({"default", "d"})  # filters that only pass their arguments on
_BRACE_FORMAT = re.compile(r"\{[^{}]*(?:\d{5}|\{)")  # a width of five digits, or one taken from an argument
_WIDE_FORMAT = "a format with a width above 9,999 or taken from an argument"
_PERCENT_FORMAT = re.compile(r"%(?:\([^)]*\))?[^a-zA-Z%]*(?:\d{5}|\*)")


class Budget:
    """What one rendering may still use; every method raises `SecurityError` if that does not suffice.

    Args:
      characters: the most that the rendering may write, and the largest text or list that it may make on the way.
    """

    def __init__(self, *, characters: int):
        self._characters = characters
        self._unwritten = characters
        self._steps = MAX_STEPS

    def as_variables(self) -> dict[str, Any]:
        """Returns the variables that the rendering needs besides the template's."""
        return {_BUDGET: self}

    def step(self, count: int = 1) -> None:
        """Counts loop iterations and calls."""
        self._steps -= count
        if self._steps < 0:
            raise SecurityError(f"more than {MAX_STEPS:,} loop iterations and calls")

    def write(self, size: int) -> None:
        """Counts what an expression writes into the result or into a variable."""
        self._unwritten -= size
        if self._unwritten < 0:
            raise SecurityError(f"more than {self._characters:,} characters written")

    def make(self, size: int) -> None:
        """Checks the size of a text or list before it is made."""
        if size > self._characters:
            raise SecurityError(f"a value of {size:,} characters or items where {self._characters:,} are allowed")

    def bounded(self, parts: Iterable[str]) -> Iterator[str]:
        """Yields the parts of the result while they fit."""
        total = 0
        for part in parts:
            total += len(part)
            self.make(total)
            yield part


class BudgetedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, whose loops, calls, operators and outputs draw on the `Budget` of the rendering.

    Args:
      filters: filters that are added to Jinja's or replace them.
      options: as for `jinja2.Environment`.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, *, filters: Mapping[str, Callable[..., Any]], **options: Any):
        super().__init__(finalize=_written, **options)
        for name in _UNBOUNDED_FILTERS:
            self.filters.pop(name)
        self.globals.pop("lipsum")
        self.filters.update(join=_join, replace=_replace, format=_format, indent=_indent, **filters)
        for name in self.filters.keys() - _ANY_NUMBER:
            self.filters[name] = _with_small_numbers(self.filters[name])
        self.filters.update(counted=_counted, concatenated=_concatenated)

    def budgeted(self, parsed: nodes.Template) -> nodes.Template:
        """Returns the parsed source with its loops counted and its ``~`` checked, for `from_string`."""
        return self._rewrite(parsed)

    def _rewrite(self, node: Any) -> Any:
        for field, value in list(node.iter_fields()):
            if isinstance(value, nodes.Node):
                setattr(node, field, self._rewrite(value))
            elif isinstance(value, list):
                setattr(node, field, [self._rewrite(item) if isinstance(item, nodes.Node) else item for item in value])
        if isinstance(node, nodes.For):
            node.iter = self._filtered(node.iter, "counted")
        if isinstance(node, nodes.Concat):  # the one operator that the sandbox cannot intercept
            return self._filtered(nodes.List(node.nodes, lineno=node.lineno, environment=self), "concatenated")
        return node

    def _filtered(self, node: Any, name: str) -> nodes.Filter:
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno, environment=self)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Returns the result of a call, and counts the call."""
        budget_of(context).step()
        if isinstance(getattr(obj, "__self__", None), (str, bytes, int)):
            _check_numbers((*args, *kwargs.values()))
            _check_method(budget_of(context), obj.__self__, obj.__name__, args)
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Returns the result of an operator, unless it would be too large."""
        _check_operation(budget_of(context), operator, left, right)
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Returns a text's ``format`` method, unless it has a large width."""
        wrapped = super().wrap_str_format(value)
        if wrapped is not None and _BRACE_FORMAT.search(value.__self__):
            raise SecurityError(_WIDE_FORMAT)
        return wrapped

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Returns whether a template may use the attribute."""
        if isinstance(obj, (str, bytes)) and attr in _UNBOUNDED_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)


def budget_of(context: Context) -> Budget:
    """Returns the budget of the rendering that the context belongs to."""
    return context.parent[_BUDGET]


def _with_small_numbers(function: Callable[..., Any]) -> Callable[..., Any]:
    own = 2 if hasattr(function, "jinja_pass_arg") else 1  # (the context and) the value that is filtered

    @functools.wraps(function)  # copies the mark of a filter that takes the context
    def checked(*args: Any, **kwargs: Any) -> Any:
        _check_numbers((*args[own:], *kwargs.values()))
        return function(*args, **kwargs)

    return checked


def _check_numbers(values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, int) and abs(value) > MAX_NUMBER:
            raise SecurityError(f"the number {value} passed to a function where at most {MAX_NUMBER:,} is allowed")


def _check_method(budget: Budget, text: Any, name: str, args: tuple[Any, ...]) -> None:
    """Refuses a text method whose result would be too long."""
    if name == "replace" and len(args) >= 2 and all(isinstance(arg, (str, bytes)) for arg in args[:2]):
        budget.make(len(text) + text.count(args[0]) * len(args[1]))
    elif name == "join" and args:
        parts = list(islice(args[0], 1 + len(args[0]))) if hasattr(args[0], "__len__") else []
        budget.make(len(text) * len(parts) + sum(len(part) for part in parts if isinstance(part, (str, bytes))))


def _check_operation(budget: Budget, operator: str, left: Any, right: Any) -> None:
    """Refuses an operation whose result would be too large."""
    if operator == "*" and isinstance(left, int) and isinstance(right, int):
        budget.make(left.bit_length() + right.bit_length())
    elif operator == "*" and isinstance(left, Sequence) and isinstance(right, int):
        budget.make(len(left) * right)
    elif operator == "*" and isinstance(right, Sequence) and isinstance(left, int):
        budget.make(len(right) * left)
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
        budget.make(left.bit_length() * abs(right))
    elif operator == "+" and isinstance(left, Sequence) and isinstance(right, Sequence):
        budget.make(len(left) + len(right))
    elif operator == "%" and isinstance(left, str) and _PERCENT_FORMAT.search(left):
        raise SecurityError(_WIDE_FORMAT)


@pass_context
def _written(context: Context, value: Any) -> Any:
    budget_of(context).write(len(value) if isinstance(value, str) else 1)
    return value


@pass_context
def _counted(context: Context, values: Any) -> Any:
    """Returns what a ``for`` iterates over; counts iterations at once if the length is known, else one by one."""
    budget = budget_of(context)
    if not hasattr(values, "__len__"):
        return _counted_one_by_one(budget, values)
    budget.step(len(values))
    return values


def _counted_one_by_one(budget: Budget, values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        budget.step()
        yield value


@pass_context
def _concatenated(context: Context, parts: list[Any]) -> str:
    texts = [str(part) for part in parts]
    budget_of(context).make(sum(map(len, texts)))
    return "".join(texts)


@pass_context
def _join(context: Context, value: Iterable[Any], d: str = "", attribute: str | None = None) -> str:
    items = list(value)
    texts = items if attribute is None else [context.environment.getitem(item, attribute) for item in items]
    budget_of(context).make(sum(len(str(text)) for text in texts) + len(str(d)) * len(texts))
    return sync_do_join(context.eval_ctx, items, d, attribute)


@pass_context
def _replace(context: Context, s: Any, old: str, new: str, count: int | None = None) -> str:
    budget_of(context).make(len(str(s)) + str(s).count(str(old)) * len(str(new)))
    return do_replace(context.eval_ctx, s, old, new, count)


@pass_context
def _format(context: Context, value: Any, *args: Any, **kwargs: Any) -> str:
    _check_operation(budget_of(context), "%", str(value), args)
    return do_format(value, *args, **kwargs)


@pass_context
def _indent(context: Context, s: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    margin = len(width) if isinstance(width, str) else width
    budget_of(context).make(len(str(s)) + (len(str(s).splitlines()) + 1) * (margin + 1))
    return do_indent(s, width, first, blank)
