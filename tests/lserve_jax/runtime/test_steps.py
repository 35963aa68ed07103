"""The compiled steps as pure functions: what they compute, what they cost, and how JAX's transformations take them."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from lserve_jax import HeadClasses, InferenceConfig, init_cache
from lserve_jax.config.checks import LARGEST_INT
from lserve_jax.config.sampling import SamplingParams
from lserve_jax.runtime.sampling import SamplingState
from lserve_jax.runtime.steps import DecodeState, decode_loop, decode_step, prefill_step
from lserve_jax.weights import abstract_params
from pallas_kernels import PageTables
from tests.lserve_jax.runtime.tiny_steps import Stepper, classes, tiny_config

# Float32 sums in another order: measured 1e-5 at most on logits of up to 8.
TOLERANCE = 1e-4
PROMPT, FORCED = 600, 30
MAX_PAGES = 40

MIXED = classes((1, 0), (0, 1), num_retrieval=(1, 1))
PATTERNS = {
    "no retrieval head, then no streaming head": classes((0, 1), (0, 1), num_retrieval=(0, 2)),
    "no retrieval head at all": classes((0, 1), (0, 1), num_retrieval=(0, 0)),
}
EVERYTHING = {"token_budget": 16 * MAX_PAGES}


@cache
def tokens(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(5, 128, count).astype(np.int32)


@cache
def stepper(heads: HeadClasses | None = None, preset: str = "lserve", slots: int = 1, **fields: Any) -> Stepper:
    return Stepper(tiny_config(preset, heads, **fields), MAX_PAGES, slots)


@cache
def mixed_logits(chunk: int) -> np.ndarray:
    """Logits of a prompt in chunks and of tokens after it, with one head of each class in each layer."""
    return stepper(MIXED, **EVERYTHING).run(tokens(PROMPT), chunk, tokens(FORCED, seed=1))


@cache
def mixed_reference() -> np.ndarray:
    """The same by dense masked attention."""
    return stepper(MIXED, **EVERYTHING).dense(PROMPT, PROMPT, np.concatenate([tokens(PROMPT), tokens(FORCED, seed=1)]))


# --- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [128, 512, PROMPT])
def test_chunked_prefill_and_decode_give_the_logits_of_dense_masked_attention(chunk: int):
    np.testing.assert_allclose(mixed_logits(chunk), mixed_reference(), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("chunk", [128, 512])
def test_chunk_sizes_agree_with_one_shot_in_logits_and_greedy_tokens(chunk: int):
    np.testing.assert_allclose(mixed_logits(chunk), mixed_logits(PROMPT), rtol=0, atol=TOLERANCE)
    run = stepper(MIXED, **EVERYTHING)
    assert run.greedy(tokens(PROMPT), chunk, 24) == run.greedy(tokens(PROMPT), PROMPT, 24)


@pytest.mark.parametrize("name", PATTERNS)
def test_layers_without_heads_of_a_class_give_the_logits_of_dense_masked_attention(name: str):
    run, prompt, forced = stepper(PATTERNS[name], **EVERYTHING), tokens(200), tokens(FORCED, seed=1)
    expected = run.dense(len(prompt), 128, np.concatenate([prompt, forced]))
    np.testing.assert_allclose(run.run(prompt, 128, forced), expected, rtol=0, atol=TOLERANCE)


def test_permuted_heads_whose_windows_cover_everything_give_the_logits_of_the_unpermuted_model():
    dense, prompt, forced = stepper(preset="dense"), tokens(200), tokens(FORCED, seed=1)
    # The largest settings, far beyond what pages can hold: as good as everything, and no sum with them overflows.
    permuted = stepper(MIXED, **EVERYTHING, local=LARGEST_INT, prefill_local=LARGEST_INT)
    expected = dense.run(prompt, 128, forced)
    np.testing.assert_allclose(permuted.run(prompt, 128, forced), expected, rtol=0, atol=TOLERANCE)
    assert permuted.greedy(prompt, 128, 24) == dense.greedy(prompt, 128, 24)


# Two ways to cover the context: as many pages as the table has, and fewer, so that the selector runs and takes all.
@pytest.mark.parametrize("pages", [MAX_PAGES, 16], ids=["the whole table", "as much as is used"])
def test_lserve_that_covers_the_context_equals_dense_bit_for_bit(pages: int):
    dense, prompt, forced = stepper(preset="dense"), tokens(200), tokens(FORCED, seed=1)
    sparse = stepper(preset="lserve", token_budget=16 * pages, static_sparsity=0.0)
    assert len(prompt) + FORCED <= 16 * pages
    np.testing.assert_array_equal(sparse.run(prompt, 128, forced), dense.run(prompt, 128, forced))
    assert sparse.greedy(prompt, 128, 24) == dense.greedy(prompt, 128, 24)


def test_a_small_budget_changes_the_logits_and_the_first_token_over_it_is_where_it_begins():
    """So that the equalities above mean something: 8 pages of 16 tokens are full with 128."""
    prompt, forced = tokens(120), tokens(FORCED, seed=1)
    dense = stepper(preset="dense").run(prompt, 128, forced)
    sparse = stepper(preset="lserve", token_budget=128, static_sparsity=0.0, selector_interval=1)
    differs = np.abs(sparse.run(prompt, 128, forced) - dense).max(axis=-1) > TOLERANCE
    assert not differs[:128].any()
    assert differs[128:].all()


# Bounds on the change of the logits (root mean square) over their spread; measured 0.0014, 0.0026 and 0.050. A step of
# int4 is 17 steps of int8, and so is about what it does.
@pytest.mark.slow
@pytest.mark.parametrize(("kv_dtype", "bound"), [("bfloat16", 0.003), ("int8", 0.005), ("int4", 0.1)])
def test_a_rounded_cache_changes_logits_as_rounding_keys_and_values_does(kv_dtype: str, bound: float):
    prompt, forced = tokens(200), tokens(FORCED, seed=1)
    run = stepper(MIXED, **EVERYTHING, kv_dtype=kv_dtype)
    logits = run.run(prompt, 128, forced)
    exact = stepper(MIXED, **EVERYTHING).run(prompt, 128, forced)
    np.testing.assert_allclose(logits[:128], exact[:128], rtol=0, atol=TOLERANCE)  # the first chunk reads no page
    change = root_mean_square(logits[128:] - exact[128:])
    assert bound / 10 < change / exact.std() < bound
    # Beside that nothing: a few elements may lie so near the middle of a step that another order of a sum rounds them
    # the other way (measured: 0.0005 of the change at most).
    expected = run.dense(len(prompt), 128, np.concatenate([prompt, forced]))
    assert root_mean_square(logits[128:] - expected[128:]) < 0.1 * change


def root_mean_square(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


# --- the loop -------------------------------------------------------------------------------------------------------


def test_decode_loop_gives_what_single_steps_give_and_ends_each_sequence_at_its_own_end():
    run = stepper(MIXED, slots=3, token_budget=128)
    prompts = [tokens(100), tokens(70, seed=2)]
    expected, caches, first = [], run.cache(), []
    for slot, prompt in enumerate(prompts):
        rows = (table[slot : slot + 1] for table in run.tables if table is not None)
        tables = PageTables(*rows, slots=np.array([slot], np.int32))
        row = np.zeros((1, 128), np.int32)
        row[0, : len(prompt)] = prompt
        counts = np.array([len(prompt)], np.int32)
        logits, caches = prefill_step(
            *(run.params, caches, row, np.zeros(1, np.int32), counts, tables), config=run.config, has_all_logits=True
        )
        first.append(int(np.asarray(logits)[0, len(prompt) - 1].argmax()))
        expected.append(run.greedy(prompt, 128, 12))
    assert first == [chosen[0] for chosen in expected]
    stop = expected[1][3]
    assert stop not in expected[1][1:3]
    state = DecodeState(
        tokens=jnp.array([*first, 0]),
        lengths=jnp.array([101, 71, 0]),
        decode_steps=jnp.zeros(3, jnp.int32),
        remaining=jnp.array([11, 11, 0]),
        stop_tokens=jnp.array([[-1, -1], [-1, stop], [-1, -1]]),
    )
    sampling = SamplingState.from_params([SamplingParams(), SamplingParams(), None])

    def loop(state: DecodeState, steps: int, caches: Any) -> Any:
        return decode_loop(
            run.params, caches, state, run.tables, sampling, np.int32(steps), config=run.config, max_steps=6
        )

    columns: list[list[int]] = [[], [], []]
    for steps in (5, 6, 6):
        generated, state, caches = loop(state, steps, caches)
        found = np.asarray(generated.tokens)
        assert (found[steps:] == -1).all()
        assert np.isfinite(np.asarray(generated.logprobs)[found >= 0]).all()
        for slot in range(3):
            columns[slot] += found[found[:, slot] >= 0, slot].tolist()
    assert columns == [expected[0][1:], expected[1][1:4], []]
    assert np.asarray(state.remaining).tolist() == [0, 0, 0]
    assert np.asarray(state.lengths).tolist() == [112, 74, 0]
    assert np.asarray(state.decode_steps).tolist() == [11, 3, 0]


# --- as pure functions ----------------------------------------------------------------------------------------------


def abstract(config: InferenceConfig, max_pages: int, slots: int = 2) -> tuple[Any, Any, PageTables]:
    """Parameters, cache and tables as shapes."""
    pages = slots * max_pages
    params = abstract_params(config.model, jnp.dtype("float32"))
    empty = jax.eval_shape(lambda: init_cache(config, max_num_seqs=slots, retrieval_pages=pages, streaming_pages=pages))
    table = jax.ShapeDtypeStruct((slots, max_pages), jnp.int32)
    return params, empty, PageTables(table, table)  # type: ignore[arg-type]


def whole(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def lower(step: str, config: InferenceConfig, max_pages: int) -> Any:
    params, empty, tables = abstract(config, max_pages)
    if step == "prefill":
        return prefill_step.lower(params, empty, whole(2, 64), whole(2), whole(2), tables, config=config)
    return decode_step.lower(params, empty, whole(2), whole(2), whole(2), tables, config=config)


def tree_bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("kv_dtype", ["float32", "int4"])
def test_shapes_are_known_without_running(kv_dtype: str):
    config = tiny_config("lserve", MIXED, token_budget=128, kv_dtype=kv_dtype)
    params, empty, tables = abstract(config, 16)
    arguments = (params, empty, whole(2, 64), whole(2), whole(2), tables)
    for has_all, shape in ((False, (2, 128)), (True, (2, 64, 128))):
        logits, after = jax.eval_shape(
            lambda *args, flag=has_all: prefill_step(*args, config=config, has_all_logits=flag), *arguments
        )
        assert (logits.shape, logits.dtype) == (shape, jnp.float32)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), empty)
    logits, after = jax.eval_shape(
        lambda *args: decode_step(*args, config=config), params, empty, whole(2), whole(2), whole(2), tables
    )
    assert (logits.shape, logits.dtype) == ((2, 128), jnp.float32)
    assert jax.tree.structure(after) == jax.tree.structure(empty)


@pytest.mark.slow
@pytest.mark.parametrize("step", ["prefill", "decode"])
def test_the_cache_is_updated_in_place_and_temporaries_do_not_grow_with_the_context(step: str):
    config = tiny_config("lserve", MIXED, token_budget=128, kv_dtype="int4")
    temporaries = {}
    few, many = 512, 4096  # more than the selector scores at once
    for max_pages in (few, many):
        compiled = lower(step, config, max_pages).compile()
        memory = compiled.memory_analysis()
        cache_bytes = tree_bytes(abstract(config, max_pages)[1])
        assert memory.alias_size_in_bytes == cache_bytes
        temporaries[max_pages] = memory.temp_size_in_bytes
    # Of each page more, a prefill copies one sequence's page table (measured: 4 bytes), and the selector holds its
    # scores and an ordering of them (16). A page itself has 256 bytes of codes for each head and pool.
    assert temporaries[many] - temporaries[few] < {"prefill": 8, "decode": 24}[step] * (many - few), temporaries


def test_nothing_recompiles_as_context_and_settings_grow():
    run = stepper(MIXED, slots=3, token_budget=128)
    steps: tuple[Any, ...] = (prefill_step, decode_step)
    run.run(tokens(40), 128, tokens(2))
    compiled = [step._cache_size() for step in steps]
    run.run(tokens(500), 128, tokens(20))
    assert [step._cache_size() for step in steps] == compiled


def test_a_donated_cache_is_gone_and_the_returned_one_takes_its_place():
    run = stepper(MIXED, slots=3, token_budget=128)
    before = run.cache()
    _, after = run.prefill(before, tokens(40), 128)
    assert all(leaf.is_deleted() for layer in before for leaf in jax.tree.leaves(layer.kv))
    _, again = run.prefill(after, tokens(40), 128)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(again))


@pytest.mark.slow
def test_exported_steps_survive_a_file_and_give_the_same():
    run = stepper(MIXED, **EVERYTHING, kv_dtype="int4")
    tables, prompt = run.tables, tokens(100)
    row = np.zeros((1, 128), np.int32)
    row[0, :100] = prompt
    prefill = (row, np.zeros(1, np.int32), np.array([100], np.int32), tables)
    decode = (np.array([7], np.int32), np.array([101], np.int32), np.zeros(1, np.int32), tables)
    caches = {"direct": run.cache(), "exported": run.cache()}
    for step, arguments, options in ((prefill_step, prefill, {"has_all_logits": True}), (decode_step, decode, {})):
        static: dict[str, Any] = {"config": run.config, **options}
        exported = export.export(step)(run.params, caches["direct"], *arguments, **static)
        restored = export.deserialize(exported.serialize())
        assert restored.in_tree == exported.in_tree
        logits, caches["direct"] = step(run.params, caches["direct"], *arguments, **static)
        theirs, caches["exported"] = restored.call(run.params, caches["exported"], *arguments)
        np.testing.assert_array_equal(np.asarray(theirs), np.asarray(logits))
