"""The engine with everything on at once: small pages, selection, streaming heads, more requests than slots.

Every test leaves an engine behind that holds no page; `check_idle` sees to it.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from lserve_jax import LLM, RequestOutput, SamplingParams
from lserve_jax.engine.outputs import TextChunk
from lserve_jax.runtime.programs import Call, Programs
from tests.lserve_jax.engine.tiny_llms import (
    GATES,
    MAX_LENGTH,
    SPARSE,
    VOCABULARY,
    assert_idle,
    generate,
    make_llm,
    prompt,
    same,
)
from tests.lserve_jax.runtime.tiny_steps import Stepper

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """One retrieval and one streaming head in each layer, in a float32 cache."""
    return make_llm(tmp_path_factory.mktemp("gates"), GATES["one of each"], kv_dtype="float32", **SPARSE)


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """Retrieval heads only in one layer, streaming heads only in the other, in an int4 cache."""
    settings = SPARSE | {"kv_dtype": "int4", "prefill_chunk": 64}
    return make_llm(tmp_path_factory.mktemp("gates"), GATES["all or none"], **settings)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return make_llm(tmp_path_factory.mktemp("gates"), attention="dense", prefill_chunk=72, max_num_seqs=3)


@pytest.fixture(autouse=True)
def check_idle(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test, the engines that it used are idle and all their pages and slots are free."""
    yield
    for name in ("sparse", "quantised", "dense"):
        if name in request.fixturenames:
            assert_idle(request.getfixturevalue(name))


def random_requests(count: int, seed: int) -> list[tuple[list[int], SamplingParams]]:
    """Prompts around page and chunk boundaries; greedy or drawn in one of several ways; short or long."""
    rng = np.random.default_rng(seed)
    requests = []
    for number in range(count):
        length = int(rng.choice([1, 2, 7, 8, 9, 55, 56, 57, 63, 64, 65, 71, 72, 73, 100, 144, 145, 150, 200, 219, 220]))
        draw: dict[str, Any] = [
            {},
            {"temperature": 0.8},
            {"temperature": 1.3, "top_k": 20},
            {"temperature": 1.0, "top_p": 0.8, "min_p": 0.02},
            {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.3},
            {"temperature": 0.9, "logit_bias": {7: 3.0, 9: -4.0}, "suppress_tokens": [11, 12], "top_logprobs": 3},
            {"bad_words": [[20, 21], [33]], "repetition_penalty": 0.8, "prompt_logprobs": True},
            {"temperature": 1.5, "min_tokens": 1, "stop_token_ids": list(range(5, 60)), "presence_penalty": -1.0},
        ][int(rng.integers(8))]
        params = SamplingParams(
            max_tokens=int(rng.choice([1, 2, 4, 5, 20, 60])),
            seed=int(rng.integers(2**32)),
            ignore_eos=bool(rng.integers(2)),
            logprobs=True,
            **draw,
        )
        requests.append((prompt(length, seed=1000 * seed + number), params))
    return requests


# --- independence of the batch --------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["sparse", "quantised"])
def test_a_batch_gives_what_its_requests_give_one_by_one(engine: str, request: pytest.FixtureRequest):
    llm: LLM = request.getfixturevalue(engine)
    requests = random_requests(16, seed=1)
    alone = [generate(llm, *one) for one in requests]
    together = llm.generate([tokens for tokens, _ in requests], [params for _, params in requests])
    assert all(same(one, other) for one, other in zip(alone, together, strict=True))
    assert {output.finish_reason for output in alone} == {"stop", "length"}


@pytest.mark.parametrize("engine", ["sparse", "quantised"])
@pytest.mark.parametrize("seed", range(4))
def test_random_arrivals_and_departures_equal_one_by_one_runs(engine: str, seed: int, request: pytest.FixtureRequest):
    llm: LLM = request.getfixturevalue(engine)
    requests = random_requests(14, seed=10 + seed)
    alone = [generate(llm, *one) for one in requests]
    programs = llm.engine.programs.names
    rng = np.random.default_rng(seed)
    waiting, running = list(range(len(requests))), {}
    finished: dict[int, RequestOutput] = {}
    while waiting or running:
        if waiting and (not running or rng.random() < 0.3):
            number = waiting.pop(0)
            running[number] = (llm.stream_output(*requests[number]), [])
        number = int(rng.choice(list(running)))
        stream, seen = running[number]
        chunk, output = next(stream)
        seen += chunk.token_ids
        if output is not None:
            finished[number] = output
            assert tuple(seen) == output.token_ids
            assert list(stream) == []
            del running[number]
        elif rng.random() < 0.1:  # a reader that goes away
            stream.close()
            assert tuple(seen) == alone[number].token_ids[: len(seen)]
            del running[number]
    assert len(finished) > len(requests) // 3
    assert all(same(output, alone[number]) for number, output in finished.items())
    assert llm.engine.programs.names == programs


