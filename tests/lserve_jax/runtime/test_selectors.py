"""Selectors behind one signature: what each chooses, in ops and in the engine, and budgets that follow the context."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lserve_jax import InputError, SamplingParams, attention_recall, from_preset, register_selector
from lserve_jax.config import selectors as registry
from lserve_jax.config.selectors import page_scores
from pallas_kernels import Selection, choose_pages
from pallas_kernels.core.workloads import TINY, Workload
from tests.lserve_jax.engine.tiny_llms import SPARSE, make_llm, prompt
from tests.pallas_kernels.cases import Cache, filled_cache

W: Workload = TINY["mixed"]
LENGTHS = np.array([96, 90, 81, 65])
NUM_SELECTED = 3


@pytest.fixture
def own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(registry, "_REGISTERED", dict(registry._REGISTERED))


def chosen(name: str, q: jax.Array, cache: Cache) -> Selection:
    lengths = jnp.asarray(cache.lengths)
    scores = page_scores(name)(q, cache.kv, cache.tables, lengths)
    assert scores.shape == (W.batch, W.retrieval, W.max_pages) and scores.dtype == jnp.float32
    return choose_pages(
        *(scores, lengths, Selection.empty(W.batch, W.retrieval, NUM_SELECTED), jnp.ones(W.batch, bool)),
        num_selected=NUM_SELECTED,
        interval=1,
        sink_pages=1,
        memory=0.0,
        page_size=W.page_size,
        head_dim=W.head_dim,
    )


@pytest.mark.parametrize("name", ["mean_key", "oracle", "random"])
def test_a_selector_chooses_pages_that_there_are(name: str, rng: np.random.Generator):
    """The first page, the newest, and one more: also where unused pages hold NaN."""
    cache = filled_cache(W, rng, LENGTHS)
    q = jnp.asarray(rng.normal(size=(W.batch, W.retrieval * W.group, W.head_dim)), jnp.float32)
    pages = np.asarray(chosen(name, q, cache).pages)
    newest = (LENGTHS - 1) // W.page_size
    np.testing.assert_array_equal(pages[..., 0], 0)
    np.testing.assert_array_equal(pages[..., 2], np.broadcast_to(newest[:, None], pages.shape[:2]))
    assert ((pages[..., 1] > 0) & (pages[..., 1] < newest[:, None])).all()


def test_no_choice_holds_more_of_the_attention_than_the_oracles(rng: np.random.Generator):
    cache = filled_cache(W, rng, LENGTHS)
    q = jnp.asarray(3 * rng.normal(size=(W.batch, W.retrieval * W.group, W.head_dim)), jnp.float32)

    def recall(pages: Any) -> np.ndarray:
        return np.asarray(attention_recall(q, cache.kv, cache.tables, jnp.asarray(cache.lengths), jnp.asarray(pages)))

    best = recall(chosen("oracle", q, cache).pages)
    newest = (LENGTHS - 1) // W.page_size
    for middle in range(1, newest.max()):
        pages = np.stack([[0, min(middle, last - 1), last] for last in newest]).astype(np.int32)
        assert (recall(np.broadcast_to(pages[:, None], (W.batch, W.retrieval, 3))) <= best + 1e-5).all()
    for other in ("mean_key", "random"):
        assert (recall(chosen(other, q, cache).pages) <= best + 1e-5).all()


def test_random_pages_differ_by_head_and_length_and_are_the_same_again(rng: np.random.Generator):
    cache = filled_cache(W, rng, LENGTHS)
    q = jnp.zeros((W.batch, W.retrieval * W.group, W.head_dim), jnp.float32)
    first, again = (
        np.asarray(page_scores("random")(q, cache.kv, cache.tables, jnp.asarray(LENGTHS))) for _ in range(2)
    )
    np.testing.assert_array_equal(first, again)
    assert len(np.unique(first)) == first.size


@pytest.mark.usefixtures("own_names")
def test_a_registered_selector_is_used_and_its_name_is_taken(tmp_path: Path):
    """One that scores by the page's number chooses the newest pages, so the answer is that of a short context."""
    called = []

    @register_selector("newest")
    def newest(q: jax.Array, kv: Any, tables: Any, lengths: jax.Array) -> jax.Array:
        called.append(lengths.shape)
        size = q.shape[0], kv.num_retrieval, tables.retrieval.shape[1]
        return jnp.broadcast_to(jnp.arange(size[2], dtype=jnp.float32), size)

    with pytest.raises(InputError, match="selector 'newest' is registered already"):
        register_selector("newest")(newest)
    with pytest.raises(InputError, match="selector 'bound' is registered already"):
        register_selector("bound")(newest)
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    texts = {
        name: make_llm(tmp_path, **SPARSE, selector=name).generate(prompt(180), params)[0].token_ids
        for name in ("newest", "oracle")
    }
    assert called and len(set(texts.values())) == 2


def test_a_name_that_nobody_registered_is_refused():
    with pytest.raises(InputError, match="selector='best' must be one of bound, mean_key, oracle, random"):
        from_preset("lserve", selector="best")


def test_a_share_of_the_context_is_read_where_it_is_more_than_the_budget(tmp_path: Path):
    """7 pages of 8 tokens at first; half of 26 pages at the end, and what is read is what the output says."""
    shared = SPARSE | {"budget_share": 0.5, "selector_interval": 1}
    llm = make_llm(tmp_path, **shared)
    attention = llm.setup.config.attention
    assert (attention.least_selected, attention.num_selected) == (7, 14)  # 14 of the 28 pages of max_model_len
    lists: list[np.ndarray] = []
    llm.generate(prompt(190), SamplingParams(max_tokens=12, ignore_eos=True))
    for layer in llm.engine.cache:
        assert layer.selected is not None
        lists.append(np.asarray(layer.selected.pages)[0])
    held = -(-(190 + 11) // 8)
    assert all((pages >= 0).sum(axis=-1).tolist() == [-(-held // 2)] * 2 for pages in lists)
    short = make_llm(tmp_path, **shared)
    short.generate(prompt(90), SamplingParams(max_tokens=4, ignore_eos=True))
    for layer in short.engine.cache:
        assert layer.selected is not None
        assert (np.asarray(layer.selected.pages)[0] >= 0).sum(axis=-1).tolist() == [7, 7]


def test_a_limit_without_a_share_changes_nothing():
    attention = from_preset("lserve", token_budget=4096, budget_cap=8192)
    assert attention.num_selected == attention.least_selected == 64


def test_a_share_without_a_limit_is_refused_where_the_context_is_not_known():
    attention = from_preset("lserve", budget_share=0.25)
    with pytest.raises(InputError, match="budget_share needs a budget_cap"):
        _ = attention.num_selected
    assert attention.capped(131_072).num_selected == 512
    assert attention.capped(4096).num_selected == 64  # not below the budget
    with pytest.raises(InputError, match="budget_cap=100 must be a whole number from 4096"):
        from_preset("lserve", budget_share=0.25, budget_cap=100)
