"""`page_select` for Hopper: values (interpreted, or native on a Hopper GPU), and machine code."""

import re
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.typing import ArrayLike, NDArray

from pallas_kernels import NO_PAGE, PagedKV, Selection, page_select, selection_width
from pallas_kernels.core.hopper import Device
from pallas_kernels.core.workloads import SERVING, Workload
from pallas_kernels.page_select import mosaic_gpu, reference
from tests.pallas_kernels.cases import Cache, abstract, abstract_pools, filled_cache, numpy_selection
from tests.pallas_kernels.hopper import assert_fits, compiled, evaluate, interpreted

SMALL = Workload(
    context=70 * 16,
    retrieval=2,
    streaming=0,
    group=2,
    head_dim=64,
    page_size=16,
    sub_page_size=4,
    num_selected=6,
)
LENGTHS = np.array([1, 96, 97, 1040, 1119, 0])
"""Around page boundaries; all pages selected up to 96; an empty slot."""


@pytest.fixture
def ring(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs have more tiles than they have in flight."""
    monkeypatch.setattr(mosaic_gpu, "heuristic", lambda *_: mosaic_gpu.Config(splits=2, stages=2))


def _cache(workload: Workload, rng: np.random.Generator, lengths: ArrayLike, limit: int | None = 3) -> Cache:
    """Whole keys up to a limit, or normal ones; a pool of as many pages as the kernel wants."""
    workload = replace(workload, batch=np.size(lengths))
    shape = (workload.batch, workload.max_pages * workload.page_size, workload.num_kv_heads, workload.head_dim)
    k = None if limit is None else rng.integers(-limit, limit + 1, shape).astype(jnp.bfloat16)
    cache = filled_cache(workload, rng, lengths, k=k)
    assert cache.kv.retrieval is not None
    spare = -cache.kv.retrieval.k.shape[0] % 8
    padded: Any = jax.tree.map(
        lambda x: jnp.pad(x, ((0, spare), *((0, 0),) * (x.ndim - 1)), constant_values=np.nan), cache.kv.retrieval
    )
    return cache._replace(kv=cache.kv._replace(retrieval=padded))


def _queries(workload: Workload, rng: np.random.Generator, batch: int, limit: int | None = 3) -> NDArray[Any]:
    shape = (batch, workload.retrieval * workload.group, workload.head_dim)
    q = rng.normal(size=shape) if limit is None else rng.integers(-limit, limit + 1, shape)
    return q.astype(jnp.bfloat16)


def _options(
    workload: Workload, sink_pages: int = 1, reduction: str = "max", spread: float = 1.0, memory: float = 0.6
) -> dict[str, Any]:
    return {
        "num_selected": workload.num_selected,
        "interval": workload.interval,
        "sink_pages": sink_pages,
        "reduction": reduction,
        "spread": spread,
        "memory": memory,
    }


def _previous(workload: Workload, rng: np.random.Generator, batch: int) -> Selection:
    """Lists of any pages, with shares of any size, or none."""
    width = selection_width(workload.num_selected, workload.interval, workload.page_size)
    shape = (batch, workload.retrieval, width)
    scores = np.where(rng.random(shape) < 0.3, -np.inf, -rng.exponential(size=shape))
    return numpy_selection(rng.integers(-1, workload.max_pages, shape), scores)


def _assert_selects(
    workload: Workload,
    q: NDArray[Any],
    cache: Cache,
    rng: np.random.Generator,
    *,
    is_refresh: ArrayLike | None = None,
    budgets: ArrayLike | None = None,
    detect_races: bool = False,
    **options: Any,
) -> NDArray[np.int32]:
    """Lists and what is remembered are the reference's, in which what is not chosen anew stays as it was."""
    batch = len(cache.lengths)
    previous = _previous(workload, rng, batch)
    is_refresh = np.full(batch, True) if is_refresh is None else np.asarray(is_refresh)
    budgets = np.full(batch, workload.num_selected) if budgets is None else np.asarray(budgets)
    arguments: Any = (q, cache.kv.retrieval, cache.tables.retrieval, cache.lengths, previous, is_refresh, budgets)
    options = _options(workload, **options)
    selected = evaluate(partial(mosaic_gpu.page_select, **options), *arguments, detect_races=detect_races)
    _assert_equal(selected, reference.page_select(*arguments, **options))
    return np.asarray(selected.pages)


def _assert_equal(actual: Selection, expected: Selection) -> None:
    assert (actual.pages.dtype, actual.scores.dtype) == (np.int32, np.float32)
    np.testing.assert_array_equal(actual.pages, expected.pages)
    np.testing.assert_array_equal(actual.scores, expected.scores)


@pytest.mark.usefixtures("ring")
@pytest.mark.parametrize(
    ("reduction", "sink_pages", "spread", "memory", "limit"),
    [("max", 0, 1.0, 0.0, 1), ("mean", 3, 1.0, 0.6, 100), ("max", 1, 0.5, 0.9, 2), ("max", 0, 1.0, 1.0, 1)],
)
def test_equals_the_reference_ties_included(
    reduction: str, sink_pages: int, spread: float, memory: float, limit: int, rng: np.random.Generator
):
    """Sums of small whole numbers are exact in any order; with a limit of 1 most are equal, and earlier pages win."""
    q = _queries(SMALL, rng, len(LENGTHS), limit)
    cache = _cache(SMALL, rng, LENGTHS, limit)
    options = {"reduction": reduction, "sink_pages": sink_pages, "spread": spread, "memory": memory}
    _assert_selects(SMALL, q, cache, rng, **options)


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param({"retrieval": 1, "group": 3, "context": 30 * 16}, id="half_a_window"),
        pytest.param({"retrieval": 3, "group": 5, "context": 30 * 16}, id="windows_that_overlap"),
        pytest.param({"retrieval": 3, "group": 1, "sub_page_size": 16, "head_dim": 128, "context": 30 * 16}, id="flat"),
        pytest.param({"retrieval": 12, "group": 1, "sub_page_size": 2, "context": 20 * 16}, id="groups_of_heads"),
        pytest.param({"interval": 40, "num_selected": 10, "context": 30 * 16}, id="many_recent_pages"),
    ],
)
def test_shapes_that_fill_no_tile(shape: dict[str, Any], rng: np.random.Generator):
    workload = replace(SMALL, **shape)
    lengths = [workload.context - 3]
    _assert_selects(workload, _queries(workload, rng, 1), _cache(workload, rng, lengths), rng)


