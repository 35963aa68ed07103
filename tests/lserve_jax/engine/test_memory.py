"""The memory plan, checked against arithmetic by hand and against what is really allocated."""

import gc
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lserve_jax import (
    LLM,
    AttentionConfig,
    HeadClasses,
    InferenceConfig,
    classify,
    from_preset,
    init_cache,
)
from lserve_jax.config.errors import InputError
from lserve_jax.config.hf import read_hf
from lserve_jax.config.sizes import CacheSettings, PoolSizes, Sizes
from lserve_jax.engine.memory import dense_bf16_bytes, page_bytes, plan_memory, tree_bytes
from lserve_jax.models.known import known_configs
from lserve_jax.weights import open_checkpoint
from tests.lserve_jax.checkpoints import tiny_config

ROOT = Path(__file__).parents[3]
TINY = ROOT / "tests" / "golden" / "tiny"
GIB = 2**30

# Llama-3.1-8B: 32 layers of 8 KV heads of 128, width 4096, feed-forward 14336, vocabulary 128256, nothing tied.
LLAMA_8B_WEIGHTS = (
    2 * 128256 * 4096  # embedding and output
    + 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024)  # q and o, k and v
    + 32 * 3 * 4096 * 14336  # gate, up, down
    + (2 * 32 + 1) * 4096  # norms
)


def llama_8b(streaming: float, **policy: Any) -> InferenceConfig:
    heads = classify(np.zeros((32, 8)), streaming)
    model = open_checkpoint("llama-3.1-8b").config
    return InferenceConfig(model=model, attention=from_preset("lserve", **policy), heads=heads)


def plan_of(config: InferenceConfig, length: int, **sizes: Any) -> Any:
    available, cache = sizes.pop("available_bytes", 80 * GIB), sizes.pop("cache", None)
    sizes = {"max_model_len": length, "max_num_seqs": 1} | sizes
    return plan_memory(config, Sizes(**sizes), available_bytes=available, cache=cache)


def test_llama_8b_at_a_million_tokens_in_int8_with_half_the_heads_streaming():
    plan = plan_of(llama_8b(0.5, kv_dtype="int8"), 1_000_000)
    assert LLAMA_8B_WEIGHTS == 8_030_261_248
    assert plan.weight_bytes == 16_060_522_496  # bfloat16
    # A page of one head: 64 keys and 64 values of 128 bytes, each value with a scale and an offset in float16, and the
    # least and greatest key of 4 sub-pages, 128 channels in bfloat16.
    head = 64 * (128 + 128 + 2 + 2) + 2 * 4 * 128 * 2
    assert head == 18_688 == 64 * 292
    # 1,000,000 tokens fill 15,625 pages of 64 exactly; 16 layers' worth of 8 heads are retrieval heads.
    assert plan.retrieval_bytes == 15_625 * 128 * head == 37_376_000_000
    # Streaming heads: 2 pages of 128 sink tokens; 512 queries with a window of 4096 reach over 4607 positions, which
    # touch 73 pages when the first of them is the last of its page: 1 + 71 whole ones + 1.
    assert 1 + 71 * 64 < 4607 <= 1 + 72 * 64
    assert plan.streaming_bytes == 75 * 128 * head == 179_404_800
    # The open page of every head in bfloat16.
    assert plan.tail_bytes == 256 * 64 * 2 * 128 * 2 == 8_388_608
    assert plan.total_bytes == 16_060_522_496 + 37_376_000_000 + 179_404_800 + 8_388_608


def test_the_same_model_dense_in_bfloat16_takes_128_kib_a_token():
    config = llama_8b(0.0, token_budget="all")
    plan = plan_of(config, 131_072)
    # 2 (k and v) · 32 layers · 8 heads · 128 channels · 2 bytes = 131,072 bytes a token. Nothing else: no page is
    # selected, so none has statistics.
    assert plan.retrieval_bytes == 131_072 * 131_072
    assert plan.streaming_bytes == 0
    # A budget adds the least and greatest key of 4 sub-pages, 2 · 4 · 128 · 2 bytes a page and head: 1/16.
    assert plan_of(llama_8b(0.0), 131_072).retrieval_bytes == 131_072 * 131_072 * 17 // 16


