from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from lserve_jax.config.errors import InputError
from lserve_jax.engine.inputs import each_prompt, naming_the_prompt, require_ids


def generated() -> Iterator[str]:
    yield "a"
    yield "b"


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ("text", ["text"]),
        (["one", "two"], ["one", "two"]),
        (("one", [1, 2]), ["one", [1, 2]]),
        ([5, 6], [[5, 6]]),
        ((np.int64(5), 6), [[5, 6]]),
        ([True, 6], [[True, 6]]),
        ([1.5], [[1.5]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
        (generated(), ["a", "b"]),
        ([], []),
        (b"hi", [b"hi"]),
        ([b"hi"], [b"hi"]),
        ([None], [None]),
    ],
    ids=str,
)
def test_a_call_names_one_prompt_or_several(prompts: Any, expected: list[Any]):
    assert each_prompt(prompts) == expected


@pytest.mark.parametrize("make", [np.array, jnp.array])
def test_an_array_of_one_dimension_is_one_prompt_and_each_row_of_two_is_one(make: Any):
    (one,) = each_prompt(make([5, 6, 7]))
    assert require_ids(one, 10) == (5, 6, 7)
    assert [require_ids(row, 10) for row in each_prompt(make([[5, 6], [7, 8]]))] == [(5, 6), (7, 8)]
    (of_arrays,) = each_prompt([make(5), make(6)])
    assert require_ids(of_arrays, 10) == (5, 6)


@pytest.mark.parametrize("prompts", [None, 5, 1.5, {"a": 1}], ids=str)
def test_what_holds_no_prompts_is_refused(prompts: Any):
    with pytest.raises(InputError, match="prompts must be text, lists of token ids or several of these, got"):
        each_prompt(prompts)


@pytest.mark.parametrize("prompt", [None, b"hi", bytearray(b"hi"), 5, {"a": 1}], ids=str)
def test_what_is_no_list_of_ids_is_refused(prompt: Any):
    with pytest.raises(InputError, match="a prompt must be text or a list of token ids, got"):
        require_ids(prompt, 10)


@pytest.mark.parametrize(
    ("ids", "wrong"),
    [
        ([5, 10], "10"),
        ([-1], "-1"),
        ([1.5], "1.5"),
        (["a"], "'a'"),
        ([True], "True"),
        ([2**70], "1180"),
        ([None], "None"),
    ],
)
def test_the_first_id_that_is_none_is_named(ids: list[Any], wrong: str):
    with pytest.raises(InputError, match=f"prompt token {wrong}.* outside the model's vocabulary of 10 tokens"):
        require_ids(ids, 10)


def test_ids_become_plain_integers():
    found = require_ids([np.int32(5), jnp.int32(6), 7], 10)
    assert found == (5, 6, 7)
    assert all(type(token) is int for token in found)
    for empty in ([], (), np.array([], np.int32)):
        with pytest.raises(InputError, match="the prompt is empty"):
            require_ids(empty, 10)


def test_an_error_says_which_of_several_prompts_it_is_about():
    with pytest.raises(InputError, match=r"^prompt 2 of 3: no$"), naming_the_prompt(2, 3):
        raise InputError("no")
    with pytest.raises(InputError, match=r"^no$"), naming_the_prompt(1, 1):
        raise InputError("no")
