import json
from pathlib import Path
from typing import Any

import pytest

from lserve_jax.config.errors import InputError
from lserve_jax.config.generation import not_honoured, recommended_params
from lserve_jax.config.sampling import SamplingParams

KEYS = json.loads((Path(__file__).parents[2] / "golden" / "generation_config_keys.json").read_text(encoding="utf-8"))

# A value of each key of transformers that would change the text of one greedy or sampled continuation.
CHANGES: dict[str, Any] = {
    "constraints": [1],
    "diversity_penalty": 0.5,
    "dola_layers": "high",
    "encoder_no_repeat_ngram_size": 2,
    "encoder_repetition_penalty": 1.5,
    "epsilon_cutoff": 0.01,
    "eta_cutoff": 0.01,
    "exponential_decay_length_penalty": [5, 1.2],
    "force_words_ids": [[5]],
    "forced_bos_token_id": 1,
    "forced_eos_token_id": 2,
    "guidance_scale": 1.5,
    "max_time": 3.0,
    "min_length": 20,
    "no_repeat_ngram_size": 3,
    "num_beam_groups": 2,
    "num_beams": 4,
    "num_return_sequences": 2,
    "penalty_alpha": 0.6,
    "top_h": 0.5,
    "typical_p": 0.9,
    "watermarking_config": {"bias": 2.0},
}
HONOURED: dict[str, tuple[Any, dict[str, Any]]] = {
    "max_new_tokens": (64, {"max_tokens": 64}),
    "min_new_tokens": (3, {"min_tokens": 3}),
    "repetition_penalty": (1.1, {"repetition_penalty": 1.1}),
    "suppress_tokens": ([5, 6], {"suppress_tokens": (5, 6)}),
    "begin_suppress_tokens": ([7], {"begin_suppress_tokens": (7,)}),
    "bad_words_ids": ([[5], [6, 7]], {"bad_words": ((5,), (6, 7))}),
    "sequence_bias": ([[[5], 1.5], [[6], -2.0]], {"logit_bias": ((5, 1.5), (6, -2.0))}),
    "stop_strings": (["END"], {"stop": ("END",)}),
}
CONTEXT = 4096
SAMPLED = {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.05}


def test_every_key_of_transformers_is_honoured_or_harmless_or_named():
    assert not_honoured(KEYS, CONTEXT) == [], "values that change nothing are not named"
    assert CHANGES.keys() <= KEYS.keys()
    for key, value in CHANGES.items():
        assert not_honoured({key: value}, CONTEXT) == [key]
    for key in KEYS.keys() - CHANGES.keys():
        assert not_honoured({key: 1}, CONTEXT) == [] or key == "max_length", key


def test_a_length_below_the_context_is_named():
    assert [not_honoured({"max_length": length}, CONTEXT) for length in (20, 50, 4096, "x")] == [
        [],
        ["max_length"],
        [],
        ["max_length"],
    ]


def test_what_is_unknown_is_named_and_biases_of_several_tokens_are():
    assert not_honoured({"chat_format": "chatml", "num_beams": 3, "temperature": 1.0}, CONTEXT) == [
        "chat_format",
        "num_beams",
    ]
    config = {"sequence_bias": [[[5], 1.0], [[6, 7], 2.0]]}
    assert not_honoured(config, CONTEXT) == ["sequence_bias (of several tokens)"]
    assert recommended_params(config, source="m").logit_bias == ((5, 1.0),)


def test_recommended_settings_are_taken_and_those_of_draws_only_if_the_model_samples():
    for key, (value, wanted) in HONOURED.items():
        assert recommended_params({key: value}, source="m") == SamplingParams(**wanted), key
        assert not_honoured({key: value}, CONTEXT) == []
    assert recommended_params(SAMPLED, source="m") == SamplingParams()
    assert recommended_params(SAMPLED | {"do_sample": True}, source="m") == SamplingParams(**SAMPLED)
    assert recommended_params({"do_sample": True}, source="m") == SamplingParams(temperature=1.0)
    assert recommended_params({}, source="m") == SamplingParams()
    assert recommended_params({"sequence_bias": [[5, 1.0]]}, source="m").logit_bias == ((5, 1.0),)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"repetition_penalty": -1}, "repetition_penalty must be a finite number above 0"),
        ({"suppress_tokens": 5.5}, "suppress_tokens must be whole numbers"),
        ({"bad_words_ids": [["a", 3]]}, "bad_words_ids must be"),
        ({"sequence_bias": {"a": 1}}, "sequence_bias must be"),
        ({"sequence_bias": 3}, "sequence_bias must be"),
        ({"do_sample": True, "temperature": "hot"}, "temperature must be"),
        ({"stop_strings": [3]}, "stop_strings must be"),
        ({"max_new_tokens": 0}, "max_new_tokens must be"),
        ({"repetition_penalty": 10**400}, "repetition_penalty must be"),
    ],
)
def test_a_wrong_value_is_one_line_that_names_the_file(config: dict[str, Any], problem: str):
    with pytest.raises(InputError, match=f"^m: generation_config.json: .*{problem}") as caught:
        recommended_params(config, source="m")
    assert "\n" not in str(caught.value)


def test_tokens_beyond_the_vocabulary_are_refused_with_the_files_key():
    config = {"bad_words_ids": [[5, 40]], "min_new_tokens": 300}
    assert recommended_params(config, source="m").min_tokens == 300
    with pytest.raises(InputError, match=r"^m: generation_config.json: bad_words_ids: token 40 is outside"):
        recommended_params(config, source="m", vocabulary=40)
