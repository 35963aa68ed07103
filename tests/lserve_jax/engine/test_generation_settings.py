"""Penalties, biases, removed tokens and log-probabilities of whole generations; logits that are not finite."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from lserve_jax import LLM, InputError, RequestOutput, SamplingParams
from lserve_jax.weights.tensors import get_leaf

MODEL = str(Path(__file__).parents[2] / "golden" / "tiny" / "llama3")
VOCABULARY = 128
PROMPT = np.random.default_rng(0).integers(5, VOCABULARY, 40).tolist()


@pytest.fixture(scope="module")
def dense() -> LLM:
    """With chunks that the prefix cache keeps."""
    sizes: Any = {"max_model_len": 160, "max_num_seqs": 3, "prefill_chunk": 64, "steps_per_call": 4}
    return LLM(MODEL, dtype="float32", attention="dense", **sizes)


def generate(llm: LLM, prompt: list[int], **settings: Any) -> RequestOutput:
    (output,) = llm.generate([prompt], SamplingParams(ignore_eos=True, **settings))
    return output


def reference(llm: LLM, prompt: list[int], count: int, params: SamplingParams) -> list[int]:
    """The greedy tokens by the definitions, one whole prefill per token."""
    tokens: list[int] = []
    pairs: Any = params.logit_bias
    for step in range(count):
        x = llm.logits([*prompt, *tokens])[-1].astype(np.float64)
        for token, bias in pairs:
            x[token] += bias
        for token in set(prompt) | set(tokens):
            x[token] *= params.repetition_penalty if x[token] < 0 else 1 / params.repetition_penalty
        for token in set(tokens):
            x[token] -= params.presence_penalty + params.frequency_penalty * tokens.count(token)
        words: Any = params.bad_words
        for *before, last in words:
            if not before or [*prompt, *tokens][-len(before) :] == before:
                x[last] = -np.inf
        x[list(params.suppress_tokens)] = -np.inf
        if step < params.min_tokens:
            x[list(params.stop_token_ids)] = -np.inf
        tokens.append(int(x.argmax()))
        if tokens[-1] in params.stop_token_ids:
            break
    return tokens


def pairs_of(tokens: tuple[int, ...]) -> list[list[int]]:
    return [list(pair) for pair in pairwise(tokens)]


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.5},
        {"repetition_penalty": 0.7},
        {"presence_penalty": 1.2},
        {"frequency_penalty": 0.8},
        {"presence_penalty": -0.7, "frequency_penalty": -0.2, "repetition_penalty": 1.1},
    ],
    ids=str,
)
def test_greedy_generations_are_those_of_the_definitions(dense: LLM, settings: dict[str, Any]):
    bias: dict[str, Any] = {"logit_bias": {17: 1.5, 40: 1.5}}  # so that tokens come again
    free = generate(dense, PROMPT, max_tokens=17, **bias).token_ids
    assert len(set(free)) < 14
    output = generate(dense, PROMPT, max_tokens=17, **bias, **settings)
    assert list(output.token_ids) == reference(dense, PROMPT, 17, SamplingParams(**bias, **settings))
    assert output.token_ids != free


def test_what_the_free_text_has_is_avoided_as_token_and_as_word(dense: LLM):
    free = generate(dense, PROMPT, max_tokens=12).token_ids
    found: list[dict[str, Any]] = [
        {"suppress_tokens": [free[3]]},
        {"bad_words": [[free[2]]]},
        {"bad_words": pairs_of(free)[3:5]},
        {"bad_words": [[PROMPT[-1], free[0]], list(free[4:7])]},
    ]
    for settings in found:
        output = generate(dense, PROMPT, max_tokens=12, **settings)
        assert list(output.token_ids) == reference(dense, PROMPT, 12, SamplingParams(**settings)), settings
        assert output.token_ids != free


def test_no_end_comes_before_min_tokens(dense: LLM):
    free = generate(dense, PROMPT, max_tokens=20).token_ids
    stops = [free[1], free[6]]
    for least in (0, 1, 2, 5, 9):
        params = SamplingParams(max_tokens=20, min_tokens=least, stop_token_ids=stops, ignore_eos=True)
        (output,) = dense.generate([PROMPT], params)
        assert list(output.token_ids) == reference(dense, PROMPT, 20, params)
        assert len(output.token_ids) > least


def test_a_min_tokens_beyond_max_tokens_holds_ends_back_to_the_last(dense: LLM):
    """Any size of it: neither the end of the context nor 32 bits are a limit of what may be asked for."""
    free = generate(dense, PROMPT, max_tokens=6).token_ids
    output = generate(dense, PROMPT, max_tokens=6, min_tokens=2**31 - 1, stop_token_ids=[free[2]])
    assert len(output.token_ids) == 6
    assert free[2] not in output.token_ids


def test_a_bad_word_as_text_never_comes_with_or_without_a_space(dense: LLM):
    assert dense.tokenizer is not None
    free = generate(dense, PROMPT, max_tokens=20)
    word = dense.tokenizer.decode([next(token for token in free.token_ids if dense.tokenizer.decode([token]).strip())])
    output = generate(dense, PROMPT, max_tokens=20, bad_words=word)
    spellings = [tuple(dense.tokenizer.encode(text, add_special_tokens=False)) for text in (word, f" {word.strip()}")]
    text = output.token_ids
    for ids in spellings:
        assert not any(text[at : at + len(ids)] == ids for at in range(len(text)))
    assert output.token_ids != free.token_ids
    with pytest.raises(InputError, match="bad_words must be non-empty texts or lists of token ids"):
        SamplingParams(bad_words=["a", " "])


def test_the_likeliest_tokens_are_those_of_the_logits_and_are_reported_only_where_asked_for(dense: LLM):
    output = generate(dense, PROMPT, max_tokens=9, logprobs=True, top_logprobs=5)
    logits = dense.logits([*PROMPT, *output.token_ids[:-1]])[len(PROMPT) - 1 :]
    wanted = np.asarray(jax.nn.log_softmax(logits))
    assert output.top_logprobs is not None and output.logprobs is not None
    for row, top, logprob, token in zip(wanted, output.top_logprobs, output.logprobs, output.token_ids, strict=True):
        assert [found for found, _ in top] == np.argsort(-row, stable=True)[:5].tolist()
        np.testing.assert_allclose([value for _, value in top], np.sort(row)[::-1][:5], rtol=1e-4, atol=1e-4)
        assert top[0] == (token, logprob)
    none = generate(dense, PROMPT, max_tokens=9)
    assert (none.logprobs, none.top_logprobs, none.prompt_logprobs, none.prompt_top_logprobs) == (None,) * 4
    assert none.token_ids == output.token_ids


@pytest.mark.parametrize("length", [1, 2, 40, 64, 65, 130])
def test_the_prompts_log_probabilities_are_those_of_its_logits(dense: LLM, length: int):
    prompt = np.random.default_rng(length).integers(5, VOCABULARY, length).tolist()
    plain = generate(dense, prompt, max_tokens=5, logprobs=True)
    output = generate(dense, prompt, max_tokens=5, logprobs=True, prompt_logprobs=True, top_logprobs=2)
    assert output.token_ids == plain.token_ids
    np.testing.assert_allclose(output.logprobs or (), plain.logprobs or (), rtol=1e-4, atol=1e-5)
    assert output.prompt_logprobs is not None and output.prompt_top_logprobs is not None
    found: Any = output.prompt_logprobs
    (first, *rest), (no_top, *top) = found, output.prompt_top_logprobs
    assert first is None and no_top is None
    assert len(rest) == len(top) == length - 1
    if length > 1:
        rows = np.asarray(jax.nn.log_softmax(dense.logits(prompt)))[:-1]
        np.testing.assert_allclose(rest, rows[np.arange(length - 1), prompt[1:]], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(rest, dense.prompt_logprobs(prompt), rtol=1e-5, atol=1e-5)
        assert [[token for token, _ in pairs or ()] for pairs in top] == np.argsort(-rows)[:, :2].tolist()


def test_nothing_is_compiled_anew_when_settings_vary(dense: LLM):
    everything: dict[str, Any] = {
        "repetition_penalty": 1.2,
        "logit_bias": {9: 1.0},
        "bad_words": [[7, 8]],
        "min_tokens": 2,
    }
    generate(dense, PROMPT, max_tokens=6)
    before = dense.compile_seconds
    generate(dense, PROMPT, max_tokens=6, **everything, logprobs=True, top_logprobs=20)
    generate(dense, PROMPT, max_tokens=6, presence_penalty=1.0, stop_token_ids=list(range(5, 100)))
    assert dense.compile_seconds == before


def test_settings_that_name_tokens_beyond_the_vocabulary_are_refused_before_anything_runs(dense: LLM):
    for name, value in (
        ("stop_token_ids", [2**40]),
        ("suppress_tokens", [5, 128]),
        ("logit_bias", {128: 1.0}),
        ("bad_words", [[1, 128]]),
    ):
        settings: dict[str, Any] = {name: value}
        with pytest.raises(
            InputError, match=f"prompt 2 of 2: {name}: token .* is outside the model's vocabulary of 128"
        ):
            dense.generate([PROMPT, PROMPT], [SamplingParams(), SamplingParams(**settings)])
    assert dense.session.is_idle


def test_a_model_may_have_any_number_of_end_tokens(dense: LLM, tmp_path: Path):
    free = generate(dense, PROMPT, max_tokens=10).token_ids
    unused = [token for token in range(100, VOCABULARY) if token not in free]
    ends = [*unused[:11], free[4]]
    folder = shutil.copytree(MODEL, tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    llm = LLM(str(folder), dtype="float32", attention="dense", max_model_len=160)
    (output,) = llm.generate([PROMPT], SamplingParams(max_tokens=10, stop_token_ids=[3]))
    assert output.token_ids == free[: free.index(free[4]) + 1]
    assert output.finish_reason == "stop"


def test_prompts_may_come_from_a_generator_and_what_is_none_is_refused(dense: LLM):
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    found = dense.generate((tokens for tokens in (PROMPT, PROMPT[:5])), params)  # type: ignore[arg-type]
    assert [output.prompt_token_ids for output in found] == [tuple(PROMPT), tuple(PROMPT[:5])]
    for prompts, problem in (
        (None, "prompts must be text"),
        ([b"hi"], "got bytes b'hi'"),
        ([PROMPT, None], "prompt 2 of 2"),
    ):
        with pytest.raises(InputError, match=problem):
            dense.generate(prompts, params)  # type: ignore[arg-type]


# --- logits that are not finite --------------------------------------------------------------------------------------


@contextmanager
def damaged(llm: LLM, path: tuple[str, ...], at: tuple[int, ...], value: float = np.nan) -> Iterator[None]:
    """One weight of a model that is not finite."""
    whole = llm.engine.params
    leaf = get_leaf(whole, path)
    llm.engine.params = jax.tree.map(lambda x: x.at[at].set(value) if x is leaf else x, whole)
    try:
        yield
    finally:
        llm.engine.params = whole


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_ends_a_request_with_an_error_that_says_where(dense: LLM, value: float):
    path = ("layers_1", "mlp", "down_proj", "kernel")
    with damaged(dense, path, (3, 5), value):
        with pytest.raises(InputError, match=r"logits are not finite in prefill \(prompt of 40 tokens\)"):
            generate(dense, PROMPT, max_tokens=8)
        with pytest.raises(InputError, match=r"logits are not finite in prefill"):
            dense.score([PROMPT], [PROMPT[:3]])
        with pytest.raises(InputError, match=r"logits are not finite in prefill"):
            dense.prompt_logprobs(PROMPT)
    stream = dense.stream(PROMPT, SamplingParams(max_tokens=8, ignore_eos=True))
    next(stream)
    with damaged(dense, path, (3, 5), value), pytest.raises(InputError, match="not finite in decoding, after 1 tokens"):
        list(stream)
    assert dense.session.is_idle
    assert len(generate(dense, PROMPT, max_tokens=8).token_ids) == 8


def test_logits_that_are_not_finite_end_one_request_and_leave_the_others_as_they_are(dense: LLM):
    """The embedding of one token is NaN: only a text with this token is affected."""
    whole = generate(dense, PROMPT, max_tokens=12, logprobs=True)
    lost = next(token for token in range(5, VOCABULARY) if token not in PROMPT and token not in whole.token_ids)
    params = SamplingParams(max_tokens=12, ignore_eos=True, logprobs=True)
    with damaged(dense, ("embed", "embedding"), (lost, 0)):
        good = dense.stream_output(PROMPT, params)
        next(good)
        with pytest.raises(InputError, match="not finite in prefill"):
            list(dense.stream([*PROMPT[:7], lost], params))
        *_, (_, output) = good
    assert output is not None
    assert (output.token_ids, output.logprobs) == (whole.token_ids, whole.logprobs)
