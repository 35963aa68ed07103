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
from pallas_kernels import LayerKV, PagedKV, PageTables, Tail

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
