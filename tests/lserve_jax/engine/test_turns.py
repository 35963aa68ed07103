"""Calls that take turns: results depend on nobody else, and a long prompt stops nobody's stream."""

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import numpy as np
import pytest

from lserve_jax import LLM, RequestOutput, SamplingParams
from lserve_jax.engine import engine
from lserve_jax.engine.scheduler import Turns
from lserve_jax.engine.setup import Setup
from lserve_jax.runtime.programs import Call
from tests.lserve_jax.engine.tiny_llms import (
    GATES,
    SPARSE,
    assert_idle,
    generate,
    make_llm,
    poisoned,
    programs_run,
    prompt,
    same,
)

pytestmark = pytest.mark.slow

TURNS = {
    "three short prompts a call": Turns(busy_steps=2, short_rows=3),
    "two prefill calls, short prompts of 30": Turns(prefill_calls=2, short_rows=2, short_chunk=30),
}


def make_llm_with(turns: Turns, folder: Any, tails: tuple[int, ...] = engine.TAIL_CHUNKS, **settings: Any) -> LLM:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Setup, "turns", turns)
        patch.setattr(engine, "TAIL_CHUNKS", tails)
        return make_llm(folder, GATES["one of each"], **(SPARSE | settings))


@pytest.fixture(scope="module", params=TURNS.values(), ids=list(TURNS))
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """An engine with several tail programs, one of them as long as the longest short prompt."""
    folder = tmp_path_factory.mktemp("gates")
    return make_llm_with(request.param, folder, (16, 40, 64), kv_dtype="int8", max_num_seqs=4, prefix_cache=False)


