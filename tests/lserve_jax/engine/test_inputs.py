from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from lserve_jax.config.errors import InputError
from lserve_jax.config.sampling import SamplingParams
from lserve_jax.engine.inputs import (
    each_conversation,
    each_params,
    each_prompt,
    naming_the_prompt,
    require_ids,
    with_bad_words_spelled,
)


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
        pytest.param(generated(), ["a", "b"], id="a generator"),
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


@pytest.mark.parametrize("token", [10, -1, 2**70])
def test_the_first_id_beyond_the_vocabulary_is_named(token: int):
    with pytest.raises(InputError, match=f"prompt token {token} is outside the model's vocabulary of 10 tokens"):
        require_ids([5, token, 11], 10)


@pytest.mark.parametrize("value", [1.5, "a", True, None, [1]], ids=str)
def test_the_first_value_that_is_no_id_is_named(value: Any):
    with pytest.raises(InputError, match="a prompt must be text or a list of token ids, got a list with ") as caught:
        require_ids([5, value], 10)
    assert str(caught.value).endswith(repr(value))


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


def test_an_array_of_texts_is_several_prompts_and_one_of_three_dimensions_is_none():
    assert each_prompt(np.array(["one", "two"])) == ["one", "two"]
    with pytest.raises(InputError, match="must have one or two dimensions, got 3"):
        each_prompt(np.zeros((1, 1, 1), np.int32))


def test_settings_are_one_for_all_prompts_or_one_per_prompt():
    one, other = SamplingParams(), SamplingParams(top_k=3)
    assert each_params(one, 3) == [one] * 3
    assert each_params((one, other), 2) == [one, other]
    with pytest.raises(InputError, match="2 prompts need as many sampling_params, got 1"):
        each_params([one], 2)
    wrong: list[Any] = [{"max_tokens": 5}, 5, [{"max_tokens": 5}], "x", [one, None]]
    for params in wrong:
        with pytest.raises(InputError, match="sampling_params must be one SamplingParams, or one per prompt, got"):
            each_params(params, 1)


def test_a_call_names_one_conversation_or_several():
    message = {"role": "user", "content": "a"}
    assert each_conversation([message]) == ([[message]], True)
    assert each_conversation([[message], [message]]) == ([[message], [message]], False)
    assert each_conversation(one for one in ([message], [message])) == ([[message], [message]], False)
    for wrong in (None, 5, "hi", message):
        with pytest.raises(InputError, match="messages must be a list of"):
            each_conversation(wrong)


class Letters:
    """Each letter is a token, and so is a space before it: "a" is 1, " a" is 101; "z" is beyond the vocabulary."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        assert not add_special_tokens
        bare = text.lstrip()
        ids = [1000 if letter == "z" else ord(letter) - 96 for letter in bare]
        return [ids[0] + 100, *ids[1:]] if text != bare else ids


def test_bad_words_are_spelled_with_and_without_a_space_and_only_as_the_model_can_write_them():
    tokenizer: Any = Letters()

    def spelled(*words: Any) -> set[Any]:
        return set(with_bad_words_spelled(SamplingParams(bad_words=words), tokenizer, 200).bad_words)

    assert spelled("ab") == {(1, 2), (101, 2)}
    assert spelled([5, 6]) == {(5, 6)}
    assert spelled("cab", "ab") == {(1, 2), (101, 2), (103, 1, 2)} - {(103, 1, 2)}
    with pytest.raises(InputError, match="bad_words: the model has no tokens for 'az'"):
        spelled("az")
    found = with_bad_words_spelled(SamplingParams(bad_words=["ab"]), tokenizer, 200)
    assert with_bad_words_spelled(found, None, 200) == found
