"""Given continuations are scored as if the model had generated them, and the recall of page selection is measured."""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers.processors import TemplateProcessing

from lserve_jax import LLM, SamplingParams, attention_recall
from lserve_jax.runtime.recall import recall_step
from pallas_kernels import LayerKV, PagedKV, PageTables, Tail
from tests.lserve_jax.runtime.tiny_steps import Stepper, tiny_config
from tests.pallas_kernels.cases import assert_same_bits

pytestmark = pytest.mark.slow

TINY = Path(__file__).parents[2] / "golden" / "tiny" / "llama3"
SIZES: dict[str, Any] = {"max_model_len": 256, "prefill_chunk": 64, "max_num_seqs": 2, "dtype": "float32"}
SPARSE: dict[str, Any] = {"page_size": 16, "sub_page_size": 4, "sink": 16, "local": 32, "token_budget": 64}
PROMPT = [1, *np.random.default_rng(3).integers(3, 128, 150).tolist()]
CONTINUATION = np.random.default_rng(4).integers(3, 128, 20).tolist()


@pytest.fixture(scope="module")
def dense() -> LLM:
    return LLM(str(TINY), attention="dense", **SIZES)


@pytest.fixture(scope="module")
def sparse() -> LLM:
    return LLM(str(TINY), recall_interval=3, **SIZES, **SPARSE)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return np.asarray(jax.nn.log_softmax(logits.astype(np.float32), axis=-1))


def test_dense_scores_are_the_log_softmax_of_the_logits(dense: LLM):
    whole = PROMPT + CONTINUATION
    table = log_softmax(dense.logits(whole))
    expected = table[np.arange(len(whole) - 1), whole[1:]]
    np.testing.assert_allclose(dense.prompt_logprobs(whole), expected, atol=1e-4)
    (score,) = dense.score([PROMPT], [CONTINUATION])
    np.testing.assert_allclose(score.logprobs, expected[len(PROMPT) - 1 :], atol=1e-3)
    assert score.token_ids == tuple(CONTINUATION)
    assert score.greedy_token_ids == tuple(table[len(PROMPT) - 1 : -1].argmax(-1).tolist())
    assert not score.is_greedy


def test_the_kv_type_shows_in_logits_beyond_the_first_chunk_alone_and_in_scores(dense: LLM):
    """As the docstrings of `LLM.logits` and `LLM.prompt_logprobs` say."""
    int8 = LLM(str(TINY), attention="dense", kv_dtype="int8", **SIZES)
    chunk = SIZES["prefill_chunk"]
    mine, exact = (llm.logits(PROMPT) for llm in (int8, dense))
    np.testing.assert_array_equal(mine[:chunk], exact[:chunk])
    assert np.abs(mine[chunk:] - exact[chunk:]).max(axis=-1).min() > 0
    mine, exact = (llm.prompt_logprobs(PROMPT) for llm in (int8, dense))
    np.testing.assert_array_equal(mine[:chunk], exact[:chunk])
    assert np.abs(mine[chunk:] - exact[chunk:]).max() > 0
    for length, is_sealed in ((9, False), (chunk, True)):  # an open page is not quantised yet
        (mine,), (exact,) = (llm.score([PROMPT[:length]], [CONTINUATION]) for llm in (int8, dense))
        assert (mine.logprobs != exact.logprobs) == is_sealed


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_logits_are_those_from_which_the_scores_come(kind: str, request: pytest.FixtureRequest):
    llm: LLM = request.getfixturevalue(kind)
    prompts, continuations = [PROMPT[:9], PROMPT, PROMPT], [CONTINUATION, CONTINUATION[::-1], [5]]
    plain = llm.score(prompts, continuations)  # more than there are slots
    scores = llm.score(prompts, continuations, has_logits=True)
    for score, without in zip(scores, plain, strict=True):
        assert without.logits is None
        assert score.logits is not None
        assert (score.logits.shape, score.logits.dtype) == ((len(score.token_ids), 128), np.float32)
        table = log_softmax(score.logits)
        np.testing.assert_allclose(table[np.arange(len(table)), score.token_ids], score.logprobs, atol=1e-6)
        assert tuple(table.argmax(-1).tolist()) == score.greedy_token_ids
        assert (score.logprobs, score.greedy_token_ids) == (without.logprobs, without.greedy_token_ids)


def test_dense_logits_of_decode_steps_are_those_of_prefill(dense: LLM):
    (score,) = dense.score([PROMPT], [CONTINUATION], has_logits=True)
    assert score.logits is not None
    expected = dense.logits(PROMPT + CONTINUATION)[len(PROMPT) - 1 : -1]
    np.testing.assert_allclose(score.logits, expected, atol=1e-3)


