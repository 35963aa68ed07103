"""Pools too small for all at once: sequences leave for host memory and come back, and no result shows it."""

import gc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from lserve_jax import LLM, RequestOutput, SamplingParams, from_preset
from lserve_jax.config.sizes import PoolSizes, Sizes
from lserve_jax.engine import room
from lserve_jax.engine.engine import Engine
from lserve_jax.engine.generation import Generation
from lserve_jax.engine.host_pages import HostPages
from lserve_jax.engine.memory import page_bytes
from lserve_jax.engine.plans import Plan, Prefill, Swap
from lserve_jax.engine.request import Request, Sequence, Status
from lserve_jax.engine.scheduler import Scheduler
from lserve_jax.engine.setup import prepare
from lserve_jax.runtime.programs import Call, Programs
from tests.lserve_jax.engine.tiny_llms import (
    GATES,
    MODEL,
    SPARSE,
    assert_idle,
    generate,
    make_llm,
    poisoned,
    prompt,
    same,
)

pytestmark = pytest.mark.slow

LENGTH = 500
CHUNK, INTERVAL = SPARSE["prefill_chunk"], SPARSE["selector_interval"]
PAGES = 72
"""Retrieval pages; one sequence of full length takes 63."""


def make_small(folder: Any, dtype: str, share: float, **settings: Any) -> LLM:
    """A model whose retrieval pool holds little more than one sequence of full length."""
    settings = SPARSE | {"max_model_len": LENGTH, "max_num_seqs": 4, "kv_dtype": dtype} | settings
    gates = GATES["all different"]
    (folder / "full_attention_heads.tsv").write_text(gates)
    settings["static_sparsity"] = share
    setup = prepare(MODEL, dtype="float32", head_pattern=folder, **settings)
    retrieval, streaming = page_bytes(setup.config)
    memory = PAGES * retrieval + setup.plan.pools.streaming * streaming + setup.plan.tail_bytes
    llm = make_llm(folder, gates, kv_memory=memory, swap_memory=2**26, **settings)
    assert llm.setup.plan.pools.retrieval == PAGES
    return llm


KINDS = [("float32", 0.5), ("bfloat16", 0.75), ("int8", 0.0), ("int4", 0.5)]


@pytest.fixture(scope="module", params=KINDS, ids=[f"{dtype}-{share:g}" for dtype, share in KINDS])
def each_small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return make_small(tmp_path_factory.mktemp("gates"), *request.param)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return make_small(tmp_path_factory.mktemp("gates"), "int4", 0.5)


class Moves(list[tuple[Status, int, int]]):
    """Status, decode steps and pages that the prefix cache still had, of each sequence that came back or left."""


@pytest.fixture(autouse=True)
def moves(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Moves]:
    """Records what is swapped; many small margins, so that much is. In the end nothing is in host memory."""
    seen = Moves()
    swap_out, swap = Scheduler._swap_out, Engine._swap

    def leaving(self: Scheduler, sequence: Sequence) -> Swap:
        seen.append((sequence.status, sequence.decode_steps, 0))
        assert len(seen) < 3000, "the same pages go to and fro"
        return swap_out(self, sequence)

    def moving(self: Engine, plan: Swap) -> None:
        if not plan.is_out:
            seen.append((Status.SWAPPED, plan.sequence.decode_steps, plan.num_shared))
        swap(self, plan)

    monkeypatch.setattr(Scheduler, "_swap_out", leaving)
    monkeypatch.setattr(Engine, "_swap", moving)
    monkeypatch.setattr(room, "MARGIN", 1)
    yield seen
    for name in ("small", "each_small"):
        if name in request.fixturenames:
            assert_idle(request.getfixturevalue(name))
    gc.collect()
    assert not [one for one in gc.get_objects() if type(one) is HostPages], "host memory is kept"


def lone(llm: LLM, tokens: list[int], params: SamplingParams) -> RequestOutput:
    """The output of a request that runs alone and finds nothing."""
    llm.engine.scheduler.forget_pages()
    before = llm.engine.scheduler.num_swaps
    output = generate(llm, tokens, params)
    assert (output.metrics.cached_tokens, llm.engine.scheduler.num_swaps) == (0, before)
    return output