@pytest.fixture(autouse=True)
def check_idle(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "llm" in request.fixturenames:
        assert_idle(request.getfixturevalue("llm"))


def requests(count: int, seed: int) -> list[tuple[list[int], SamplingParams]]:
    """Prompts around the sizes of all programs, most of them short."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        length = int(
            rng.choice([1, 2, 15, 16, 17, 29, 30, 31, 40, 41, 63, 64, 65, 72, 73, 88, 112, 113, 136, 150, 200])
        )
        fields: dict[str, Any] = [{}, {"temperature": 0.9}, {"bad_words": [[20, 21]]}, {"prompt_logprobs": True}][
            int(rng.integers(4))
        ]
        params = SamplingParams(
            max_tokens=int(rng.choice([1, 2, 9, 25])), seed=number, logprobs=True, top_logprobs=4, **fields
        )
        found.append((prompt(length, seed=1000 * seed + number), params))
    return found


@pytest.mark.parametrize("seed", range(3))
def test_results_do_not_depend_on_companions(llm: LLM, seed: int):
    each = requests(20, seed)
    alone = [generate(llm, *one) for one in each]
    together: list[int] = []

    def count_rows(call: Call, result: Any) -> None:
        if call.name == "prefill_short":
            together.append(int((call.args[4] > 0).sum()))

    for order in (range(20), range(19, -1, -1)):
        with programs_run(count_rows), poisoned(llm):
            outputs = llm.generate([each[at][0] for at in order], [each[at][1] for at in order])
        assert all(same(output, alone[at]) for output, at in zip(outputs, order, strict=True))
    assert max(together) == llm.engine._turns.short_rows


@pytest.mark.parametrize("seed", range(3))
def test_results_do_not_depend_on_when_others_come_and_go(llm: LLM, seed: int):
    each = requests(16, seed=10 + seed)
    alone = [generate(llm, *one) for one in each]
    rng = np.random.default_rng(seed)
    waiting, running = list(range(len(each))), {}
    outputs: dict[int, RequestOutput] = {}
    while waiting or running:
        if waiting and (not running or rng.random() < 0.5):
            number = waiting.pop(0)
            running[number] = llm.stream_output(*each[number])
        number = int(rng.choice(list(running)))
        _, output = next(running[number])
        if output is not None:
            outputs[number] = output
            list(running.pop(number))
        elif rng.random() < 0.1:
            running.pop(number).close()
    assert len(outputs) > len(each) // 3
    assert all(same(output, alone[number]) for number, output in outputs.items())


def test_scores_of_a_short_prompt_and_its_companions_are_those_of_lone_runs(llm: LLM):
    """Scores come from a program of its own, which reads one prompt."""
    plain = SamplingParams(max_tokens=6, ignore_eos=True, logprobs=True)
    scored = SamplingParams(max_tokens=6, ignore_eos=True, logprobs=True, prompt_logprobs=True, top_logprobs=2)
    for order in ([scored, plain, plain], [plain, scored, plain], [plain, plain, scored], [scored] * 3):
        prompts = [prompt(20, seed=number) for number in range(3)]
        alone = [generate(llm, *one) for one in zip(prompts, order, strict=True)]
        together = llm.generate(prompts, order)
        assert all(same(*pair) for pair in zip(together, alone, strict=True))
        for output, params in zip(together, order, strict=True):
            assert (output.prompt_logprobs is not None) == params.prompt_logprobs
            assert len(output.prompt_logprobs or output.prompt_token_ids) == 20


def test_the_last_chunk_takes_the_smallest_program_that_holds_it(llm: LLM):
    short = llm.engine._turns.short_chunk
    for length in (short + 1, 39, 40, 41, 64, 65, 72, 72 + 16, 72 + 17, 144 + 40, 144 + 41, 144 + 65):
        if length <= short:
            continue
        with programs_run() as counts:
            generate(llm, prompt(length), SamplingParams(max_tokens=1))
        rest = (length - 1) % 72 + 1
        last = next(size for size in (16, 40, 64, 72) if size >= rest)
        whole = (length - rest) // 72
        names = {"prefill_72": whole + (last == 72)} if whole or last == 72 else {}
        names |= {} if last == 72 else {f"prefill_{last}": 1}
        assert {name: count for name, count in counts.items() if name != "sample"} == names


# --- one stream beside a long prompt ---------------------------------------------------------------------------------


def test_a_command_for_few_prompts_compiles_no_tails_and_says_the_same(tmp_path: Any):
    settings = SPARSE | {"kv_dtype": "float32"}
    llm = make_llm(tmp_path, GATES["one of each"], **settings, has_tails=False)
    usual = make_llm(tmp_path, GATES["one of each"], **settings)
    params = SamplingParams(max_tokens=4, ignore_eos=True, logprobs=True)
    for length, programs in ((150, {"prefill_72": 3}), (72, {"prefill_72": 1}), (64, {"prefill_short": 1})):
        with programs_run() as ran:
            (found,) = llm.generate([prompt(length)], params)
        assert {name: count for name, count in ran.items() if name.startswith("prefill")} == programs
        (expected,) = usual.generate([prompt(length)], params)
        np.testing.assert_allclose(found.logprobs or (), expected.logprobs or (), atol=1e-4)


@pytest.fixture(scope="module")
def small_chunks(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """Chunks of 16 tokens; 4 steps per decode call, 2 while somebody waits."""
    folder = tmp_path_factory.mktemp("gates")
    return make_llm_with(Turns(busy_steps=2), folder, kv_dtype="float32", prefill_chunk=16, max_model_len=400)


def test_one_chunk_of_a_long_prompt_lies_between_two_decode_calls(small_chunks: LLM):
    llm, calls = small_chunks, []
    with programs_run(lambda call, result: calls.append(call)):
        stream = llm.stream(prompt(9), SamplingParams(max_tokens=120, ignore_eos=True))
        next(stream)
        reader = llm.stream_output(prompt(20 * 16, seed=1), SamplingParams(max_tokens=2, ignore_eos=True))
        list(reader)
        names = [call.name for call in calls]
        assert names.count("prefill_16") == 21
        begin, end = names.index("sample") + 1, len(names) - 1 - names[::-1].index("prefill_16")
        during = [name for name in names[begin : end + 1] if name != "sample"]
        runs = [(name, len(list(group))) for name, group in groupby(during)]
        assert max(count for name, count in runs if name == "prefill_16") == 1
        assert sum(count for name, count in runs if name == "decode") >= 19
        steps = {int(call.args[5]) for call in calls[begin + 2 : end] if call.name == "decode"}
        assert steps == {2}
        stream.close()
    assert_idle(llm)


def test_a_short_prompt_passes_a_long_one_and_answers_first(small_chunks: LLM):
    llm = small_chunks
    long, short = prompt(20 * 16, seed=1), [prompt(16, seed=number) for number in range(2, 8)]
    params = SamplingParams(max_tokens=2, ignore_eos=True, logprobs=True)
    expected = [generate(llm, tokens, params) for tokens in (long, *short)]
    llm.engine.scheduler.forget_pages()
    generations = [llm.request(tokens, params) for tokens in (long, *short)]
    starts: list[int] = []

    def note_start(call: Call, result: Any) -> None:
        if call.name == "prefill_16":
            starts.append(int(call.args[3][0]))

    with programs_run(note_start):
        finished: list[int] = []
        for _ in llm.session.run(generations):
            done = [at for at, one in enumerate(generations) if one.finish_reason is not None]
            finished += [at for at in done if at not in finished]
    assert finished == [1, 2, 3, 4, 5, 6, 0]
    assert all(same(llm.output(one), output) for one, output in zip(generations, expected, strict=True))
    # One chunk of the long prompt lies between two that pass it.
    passing = [at == 0 for at in starts[1:]]
    assert passing[:12] == [True, False] * 6
    assert_idle(llm)


# --- warm-up ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chunk", "length", "fields"),
    [
        (72, 220, {}),
        (72, 130, {}),
        (300, 300, {}),
        (300, 400, {"recall_interval": 3}),
        (64, 200, {"kv_memory": "small", "swap_memory": 2**24}),
    ],
    ids=["as elsewhere", "less than two chunks", "one chunk", "with recall", "with swapping"],
)
def test_after_the_warm_up_nothing_is_compiled(chunk: int, length: int, fields: dict[str, Any], tmp_path: Any):
    if "kv_memory" in fields:
        fields = fields | {"kv_memory": 26 * 2 * 2 * (8 * 16 * 4 + 2 * 2 * 16 * 4) + 100_000}
    turns = Turns(busy_steps=2, short_rows=2)
    llm = make_llm_with(turns, tmp_path, kv_dtype="float32", prefill_chunk=chunk, max_model_len=length, **fields)
    llm.engine.warm_up()
    names, seconds = set(llm.engine.programs.names), llm.compile_seconds
    assert llm.engine.programs.choices == {}, "nothing has run"
    assert any(name.startswith("read_") for name in names) == ("swap_memory" in fields)
    lengths = [n for n in (1, 60, 64, 65, 100, 128, 150, 256, 257, 290, 300, 330, 390) if n < length]
    for has_scores in (False, True):
        params = SamplingParams(max_tokens=6, ignore_eos=True, prompt_logprobs=has_scores, top_logprobs=has_scores * 2)
        for _ in range(2):
            llm.generate([prompt(n, seed=n) for n in lengths], params)
    assert set(llm.engine.programs.names) == names
    assert llm.compile_seconds == seconds