@pytest.mark.parametrize(
    ("preset", "kv_dtype", "page"),
    [
        ("dense", "auto", 64 * 2 * 2 * 128),
        ("streaming", "auto", 64 * 2 * 2 * 128),
        (
            "dense",
            "int8",
            64 * (128 + 128 + 4) + 2 * 128 * 2,
        ),  # bounds of the whole page: as much as two scales per key
        ("qserve", "int4", 64 * (64 + 64 + 4) + 4 * 2 * 128 * 2),
    ],
)
def test_a_head_that_selects_no_pages_stores_no_more_than_keys_need(preset: str, kv_dtype: str, page: int):
    heads, policy = classify(np.zeros((32, 8)), 0.0), from_preset(preset, kv_dtype=kv_dtype)
    config = InferenceConfig(model=open_checkpoint("llama-3.1-8b").config, attention=policy, heads=heads)
    assert page_bytes(config) == (32 * 8 * page, 0)


@pytest.mark.parametrize("length", [1, 43, 64, 65, 1000])
def test_dense_attention_in_bfloat16_holds_what_it_is_compared_with(length: int):
    """Its pages are not full either: a ratio above 1 would count their rounding, which no setting can save."""
    plan = plan_of(llama_8b(0.0, token_budget="all"), length, max_num_seqs=3)
    assert plan.retrieval_bytes + plan.streaming_bytes == 3 * dense_bf16_bytes(plan.config, length)
    assert "1.00x of dense bfloat16" in plan.describe()
    assert dense_bf16_bytes(plan.config, length) == -(-length // 64) * 64 * 131_072


def test_int4_codes_take_half_a_byte_and_those_of_streaming_heads_a_whole_one():
    plan = plan_of(llama_8b(0.5, kv_dtype="int4"), 1_000_000)
    assert plan.retrieval_bytes == 15_625 * 128 * 64 * 164
    assert 64 * 164 == 64 * (64 + 64 + 2 + 2) + 2 * 4 * 128 * 2
    assert plan.streaming_bytes == 75 * 128 * 64 * 292


def test_slots_share_one_prefills_worth_of_streaming_pages():
    config = llama_8b(0.5)
    one, four = plan_of(config, 100_000), plan_of(config, 100_000, max_num_seqs=4)
    assert four.pools.retrieval == 4 * one.pools.retrieval == 4 * 1563
    # 8 decode steps with a window of 256 reach over 263 positions: 1 + 4 whole + 1 pages, and the sink's 2.
    assert (one.pools.streaming, four.pools.streaming) == (75, 75 + 3 * 8)
    # No more than a sequence has.
    assert plan_of(config, 130, max_num_seqs=2).pools == PoolSizes(retrieval=6, streaming=6)


SMALL = read_hf(tiny_config(num_hidden_layers=1), source="one layer of 3 KV heads")
LIMITS = st.integers(2**15, 2**45)


@settings(max_examples=50)
@given(LIMITS, st.integers(1, 6), st.sampled_from([0, 1, 3]), st.sampled_from(["bfloat16", "int8", "int4"]))
def test_the_largest_context_fits_and_one_page_more_does_not(available: int, slots: int, kept: int, kv_dtype: str):
    heads = HeadClasses(order=((0, 1, 2),), num_retrieval=(kept,))
    config = InferenceConfig(model=SMALL, attention=from_preset("lserve", kv_dtype=kv_dtype), heads=heads)
    plan = plan_of(config, 1000, max_num_seqs=slots, available_bytes=available)
    largest = plan.largest_context
    assert largest % 64 == 0
    if largest:
        assert plan_of(config, largest, max_num_seqs=slots, available_bytes=available).fits
    if largest < 2**31 - 64:
        assert not plan_of(config, largest + 1, max_num_seqs=slots, available_bytes=available).fits
    assert plan.fits == (largest >= 1000)


def test_a_context_has_int32_positions_however_much_memory_there_is():
    plan = plan_of(llama_8b(1.0), 1000, available_bytes=2**60)
    assert plan.largest_context == 2**31 - 64


def test_a_context_that_does_not_fit_is_refused_with_the_largest_that_does():
    config = llama_8b(0.0)  # with a budget, and so with statistics
    plan = plan_of(config, 131_072, available_bytes=24 * GIB)
    assert not plan.fits
    # 0.9 · 24 GiB − weights − open pages = 7,124,264,714 bytes: 799 pages of 64 · 131,072 · 17/16 bytes.
    assert plan.largest_context == 799 * 64
    message = (
        r"max_model_len=131072 with 1 sequence\(s\) needs 31\.97 GiB for weights and KV cache, but 21\.60 GiB can be "
        r"used: the largest context that fits is 51136 tokens \(max_model_len\)"
    )
    with pytest.raises(ValueError, match=message):
        plan.require_fit()
    plan_of(config, 51_136, available_bytes=24 * GIB).require_fit()
    with pytest.raises(ValueError, match="not even the weights and one page fit"):
        plan_of(config, 1000, available_bytes=GIB).require_fit()


PATTERNS = {
    "all retrieval": HeadClasses.all_retrieval(3, 3),
    "mixed": HeadClasses(order=((0, 1, 2), (2, 0, 1), (0, 1, 2)), num_retrieval=(2, 1, 0)),
    "all streaming": HeadClasses(order=((0, 1, 2),) * 3, num_retrieval=(0, 0, 0)),
}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float32", "int8", "int4"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_planned_bytes_are_those_of_the_cache_that_is_made(pattern: str, kv_dtype: str, dtype: str, tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    policy = AttentionConfig(
        page_size=8, sub_page_size=4, token_budget=64, sink=9, local=20, prefill_local=40, kv_dtype=kv_dtype
    )
    model = open_checkpoint(str(tmp_path)).config
    config = InferenceConfig(model=model, attention=policy, heads=PATTERNS[pattern], dtype=dtype)
    plan = plan_of(config, 200, max_num_seqs=3, prefill_chunk=16)
    cache = init_cache(
        config, max_num_seqs=3, retrieval_pages=plan.pools.retrieval, streaming_pages=plan.pools.streaming
    )
    assert plan.retrieval_bytes == sum(tree_bytes(layer.kv.retrieval) for layer in cache)
    assert plan.streaming_bytes == sum(tree_bytes(layer.kv.streaming) for layer in cache)
    assert plan.tail_bytes == sum(tree_bytes(layer.kv.tail) for layer in cache)
    # What the selector remembers is left to the headroom: 8 bytes for each of its pages.
    rest = tree_bytes(cache) - plan.cache_bytes
    assert rest == 8 * 3 * sum(config.num_retrieval) * 8


