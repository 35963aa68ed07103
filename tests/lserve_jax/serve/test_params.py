"""A request's settings: whose value wins, which field is wrong, how much room there is."""

import dataclasses
from typing import Any

import pytest

from lserve_jax import SamplingParams
from lserve_jax.config.sampling import MAX_SEED
from lserve_jax.serve.errors import ApiError
from lserve_jax.serve.params import room, salt, sampling_params, seeded
from lserve_jax.serve.protocol import ChatRequest, CompletionRequest

BASE = SamplingParams(temperature=0.7, top_p=0.9, max_tokens=11, stop=("END",), repetition_penalty=1.1)


def chat(**fields: Any) -> ChatRequest:
    return ChatRequest.of({"messages": [{"role": "user", "content": "a"}]} | fields)


def completion(**fields: Any) -> CompletionRequest:
    return CompletionRequest.of({"prompt": "a"} | fields)


def test_the_models_recommendations_count_where_a_request_says_nothing():
    assert sampling_params(chat(), BASE, 5) == dataclasses.replace(BASE, max_tokens=5)


def test_null_is_the_same_as_nothing():
    fields = dict.fromkeys(("temperature", "top_p", "stop", "seed", "logit_bias", "n", "logprobs"))
    assert sampling_params(chat(**fields), BASE, 5) == dataclasses.replace(BASE, max_tokens=5)


def test_a_requests_own_values_win_also_those_that_switch_off():
    given: dict[str, Any] = {
        "temperature": 0,
        "top_p": 1.0,
        "stop": [],
        "repetition_penalty": 1.0,
        "top_k": 3,
        "min_p": 0.1,
        "seed": 7,
        "presence_penalty": -2,
        "frequency_penalty": 2,
        "min_tokens": 1,
        "bad_words": "x",
        "ignore_eos": True,
        "suppress_tokens": [1],
        "begin_suppress_tokens": [2],
        "stop_token_ids": [3],
        "skip_special_tokens": False,
    }
    found = sampling_params(chat(**given, logit_bias={"4": -100}), BASE, 5)
    assert found == SamplingParams(**given, logit_bias={4: -100.0}, max_tokens=5)


def test_log_probabilities_of_both_shapes():
    def of(request: ChatRequest | CompletionRequest) -> tuple[bool, bool, int]:
        found = sampling_params(request, BASE, 1)
        return found.logprobs, found.prompt_logprobs, found.top_logprobs

    assert of(chat(logprobs=True)) == (True, False, 0)
    assert of(chat(logprobs=True, top_logprobs=20)) == (True, False, 20)
    assert of(chat(logprobs=False)) == (False, False, 0)
    assert of(completion(logprobs=0)) == (True, False, 0)
    assert of(completion(logprobs=5)) == (True, False, 5)
    assert of(completion(logprobs=1, echo=True)) == (True, True, 1)
    assert of(completion(echo=True)) == (False, False, 0)
    assert of(completion(logprobs=1, prompt_logprobs=3)) == (True, True, 3)
    assert of(chat(prompt_logprobs=0)) == (False, True, 0)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"stop": ""}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"bad_words": [" "]}, "bad_words"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"\N{SUPERSCRIPT TWO}": 1}}, "logit_bias"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
    ],
)
def test_a_value_out_of_range_names_its_field(fields: dict[str, Any], param: str):
    with pytest.raises(ApiError) as caught:
        sampling_params(completion(**fields), BASE, 1)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(("given", "expected"), [(0, 0), (MAX_SEED, MAX_SEED), (2**32, 0), (-1, MAX_SEED)])
def test_seeds_of_64_bits_are_folded(given: int, expected: int):
    assert sampling_params(chat(seed=given), BASE, 1).seed == expected


def test_several_answers_have_seeds_in_a_row_and_none_without_one():
    params = SamplingParams(seed=MAX_SEED)
    assert [seeded(params, index).seed for index in range(3)] == [MAX_SEED, 0, 1]
    assert seeded(SamplingParams(), 2).seed is None


def test_room():
    assert room(10, 5, None, 15) == 5
    assert room(10, None, None, 15) == 5
    assert room(10, None, 3, 15) == 3
    assert room(10, None, 9, 15) == 5
    assert room(15, 0, None, 15) == 0


@pytest.mark.parametrize(
    ("prompt", "wanted", "param", "total"),
    [(10, 6, "max_tokens", 16), (15, None, "prompt", 16), (20, None, "prompt", 21), (16, 0, "prompt", 16)],
)
def test_what_does_not_fit_has_the_code_and_the_words_by_which_clients_know(
    prompt: int, wanted: int | None, param: str, total: int
):
    with pytest.raises(
        ApiError, match=f"maximum context length is 15 tokens, however you requested {total} "
    ) as caught:
        room(prompt, wanted, 3, 15)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", param)


def test_salts_differ_by_what_is_named_and_by_the_key():
    none, by_key = salt(chat(), None), salt(chat(), "key")
    assert none == by_key == b""
    salts = [
        salt(chat(cache_salt="a"), None),
        salt(chat(cache_salt="b"), None),
        salt(chat(cache_salt="a"), "key"),
        salt(chat(cache_salt="y\0a"), None),
    ]
    assert len(set(salts)) == 4 and all(len(one) == 32 for one in salts)
    assert salt(completion(prompt_cache_key="a"), None) == salts[0]
