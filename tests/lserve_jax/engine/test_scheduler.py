"""Who runs when: turns of prefill and decode calls, the order of service, and the room that each needs."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lserve_jax.config.pages import most_streaming_pages
from lserve_jax.config.sizes import Sizes
from lserve_jax.engine import room
from lserve_jax.engine.plans import Decode, Prefill, Swap
from lserve_jax.engine.request import Status
from lserve_jax.engine.scheduler import Turns
from tests.lserve_jax.engine.page_model import Device, Settings, assert_all_free, assert_nothing_leaks, make_request

CONFIG = Settings()

CONFIGS = st.builds(
    lambda **overrides: replace(CONFIG, **overrides),
    max_num_seqs=st.integers(1, 5),
    prefill_chunk=st.integers(1, 70),
    steps_per_call=st.integers(1, 20),
    page_size=st.sampled_from([1, 4, 8, 16, 64]),
    sink=st.integers(0, 40),
    local=st.integers(1, 60),
    prefill_local=st.integers(1, 100),
    retrieval_pages=st.one_of(st.just(0), st.integers(200, 450)),
    streaming_pages=st.one_of(st.just(0), st.integers(200, 450)),
    turns=st.builds(
        Turns,
        prefill_calls=st.integers(1, 3),
        busy_steps=st.sampled_from([None, 1, 4]),
        short_chunk=st.just(1),
    ),
)
# (calls before it arrives, prompt, max_tokens, generated tokens at which it stops)
ARRIVALS = st.lists(
    st.tuples(st.integers(0, 6), st.integers(1, 200), st.integers(1, 60), st.integers(1, 80)), min_size=1, max_size=12
)


@settings(deadline=None, max_examples=60)
@given(CONFIGS, ARRIVALS)
def test_random_arrivals_all_finish_in_fair_order_and_nothing_leaks(
    config: Settings, arrivals: list[tuple[int, int, int, int]]
):
    scheduler = config.scheduler()
    device = Device(scheduler, {index: stop for index, (_, _, _, stop) in enumerate(arrivals)})
    sequences = []
    for index, (delay, prompt, max_tokens, _) in enumerate(arrivals):
        for _ in range(delay):
            device.step()
        sequences.append(scheduler.add(make_request(index, prompt, max_tokens)))
    device.run()
    assert_all_free(scheduler)
    for sequence, (_, prompt, max_tokens, stop) in zip(sequences, arrivals, strict=True):
        due = max(1, min(max_tokens, config.max_model_len - prompt))
        assert sequence.status is Status.FINISHED
        assert len(sequence.generated) == min(due, stop)
        assert sequence.finish_reason == ("stop" if stop <= due else "length")
        assert sequence.decode_steps == len(sequence.generated) - 1
        assert sequence.num_cached == len(sequence.tokens) - 1
    # First come, first served, and one prefill at a time; but a prompt of one call may pass a longer one.
    prefills = [ids[0] for kind, ids in device.calls if kind == "prefill"]
    in_order = [number for number in prefills if number not in device.passed]
    assert in_order == sorted(in_order)
    assert set(prefills) == set(range(len(arrivals)))


@settings(deadline=None, max_examples=60)
@given(CONFIGS, ARRIVALS, st.lists(st.tuples(st.integers(0, 40), st.integers(0, 12)), max_size=8))
def test_random_aborts_leak_nothing_and_stop_nobody_else(
    config: Settings, arrivals: list[tuple[int, int, int, int]], aborts: list[tuple[int, int]]
):
    scheduler = config.scheduler()
    device = Device(scheduler)
    sequences = [scheduler.add(make_request(i, prompt, tokens)) for i, (_, prompt, tokens, _) in enumerate(arrivals)]
    aborted = set()
    for delay, request_id in aborts:
        for _ in range(delay):
            device.step()
        if scheduler.abort(request_id):
            device.check()
            aborted.add(request_id)
            assert sequences[request_id].finish_reason == "abort"
    device.run()
    assert_all_free(scheduler)
    assert {i for i, sequence in enumerate(sequences) if sequence.finish_reason == "abort"} == aborted
    assert all(sequence.remaining == 0 for sequence in sequences if sequence.finish_reason == "length")


def test_a_short_request_does_not_overtake_one_that_waits_for_pages():
    scheduler = replace(CONFIG, retrieval_pages=25).scheduler()
    device = Device(scheduler)
    for request_id, prompt in enumerate((80, 150, 8)):
        scheduler.add(make_request(request_id, prompt, 20))
    device.run()
    kinds = [ids for kind, ids in device.calls if kind == "prefill"]
    assert kinds == [(0,)] * 3 + [(1,)] * 5 + [(2,)]
    assert ("decode", (0,)) in device.calls  # alone, though a slot was free


def test_admission_commits_the_pages_of_the_whole_generation():
    # Each request needs 5 pages in the end, but 2 at its start.
    scheduler = replace(CONFIG, retrieval_pages=9).scheduler()
    device = Device(scheduler)
    for request_id in range(2):
        scheduler.add(make_request(request_id, 9, 30))
    device.run()
    assert ("decode", (0, 1)) not in device.calls
    scheduler = replace(CONFIG, retrieval_pages=10).scheduler()
    device = Device(scheduler)
    for request_id in range(2):
        scheduler.add(make_request(request_id, 9, 30))
    device.run()
    assert ("decode", (0, 1)) in device.calls


def test_streaming_pages_of_the_prefill_window_are_uncommitted_when_the_prefill_ends():
    config = replace(CONFIG, max_model_len=1000, retrieval_pages=300, prefill_local=200)
    decode = most_streaming_pages(config.sink, config.local, config.steps_per_call, config.page_size)
    prefill = most_streaming_pages(config.sink, config.prefill_local, config.prefill_chunk, config.page_size)
    assert decode < prefill
    for missing, is_together in ((0, True), (1, False)):
        scheduler = replace(config, streaming_pages=decode + prefill - missing).scheduler()
        device = Device(scheduler)
        for request_id in range(2):
            scheduler.add(make_request(request_id, 900, 12))
        device.run()
        assert (("prefill", (1,)) in device.calls[: last_call(device, ("decode", (0,)))]) == is_together


def test_a_decode_call_has_as_many_steps_as_the_longest_to_go_and_no_more_than_configured():
    scheduler = CONFIG.scheduler()
    sequences = [scheduler.add(make_request(i, 5, tokens)) for i, tokens in enumerate((11, 6))]
    device = Device(scheduler)
    for _ in range(3):
        device.step()
    assert device.calls == [("prefill", (0,)), ("decode", (0,)), ("prefill", (1,))]
    plan = scheduler.schedule()
    assert isinstance(plan, Decode)
    assert plan.sequences == tuple(sequences)
    assert plan.limits == (2, 5)
    assert plan.num_steps == 5
    scheduler = replace(CONFIG, steps_per_call=4).scheduler()
    scheduler.add(make_request(0, 5, 6))
    Device(scheduler).step()
    plan = scheduler.schedule()
    assert isinstance(plan, Decode)
    assert plan.num_steps == 4


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "generated"), [(195, 100, 5), (199, 100, 1), (200, 100, 1), (190, 10, 10)]
)
def test_generation_ends_with_length_where_the_context_does(prompt: int, max_tokens: int, generated: int):
    scheduler = CONFIG.scheduler()
    sequence = scheduler.add(make_request(0, prompt, max_tokens))
    Device(scheduler).run()
    assert len(sequence.generated) == generated
    assert sequence.finish_reason == "length"


def test_a_prompt_longer_than_the_context_is_refused_with_both_lengths():
    scheduler = CONFIG.scheduler()
    with pytest.raises(
        ValueError, match=r"^prompt has 201 tokens, but max_model_len is 200: shorten the prompt or raise"
    ):
        scheduler.add(make_request(0, 201, 1))
    assert_nothing_leaks(scheduler)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"retrieval_pages": 14},
            r"150 tokens and may grow to 200, which takes 25 retrieval pages of 8 tokens, but .* 14",
        ),
        (
            {"streaming_pages": 6},
            r"150 tokens and may grow to 200, which takes \d+ streaming pages of 8 tokens, but .* 6:",
        ),
    ],
)
def test_a_request_that_the_pools_cannot_hold_alone_is_refused(overrides: dict[str, int], message: str):
    scheduler = replace(CONFIG, **overrides).scheduler()
    with pytest.raises(ValueError, match=message):
        scheduler.add(make_request(0, 150, 100))
    assert_nothing_leaks(scheduler)


def test_an_id_may_be_used_again_only_after_its_request_has_finished():
    scheduler = CONFIG.scheduler()
    scheduler.add(make_request(5, 3, 2))
    with pytest.raises(ValueError, match=r"request 5: this id is in use"):
        scheduler.add(make_request(5, 3, 2))
    Device(scheduler).run()
    scheduler.add(make_request(5, 3, 2))


def test_a_request_can_be_aborted_waiting_prefilling_and_decoding():
    scheduler = replace(CONFIG, max_num_seqs=2).scheduler()
    device = Device(scheduler)
    sequences = [scheduler.add(make_request(i, 60, 50)) for i in range(3)]
    for _ in range(4):
        device.step()
    assert [sequence.status for sequence in sequences] == [Status.DECODING, Status.PREFILLING, Status.WAITING]
    assert [scheduler.abort(i) for i in range(3)] == [True] * 3
    assert [sequence.finish_reason for sequence in sequences] == ["abort"] * 3
    assert not scheduler.abort(0)
    assert_all_free(scheduler)


@pytest.mark.parametrize("is_all", [False, True])
def test_a_request_can_be_aborted_while_its_pages_are_in_host_memory(is_all: bool, small_margin: None):
    scheduler = OVERSUBSCRIBED.scheduler()
    device = Device(scheduler)
    sequences = [scheduler.add(make_request(i, 60, 100)) for i in range(3)]
    while not scheduler.swapped:
        assert device.step() is not None
    (gone,) = scheduler.swapped
    assert gone is sequences[2]
    if is_all:
        scheduler.abort_all()
        device.check()
    else:
        assert scheduler.abort(2)
        device.run()
        assert [len(one.generated) for one in sequences[:2]] == [100, 100]
    assert gone.finish_reason == "abort"
    assert gone.swapped is None
    assert_all_free(scheduler)


def test_bad_requests_and_configs_are_refused():
    with pytest.raises(ValueError, match=r"request 3: the prompt is empty"):
        make_request(3, 0, 1)
    with pytest.raises(ValueError, match=r"request 3: max_tokens must be at least 1, got 0"):
        make_request(3, 1, 0)
    with pytest.raises(ValueError, match=r"max_num_seqs=0 must be a whole .* from 1; prefill_chunk=-1 must be a whole"):
        Sizes(max_model_len=1, max_num_seqs=0, prefill_chunk=-1)


# --- turns ---------------------------------------------------------------------------------------------------------


def last_call(device: Device, call: tuple[str, tuple[int, ...]]) -> int:
    return max(index for index, other in enumerate(device.calls) if other == call)


def longest_wait(device: Device, number: int) -> int:
    """How many calls in a row go to others between two decode calls of a request."""
    places = [i for i, (kind, ids) in enumerate(device.calls) if kind == "decode" and number in ids]
    return max(after - before - 1 for before, after in pairwise(places))


def test_calls_take_turns():
    scheduler = CONFIG.scheduler()
    device = Device(scheduler)
    for request_id, (prompt, tokens) in enumerate(((40, 12), (10, 12), (70, 12), (5, 3))):
        scheduler.add(make_request(request_id, prompt, tokens))
    device.run()
    assert device.calls == [
        ("prefill", (0,)),
        ("prefill", (1,)),  # needs one call, and passes
        ("decode", (1,)),
        ("prefill", (0,)),
        ("decode", (0, 1)),  # 1 ends
        ("prefill", (2,)),
        ("decode", (0,)),  # 0 ends
        ("prefill", (3,)),
        ("decode", (3,)),
        ("prefill", (2,)),
        ("prefill", (2,)),
        *[("decode", (2,))] * 2,
    ]


@pytest.mark.parametrize(("prefill_calls", "wait"), [(1, 1), (2, 2), (10**9, 20)])
def test_a_stream_goes_on_while_a_prompt_of_twenty_chunks_is_read(prefill_calls: int, wait: int):
    """The last case is a policy that prefers prefill."""
    config = replace(CONFIG, max_model_len=700, retrieval_pages=200, turns=Turns(prefill_calls=prefill_calls))
    scheduler = config.scheduler()
    device = Device(scheduler)
    scheduler.add(make_request(0, 10, 300))
    device.step()
    device.step()
    scheduler.add(make_request(1, 640, 5))
    device.run()
    assert longest_wait(device, 0) == wait
    assert device.calls.count(("prefill", (1,))) == 20


@pytest.mark.parametrize(("retrieval_pages", "prompt"), [(53, 19), (54, 28), (57, 46)])
def test_calls_take_turns_also_when_somebody_leaves_between_them(retrieval_pages: int, prompt: int, small_margin: None):
    """A decode call lacks pages while a long prompt is read, and the short one that passed it leaves.

    A swap is no call: it must not count as the turn of those who decode.
    """
    config = replace(OVERSUBSCRIBED, max_model_len=400, max_num_seqs=4, retrieval_pages=retrieval_pages, swap=200)
    scheduler = config.scheduler()
    device = Device(scheduler)
    scheduler.add(make_request(0, prompt, 200))
    device.step()
    device.step()
    scheduler.add(make_request(1, 280, 20))
    scheduler.add(make_request(2, 10, 150))
    device.run()
    assert scheduler.num_swaps > 0
    assert longest_wait(device, 0) == 1
    assert_all_free(scheduler)


@pytest.mark.parametrize(("busy_steps", "expected"), [(None, 8), (3, 3), (100, 8)])
def test_bursts_are_short_while_a_prompt_is_read_or_waits(busy_steps: int | None, expected: int):
    config = replace(CONFIG, max_num_seqs=2, turns=Turns(busy_steps=busy_steps, short_chunk=1))
    scheduler = config.scheduler()
    device = Device(scheduler)
    scheduler.add(make_request(0, 10, 100))

    def steps(count: int) -> list[tuple[int, ...]]:
        found = []
        for _ in range(count):
            plan = device.step()
            found += [plan.limits] if isinstance(plan, Decode) else []
        return found

    assert steps(3) == [(8,), (8,)]
    scheduler.add(make_request(1, 70, 40))
    assert steps(4) == [(expected,)] * 2
    scheduler.add(make_request(2, 70, 1))  # has no slot
    assert set(steps(3)) == {(expected, expected)}
    scheduler.abort(2)
    assert steps(1) == [(8, 8)]


def test_a_sequence_for_which_the_host_acts_after_each_token_takes_one_and_the_others_go_on():
    scheduler = CONFIG.scheduler()
    scheduler.add(make_request(0, 5, 50))
    scheduler.add(make_request(1, 5, 50, is_stepwise=True))
    device = Device(scheduler)
    for _ in range(3):
        device.step()
    plan = device.step()
    assert isinstance(plan, Decode)
    assert plan.limits == (8, 1)
    assert plan.num_steps == 8


def test_every_second_prefill_call_may_go_to_prompts_that_pass_a_long_one():
    config = replace(CONFIG, max_num_seqs=8, max_model_len=400, retrieval_pages=300, streaming_pages=200)
    scheduler = config.scheduler()
    device = Device(scheduler)
    scheduler.add(make_request(0, 320, 1))
    scheduler.add(make_request(9, 64, 1))  # needs two calls: it passes nobody
    for number in range(1, 5):
        scheduler.add(make_request(number, 32, 1))
    device.run()
    prefills = [ids[0] for kind, ids in device.calls if kind == "prefill"]
    assert prefills == [0, 1, 0, 2, 0, 3, 0, 4, *[0] * 6, 9, 9]


def test_nobody_passes_one_that_waits_for_a_slot():
    scheduler = replace(CONFIG, max_num_seqs=2).scheduler()
    device = Device(scheduler)
    for number, prompt in enumerate((150, 20, 150, 5)):
        scheduler.add(make_request(number, prompt, 60))
    device.run()
    first = {ids[0]: index for index, (kind, ids) in reversed(list(enumerate(device.calls))) if kind == "prefill"}
    assert first[1] == 1
    assert sorted(first, key=lambda number: first[number]) == [0, 1, 2, 3]


def test_short_prompts_share_a_call():
    config = replace(CONFIG, max_num_seqs=6, streaming_pages=80, turns=Turns(short_chunk=16, short_rows=3))
    scheduler = config.scheduler()
    device = Device(scheduler)
    lengths = (16, 1, 17, 5, 6, 7)
    for number, prompt in enumerate(lengths):
        scheduler.add(make_request(number, prompt, 1, is_cacheable=number != 4))
    device.run()
    # Number 2 is too long, and 4 wants to be alone: they wait for the short ones that fill the first call.
    assert [ids for kind, ids in device.calls if kind == "prefill"] == [(0, 1, 3), (2,), (4,), (5,)]


def test_requests_are_served_by_priority_and_then_in_the_order_of_their_arrival():
    scheduler = replace(CONFIG, max_num_seqs=1).scheduler()
    device = Device(scheduler)
    scheduler.add(make_request(0, 40, 5, priority=5))
    device.step()
    for number, priority in ((1, 1), (2, 0), (3, 1), (4, -3), (5, 0)):
        scheduler.add(make_request(number, 5, 2, priority=priority))
    device.run()
    prefills = [ids[0] for kind, ids in device.calls if kind == "prefill"]
    assert prefills == [0, 0, 4, 2, 5, 1, 3]


# --- more sequences than the pools hold at their longest --------------------------------------------------------------

OVERSUBSCRIBED = replace(CONFIG, max_model_len=200, retrieval_pages=40, streaming_pages=100, swap=60)
"""Three sequences of up to 160 tokens, 20 pages each, in 40 pages."""


@pytest.fixture
def small_margin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "MARGIN", 8)


def test_the_last_one_leaves_when_pages_run_out_and_comes_back_before_anyone_new(small_margin: None):
    scheduler = OVERSUBSCRIBED.scheduler()
    device = Device(scheduler)
    sequences = [scheduler.add(make_request(i, 60, 100)) for i in range(4)]
    swaps = []
    while (plan := device.step()) is not None:
        if isinstance(plan, Swap):
            swaps.append((plan.sequence.request.id, plan.is_out))
        elif isinstance(plan, Prefill) and plan.chunks[0].sequence is sequences[3]:
            assert not scheduler.swapped
    assert swaps[0] == (2, True)
    assert (2, False) in swaps
    assert scheduler.num_swaps == sum(is_out for _, is_out in swaps)
    assert all(number != 0 for number, _ in swaps)
    assert [len(one.generated) for one in sequences] == [100] * 4
    assert_all_free(scheduler)


def test_what_is_still_cached_does_not_move_back(small_margin: None):
    scheduler = replace(OVERSUBSCRIBED, retrieval_pages=30).scheduler()
    device = Device(scheduler)
    for i in range(3):
        scheduler.add(make_request(i, [5] * 96 + [i] * 4, 60))
    shared = []
    while (plan := device.step()) is not None:
        if isinstance(plan, Swap) and not plan.is_out:
            shared.append(plan.num_shared)
    assert shared and set(shared) == {3 * 32 // 8}
    assert_all_free(scheduler)


def test_a_short_prompt_that_comes_back_does_not_take_the_pages_of_a_long_one(small_margin: None):
    """It is as long as a chunk that is cached, and begins alike, but another program wrote its pages."""
    config = replace(OVERSUBSCRIBED, turns=Turns(short_chunk=32, short_rows=2))
    scheduler = config.scheduler()
    device = Device(scheduler)
    scheduler.add(make_request(0, [5] * 70, 100))  # holds the chunk all the time
    for i in (1, 2):
        scheduler.add(make_request(i, [5] * 32, 100))
    moved = []
    while (plan := device.step()) is not None:
        if isinstance(plan, Swap) and not plan.is_out:
            moved.append(plan.num_shared)
    assert moved and set(moved) == {0}
    assert_all_free(scheduler)


@pytest.mark.parametrize("steps", [8, 64, 100])
def test_whoever_comes_back_stays_for_a_call_at_least(steps: int, small_margin: None):
    """A call may take more pages than the margin; then two moves of the same pages must not follow each other."""
    scheduler = replace(OVERSUBSCRIBED, steps_per_call=steps).scheduler()
    device = Device(scheduler)
    for i in range(3):
        scheduler.add(make_request(i, 20, 150))
    plans = []
    while (plan := device.step()) is not None:
        plans.append(plan)
        assert len(plans) < 1000, "pages move to and fro, and nothing is computed"
    for plan, following in pairwise(plans):
        is_back = isinstance(plan, Swap) and not plan.is_out
        assert not (is_back and isinstance(following, Swap) and following.is_out)
    assert_all_free(scheduler)


def test_a_prompt_that_is_being_read_leaves_and_is_read_on(small_margin: None):
    config = replace(OVERSUBSCRIBED, max_model_len=320, swap=200, steps_per_call=20)
    scheduler = config.scheduler()
    device = Device(scheduler)
    scheduler.add(make_request(0, 30, 250))
    device.step()
    late = scheduler.add(make_request(1, 200, 10))
    while not scheduler.swapped:
        assert device.step() is not None
    assert scheduler.swapped == [late]
    assert 0 < late.num_cached < late.prompt_length
    device.run()
    assert device.calls.count(("prefill", (1,))) == 7
    assert_all_free(scheduler)