def test_the_slot_of_a_request_does_not_matter(sparse: LLM):
    params = SamplingParams(max_tokens=40, ignore_eos=True, logprobs=True, temperature=0.9, seed=5)
    alone = generate(sparse, prompt(100), params)
    assert all(same(output, alone) for output in sparse.generate([prompt(100)] * 7, params))


def test_prefix_lengths_around_pages_chunks_and_the_selectors_phase_agree_with_their_batch(sparse: LLM):
    params = SamplingParams(max_tokens=12, ignore_eos=True, logprobs=True)
    prompts = [prompt(160)[:length] for length in range(56, 82)]
    together = sparse.generate(prompts, params)
    assert all(same(generate(sparse, tokens, params), output) for tokens, output in zip(prompts, together, strict=True))


def test_pages_that_are_recycled_give_what_a_sequence_that_keeps_all_its_pages_gives(sparse: LLM):
    keeper = Stepper(sparse.config, -(-MAX_LENGTH // SPARSE["page_size"]))
    for length in (65, 100, 150):
        tokens = prompt(length, seed=length)
        expected = keeper.greedy(np.array(tokens, np.int32), SPARSE["prefill_chunk"], 70)
        assert list(free_run(sparse, tokens, 70).token_ids) == expected


def test_programs_are_those_of_the_first_requests_however_requests_vary(sparse: LLM):
    generate(sparse, prompt(3), SamplingParams(max_tokens=3, ignore_eos=True))
    generate(sparse, prompt(100), SamplingParams(max_tokens=3, ignore_eos=True))
    plain = {"prefill_short", "prefill_64", "prefill_72", "sample", "decode"}
    scored = {"prefill_short_scored", "prefill_64_scored", "prefill_72_scored"}
    assert plain <= set(sparse.engine.programs.names) <= plain | scored
    for length in (3, 100):
        generate(sparse, prompt(length), SamplingParams(max_tokens=3, ignore_eos=True, prompt_logprobs=True))
    programs, seconds = sparse.engine.programs.names, sparse.compile_seconds
    assert set(programs) == plain | scored
    requests = random_requests(12, seed=3)
    sparse.generate([tokens for tokens, _ in requests], [params for _, params in requests])
    assert (sparse.engine.programs.names, sparse.compile_seconds) == (programs, seconds)


@pytest.mark.parametrize("length", [5, 64, 65, 150])
def test_what_is_compiled_while_weights_load_is_all_that_the_first_prompt_needs(length: int, sparse: LLM):
    events: list[tuple[str, int]] = []
    llm = LLM.from_setup(
        sparse.setup, expected_tokens=length, on_progress=lambda stage, done, total: events.append((stage, done))
    )
    assert events[0][0].startswith("compile ")
    assert events[1] == ("weights", 0)
    programs = llm.engine.programs.names
    assert same(free_run(llm, prompt(length), 12), free_run(sparse, prompt(length), 12))
    assert llm.engine.programs.names == programs


# --- ends -----------------------------------------------------------------------------------------------------------


def free_run(llm: LLM, tokens: list[int], count: int, **fields: Any) -> RequestOutput:
    return generate(llm, tokens, SamplingParams(max_tokens=count, ignore_eos=True, logprobs=True, **fields))


def test_a_stop_token_ends_a_request_wherever_it_falls_in_a_call(sparse: LLM):
    whole = free_run(sparse, prompt(60), 30, temperature=1.0, seed=3)
    first_at = {token: at for at, token in reversed(list(enumerate(whole.token_ids)))}
    assert len(first_at) > 10
    for token, at in first_at.items():
        output = free_run(sparse, prompt(60), 30, temperature=1.0, seed=3, stop_token_ids=[token])
        assert output.token_ids == whole.token_ids[: at + 1]
        assert output.logprobs == (whole.logprobs or ())[: at + 1]
        assert output.finish_reason == "stop"
        assert sparse.tokenizer is not None
        assert output.text == sparse.tokenizer.decode(whole.token_ids[:at])


def test_a_request_may_have_any_number_of_stop_tokens(sparse: LLM):
    """The device knows the first few; the host finds the others, and what was generated after them does not count."""
    free = free_run(sparse, prompt(60), 30, temperature=1.0, seed=3)
    unused = [token for token in range(5, VOCABULARY) if token not in free.token_ids]
    for at in (0, 1, 5, 17, 29):
        stop = free.token_ids[at]
        first = free.token_ids.index(stop)
        output = free_run(sparse, prompt(60), 30, temperature=1.0, seed=3, stop_token_ids=[*unused[:40], stop])
        assert output.token_ids == free.token_ids[: first + 1]
        assert output.finish_reason == "stop"


def test_the_models_own_end_token_ends_a_request_unless_it_is_ignored(sparse: LLM):
    own = sparse.config.model.eos_token_ids
    assert own == (2, 4)
    ended = 0
    for seed in range(20):
        params: dict[str, Any] = {"temperature": 2.0, "seed": seed, "max_tokens": 30}
        whole = generate(sparse, prompt(20), SamplingParams(ignore_eos=True, **params))
        output = generate(sparse, prompt(20), SamplingParams(**params))
        end = next((at for at, token in enumerate(whole.token_ids) if token in own), None)
        assert len(whole.token_ids) == 30
        assert whole.finish_reason == "length"
        assert output.token_ids == whole.token_ids[: None if end is None else end + 1]
        assert output.finish_reason == ("length" if end is None else "stop")
        ended += end is not None
    assert 0 < ended < 20


def test_a_stop_string_is_found_across_tokens_and_cut_from_the_text(sparse: LLM):
    whole = free_run(sparse, prompt(60), 40, temperature=1.0, seed=3)
    tokenizer = sparse.tokenizer
    assert tokenizer is not None
    texts = [tokenizer.decode(whole.token_ids[: count + 1]) for count in range(len(whole.token_ids))]
    found = 0
    for at in range(3, 30):
        stop = texts[at][len(texts[at - 2]) - 1 :]  # the end of one token, a whole one, and the next
        if len(stop) < 3 or not texts[at].startswith(texts[at - 2]) or stop in texts[at - 1]:
            continue
        output = free_run(sparse, prompt(60), 40, temperature=1.0, seed=3, stop=["not there at all", stop])
        assert output.finish_reason == "stop"
        assert output.text == texts[at][: texts[at].index(stop)]
        assert output.token_ids == whole.token_ids[: at + 1]
        assert output.logprobs == (whole.logprobs or ())[: at + 1]
        found += 1
    assert found > 5


def test_streamed_text_never_shows_what_a_stop_string_takes_back(sparse: LLM):
    whole = free_run(sparse, prompt(60), 40, temperature=1.0, seed=3)
    stop = whole.text[11:17]
    params = SamplingParams(max_tokens=40, ignore_eos=True, temperature=1.0, seed=3, stop=stop)
    chunks = list(sparse.stream(prompt(60), params))
    assert all(isinstance(chunk, TextChunk) for chunk in chunks)
    assert "".join(chunks) == whole.text[: whole.text.index(stop)]
    tokens = tuple(token for chunk in chunks for token in chunk.token_ids)
    assert tokens == whole.token_ids[: len(tokens)]


@pytest.mark.parametrize("length", [1, 64, 72, 73, MAX_LENGTH])
def test_one_token_is_generated_by_the_prefill_alone(sparse: LLM, length: int):
    output = free_run(sparse, prompt(length), 1)
    assert (len(output.token_ids), output.finish_reason) == (1, "length")
    assert (output.metrics.decoded_tokens, output.metrics.pages_read_ratio) == (0, None)
    if length < MAX_LENGTH:
        assert output.token_ids == free_run(sparse, prompt(length), 2).token_ids[:1]


@pytest.mark.parametrize("left", [0, 1, 2, 3, 4, 5, 9])
def test_generation_ends_where_the_context_ends(sparse: LLM, left: int):
    output = free_run(sparse, prompt(MAX_LENGTH - left), 1000)
    assert output.finish_reason == "length"
    assert len(output.token_ids) == max(left, 1)


def test_a_prompt_longer_than_the_context_is_refused_with_both_lengths_before_anything_runs(sparse: LLM):
    message = r"prompt has 221 tokens, but max_model_len is 220: shorten the prompt or raise max_model_len"
    with pytest.raises(ValueError, match=message):
        sparse.generate([prompt(5), prompt(221)], SamplingParams(max_tokens=2))
    with pytest.raises(ValueError, match=message):
        sparse.logits(prompt(221))


# --- sampling and log-probabilities ---------------------------------------------------------------------------------


def test_each_request_of_a_batch_is_sampled_by_its_own_parameters(sparse: LLM):
    common: dict[str, Any] = {"max_tokens": 30, "ignore_eos": True}
    settings: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.5, "seed": 1},
        {"temperature": 1.5, "seed": 2},
        {"temperature": 1.5, "seed": 1},
        {"temperature": 1.5, "seed": 3, "top_k": 1},
        {"temperature": 1.5, "seed": 4, "top_p": 1e-6},
        {"temperature": 1.5, "seed": 5, "min_p": 1.0},
        {"temperature": 1.5, "seed": 2**32 - 1},
    ]
    params = [SamplingParams(**common, **setting) for setting in settings]
    greedy, *drawn = (output.token_ids for output in sparse.generate([prompt(33)] * len(params), params))
    first, second, again, *certain, last = drawn
    assert first == again
    assert len({greedy, first, second, last}) == 4
    assert certain == [greedy] * 3


