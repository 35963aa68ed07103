from typing import Any

import numpy as np
import pytest

from lserve_jax.config.errors import InputError
from lserve_jax.config.sampling import SamplingParams


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "hot"),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("top_k", 2.0),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("seed", -1),
        ("seed", 2**32),
        ("stop", ("",)),
        ("stop", (3,)),
        ("stop", 3),
        ("stop_token_ids", (-1,)),
        ("stop_token_ids", ("a",)),
        ("stop_token_ids", 3.5),
        ("min_tokens", -1),
        ("min_tokens", 2**31),
        ("max_tokens", 2**31),
        ("temperature", 10**400),
        ("repetition_penalty", 1e39),
        ("logit_bias", {1: 1e39}),
        ("logit_bias", {1: np.array([1.0, 2.0])}),
        ("bad_words", [5, 6]),
        ("repetition_penalty", 0),
        ("repetition_penalty", float("inf")),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -3),
        ("frequency_penalty", float("nan")),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {1: "a"}),
        ("logit_bias", {1: float("nan")}),
        ("logit_bias", {1: float("inf")}),
        ("logit_bias", [(1, 2, 3)]),
        ("logit_bias", 3),
        ("suppress_tokens", [1.5]),
        ("begin_suppress_tokens", "a"),
        ("bad_words", [""]),
        ("bad_words", [[]]),
        ("bad_words", [[1, -1]]),
        ("bad_words", b"ab"),
        ("bad_words", 3.5),
        ("top_logprobs", 1),
        ("logprobs", 5),
        ("ignore_eos", "no"),
    ],
)
def test_a_wrong_value_is_refused_by_name(name: str, value: Any):
    with pytest.raises(InputError, match=f"^{name} must be .*, got "):
        SamplingParams(**{name: value})


def test_all_wrong_values_are_named_at_once():
    with pytest.raises(
        InputError, match=r"max_tokens must .*; temperature must .*; top_p must .*; seed must "
    ) as caught:
        SamplingParams(max_tokens=-1, temperature=-1, top_p=2, seed=-5)
    assert "\n" not in str(caught.value)


def test_stop_takes_a_string_or_several_and_ids_take_numpy():
    assert SamplingParams(stop="END").stop == ("END",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    array: Any = np.array([1, 2])
    ids = SamplingParams(stop_token_ids=array).stop_token_ids
    assert ids == (1, 2)
    assert all(type(index) is int for index in ids)
    assert SamplingParams() == SamplingParams(top_k=0)
    assert hash(SamplingParams(stop=["a"])) == hash(SamplingParams(stop="a"))


def test_log_probabilities_of_the_likeliest_go_up_to_20_and_need_a_place():
    assert SamplingParams(logprobs=True, top_logprobs=20).top_logprobs == 20
    assert SamplingParams(prompt_logprobs=True, top_logprobs=1).top_logprobs == 1
    with pytest.raises(InputError, match="top_logprobs must be a whole number from 0 to 20"):
        SamplingParams(logprobs=True, top_logprobs=21)


def test_lists_of_any_kind_become_tuples_of_plain_values():
    given: dict[str, Any] = {
        "logit_bias": {np.int64(5): np.float32(1.5), 7: float("-inf")},
        "bad_words": ["a", [1, np.int32(2)], (3,)],
        "suppress_tokens": np.array([4]),
    }
    params = SamplingParams(**given)
    assert params.suppress_tokens == (4,)
    assert params.logit_bias == ((5, 1.5), (7, float("-inf")))
    assert params.bad_words == ("a", (1, 2), (3,))
    assert SamplingParams(bad_words="word").bad_words == ("word",)
    assert hash(params)
    assert SamplingParams(logit_bias=params.logit_bias).logit_bias == params.logit_bias


def test_a_token_must_be_left_to_choose():
    everything: dict[str, Any] = {"suppress_tokens": [0, 1], "logit_bias": {2: float("-inf")}, "bad_words": [[3]]}
    SamplingParams(**everything).require_vocabulary(5)
    with pytest.raises(InputError, match="leave no token"):
        SamplingParams(**everything).require_vocabulary(4)
    assert SamplingParams(stop=None, bad_words=None).stop == ()  # type: ignore[arg-type]


def test_a_request_knows_whether_it_changes_logits_and_whether_the_host_must_act_after_every_token():
    assert not SamplingParams(temperature=1.0, top_k=5, stop_token_ids=[1], logprobs=True, top_logprobs=2).is_adjusted
    changes: list[dict[str, Any]] = [
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": -0.1},
        {"logit_bias": {1: 0.5}},
        {"suppress_tokens": [1]},
        {"begin_suppress_tokens": [1]},
        {"bad_words": [[1]]},
        {"min_tokens": 1},
    ]
    for change in changes:
        params = SamplingParams(**change)
        assert params.is_adjusted
        assert not params.is_stepwise
    assert SamplingParams(bad_words=[[1, 2]]).is_stepwise
