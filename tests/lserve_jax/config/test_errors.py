"""Values in messages: how they are written, cut, and that a large one costs nothing."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lserve_jax.config.errors import shown

# Without quotes: Python chooses its own by what comes later in a text.
_PLAIN = st.one_of(st.none(), st.booleans(), st.integers(), st.text("ab\n", max_size=30), st.binary(max_size=5))
_VALUES = st.recursive(
    _PLAIN,
    lambda part: st.one_of(
        st.lists(part), st.lists(part).map(tuple), st.dictionaries(st.text("ab", max_size=9), part, max_size=9)
    ),
    max_leaves=40,
)


@given(_VALUES, st.integers(0, 90))
def test_a_value_is_its_notation_cut_after_some_characters(value: Any, length: int):
    text = repr(value)
    assert shown(value, length) == (text if len(text) <= length else f"{text[:length]}…")


class Counted:
    """A value that knows how often it was written."""

    def __init__(self) -> None:
        self.times = 0

    def __repr__(self) -> str:
        self.times += 1
        return "x"


@pytest.mark.parametrize("nested", [lambda one: one, lambda one: [one], lambda one: {"a": (one,)}])
def test_a_large_value_is_not_written_whole(nested: Any):
    one = Counted()
    assert len(shown(nested([one] * 100_000))) == 81
    assert one.times < 100


def test_a_value_of_any_depth_can_be_shown():
    value: Any = []
    for _ in range(100_000):
        value = [value]
    assert shown(value) == "[" * 80 + "…"