def test_draws_without_a_seed_differ(sparse: LLM):
    params = SamplingParams(max_tokens=20, temperature=2.0, ignore_eos=True)
    assert len({output.token_ids for output in sparse.generate([prompt(33)] * 4, params)}) == 4


def test_log_probabilities_are_those_of_the_models_own_distribution(dense: LLM):
    for fields in ({}, {"temperature": 1.7, "top_k": 30, "seed": 8}):
        output = free_run(dense, prompt(70), 40, **fields)
        logits = dense.logits([*prompt(70), *output.token_ids])[69:-1]
        expected = np.asarray(jax.nn.log_softmax(logits, axis=-1))[np.arange(40), list(output.token_ids)]
        # The last rows come from prefill and not from decode steps: float32 sums in another order.
        np.testing.assert_allclose(np.array(output.logprobs), expected, rtol=0, atol=1e-4)
        if not fields:
            assert output.token_ids == tuple(logits.argmax(axis=-1).tolist())
    assert generate(dense, prompt(3), SamplingParams(max_tokens=2)).logprobs is None


def test_logits_of_a_prompt_do_not_depend_on_what_the_pages_held_before(sparse: LLM):
    before = sparse.logits(prompt(150))
    requests = random_requests(8, seed=4)
    sparse.generate([tokens for tokens, _ in requests], [params for _, params in requests])
    np.testing.assert_array_equal(sparse.logits(prompt(150)), before)
    assert (before.shape, before.dtype) == ((150, VOCABULARY), np.float32)