def test_an_engine_takes_what_its_plan_says():
    model = str(TINY / "qwen3")
    llm = LLM(model, kv_dtype="int8", max_model_len=96, max_num_seqs=2, token_budget=256)
    plan = llm.setup.plan
    assert tree_bytes(llm.engine.params) == plan.weight_bytes
    assert tree_bytes(llm.engine.cache) == plan.cache_bytes


def test_a_budget_beyond_all_pages_costs_nothing():
    """The lists of chosen pages grow with the budget, and this one would take 2 · 2 · 2 · 15,625,001 · 4 bytes."""
    llm = LLM(str(TINY / "llama3"), max_model_len=96, max_num_seqs=2, token_budget=10**9)
    assert all(layer.selected is None for layer in llm.engine.cache)


# --- how much the cache takes, and what it keeps ----------------------------------------------------------------------

PAGE = 128 * 18_688  # of either pool of llama_8b(0.5, kv_dtype="int8")
TAILS = 4 * 8_388_608


def four_chats(available_bytes: int | None = 80 * GIB, **cache: Any) -> Any:
    config = llama_8b(0.5, kv_dtype="int8")
    return plan_of(config, 131_072, max_num_seqs=4, available_bytes=available_bytes, cache=CacheSettings(**cache))


FULL = PoolSizes(retrieval=4 * 2048, streaming=75 + 3 * 8)
FULL_BYTES = (FULL.retrieval + FULL.streaming) * PAGE + TAILS


