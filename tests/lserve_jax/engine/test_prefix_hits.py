"""Prompts that begin like earlier ones: a hit gives what a cold run gives, bit for bit, and computes only the rest."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest

from lserve_jax import LLM, RequestOutput, SamplingParams
from lserve_jax.engine.prefix_cache import PrefixCache
from lserve_jax.runtime.programs import Call, Programs
from tests.lserve_jax.engine.tiny_llms import (
    GATES,
    SPARSE,
    assert_idle,
    generate,
    logits_of,
    make_llm,
    poisoned,
    prefills,
    programs_run,
    prompt,
    same,
)

pytestmark = pytest.mark.slow

CHUNK = SPARSE["prefill_chunk"]
PARAMS = SamplingParams(max_tokens=14, ignore_eos=True, logprobs=True, top_logprobs=5)
LENGTH = 500


class Pair(NamedTuple):
    """Two engines of one model: one without a prefix cache, and one with it."""

    cold: LLM
    warm: LLM
    share: float

    @property
    def cache(self) -> PrefixCache:
        cache = self.warm.engine.scheduler.cache
        assert cache is not None
        return cache

    def hit(self, tokens: list[int], params: SamplingParams = PARAMS) -> tuple[int, dict[str, int], RequestOutput]:
        """Checks one request against its cold run; returns the tokens found, the prefill programs run, the output."""
        expected, cold = logits_of(self.cold, tokens, params)
        with programs_run() as counts, poisoned(self.warm):
            output, warm = logits_of(self.warm, tokens, params)
        assert same(output, expected)
        assert len(warm) == len(cold) > 0
        for one, other in zip(warm, cold, strict=True):
            np.testing.assert_array_equal(one, other)
        assert expected.metrics.cached_tokens == 0
        return output.metrics.cached_tokens, prefills(counts), output


def make_pair(factory: pytest.TempPathFactory, share: float, gates: str | None, **settings: Any) -> Pair:
    settings = SPARSE | {"max_model_len": LENGTH} | settings
    warm, cold = (
        make_llm(factory.mktemp("gates"), gates, prefix_cache=has_cache, **settings) for has_cache in (True, False)
    )
    assert cold.engine.scheduler.cache is None
    cold.engine.programs = warm.engine.programs  # the same shapes: each program is compiled once
    return Pair(cold, warm, share)


SHARES = [0.0, 0.5, 0.75, 1.0]
KINDS = [(dtype, share) for dtype in ("float32", "bfloat16", "int8", "int4") for share in SHARES]


@pytest.fixture(scope="module", params=KINDS, ids=[f"{dtype}-{share:g}" for dtype, share in KINDS])
def each_pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Every type of cache with every share of streaming heads."""
    dtype, share = request.param
    return make_pair(tmp_path_factory, share, GATES["all different"], static_sparsity=share, kv_dtype=dtype)


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory, 0.5, GATES["one of each"], kv_dtype="int4", prefix_windows=12)