# --- trouble --------------------------------------------------------------------------------------------------------


def test_a_stream_that_is_closed_midway_gives_its_pages_back_and_others_go_on(sparse: LLM):
    params = SamplingParams(max_tokens=60, ignore_eos=True, logprobs=True)
    expected = generate(sparse, prompt(90), params)
    abandoned = [sparse.stream(prompt(100 + number), params) for number in range(3)]
    for stream in abandoned:
        next(stream)
    held = sparse.engine.scheduler.allocator.retrieval
    assert held is not None
    assert held.num_free + held.num_evictable < held.num_pages
    assert same(generate(sparse, prompt(90), params), expected)  # all slots are taken: it waits for them to finish
    for stream in abandoned:
        stream.close()
    assert held.num_free + held.num_evictable == held.num_pages
    assert same(generate(sparse, prompt(90), params), expected)


def test_logits_are_refused_while_a_stream_is_open(sparse: LLM):
    stream = sparse.stream(prompt(9), SamplingParams(max_tokens=60, ignore_eos=True))
    next(stream)
    with pytest.raises(ValueError, match="finish or close the streams that are open"):
        sparse.logits(prompt(9))
    stream.close()
    assert sparse.logits(prompt(9)).shape == (9, VOCABULARY)


def failing_at(run: Callable[..., Any], name: str, call: int, error: BaseException) -> Callable[..., Any]:
    """`Programs.run` that runs everything, and yet raises at one call of one program, its inputs consumed."""
    calls = 0

    def fail(self: Programs, program: Call) -> Any:
        nonlocal calls
        result = run(self, program)
        calls += program.name.startswith(name)
        if calls == call and program.name.startswith(name):
            raise error
        return result

    return fail