def requests(count: int, seed: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts short and long, some that begin alike; greedy and drawn; some are decoded step by step."""
    rng = np.random.default_rng(seed)
    prompts, params = [], []
    for number in range(count):
        begin = prompt(2 * CHUNK, seed=77) if rng.random() < 0.5 else []
        prompts.append([*begin, *prompt(int(rng.choice([3, 40, 70, 150, 250])), seed=1000 * seed + number)])
        fields: dict[str, Any] = [{}, {"temperature": 0.9}, {"bad_words": [[20, 21]]}][int(rng.integers(3))]
        params.append(
            SamplingParams(
                max_tokens=int(rng.choice([20, 60, 100])),
                seed=number,
                ignore_eos=True,
                logprobs=True,
                top_logprobs=3,
                **fields,
            )
        )
    return prompts, params


def test_any_sequence_may_leave_at_any_time(each_small: LLM, moves: Moves, monkeypatch: pytest.MonkeyPatch):
    """Before every third call on average, one of those that run is sent away, whatever room there is."""
    prompts, params = requests(10, seed=0)
    expected = [lone(each_small, *one) for one in zip(prompts, params, strict=True)]
    scheduler = each_small.engine.scheduler
    scheduler.forget_pages()
    schedule, rng = scheduler.schedule, np.random.default_rng(1)

    def restless() -> Plan | None:
        if scheduler.running and rng.random() < 1 / 3:
            return scheduler._swap_out(scheduler.running[int(rng.integers(len(scheduler.running)))])
        return schedule()

    monkeypatch.setattr(scheduler, "schedule", restless)
    with poisoned(each_small):
        found = each_small.generate(prompts, params)
    assert all(same(*pair) for pair in zip(found, expected, strict=True))
    left = [move for move in moves if move[0] is not Status.SWAPPED]
    assert scheduler.num_swaps >= len(left) > 30
    assert {status for status, _, _ in left} == {Status.PREFILLING, Status.DECODING}
    assert {steps % INTERVAL for status, steps, _ in left if status is Status.DECODING} == set(range(INTERVAL))
    assert {num_shared > 0 for status, _, num_shared in moves if status is Status.SWAPPED} == {False, True}


def test_results_are_those_of_lone_runs_where_pages_run_out(small: LLM, moves: Moves):
    params = SamplingParams(max_tokens=150, ignore_eos=True, logprobs=True, top_logprobs=3)
    prompts = [[*prompt(CHUNK, seed=77), *prompt(30 + 40 * number, seed=number)] for number in range(6)]
    expected = [lone(small, tokens, params) for tokens in prompts]
    small.engine.scheduler.forget_pages()
    with poisoned(small):
        assert all(same(*pair) for pair in zip(small.generate(prompts, params), expected, strict=True))
    assert sum(status is Status.DECODING for status, *_ in moves) >= 2


def test_results_are_those_of_lone_runs_without_a_prefix_cache(tmp_path_factory: pytest.TempPathFactory, moves: Moves):
    llm = make_small(tmp_path_factory.mktemp("gates"), "int8", 0.5, prefix_cache=False)
    params = SamplingParams(max_tokens=150, ignore_eos=True, logprobs=True)
    prompts = [prompt(100 + 40 * number, seed=number) for number in range(5)]
    expected = [generate(llm, tokens, params) for tokens in prompts]
    assert not moves
    with poisoned(llm):
        assert all(same(*pair) for pair in zip(llm.generate(prompts, params), expected, strict=True))
    assert moves
    assert_idle(llm)


def test_results_are_those_of_lone_runs_at_the_real_margin(small: LLM, moves: Moves, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(room, "MARGIN", 256)
    params = SamplingParams(max_tokens=400, ignore_eos=True, logprobs=True)
    prompts = [prompt(20, seed=number) for number in range(4)]
    expected = [lone(small, tokens, params) for tokens in prompts]
    assert all(same(*pair) for pair in zip(small.generate(prompts, params), expected, strict=True))
    assert 1 <= sum(status is Status.DECODING for status, *_ in moves) < 20


def test_calls_of_more_steps_than_the_margin_do_not_move_the_same_pages_for_ever(
    tmp_path_factory: pytest.TempPathFactory, moves: Moves
):
    llm = make_small(tmp_path_factory.mktemp("gates"), "float32", 0.5, steps_per_call=24)
    params = SamplingParams(max_tokens=300, ignore_eos=True, logprobs=True)
    prompts = [prompt(150 + number, seed=number) for number in range(3)]
    expected = [lone(llm, tokens, params) for tokens in prompts]
    assert all(same(*pair) for pair in zip(llm.generate(prompts, params), expected, strict=True))
    assert moves
    assert_idle(llm)


def begun(llm: LLM, prompts: list[list[int]], params: SamplingParams) -> list[Generation]:
    """Requests that are open, at a moment at which one of them is in host memory."""
    generations = [llm.request(tokens, params) for tokens in prompts]
    for generation in generations:
        llm.session.open(generation)
    while not llm.engine.scheduler.swapped:
        assert llm.session.step(), "nothing was swapped"
    return generations


def test_a_swapped_request_may_be_aborted_and_leaves_nothing_behind(small: LLM):
    params = SamplingParams(max_tokens=250, ignore_eos=True, logprobs=True)
    prompts = [prompt(150, seed=number) for number in range(4)]
    expected = [lone(small, tokens, params) for tokens in prompts]
    small.engine.scheduler.forget_pages()
    generations = begun(small, prompts, params)
    (swapped, *_) = small.engine.scheduler.swapped
    assert isinstance(swapped.swapped and swapped.swapped.pages[0], HostPages)
    small.session.end([one for one in generations if one.request.id == swapped.request.id])
    assert swapped.finish_reason == "abort"
    assert swapped.swapped is None
    assert swapped not in small.engine.scheduler.swapped
    while small.session.step():
        pass
    for one, output in zip(generations, expected, strict=True):
        assert one.request.id == swapped.request.id or same(small.output(one), output)
    small.session.end(generations)


@pytest.mark.parametrize(
    "program", ["read_retrieval_pages", "write_retrieval_pages", "read_slot", "write_slot", "write_streaming_pages"]
)
def test_a_swap_that_fails_leaves_the_engine_usable(small: LLM, program: str, monkeypatch: pytest.MonkeyPatch):
    params = SamplingParams(max_tokens=120, ignore_eos=True, logprobs=True)
    prompts = [prompt(150, seed=number) for number in range(4)]
    expected = [lone(small, tokens, params) for tokens in prompts]
    small.engine.scheduler.forget_pages()
    with monkeypatch.context() as patch:
        run, failed = Programs.run, []

        def fail(self: Programs, call: Call) -> Any:
            result = run(self, call)
            if call.name == program:
                failed.append(program)
                raise RuntimeError("the host has no memory")
            return result

        patch.setattr(Programs, "run", fail)
        with pytest.raises(RuntimeError, match="the host has no memory"):
            small.generate(prompts, params)
        assert failed == [program]
    assert_idle(small)
    assert all(same(*pair) for pair in zip(small.generate(prompts, params), expected, strict=True))


def test_sequences_do_not_leave_where_host_memory_has_no_room(tmp_path_factory: pytest.TempPathFactory, moves: Moves):
    folder = tmp_path_factory.mktemp("gates")
    settings = SPARSE | {"max_model_len": LENGTH, "max_num_seqs": 4, "kv_dtype": "int8"}
    (folder / "full_attention_heads.tsv").write_text(GATES["one of each"])
    setup = prepare(MODEL, dtype="float32", head_pattern=folder, **settings)
    retrieval, streaming = page_bytes(setup.config)
    memory = PAGES * retrieval + setup.plan.pools.streaming * streaming + setup.plan.tail_bytes
    llm = make_llm(folder, GATES["one of each"], kv_memory=memory, **settings)
    prompts, params = requests(10, seed=3)
    expected = [lone(llm, *one) for one in zip(prompts, params, strict=True)]
    assert all(same(*pair) for pair in zip(llm.generate(prompts, params), expected, strict=True))
    assert not moves
    assert not [name for name in llm.engine.programs.names if name.startswith(("read", "write"))]


def test_a_short_prompt_does_not_come_back_to_a_chunk_that_another_program_wrote():
    """A short prompt is as long as a chunk, and a longer one with the same chunk is in the prefix cache."""
    sizes = Sizes(max_model_len=200, prefill_chunk=64)
    attention = from_preset("lserve", page_size=8, sub_page_size=4, token_budget=56)
    scheduler = Scheduler(sizes, attention, PoolSizes(retrieval=100, streaming=0, swap=100))
    params = SamplingParams(max_tokens=20)
    for number, length in enumerate((65, 64)):
        sequence = scheduler.add(Request(id=number, prompt=(7,) * length, sampling=params))
        while isinstance(plan := scheduler.schedule(), Prefill):
            (chunk,) = plan.chunks
            scheduler.record_prefill(chunk, 7 if chunk.is_last else None, "stop" if length == 65 else None)
    assert scheduler.cache is not None
    assert scheduler.cache.num_entries == 1
    left = scheduler._swap_out(sequence)
    back = scheduler.schedule()
    assert isinstance(back, Swap)
    assert (len(left.retrieval), back.num_shared, len(back.retrieval)) == (9, 0, 9)
