"""Everything that a template can do with a long value costs at least what Python does with it."""

from contextlib import suppress
from typing import Any

import pytest

from lserve_jax.text import jinja_costs
from lserve_jax.text.jinja_budget import COPIES, Budget
from lserve_jax.text.jinja_sandbox import BudgetedEnvironment

ENVIRONMENT = BudgetedEnvironment(filters={})
LENGTH = 20_000

# Arguments of methods of texts; those that are not here have none.
TEXT_ARGUMENTS = {
    **dict.fromkeys(("center", "ljust", "rjust", "zfill"), "9"),
    **dict.fromkeys(("count", "find", "index", "partition", "rfind", "rindex", "rpartition", "split", "rsplit"), "'x'"),
    **dict.fromkeys(("endswith", "removeprefix", "removesuffix", "startswith"), "'x'"),
    "replace": "'y', 'z'",
    "join": "['a', 'b']",
    "format": "1",
    "format_map": "{}",
    "maketrans": "x",
}
# Uses of filters that read a text; filters that are not here have no arguments.
FILTERS_OF_TEXT = {
    "attr": "{} | attr(x)",
    "format": "x | format(1)",
    "replace": "x | replace('y', 'z')",
    "int": "x | int",
    "truncate": "x | truncate(9)",
    "center": "x | center(9)",
    "join": "[x, x] | join",
    "sum": "x | list | sum",
    "dictsort": "{x: x} | dictsort",
    "items": "{x: x} | items | join",
    "groupby": "[[x]] | groupby(0)",
    "map": "[x] | map('upper') | list",
    "select": "[x] | select('eq', x) | list",
    "max": "[x, x] | max",
    "reject": "[x] | reject('eq', x) | list",
    "selectattr": "[[x]] | selectattr(0, 'eq', x) | list",
    "rejectattr": "[[x]] | rejectattr(0, 'eq', x) | list",
    "sort": "[x] | sort",
    "unique": "[x] | unique | list",
    "min": "[x, x] | min",
    "batch": "x | batch(2) | list",
    "slice": "x | slice(2) | list",
    "reverse": "x | reverse",
    "round": "x | float | round",
    "abs": "x | float | abs",
    "filesizeformat": "x | filesizeformat",
}
OPERATIONS = [
    *("x + 'a'", "'a' ~ x", "x * 2", "'a' in x", "x in 'a'", "x == x", "x < 'y'", "1 if x in ['a'] else 2", "'%s' % x"),
    *("x[1:]", "x[::-1]", "[x, x] == 1", "{x: 1}", "x is eq('a')", "x is lower", "x is in ['a']", "'a' is in x"),
    *("'{}'.format(x)", "[x].index(x)", "[x].count('a')", "{}.get(x)", "dict(a=x)", "'a'.join([x])", "'a'.strip(x)"),
]
LIST_OPERATIONS = [
    *("x + x", "x * 2", "x == 1", "-1 in x", "-1 not in x", "x[1:]", "x | list", "x | sort", "x | unique | list"),
    *("x | join", "x | tojson", "x | string", "x | sum", "x | max", "x | groupby('real')", "x | map('abs') | list"),
    *("x.index(-1)", "x.count(1)", "x.copy()", "x ~ ''", "-1 is in x", "x | batch(2) | list", "x | reverse | list"),
    *("x | select('odd') | list", "x | length and x | list | last", "range(x | length) | list", "-1 in x | map('abs')"),
]


def cost(expression: str, x: Any) -> int:
    """The units of an expression, whether or not it fails on this value after it was counted."""
    template = ENVIRONMENT.from_string(ENVIRONMENT.budgeted(ENVIRONMENT.parse("{% set y = " + expression + " %}")))
    budget = Budget(units=10**9, characters=10**8)
    with budget.in_force(), suppress(TypeError, ValueError, LookupError):
        template.render(x=x)
    return budget.spent


def is_proportional(expression: str, unit: Any) -> bool:
    """Whether twice the value costs more by at least what copying the second half does."""
    return cost(expression, unit * (2 * LENGTH)) - cost(expression, unit * LENGTH) >= LENGTH // COPIES