@pytest.mark.usefixtures("ring")
def test_each_sequence_has_a_budget_of_its_own(rng: np.random.Generator):
    """From the pages that are always selected to as many as the list holds."""
    workload = replace(SMALL, num_selected=12)
    lengths = [48 * 16 + 5, 1119, 1000, 150, 97, 0]
    cache, q = _cache(workload, rng, lengths), _queries(workload, rng, len(lengths))
    pages = _assert_selects(workload, q, cache, rng, budgets=[12, 3, 7, 9, 6, 5], memory=0.5)
    assert (pages >= 0).sum(axis=-1)[:, 0].tolist()[:5] == [12, 3, 7, 9, 6]


@pytest.mark.usefixtures("ring")
def test_races(rng: np.random.Generator):
    """The same tile memory three times over; one sequence of two selects."""
    workload = replace(SMALL, head_dim=128, context=48 * 16)
    cache, q = _cache(workload, rng, [700, 48 * 16]), _queries(workload, rng, 2)
    _assert_selects(workload, q, cache, rng, is_refresh=[False, True], detect_races=True)


def test_only_sequences_that_select_are_touched(rng: np.random.Generator):
    """Where no selection is due, neither statistics nor the table are looked at: they are not even numbers of pages."""
    is_refresh = np.arange(len(LENGTHS)) % 2 == 0
    cache = _cache(SMALL, rng, LENGTHS)
    table = np.where(is_refresh[:, None], cache.tables.retrieval, 2**31 - 1).astype(np.int32)
    cache = cache._replace(tables=cache.tables._replace(retrieval=table))
    _assert_selects(SMALL, _queries(SMALL, rng, len(LENGTHS)), cache, rng, is_refresh=is_refresh)