@pytest.mark.parametrize("program", ["prefill_72", "sample", "decode"])
@pytest.mark.parametrize("error", [RuntimeError("the device is gone"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
def test_a_call_that_fails_midway_leaves_the_engine_usable(
    sparse: LLM, program: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
):
    params = SamplingParams(max_tokens=20, ignore_eos=True, logprobs=True)
    prompts = [prompt(100, seed=number) for number in range(5)]
    expected = sparse.generate(prompts, params)
    sparse.engine.scheduler.forget_pages()  # so that every chunk is read again
    other = sparse.stream(prompt(80), SamplingParams(max_tokens=100, ignore_eos=True))  # it outlives the failure
    next(other)
    with monkeypatch.context() as patch:
        patch.setattr(Programs, "run", failing_at(Programs.run, program, 2, error))
        with pytest.raises(type(error)):
            sparse.generate(prompts, params)
    with pytest.raises(RuntimeError, match="a call for several requests failed, and this one was ended"):
        list(other)
    assert_idle(sparse)
    assert all(same(*pair) for pair in zip(sparse.generate(prompts, params), expected, strict=True))


def test_prompt_logits_that_fail_leave_the_engine_usable(sparse: LLM, monkeypatch: pytest.MonkeyPatch):
    expected = sparse.logits(prompt(150))
    with monkeypatch.context() as patch:
        patch.setattr(Programs, "run", failing_at(Programs.run, "prefill", 2, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            sparse.logits(prompt(150))
    assert_idle(sparse)
    np.testing.assert_array_equal(sparse.logits(prompt(150)), expected)


def test_an_error_in_the_readers_loop_ends_the_stream(sparse: LLM):
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    with suppress(ZeroDivisionError):
        for _ in sparse.stream(prompt(9), params):
            raise ZeroDivisionError
    assert_idle(sparse)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "the prompt is empty"),
        ("", "the prompt is empty"),
        ([prompt(4), []], "the prompt is empty"),
        (["text", ""], "the prompt is empty"),
        ([[5, 128]], "prompt token 128 is outside the model's vocabulary of 128 tokens"),
        ([[5, -1]], "prompt token -1 is outside"),
        ([[5.0]], "a list with 5.0"),
    ],
)
def test_a_prompt_that_cannot_be_is_refused_in_one_line(sparse: LLM, prompts: Any, message: str):
    if prompts == []:
        assert sparse.generate([]) == []
        prompts = [[]]
    with pytest.raises(ValueError, match=message):
        sparse.generate(prompts, SamplingParams(max_tokens=2))
    with pytest.raises(ValueError, match=message):
        sparse.logits(prompts[-1] if prompts else "")


def test_prompts_may_be_text_lists_or_arrays_one_or_several(sparse: LLM):
    params, tokens = SamplingParams(max_tokens=5, ignore_eos=True), prompt(30)
    expected = generate(sparse, tokens, params).token_ids
    for prompts in (tokens, np.array(tokens), [np.array(tokens)], np.array([tokens, tokens]), (tuple(tokens),)):
        outputs = sparse.generate(prompts, params)  # type: ignore[arg-type]
        assert {output.token_ids for output in outputs} == {expected}
    text = "hello there"
    assert sparse.tokenizer is not None
    by_text = sparse.generate([text, sparse.tokenizer.encode(text)], params)
    assert by_text[0].token_ids == by_text[1].token_ids == sparse.generate(text, params)[0].token_ids


def test_as_many_sampling_params_as_prompts_are_needed(sparse: LLM):
    with pytest.raises(ValueError, match="2 prompts need as many sampling_params, got 1"):
        sparse.generate([prompt(3), prompt(4)], [SamplingParams()])


# --- what was read --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gates", "fields"),
    [
        (GATES["one of each"], {"dense_layers": ()}),
        ("1\t1\n1\t0\n", {"dense_layers": (0,), "static_sparsity": 0.25}),
    ],
    ids=["as elsewhere", "a dense layer"],
)
def test_pages_read_ratio_equals_a_count_of_the_pages_that_each_head_read(
    gates: str, fields: dict[str, Any], sparse: LLM, tmp_path: Path
):
    settings = SPARSE | {"steps_per_call": 1, "max_num_seqs": 1, "prefill_chunk": 64, **fields}
    llm = make_llm(tmp_path, gates, kv_dtype="float32", **settings)
    for length in (1, 30, 55, 56, 57, 150):
        read = in_all = 0
        params = SamplingParams(max_tokens=30, ignore_eos=True)
        outputs, tokens = [], 0
        for chunk, output in llm.stream_output(prompt(length), params):
            outputs.append(output)
            # A yield after the prefill's calls, with nothing decoded, and then after each decode step.
            tokens += len(chunk.token_ids)
            if tokens > 1:
                one, dense = pages_read(llm, length + tokens - 1)
                read, in_all = read + one, in_all + dense
        result = outputs[-1]
        assert result is not None
        assert result.metrics.decoded_tokens == 29
        assert result.metrics.pages_read_ratio == pytest.approx(read / in_all, abs=1e-12)
        assert (read < in_all) == (length > 1)
        if not fields[
            "dense_layers"
        ]:  # how many steps a call makes, and in how many chunks a prompt comes, is no matter
            assert result.token_ids == free_run(sparse, prompt(length), 30).token_ids


def pages_read(llm: LLM, length: int) -> tuple[int, int]:
    """Pages that all heads read for the last of `length` tokens, counted head by head, and what dense heads would."""
    policy, config = llm.config.attention, llm.config
    size, read = policy.page_size, 0
    held = len({at // size for at in range(length)})
    visible = {at // size for at in range(length) if at < policy.sink or at > length - 1 - policy.local}
    for layer, count in zip(llm.engine.cache, config.num_retrieval, strict=True):
        read += (config.model.num_kv_heads - count) * len(visible)
        if layer.selected is None:
            read += count * held
        else:
            chosen = np.asarray(layer.selected)[0]
            read += int(((chosen >= 0) & (chosen * size < length)).sum())
    return read, config.model.num_layers * config.model.num_kv_heads * held


def test_dense_attention_reads_everything(dense: LLM):
    assert free_run(dense, prompt(100), 20).metrics.pages_read_ratio == 1.0


def test_bytes_held_are_those_of_the_pages(sparse: LLM, quantised: LLM):
    bounds, scales = 2 * 2 * 16 * 4, 8 * 2 * 2
    for llm, retrieval, streaming in (
        (sparse, 8 * 2 * 16 * 4 + bounds, 8 * 2 * 16 * 4),
        (quantised, 8 * 2 * 8 + scales + bounds, 8 * 2 * 16 + scales + bounds),
    ):
        metrics = free_run(llm, prompt(100), 30).metrics
        # 129 tokens are cached; the last call had reserved 17 retrieval pages, sink 2 and window 4 or 5 streaming ones.
        assert metrics.retrieval_bytes == 17 * 2 * retrieval
        assert metrics.streaming_bytes in [pages * 2 * streaming for pages in (6, 7)]
        assert metrics.dense_bf16_bytes == 17 * 8 * 2 * 2 * 2 * 16 * 2


def test_dense_attention_holds_what_it_is_compared_with_wherever_a_request_ends(dense: LLM):
    """60 tokens leave room in a page of 64. The first decode call reserves a second one; a stop leaves that empty."""
    whole = free_run(dense, prompt(60), 12, temperature=1.0, seed=3)
    for count in (2, 12):
        output = free_run(dense, prompt(60), 12, temperature=1.0, seed=3, stop_token_ids=[whole.token_ids[count - 1]])
        metrics = output.metrics
        assert len(output.token_ids) == count
        assert metrics.retrieval_bytes == 2 * metrics.dense_bf16_bytes, "a float32 cache takes twice as much"
        assert metrics.dense_bf16_bytes == (1 if count == 2 else 2) * 64 * 2 * 2 * 2 * 16 * 2
