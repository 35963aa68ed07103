"""Jinja's sandbox, in which everything that a template does draws on a budget."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.exceptions import TemplateSyntaxError
from jinja2.runtime import BlockReference, Context, LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Cycler, Joiner, Namespace

from lserve_jax.text import jinja_costs
from lserve_jax.text.jinja_budget import ITEM, STEP, current

_NODE = 10  # units of a node of a block that runs, whether or not the node is reached
_BLOCKS = (nodes.For, nodes.Macro, nodes.CallBlock, nodes.Block)  # what may run many times
_OWN_TYPES = (str, bytes, int, float, list, tuple, set, frozenset, dict)
_PASSING_ON = (Macro, BlockReference, LoopContext, Cycler, Joiner)  # what does not look into its arguments

# Filters of the rewritten source. No template can spell a name with a blank.
_COUNTED, _COMPARED, _CONCATENATED = " counted", " compared", " concatenated"
_READ, _TAKEN, _SPENT = " read", " taken", " spent"


class BudgetedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, whose blocks, operators, filters, tests, calls and outputs draw on `current`.

    Args:
      filters: filters that are added to Jinja's or replace them.
      options: as for `jinja2.Environment`.
    """

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "**", "%"})

    def __init__(self, *, filters: Mapping[str, Callable[..., Any]], **options: Any):
        super().__init__(finalize=_written, **options)
        self.filters.update(filters)
        for name in jinja_costs.REMOVED_FILTERS:
            self.filters.pop(name)
        self.globals.pop("lipsum")
        self.tests["in"] = lambda value, values: jinja_costs.compared(value, "in", values)
        for functions, constant in (
            (self.filters, jinja_costs.CONSTANT_FILTERS),
            (self.tests, jinja_costs.CONSTANT_TESTS),
        ):
            for name, function in list(functions.items()):
                functions[name] = jinja_costs.charged(name, function, is_constant=name in constant)
        self.filters.update(
            {
                _COUNTED: _counted,
                _COMPARED: jinja_costs.compared,
                _CONCATENATED: jinja_costs.concatenated,
                _READ: _read,
                _TAKEN: _taken,
                _SPENT: _spent,
            }
        )

    def budgeted(self, parsed: nodes.Template) -> nodes.Template:
        """Returns the parsed source with everything counted that this class does not see, for `from_string`."""
        return self._rewrite(parsed)

    def _rewrite(self, node: Any) -> Any:
        cost = _static_cost(node.body) if isinstance(node, _BLOCKS) else 0
        if isinstance(node, nodes.For):
            self._count_items(node)
        for field, value in list(node.iter_fields()):
            if isinstance(value, nodes.Node):
                setattr(node, field, self._rewrite(value))
            elif isinstance(value, list):
                setattr(node, field, [self._rewrite(item) if isinstance(item, nodes.Node) else item for item in value])
        if isinstance(node, _BLOCKS):
            cost_of_body = nodes.Const(cost, lineno=node.lineno, environment=self)
            spending = self._filtered(cost_of_body, _SPENT)
            node.body.insert(0, nodes.ExprStmt(spending, lineno=node.lineno, environment=self))
        return self._replaced(node)

    def _count_items(self, loop: nodes.For) -> None:
        if loop.recursive and loop.test is not None:
            raise TemplateSyntaxError("a recursive loop cannot have a condition here", loop.lineno)
        units = STEP + (_static_cost([loop.test]) if loop.test is not None else 0)
        loop.iter = self._filtered(loop.iter, _COUNTED, nodes.Const(units, lineno=loop.lineno, environment=self))

    def _replaced(self, node: Any) -> Any:
        """Returns an expression whose parts are rewritten, with a filter where the sandbox intercepts nothing."""
        if isinstance(node, nodes.Concat):
            parts = nodes.List(node.nodes, lineno=node.lineno, environment=self)
            return self._filtered(parts, _CONCATENATED)
        if isinstance(node, nodes.Compare):
            chain = [
                part
                for operand in node.ops
                for part in (nodes.Const(operand.op, lineno=node.lineno, environment=self), operand.expr)
            ]
            return self._filtered(node.expr, _COMPARED, *chain)
        if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
            return self._filtered(node, _TAKEN)
        if isinstance(node, nodes.Pair) and not isinstance(node.key, nodes.Const):
            node.key = self._filtered(node.key, _READ)
        return node

    def _filtered(self, node: Any, name: str, *args: nodes.Expr) -> nodes.Filter:
        return nodes.Filter(node, name, list(args), [], None, None, lineno=node.lineno, environment=self)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Returns the result of a call, after counting it."""
        budget, given = current(), list(args)
        owner = getattr(obj, "__self__", None)
        budget.spend(STEP + ITEM * (len(args) + len(kwargs)))
        if isinstance(owner, _OWN_TYPES):
            budget.read(kwargs)
            jinja_costs.check_method(budget, owner, obj.__name__, given)
        elif not _passes_on(obj, owner):
            budget.read((given, kwargs))
        return jinja_costs.taken(budget, super().call(context, obj, *given, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Returns the result of an operator, unless it would be too large."""
        jinja_costs.check_operation(current(), operator, left, right)
        return super().call_binop(context, operator, left, right)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Returns an item; a key may take long to compare, or to name in an error."""
        if not isinstance(argument, str | int):
            current().read(argument)
        return super().getitem(obj, argument)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Returns a text's ``format`` method, which checks the size of its result."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        form = value.__self__

        def checked(*args: Any, **kwargs: Any) -> str:
            jinja_costs.check_braces(current(), form, (args, kwargs))
            return wrapped(*args, **kwargs)

        return checked

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Returns whether a template may use the attribute."""
        if isinstance(obj, (str, bytes)) and attr in jinja_costs.REMOVED_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)


def _passes_on(obj: Any, owner: Any) -> bool:
    """Returns whether a function of Jinja does not look into its arguments."""
    if isinstance(owner, LoopContext) and obj.__name__ == "changed":
        return False
    return obj is Namespace or isinstance(obj, _PASSING_ON) or isinstance(owner, _PASSING_ON)


def _static_cost(body: Sequence[nodes.Node]) -> int:
    """Returns the units of running statements once; inner blocks that may run many times count their own bodies."""
    cost, waiting = 0, list(body)
    while waiting:
        node = waiting.pop()
        cost += _NODE
        if isinstance(node, nodes.TemplateData | nodes.Const) and isinstance(text := _text(node), str):
            cost += len(text)
        inner = node.iter_child_nodes(exclude=("body",)) if isinstance(node, _BLOCKS) else node.iter_child_nodes()
        waiting.extend(inner)
    return cost


def _text(node: nodes.TemplateData | nodes.Const) -> Any:
    return node.data if isinstance(node, nodes.TemplateData) else node.value


@pass_context  # so that Jinja does not call it for constants as it compiles
def _written(context: Context, value: Any) -> Any:
    del context
    budget = current()
    if isinstance(value, Undefined):
        return value
    if not isinstance(value, str):
        budget.read(value)
        value = str(value)
    budget.write(len(value))
    return value


def _counted(values: Iterable[Any], units: int) -> Iterable[Any]:
    return values if isinstance(values, Undefined) else current().counted(values, units)


def _read(value: Any) -> Any:
    current().read(value)
    return value


def _taken(value: Any) -> Any:
    return jinja_costs.taken(current(), value)


def _spent(units: int) -> None:
    current().spend(units)