@pytest.mark.parametrize(("reduction", "memory"), [("max", 0.5), ("mean", 0.0)])
def test_bounds_of_pages_that_are_not_sealed_do_not_matter(reduction: str, memory: float, rng: np.random.Generator):
    """With one token, or half a page, after the last sealed page, and with none."""
    workload = replace(SMALL, interval=1, context=30 * 16)
    cache, q = _cache(workload, rng, [417, 424, 432]), _queries(workload, rng, 3)
    pages = cache.kv.retrieval
    assert pages is not None and pages.k_min is not None and pages.k_max is not None
    previous = _previous(workload, rng, 3)
    options = _options(workload, reduction=reduction, memory=memory)
    run = jax.jit(partial(mosaic_gpu.page_select, **options))
    is_sealed = np.zeros(pages.k.shape[0], bool)
    for table, length in zip(np.asarray(cache.tables.retrieval), cache.lengths, strict=True):
        is_sealed[table[: length // workload.page_size]] = True
    for least, greatest in ((np.nan, np.nan), (-np.inf, np.inf), (-3e38, 3e38)):
        k_min, k_max = (
            jnp.where(is_sealed[:, None, None, None], x, jnp.asarray(value, x.dtype))
            for x, value in ((pages.k_min, least), (pages.k_max, greatest))
        )
        held = pages._replace(k_min=k_min, k_max=k_max)
        arguments: Any = (
            *(q, held, cache.tables.retrieval, cache.lengths, previous, np.full(3, True)),
            np.full(3, workload.num_selected),
        )
        selected = evaluate(run, *arguments)
        _assert_equal(selected, reference.page_select(*arguments, **options))
        np.testing.assert_array_equal(selected.pages[:, :, -1], [[26] * 2, [26] * 2, [26] * 2])


def test_rounded_scores_rank_alike(rng: np.random.Generator):
    """Pages in the list that are not the reference's have scores within rounding of the last one that it chose."""
    workload = replace(SMALL, head_dim=128)
    cache, q = _cache(workload, rng, [1117], limit=None), _queries(workload, rng, 1, limit=None)
    previous = Selection.empty(1, 2, 7)
    assert cache.kv.retrieval is not None
    arguments: Any = (
        *(q, cache.kv.retrieval, cache.tables.retrieval, cache.lengths, previous, np.array([True])),
        np.array([workload.num_selected]),
    )
    selected = evaluate(partial(mosaic_gpu.page_select, **_options(workload)), *arguments)
    for head in range(2):
        scores = reference.page_scores(*arguments[:3], b=0, head=head, count=69, reduction="max", spread=1.0)
        chosen = [page for page in selected.pages[0, head].tolist() if 1 <= page < 69]
        left_out = sorted(set(range(1, 69)) - set(chosen))
        assert len(chosen) == 4 and chosen == sorted(chosen)
        assert scores[chosen].min() >= scores[left_out].max() * (1 - 1e-6)


def _shape(**fields: Any) -> Any:
    """Sizes of Llama-3-8B at 128K, but for some."""
    options: dict[str, Any] = {
        "num_selected": 64,
        "interval": 4,
        "sink_pages": 1,
        "reduction": "max",
        "spread": 1.0,
        "memory": 0.6,
        "width": 65,
    }
    arrays = {"num_heads": 4, "group": 4, "head_dim": 128, "page_size": 64, "subs": 4, "max_pages": 2048}
    everything: dict[str, Any] = {**options, **arrays, **fields}
    return mosaic_gpu._Shape(**everything)


@pytest.mark.parametrize("values", ["distinct", "few", "signed_zeros"])
def test_choice_among_many_blocks_of_pages(values: str, rng: np.random.Generator):
    """The second kernel alone: more pages than a block, many of them equal, and garbage where none is ranked."""
    pages, width, sink = 4500, 140, 2
    shape = _shape(num_heads=2, page_size=16, max_pages=pages, width=width, num_selected=width - 1, sink_pages=sink)
    scores = {
        "distinct": rng.normal(size=(1, 2, pages)) * 1e3,
        "few": rng.integers(-1, 1, (1, 2, pages)),
        "signed_zeros": rng.choice([0.0, -0.0], (1, 2, pages)),
    }[values].astype(np.float32)
    length = pages * 16 - 20
    end = (length - 4) // 16
    keys = np.full((1, 2, 3 * 2048), 2**31 - 1, np.int32)
    keys[..., sink:end] = np.asarray(mosaic_gpu._order_key(jnp.asarray(scores)))[..., sink:end]

    def choose(keys: jax.Array, *by_sequence: Any) -> jax.Array:
        selected = jax.new_ref(jnp.zeros((1, 2, width), jnp.int32))
        held, end, budgets = by_sequence
        mosaic_gpu._choose(selected, held, end, budgets, keys, shape)
        return jax.freeze(selected)

    by_sequence = (np.array([number], np.int32) for number in (length, end, width - 1))
    selected = np.asarray(evaluate(choose, keys, *by_sequence))
    recent = -(-length // 16) - end
    free = width - 1 - sink - recent
    for head in range(2):
        best = sink + np.argsort(-scores[0, head, sink:end], kind="stable")[:free]
        expected = [*range(sink), *sorted(best.tolist()), *range(end, end + recent)]
        expected += [NO_PAGE] * (width - len(expected))
        np.testing.assert_array_equal(selected[0, head], expected)


def test_a_table_that_is_no_longer_than_the_selection(rng: np.random.Generator):
    """Nothing is ranked, so nothing is scored; the reserve ends with the table."""
    workload = replace(SMALL, context=96, num_selected=9)
    lengths = [96, 1, 50, 0]
    selected = _assert_selects(workload, _queries(workload, rng, 4), _cache(workload, rng, lengths), rng)
    np.testing.assert_array_equal(selected[0, 0], [0, 1, 2, 3, 4, 5, -1, -1, -1, -1])


def _arguments(workload: Workload) -> Any:
    width = selection_width(workload.num_selected, workload.interval, workload.page_size)
    b, k = workload.batch, workload.retrieval
    pools = abstract_pools(workload, -(-b * workload.max_pages // 8) * 8)
    q = abstract(b, k * workload.group, workload.head_dim, dtype=workload.dtype)
    previous = Selection(abstract(b, k, width), abstract(b, k, width, dtype=np.float32))
    return q, pools.retrieval, abstract(b, workload.max_pages), abstract(b), previous, abstract(b, dtype=np.bool_)


LLAMA = SERVING["llama3_8b_128k"]


@pytest.mark.parametrize(
    ("workload", "reduction", "memory"),
    [
        pytest.param(LLAMA, "max", 0.6, id="llama3_8b_128k"),
        pytest.param(LLAMA, "mean", 0.0, id="llama3_8b_128k-mean"),
        pytest.param(replace(LLAMA, batch=8, num_selected=128), "max", 0.6, id="llama3_8b_128k-batch8"),
        pytest.param(replace(LLAMA, retrieval=3, context=2**20), "max", 0.6, id="llama3_8b_1m-3_heads"),
        pytest.param(replace(LLAMA, retrieval=8, group=16), "max", 0.0, id="group16"),
        pytest.param(SERVING["llama2_7b_64k"], "max", 0.6, id="llama2_7b_64k"),
        pytest.param(SERVING["smollm2_135m_8k"], "mean", 0.6, id="smollm2_135m_8k"),
        pytest.param(
            replace(LLAMA, retrieval=8, page_size=16, context=2**20, num_selected=256, interval=1),
            *("max", 0.0),
            id="quest_1m",
        ),
        pytest.param(replace(LLAMA, retrieval=1, page_size=128, head_dim=64), "max", 0.6, id="page128"),
        pytest.param(replace(LLAMA, retrieval=5, page_size=32, context=2**20), "max", 1.0, id="page32_1m"),
    ],
)
def test_machine_code(workload: Workload, reduction: str, memory: float):
    """Two kernels, in which nothing spills; no copy of the statistics; scratch memory for scores and ranks alone."""
    run = partial(page_select, implementation="mosaic_gpu", **_options(workload, reduction=reduction, memory=memory))
    program, kernels = compiled(run, *_arguments(workload), donate=(4,))
    assert_fits(kernels, count=2)
    text = program.as_text()
    assert not re.search(r"= \S+ (copy|copy-start|sort|custom-call-start)\(", text)
    scores = workload.batch * workload.retrieval * max(workload.max_pages, 2048) * 4
    assert program.memory_analysis().temp_size_in_bytes <= (2 if memory else 1) * scores + 2**18


@pytest.mark.parametrize("batch", [1, 2, 8, 64, 256])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_heuristic_returns_one_of_two_depths(batch: int, head_dim: int):
    """So that the machine code above is all there is, but for the number of programs."""
    config = mosaic_gpu.heuristic(batch, _shape(head_dim=head_dim), Device("NVIDIA H200", 132))
    assert config.stages == {64: 4, 128: 2}[head_dim]
    assert 32 <= config.splits <= 512
    assert batch > 12 or batch * config.splits <= 3 * 132


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ({"dtype": "float32"}, "queries must be bfloat16, not float32"),
        ({"head_dim": 32}, "head_dim=32 must be 64 or 128"),
        ({"num_selected": 2**15, "context": 2**20}, "num_selected=32768 must be less than 32768"),
        ({"page_size": 256, "sub_page_size": 2}, "128 sub-pages of a page: at most 64"),
        ({"group": 130}, "130 query heads of a KV head: at most 128"),
    ],
)
def test_refuses_what_it_is_not_made_for(shape: dict[str, Any], reason: str):
    workload = replace(SMALL, **shape)
    run = partial(page_select, implementation="mosaic_gpu", **_options(workload))
    with interpreted(), pytest.raises(NotImplementedError, match=re.escape(reason)):
        jax.eval_shape(run, *_arguments(workload))


def test_refuses_a_pool_that_ends_within_a_window():
    q, pages, *rest = _arguments(SMALL)
    odd: PagedKV = jax.tree.map(lambda x: jax.ShapeDtypeStruct((71, 1, *x.shape[2:]), x.dtype), pages)
    run = partial(page_select, implementation="mosaic_gpu", **_options(SMALL))
    with interpreted(), pytest.raises(NotImplementedError, match="must be of 8n sub-pages and heads"):
        jax.eval_shape(run, q, odd, *rest)


def test_refuses_a_device_that_is_no_hopper_gpu():
    if jax.default_backend() != "cpu":
        pytest.skip("the default device is a GPU")
    run = partial(page_select, implementation="mosaic_gpu", **_options(SMALL))
    with pytest.raises(NotImplementedError, match="need a Hopper GPU"):
        jax.eval_shape(run, *_arguments(SMALL))