def test_logits_have_a_program_of_their_own_which_others_do_not_wait_for(dense: LLM):
    llm = LLM(str(TINY), attention="dense", **SIZES)
    llm.score([PROMPT], [CONTINUATION])
    before = set(llm.engine.programs.names)
    (score,) = llm.score([PROMPT], [CONTINUATION], has_logits=True)
    assert set(llm.engine.programs.names) - before == {"decode_logits"}
    stream = llm.stream_output(PROMPT[:20], SamplingParams(max_tokens=40, ignore_eos=True, logprobs=True))
    next(stream)
    (beside,) = llm.score([PROMPT], [CONTINUATION], has_logits=True)  # in one batch with a request that wants none
    *_, (_, output) = stream
    assert beside.logits is not None
    np.testing.assert_array_equal(beside.logits, score.logits)
    (alone,) = dense.generate([PROMPT[:20]], SamplingParams(max_tokens=40, ignore_eos=True, logprobs=True))
    assert output is not None
    assert (output.token_ids, output.logprobs) == (alone.token_ids, alone.logprobs)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_what_was_generated_scores_as_it_did_then(kind: str, request: pytest.FixtureRequest):
    llm: LLM = request.getfixturevalue(kind)
    params = SamplingParams(max_tokens=20, ignore_eos=True, logprobs=True)
    (output,) = llm.generate([PROMPT], params)
    prompts, continuations = [PROMPT[:9], PROMPT, PROMPT], [CONTINUATION, list(output.token_ids), [5]]
    scores = llm.score(prompts, continuations)  # more than there are slots, and of other lengths
    assert scores[1].is_greedy
    assert scores[1].logprobs == output.logprobs
    assert scores[1].metrics.pages_read_ratio == output.metrics.pages_read_ratio
    assert [len(score.logprobs) for score in scores] == [20, 20, 1]


def test_selection_is_at_work_in_scores(dense: LLM, sparse: LLM):
    (expected,), (score,) = (llm.score([PROMPT], [CONTINUATION]) for llm in (dense, sparse))
    assert score.logprobs[0] == pytest.approx(expected.logprobs[0], abs=1e-4)  # of the prefill, which selects nothing
    assert np.abs(np.subtract(score.logprobs, expected.logprobs))[1:].max() > 1e-3


def test_an_end_token_inside_a_continuation_does_not_end_it(dense: LLM):
    (score,) = dense.score([PROMPT], [[5, 2, 6, 2]])
    assert len(score.logprobs) == 4


def test_text_is_continued_without_another_beginning_token(tmp_path: Path):
    backend = tokenizers.Tokenizer.from_file(str(TINY / "tokenizer.json"))
    begin = backend.id_to_token(1)
    backend.post_processor = TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, 1)])
    backend.save(str(tmp_path / "tokenizer.json"))
    llm = LLM(str(TINY), tokenizer=str(tmp_path), attention="dense", **SIZES)
    (score,) = llm.score(["hello there"], [" and you"])
    assert llm.tokenizer is not None
    assert llm.tokenizer.encode(" and you") == [1, *score.token_ids]


@pytest.mark.parametrize(
    ("prompts", "continuations", "message"),
    [
        ([[1, 2]], [], "1 prompts need as many continuations, got 0"),
        ([[1, 2]], [[]], "the prompt is empty"),
        ([[1, 2]], [[999]], "outside the model's vocabulary"),
        ([[1] * 250], [[5] * 7], r"250 \+ 7 tokens, but max_model_len is 256"),
    ],
)
def test_what_cannot_be_scored_is_refused(dense: LLM, prompts: Any, continuations: Any, message: str):
    with pytest.raises(ValueError, match=message):
        dense.score(prompts, continuations)


def test_a_continuation_may_fill_the_context_to_the_last_token(dense: LLM):
    (score,) = dense.score([[1] * 250], [[5] * 6])
    assert len(score.logprobs) == 6


# --- recall ---------------------------------------------------------------------------------------------------------