METHODS = [name for name in dir(str) if not name.startswith("_") and name not in jinja_costs.REMOVED_METHODS]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_of_a_text_costs_its_length(name: str):
    assert is_proportional(f"x.{name}({TEXT_ARGUMENTS.get(name, '')})", "x")


@pytest.mark.parametrize("name", sorted(name for name in ENVIRONMENT.filters if not name.startswith(" ")))
def test_every_filter_of_a_text_costs_its_length(name: str):
    if name in jinja_costs.CONSTANT_FILTERS:
        assert cost(f"x | {name}", "x" * LENGTH) < 2 * LENGTH // COPIES  # what returns the value may seem to copy it
    else:
        assert is_proportional(FILTERS_OF_TEXT.get(name, f"x | {name}"), "x")


@pytest.mark.parametrize("name", sorted(ENVIRONMENT.tests))
def test_every_test_of_a_text_costs_its_length_or_is_known_to_be_constant(name: str):
    test = ENVIRONMENT.tests[name]
    if name in jinja_costs.CONSTANT_TESTS:
        return
    spent = []
    for length in (LENGTH, 2 * LENGTH):
        budget = Budget(units=10**9, characters=10**8)
        with budget.in_force():
            try:
                test("x" * length, *(() if name in ("lower", "upper", "odd", "even") else ("y" * length,)))
            except TypeError:  # no number
                assert name in ("odd", "even", "divisibleby")
        spent.append(budget.spent)
    assert spent[1] - spent[0] >= LENGTH // COPIES


@pytest.mark.parametrize("expression", OPERATIONS)
def test_every_operation_on_a_text_costs_its_length(expression: str):
    assert is_proportional(expression, "x")


@pytest.mark.parametrize("expression", LIST_OPERATIONS)
def test_every_operation_on_a_list_costs_its_length(expression: str):
    assert is_proportional(expression, [1])


@pytest.mark.parametrize(
    "expression",
    ["x.rfind(y)", "x.rindex(y)", "x.rsplit(y)", "x.rpartition(y)", "x.strip(y)", "x.lstrip(y)", "x | trim(y)"],
)
def test_a_search_that_may_compare_all_at_each_place_costs_the_product(expression: str):
    pattern = f"{expression.replace('y', repr('y' * 2000))}"
    assert cost(pattern, "x" * LENGTH) >= 2000 * LENGTH // COPIES


def test_a_negative_number_gives_nothing_back():
    assert cost("'abc' * -1000000000", "") > 0
    assert cost("[1] * -1000000000", "") > 0
    assert cost("(-1000000000) * 'abc'", "") > 0


def test_an_iterator_is_counted_wherever_it_is_read():
    plain = cost("x | list", [1] * LENGTH)
    for read in ("| list", "| join", "| sum", "| max", "| sort", "| first and x | map('abs') | list"):
        assert cost(f"x | map('abs') {read}", [1] * LENGTH) > plain + 100 * LENGTH


def test_conditions_of_loops_and_bodies_of_blocks_cost_their_size_each_time():
    def of(source: str) -> int:
        template = ENVIRONMENT.from_string(ENVIRONMENT.budgeted(ENVIRONMENT.parse(source)))
        budget = Budget(units=10**9, characters=10**8)
        with budget.in_force():
            template.render()
        return budget.spent

    long = "[" + "a, " * 500 + "]"
    empty = of("{% for i in range(100) %}{% endfor %}")
    assert of(f"{{% for i in range(100) if {long} %}}{{% endfor %}}") > empty + 100 * 500
    assert of(f"{{% for i in range(100) %}}{{% if {long} %}}{{% endif %}}{{% endfor %}}") > empty + 100 * 500
    macro = f"{{% macro f() %}}{{% if {long} %}}{{% endif %}}{{% endmacro %}}"
    assert of(macro + "{% for i in range(100) %}{{ f() }}{% endfor %}") > empty + 100 * 500
    text = "x" * 1000
    assert of(f"{{% for i in range(100) %}}{{% set y %}}{text}{{% endset %}}{{% endfor %}}") > empty + 100 * 1000