def test_bytes_for_the_cache_become_the_streaming_pages_of_all_and_retrieval_pages():
    assert four_chats().pools == FULL
    plan = four_chats(kv_memory=10 * GIB)
    assert plan.pools.streaming == FULL.streaming
    assert plan.pools.retrieval == (10 * GIB - TAILS) // PAGE - FULL.streaming == 4375
    assert 10 * GIB - PAGE < plan.cache_bytes <= 10 * GIB
    assert four_chats(kv_memory=10 * GIB, available_bytes=None).pools == plan.pools
    assert four_chats(kv_memory=FULL_BYTES).pools == FULL


@pytest.mark.parametrize(
    ("kv_memory", "left", "retrieval"),
    [
        ("fit", FULL_BYTES, FULL.retrieval),
        ("fit", FULL_BYTES - 1, FULL.retrieval - 1),
        ("fit", FULL_BYTES + 9 * PAGE, FULL.retrieval),
        ("free", FULL_BYTES, FULL.retrieval),
        ("free", FULL_BYTES + 9 * PAGE, FULL.retrieval + 9),
        ("free", FULL_BYTES - 1, FULL.retrieval - 1),
        (None, FULL_BYTES - 1, FULL.retrieval),
    ],
)
def test_the_cache_takes_what_the_device_has_left(kv_memory: str | None, left: int, retrieval: int):
    available = -(-10 * (2 * LLAMA_8B_WEIGHTS + left) // 9)  # nine tenths of it can be used
    plan = four_chats(available_bytes=available, kv_memory=kv_memory)
    assert plan.pools == replace(FULL, retrieval=retrieval)
    assert plan.fits == (retrieval <= FULL.retrieval - 1 or left >= FULL_BYTES)


@pytest.mark.parametrize("kv_memory", ["fit", "free", None])
def test_a_device_that_is_not_here_has_room_for_every_slot(kv_memory: str | None):
    assert four_chats(available_bytes=None, kv_memory=kv_memory).pools == FULL


def test_bytes_for_less_than_one_sequence_are_refused_with_what_it_takes():
    least = (2048 + FULL.streaming) * PAGE + TAILS
    assert four_chats(kv_memory=least).pools == PoolSizes(retrieval=2048, streaming=FULL.streaming)
    message = (
        r"^kv_memory of 4\.81 GiB is too small for one sequence of max_model_len=131072 tokens, which takes 4\.81 GiB: "
        r"give more, or lower max_model_len or max_num_seqs$"
    )
    with pytest.raises(InputError, match=message):
        four_chats(kv_memory=least - 1)


@pytest.mark.parametrize("kv_memory", ["fit", "free"])
def test_a_device_with_too_little_for_one_sequence_says_which_context_would_fit(kv_memory: str):
    plan = four_chats(kv_memory=kv_memory, available_bytes=20 * GIB)
    assert not plan.fits
    largest = plan.largest_context
    message = rf"^max_model_len=131072 with 4 sequence\(s\) needs 19\.77 GiB .* fits is {largest} tokens"
    with pytest.raises(InputError, match=message):
        plan.require_fit()
    smaller = plan_of(
        plan.config,
        largest,
        max_num_seqs=4,
        available_bytes=20 * GIB,
        cache=CacheSettings(kv_memory=kv_memory),
    )
    smaller.require_fit()
    with pytest.raises(InputError, match="not even the weights and one page fit"):
        four_chats(kv_memory=kv_memory, available_bytes=15 * GIB).require_fit()


def test_bytes_beyond_the_device_are_refused_with_what_it_has_left():
    plan = four_chats(kv_memory=10 * GIB, available_bytes=24 * GIB)
    left = int(24 * GIB * 0.9) - plan.weight_bytes
    with pytest.raises(InputError, match=rf"^kv_memory=10737418240 needs 24\.96 GiB .*: it may be {left} bytes$"):
        plan.require_fit()
    four_chats(kv_memory=left, available_bytes=24 * GIB).require_fit()


def test_host_memory_holds_retrieval_pages_beside_the_streaming_pages_of_all():
    streaming = FULL.streaming * PAGE
    for memory, pages in (
        (0, 0),
        (streaming, 0),
        (streaming + PAGE - 1, 0),
        (streaming + 7 * PAGE, 7),
    ):
        plan = four_chats(swap_memory=memory)
        assert plan.pools == replace(FULL, swap=pages)
    assert "swap:             7 retrieval pages in host memory" in plan.describe()
    # More windows on the device may be held by sequences too, and leave with them.
    assert four_chats(swap_memory=streaming + 7 * PAGE, prefix_windows=1).pools.swap == 0
    assert plan_of(llama_8b(1.0), 1000, cache=CacheSettings(swap_memory=2**40)).pools.swap == 0


def test_windows_of_the_prefix_cache_add_streaming_pages():
    # A window of 4096 straddles 65 pages, and the sink has 2.
    assert four_chats(prefix_windows=3).pools == replace(FULL, streaming=FULL.streaming + 3 * 67)
    # A sequence has no more pages than that.
    short = plan_of(llama_8b(0.5), 130, cache=CacheSettings(prefix_windows=3))
    assert short.pools == PoolSizes(retrieval=3, streaming=3 + 3 * 3)
    assert plan_of(llama_8b(0.0), 130, cache=CacheSettings(prefix_windows=3)).pools.streaming == 0


def test_the_plan_says_what_the_prefix_cache_does():
    assert "prefix cache:     idle pages, in units of 512 tokens; room for 2 windows beyond" in (
        four_chats(prefix_windows=2).describe()
    )
    assert "prefix cache:     off\n" in four_chats(prefix_cache=False).describe()
    plan = plan_of(llama_8b(0.5), 1000, prefill_chunk=100)
    assert not plan.has_prefix_cache
    assert "prefix cache:     off, because prefill_chunk=100 is not a multiple of page_size=64" in plan.describe()


@settings(max_examples=60)
@given(st.integers(2**12, 2**34), st.integers(1, 6), st.sampled_from([0, 1, 3]), st.sampled_from(["bfloat16", "int4"]))
def test_any_bytes_are_filled_and_never_exceeded(memory: int, slots: int, kept: int, kv_dtype: str):
    heads = HeadClasses(order=((0, 1, 2),), num_retrieval=(kept,))
    config = InferenceConfig(model=SMALL, attention=from_preset("lserve", kv_dtype=kv_dtype), heads=heads)
    sizes = {"max_num_seqs": slots, "cache": CacheSettings(kv_memory=memory)}
    try:
        plan = plan_of(config, 1000, **sizes)
    except InputError:
        with pytest.raises(InputError, match="is too small for one sequence"):
            plan_of(config, 1000, **sizes | {"available_bytes": None})
        return
    assert plan.cache_bytes <= memory
    shapes = jax.eval_shape(
        lambda: init_cache(
            config, max_num_seqs=slots, retrieval_pages=plan.pools.retrieval, streaming_pages=plan.pools.streaming
        )
    )
    made = sum(tree_bytes(layer.kv) for layer in shapes)
    assert made == plan.cache_bytes, "kernels pad the pool"
    if kept and plan.pools.retrieval < 2**31 - 16:
        assert memory - made < 8 * page_bytes(config)[0]
    # The largest context is the last one that these bytes hold.
    plan_of(config, plan.largest_context, **sizes)
    if plan.largest_context < 2**31 - 64:
        with pytest.raises(InputError, match="is too small for one sequence"):
            plan_of(config, plan.largest_context + 1, **sizes)


# --- the command ----------------------------------------------------------------------------------------------------


def dry_run(*arguments: str) -> tuple[dict[str, str], str]:
    """The rows of the plan that the command prints, and its stderr."""
    command = [sys.executable, "-m", "lserve_jax.generate", "--dry-run", *arguments]
    environment = os.environ | {"XDG_CACHE_HOME": str(ROOT / "LICENSE")}  # a plan writes nothing: no folder is needed
    environment.pop("JAX_COMPILATION_CACHE_DIR")
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    rows = dict(line.split(":", 1) for line in result.stdout.splitlines())
    return {name: value.strip() for name, value in rows.items()}, result.stderr


MILLION = ("--max-model-len", "1000000", "--kv-dtype", "int8", "--static-sparsity", "0.5", "--prefill-chunk", "512")


def check_million(rows: dict[str, str], pages: int) -> None:
    """With a layer that has one retrieval head, of four sub-pages a page, the pool holds an even number of pages."""
    retrieval = pages * 2_392_064
    gib = 2**30
    assert rows["context"] == "1,000,000 tokens x 1 sequence(s)"
    assert rows["KV heads"] == "128 retrieval + 128 streaming of 256"
    assert rows["weights"] == "16,060,522,496 bytes (14.96 GiB, bfloat16)"
    assert rows["retrieval pages"] == f"{pages:,} x 2,392,064 = {retrieval:,} bytes"
    assert rows["streaming pages"] == "75 x 2,392,064 = 179,404,800 bytes"
    assert rows["open pages"] == "1 x 8,388,608 = 8,388,608 bytes"
    cache = retrieval + 179_404_800 + 8_388_608
    assert rows["KV cache"] == f"{cache:,} bytes ({cache / gib:.2f} GiB, int8), 0.29x of dense bfloat16"
    assert rows["total"] == f"{cache + 16_060_522_496:,} bytes ({(cache + 16_060_522_496) / gib:.2f} GiB)"
    assert re.fullmatch(r"\d+\.\d\d GiB free, 90% of it usable: (fits|DOES NOT FIT)", rows["memory"])
    assert re.fullmatch(r"[\d,]+ tokens x 1 sequence\(s\)", rows["largest context"])


@pytest.mark.slow
def test_dry_run_of_a_million_tokens_needs_a_name_alone():
    rows, errors = dry_run("--model", "llama-3.1-8b", *MILLION)
    check_million(rows, 15_625)
    assert errors.splitlines() == [
        "max_model_len=1000000 is beyond the 131072 tokens that this model was made for: expect nonsense past them"
    ]


@pytest.mark.slow
def test_dry_run_of_a_million_tokens_needs_a_folder_with_a_configuration_alone(tmp_path: Path, shared_patterns: Path):
    (tmp_path / "config.json").write_text(json.dumps(known_configs()["llama-3.1-8b"]))
    pattern = str(shared_patterns / "Meta-Llama-3.1-8B-Instruct")
    rows, _ = dry_run("--model", str(tmp_path), "--head-pattern", pattern, "--quiet", *MILLION)
    check_million(rows, 15_626)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json"]


def test_a_plan_starts_no_memory_of_the_device():
    gc.collect()  # what other tests left is not to go while this one counts
    before = len(jax.live_arrays())
    plan_of(llama_8b(0.5), 1_000_000)
    assert len(jax.live_arrays()) == before