def test_recall_is_the_mass_of_the_selected_pages(rng: np.random.Generator):
    page, heads, group, width = 4, 2, 3, 8
    keys = rng.normal(size=(6, heads, page, width)).astype(np.float32)
    keys[0] = np.nan  # a page that nobody holds
    table = np.array([[3, 1, 5, -1], [2, 4, -1, -1], [-1] * 4], np.int32)
    lengths = np.array([10, 7, 0], np.int32)
    selected = np.array([[[0, 2, -1], [1, 2, -1]], [[0, 1, -1], [1, -1, -1]], [[0, -1, -1]] * 2], np.int32)
    q = rng.normal(size=(3, heads * group, width)).astype(np.float32)
    slots = np.array([2, 0, 1], np.int32)
    tail = np.full((4, heads + 1, page, width), np.nan, np.float32)  # a streaming head comes last
    for b, last in ((0, 5), (1, 4)):
        tail[slots[b], :heads], keys[last] = keys[last], np.nan  # the open pages are in the tail alone
    pool = PagedKV(*[jnp.asarray(keys)] * 2)
    kv = LayerKV(pool, None, Tail(*[jnp.asarray(tail)] * 2))
    tables = PageTables(jnp.asarray(table), jnp.asarray(table), jnp.asarray(slots))
    found = np.asarray(attention_recall(jnp.asarray(q), kv, tables, *map(jnp.asarray, (lengths, selected))))
    for b, last in ((0, 5), (1, 4)):
        keys[last] = tail[slots[b], :heads]
    for b in range(2):
        for head in range(heads):
            tokens = np.concatenate([keys[p, head] for p in table[b] if p >= 0])[: lengths[b]]
            scores = q[b, head * group : (head + 1) * group] @ tokens.T / math.sqrt(width)
            weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
            held = np.isin(np.arange(lengths[b]) // page, selected[b, head])
            assert found[b, head] == pytest.approx(weights[:, held].sum(-1).mean(), abs=1e-5)
    assert found[1, 0] == pytest.approx(1)  # all its pages
    assert np.isnan(found[2]).all()


def test_measuring_recall_changes_nothing_and_is_reported(sparse: LLM):
    plain = LLM(str(TINY), **SIZES, **SPARSE)
    params = SamplingParams(max_tokens=25, ignore_eos=True, logprobs=True)
    prompts = [PROMPT, PROMPT[::-1]]
    expected, found = plain.generate(prompts, params), sparse.generate(prompts, params)
    assert [output.token_ids for output in found] == [output.token_ids for output in expected]
    assert [output.logprobs for output in found] == [output.logprobs for output in expected]
    assert "recall" in sparse.engine.programs.names
    assert "recall" not in plain.engine.programs.names
    for off, on in zip(expected, found, strict=True):
        assert off.metrics.attention_recall is None
        assert on.metrics.attention_recall_by_layer is not None
        assert on.metrics.attention_recall is not None
        assert 0.2 < on.metrics.attention_recall < 1
        assert on.metrics.attention_recall == pytest.approx(np.nanmean(on.metrics.attention_recall_by_layer))


@pytest.mark.parametrize("interval", [1, 3])
def test_a_measured_step_remembers_as_one_that_is_not_measured(interval: int):
    """Pages, what is remembered of them, and the logits, bit for bit: a step that is made twice forgets once."""
    config = tiny_config(token_budget=64, selector_interval=interval, selector_memory=0.6)
    stepper = Stepper(config, 12)
    caches = [stepper.prefill(stepper.cache(), np.array(PROMPT), 64)[1] for _ in range(2)]
    for step, token in enumerate(CONTINUATION[:8]):
        length = len(PROMPT) + step + 1
        values = (np.array([value], np.int32) for value in (token, length, step))
        recall, caches[0] = recall_step(stepper.params, caches[0], *values, stepper.tables, config=config)
        assert (np.asarray(recall) > 0).all()
        (first, caches[0]), (second, caches[1]) = (stepper.decode(cache, token, length, step) for cache in caches)
        assert_same_bits(first, second)
        assert_same_bits(*([layer.selected for layer in cache] for cache in caches))
    scores = np.asarray([layer.selected.scores for layer in caches[0] if layer.selected is not None])
    assert ((scores < 0) & (scores > -np.inf)).any()


def test_nothing_left_out_is_no_recall(sparse: LLM):
    (output,) = sparse.generate([PROMPT[:20]], SamplingParams(max_tokens=8, ignore_eos=True))
    assert output.metrics.attention_recall is None


def test_recall_of_rotated_pages_is_that_of_others(sparse: LLM):
    """Of 4-bit pages, whose keys lie in another basis than the model's queries."""
    rounded = LLM(str(TINY), recall_interval=3, kv_dtype="int4", **SIZES, **SPARSE)
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    recalls = [llm.generate([PROMPT], params)[0].metrics.attention_recall_by_layer for llm in (sparse, rounded)]
    exact, found = (np.asarray(recall, np.float64) for recall in recalls)
    np.testing.assert_allclose(found, exact, atol=0.03)