@pytest.fixture(autouse=True)
def empty_before_idle_after(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each test begins with an empty prefix cache, and leaves pages behind that only the prefix cache holds."""
    pairs = [request.getfixturevalue(name) for name in ("each_pair", "quantised") if name in request.fixturenames]
    for pair in pairs:
        pair.warm.engine.scheduler.forget_pages()
    yield
    for pair in pairs:
        assert_idle(pair.warm)
        assert_idle(pair.cold)


# --- who hits what ---------------------------------------------------------------------------------------------------


def test_another_question_about_a_document_computes_only_the_question(each_pair: Pair):
    document = prompt(3 * CHUNK + 20)
    tail = {"prefill_64": 1}
    assert each_pair.hit([*document, *prompt(10, seed=1)])[:2] == (0, {"prefill_72": 3} | tail)
    assert each_pair.hit([*document, *prompt(44, seed=2)])[:2] == (3 * CHUNK, tail)
    assert each_pair.hit([*document, *prompt(45, seed=3)])[:2] == (3 * CHUNK, {"prefill_72": 1})


def test_the_second_turn_of_a_chat_computes_the_first_answer_and_the_new_question(each_pair: Pair):
    first = prompt(2 * CHUNK + 60)
    *_, output = each_pair.hit(first)
    second = [*first, *output.token_ids, *prompt(30, seed=1)]  # 248 tokens
    assert each_pair.hit(second)[:2] == (2 * CHUNK, {"prefill_72": 1, "prefill_64": 1})
    # The chunk in which the first answer stood was read as a prompt now.
    assert each_pair.hit([*second, *prompt(20, seed=2)])[:2] == (3 * CHUNK, {"prefill_64": 1})


def test_an_edit_of_the_last_turn_hits_all_chunks_before_the_edit(each_pair: Pair):
    tokens = prompt(3 * CHUNK + 30)
    each_pair.hit(tokens)
    edited = [*tokens[: 2 * CHUNK + 50], *prompt(60, seed=1)]
    assert each_pair.hit(edited)[:2] == (2 * CHUNK, {"prefill_72": 1, "prefill_64": 1})


def test_a_junction_is_computed_once_more_and_then_hit(each_pair: Pair):
    """A system prompt of two chunks: no window is kept where the first prompt only passed."""
    system = prompt(2 * CHUNK + 5)
    needs_window, sees_pages = each_pair.share > 0, each_pair.share < 1
    each_pair.hit([*system, *prompt(4 * CHUNK, seed=1)])
    found, programs, _ = each_pair.hit([*system, *prompt(3 * CHUNK, seed=2)])
    assert found == (0 if needs_window else 2 * CHUNK)
    assert programs == {"prefill_72": 5 if needs_window else 3, "prefill_64": 1}
    # A model without retrieval heads keeps no trace of chunks without a window, so it finds no junction.
    assert each_pair.hit([*system, *prompt(20, seed=3)])[0] == (2 * CHUNK if sees_pages else 0)


@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_a_prompt_of_whole_chunks_computes_its_last_one(each_pair: Pair, chunks: int):
    tokens = prompt(chunks * CHUNK + 1)
    whole = tokens[:-1]
    assert each_pair.hit(whole)[:2] == (0, {"prefill_72": chunks})
    assert each_pair.hit(whole)[:2] == ((chunks - 1) * CHUNK, {"prefill_72": 1})
    assert each_pair.hit(tokens)[:2] == (chunks * CHUNK, {"prefill_64": 1})
    assert each_pair.hit(tokens)[:2] == (chunks * CHUNK, {"prefill_64": 1})


def test_evicted_windows_make_hits_shorter_and_change_nothing(each_pair: Pair):
    pool = each_pair.warm.engine.scheduler.allocator.streaming
    tokens = prompt(3 * CHUNK + 30)
    each_pair.hit(tokens)
    if pool is None:
        assert each_pair.cache.num_windows == 0
        return
    assert each_pair.cache.num_windows == 2
    each_pair.cache._drop_window(each_pair.cache._windows[digests(each_pair, tokens)[2]])
    assert each_pair.hit(tokens)[:2] == (2 * CHUNK, {"prefill_72": 1, "prefill_64": 1})
    assert each_pair.hit(tokens)[:2] == (3 * CHUNK, {"prefill_64": 1})
    each_pair.cache.evict(pool, pool.num_pages - pool.num_free)
    assert each_pair.cache.num_windows == 0
    assert each_pair.hit(tokens)[:2] == (0, {"prefill_72": 3, "prefill_64": 1})
    assert each_pair.hit(tokens)[:2] == (3 * CHUNK, {"prefill_64": 1})


def test_random_prompts_that_begin_alike_run_beside_each_other_as_in_cold_runs(each_pair: Pair):
    """More prompts than the pools hold: entries and windows are given up and made again, all free memory is NaN."""
    rng = np.random.default_rng(5)
    trunk = [prompt(CHUNK, seed=100 + number) for number in range(2)]
    requests = []
    for number in range(18):
        parts = [trunk[int(rng.integers(2))] for _ in range(int(rng.integers(1, 5)))]
        tail = prompt(int(rng.choice([1, 20, 64, 65, 71, 72, 90])), seed=number)
        requests.append(([token for part in parts for token in part] + tail, PARAMS))
    prompts, params = [list(one) for one in zip(*requests, strict=True)]
    expected = each_pair.cold.generate(prompts, params)
    counts = each_pair.cache.counts
    before = counts.hits, counts.evicted_windows
    with poisoned(each_pair.warm):
        found = each_pair.warm.generate(prompts, params)
        found += each_pair.warm.generate(prompts, params)
    assert all(same(*pair) for pair in zip(found, expected * 2, strict=True))
    assert sum(output.metrics.cached_tokens for output in found) == counts.hits - before[0] > 5 * CHUNK
    if each_pair.share > 0:
        assert counts.evicted_windows > before[1]


def digests(pair: Pair, tokens: list[int]) -> tuple[bytes, ...]:
    return pair.cache.digests(tokens, b"")


# --- one model --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", range(2 * CHUNK + 1, 2 * CHUNK + 10))
def test_selection_goes_on_in_the_same_phase_after_a_hit(quantised: Pair, length: int):
    params = SamplingParams(max_tokens=23, ignore_eos=True, logprobs=True, top_logprobs=5)
    tokens = prompt(length, seed=length)
    assert quantised.hit(tokens, params)[0] == 0
    assert quantised.hit(tokens, params)[0] == 2 * CHUNK


def test_entries_that_were_given_up_are_computed_again(quantised: Pair):
    """The retrieval pool holds 3 sequences of 500 tokens; 10 prompts of 400 do not stay."""
    prompts = [prompt(400, seed=number) for number in range(10)]
    before = quantised.cache.counts.evicted_entries
    for tokens in (*prompts, prompts[-1], prompts[0]):
        quantised.hit(tokens)
    assert quantised.cache.counts.evicted_entries > before
    assert quantised.hit(prompts[-1])[0] > 0
    assert quantised.hit(prompts[0])[0] > 0


def test_another_salt_never_hits(quantised: Pair):
    tokens = prompt(3 * CHUNK)
    expected = generate(quantised.cold, tokens, PARAMS)
    for salt, found in ((b"", 0), (b"a", 0), (b"b", 0), (b"a", 2), (b"", 2), (b"c", 0)):
        output = generate(quantised.warm, tokens, PARAMS, salt=salt)
        assert output.metrics.cached_tokens == found * CHUNK
        assert same(output, expected)


def test_requests_for_prompt_logprobs_neither_hit_nor_enter(quantised: Pair):
    params = SamplingParams(max_tokens=5, logprobs=True, prompt_logprobs=True, top_logprobs=3)
    tokens = prompt(3 * CHUNK + 9)
    expected = generate(quantised.cold, tokens, params)
    assert expected.prompt_logprobs is not None
    for _ in range(2):
        with programs_run() as counts:
            output = generate(quantised.warm, tokens, params)
        assert prefills(counts) == {"prefill_72_scored": 3, "prefill_64_scored": 1}
        assert output.metrics.cached_tokens == 0
        assert same(output, expected)
        assert len(output.prompt_logprobs or ()) == len(tokens)
        assert quantised.cache.num_entries == 0
    generate(quantised.warm, tokens, PARAMS)
    assert quantised.cache.num_entries == 3
    assert same(generate(quantised.warm, tokens, params), expected)


def test_logits_of_a_whole_prompt_neither_hit_nor_enter(quantised: Pair):
    tokens = prompt(2 * CHUNK + 9)
    expected = quantised.cold.logits(tokens), quantised.cold.prompt_logprobs(tokens)
    for entries in (0, 2):
        assert quantised.cache.num_entries == entries
        np.testing.assert_array_equal(quantised.warm.logits(tokens), expected[0])
        np.testing.assert_array_equal(quantised.warm.prompt_logprobs(tokens), expected[1])
        assert quantised.cache.num_entries == entries
        generate(quantised.warm, tokens, PARAMS)


def test_scores_of_several_continuations_share_their_prompt(quantised: Pair):
    tokens = prompt(2 * CHUNK + 9)
    continuations = [prompt(length, seed=length) for length in (1, 5, 17)]
    expected = quantised.cold.score([tokens] * 3, continuations)
    found = quantised.warm.score([tokens] * 3, continuations)
    names = ("token_ids", "logprobs", "greedy_token_ids")
    assert all(getattr(*pair) for pair in ((one, name) for one in found for name in names))
    for one, other in zip(found, expected, strict=True):
        assert [getattr(one, name) for name in names] == [getattr(other, name) for name in names]
    assert [one.metrics.cached_tokens for one in found] == [0, 2 * CHUNK, 2 * CHUNK]


def test_a_prompt_hits_what_one_that_is_still_being_read_has_entered(quantised: Pair):
    """Both wait at once; the second is admitted when the first has been read, and its chunks are there."""
    prompts = [[*prompt(3 * CHUNK), *prompt(9, seed=1)], [*prompt(3 * CHUNK), *prompt(9, seed=2)]]
    expected = quantised.cold.generate(prompts, PARAMS)
    found = quantised.warm.generate(prompts, PARAMS)
    assert all(same(*pair) for pair in zip(found, expected, strict=True))
    assert [output.metrics.cached_tokens for output in found] == [0, 3 * CHUNK]


@pytest.mark.parametrize("program", ["prefill_72", "prefill_64", "decode"])
def test_a_failed_call_that_loses_the_cache_empties_the_prefix_cache(
    quantised: Pair, program: str, monkeypatch: pytest.MonkeyPatch
):
    tokens = prompt(2 * CHUNK + 9)
    quantised.hit(tokens)
    assert quantised.cache.num_entries == 2
    with monkeypatch.context() as patch:
        run = Programs.run

        def fail(self: Programs, call: Call) -> Any:
            result = run(self, call)
            if call.name == program:
                raise RuntimeError("the device is gone")
            return result

        patch.setattr(Programs, "run", fail)
        with pytest.raises(RuntimeError, match="the device is gone"):
            generate(quantised.warm, [*tokens[: CHUNK + 9], *prompt(CHUNK + 20, seed=1)], PARAMS)
    assert (quantised.cache.num_entries, quantised.cache.num_windows) == (0, 0)
    for pool in (quantised.cache.retrieval, quantised.cache.streaming):
        assert pool is not None
        assert pool.num_free == pool.num_pages
    assert quantised.hit(tokens)[0] == 0
    assert quantised.hit(tokens)[0] == 2 * CHUNK


def test_a_failed_call_that_leaves_the_cache_alone_leaves_the_prefix_cache_alone(
    quantised: Pair, monkeypatch: pytest.MonkeyPatch
):
    tokens = prompt(2 * CHUNK + 9)
    quantised.hit(tokens)
    with monkeypatch.context() as patch:
        run = Programs.run

        def fail(self: Programs, call: Call) -> Any:
            if call.name == "sample":
                raise RuntimeError("no memory for the result")
            return run(self, call)

        patch.setattr(Programs, "run", fail)
        with pytest.raises(RuntimeError, match="no memory"):
            generate(quantised.warm, [*tokens, *prompt(60, seed=1)], PARAMS)
    assert quantised.hit([*tokens, *prompt(9, seed=1)])[0] == 2 * CHUNK


def test_an_abandoned_prompt_leaves_its_chunks_to_the_next(quantised: Pair):
    tokens = prompt(4 * CHUNK + 9)
    stream = quantised.warm.stream_output(tokens, PARAMS)
    for _ in range(2):
        next(stream)
    stream.close()
    # Windows are kept at the last two boundaries, which it did not reach.
    assert quantised.cache.num_entries == 2
    assert quantised.hit(tokens)[0] == 0
    assert quantised.cache.num_entries == 4


@pytest.mark.parametrize("preset", ["dense", "quest", "qserve", "streaming", "minference"])
def test_hits_of_the_other_presets(preset: str, tmp_path_factory: pytest.TempPathFactory):
    gates = GATES["all different"] if preset == "streaming" else None
    unused = dict.fromkeys(SPARSE)  # the preset's own values
    settings = unused | {"attention": preset, "prefill_chunk": 128, "max_num_seqs": 2, "steps_per_call": 4}
    pair = make_pair(tmp_path_factory, 0.5, gates, **settings)
    tokens = prompt(300)
    assert pair.hit(tokens)[0] == 0
    assert pair.hit([*tokens[:280], *prompt(60, seed=1)])[:2] == (256, {"prefill_128": 1})
    assert pair.hit(tokens)[:2] == (256, {"prefill_64": 1})


FEW_BLOCKS: dict[str, Any] = {
    "prefill_sparsity": "blocks",
    "prefill_block": 16,
    "prefill_from": 0,
    "prefill_near": 16,
    "prefill_threshold": 0.9,
    "prefill_first_layer": 0,
}


@pytest.fixture(scope="module", params=["int8", "float32"])
def blocks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Models whose prompts leave blocks of their history out, but not for their last tokens."""
    return make_pair(
        tmp_path_factory, 0.5, GATES["one of each"], kv_dtype=request.param, prefix_windows=12, **FEW_BLOCKS
    )


def test_hits_where_the_last_tokens_of_a_prompt_read_more(blocks: Pair):
    document = prompt(4 * CHUNK + 20)
    assert blocks.hit(document)[0] == 0
    assert blocks.hit([*document, *prompt(10, seed=1)])[0] == 4 * CHUNK
    assert blocks.hit([*document, *prompt(100, seed=2)])[0] == 4 * CHUNK
    assert blocks.hit(document[: 4 * CHUNK])[0] == 3 * CHUNK


def test_density_of_a_prompt(blocks: Pair, quantised: Pair):
    """A prompt of one chunk has no history; requests do not notice."""
    density = blocks.warm.prefill_density(prompt(400))
    assert density is not None and 0.05 < density < 0.9
    assert density == blocks.cold.prefill_density(prompt(400))
    assert blocks.warm.prefill_density(prompt(CHUNK)) == 1.0
    assert quantised.warm.prefill_density(prompt(400)) is None


def test_the_last_chunk_of_a_prompt_of_whole_chunks_is_no_part_of_a_longer_one(blocks: Pair):
    """Its tokens have read everything; those of the longer prompt have not."""
    blocks.warm.engine.scheduler.forget_pages()
    document = prompt(3 * CHUNK, seed=5)
    assert blocks.hit(document)[0] == 0
    assert blocks.hit([*document, *prompt(30, seed=6)])[0] == 2 * CHUNK
    assert blocks.hit(document)[0] == 2 * CHUNK
    assert blocks.hit([*document, *prompt(31, seed=7)])[0] == 3 * CHUNK


def test_a_prompt_of_one_chunk_that_is_read_by_a_program_of_its_own_is_never_taken_for_a_chunk(
    tmp_path_factory: pytest.TempPathFactory,
):
    """Where a chunk is as long as the longest short prompt, an equal chunk of a longer prompt is another's work."""
    pair = make_pair(tmp_path_factory, 0.5, GATES["one of each"], prefill_chunk=64)
    tokens = prompt(100)
    assert pair.hit(tokens[:64])[:2] == (0, {"prefill_short": 1})
    assert pair.hit(tokens)[:2] == (0, {"prefill_64": 2})
    assert pair.hit(tokens[:64])[:2] == (0, {"prefill_short": 1})
    assert pair.hit(tokens[:65])[:2] == (64, {"prefill_64": 1})
