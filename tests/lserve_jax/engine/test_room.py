"""Who may hold pages: admission with shared pages, beyond the pools, and within host memory."""

from dataclasses import replace

import numpy as np
import pytest

from lserve_jax.config.pages import most_streaming_pages
from lserve_jax.engine import room as room_module
from lserve_jax.engine.request import Sequence, Swapped
from lserve_jax.engine.scheduler import Scheduler
from tests.lserve_jax.engine.page_model import Device, Settings, assert_all_free, make_request

CONFIG = Settings(max_model_len=400, max_num_seqs=8, retrieval_pages=50, streaming_pages=0)


def make_sequence(scheduler: Scheduler, prompt: int, max_tokens: int, *, number: int = 0) -> Sequence:
    request = make_request(number, prompt, max_tokens)
    sequence = Sequence.from_request(request, max_model_len=400, page_size=8)
    sequence.number = number
    return sequence


def run_beside(scheduler: Scheduler, sequence: Sequence, tokens: int) -> Sequence:
    """A sequence that runs and has pages for so many tokens."""
    assert scheduler.allocator.reserve(sequence, 0, tokens, 20)
    sequence.num_cached = tokens
    return sequence


@pytest.mark.parametrize("steps", [1, 500])
def test_needs_are_of_the_whole_generation_but_its_last_token(steps: int):
    scheduler = replace(CONFIG, steps_per_call=steps).scheduler()
    one = run_beside(scheduler, make_sequence(scheduler, 80, 121), 80)  # 200 cached tokens: 25 pages
    assert scheduler.room.may_run([one], make_sequence(scheduler, 80, 121), [])
    assert not scheduler.room.may_run([one], make_sequence(scheduler, 80, 122), [])
    scheduler.allocator.free(one)
    assert scheduler.room.may_run([], make_sequence(scheduler, 100, 300), [])


def test_pages_of_the_cache_count_once_however_many_read_them():
    """Three readers of one document of 20 pages, who need 8 pages of their own each."""
    scheduler = replace(CONFIG, retrieval_pages=44).scheduler()
    device = Device(scheduler)
    document = list(range(160))
    scheduler.add(make_request(9, [*document, 5], 1))
    device.run()
    for i in range(3):
        scheduler.add(make_request(i, [*document, i], 64))
    device.run()
    assert ("decode", (0, 1, 2)) in device.calls
    smaller = replace(CONFIG, retrieval_pages=43).scheduler()
    device = Device(smaller)
    smaller.add(make_request(9, [*document, 5], 1))
    device.run()
    for i in range(3):
        smaller.add(make_request(i, [*document, i], 64))
    device.run()
    assert ("decode", (0, 1)) in device.calls
    assert ("decode", (0, 1, 2)) not in device.calls
    assert_all_free(smaller)


def test_pages_that_a_hit_shares_are_no_longer_there_to_be_evicted():
    scheduler = CONFIG.scheduler()
    device = Device(scheduler)
    scheduler.add(make_request(0, [*range(160)], 1))
    device.run()
    assert scheduler.cache is not None
    assert scheduler.allocator.retrieval is not None
    assert scheduler.allocator.retrieval.num_evictable == 20
    pages = [page for entry in scheduler.cache._entries.values() for page in entry.retrieval]
    new = make_sequence(scheduler, 160, 120)  # 279 tokens: 35 pages, of which 20 are shared
    other = run_beside(scheduler, make_sequence(scheduler, 9, 112), 9)  # holds 2 pages, and needs 13 more
    # 28 pages are free: 15 for what is not shared, and 13.
    assert scheduler.room.may_run([other], new, pages)
    scheduler.allocator.free(other)
    other = run_beside(scheduler, make_sequence(scheduler, 9, 113), 9)
    assert not scheduler.room.may_run([other], new, pages)
    # Pages that another one reads too were not there to be evicted before.
    assert scheduler.allocator.retrieval is not None
    scheduler.allocator.retrieval.share(pages)
    assert not scheduler.room.may_run([other], new, pages)
    other.max_length -= 1
    assert scheduler.room.may_run([other], new, pages)
    scheduler.allocator.retrieval.give_back(pages)


def test_beyond_the_pools_sequences_need_a_margin_now_and_room_on_the_host_later(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(room_module, "MARGIN", 16)
    # Each needs 30 pages in the end, and 10 + 2 soon.
    for swap, is_allowed in ((0, False), (29, False), (30, True), (100, True)):
        scheduler = replace(CONFIG, swap=swap).scheduler()
        one = run_beside(scheduler, make_sequence(scheduler, 80, 161), 80)
        assert scheduler.room.may_run([one], make_sequence(scheduler, 80, 161), []) == is_allowed
    scheduler = replace(CONFIG, swap=100).scheduler()
    many = [run_beside(scheduler, make_sequence(scheduler, 80, 161), 80) for _ in range(3)]
    # 30 pages are held, and 6 more are due: 14 remain for the fourth, who would soon hold 12.
    assert scheduler.room.may_run(many, make_sequence(scheduler, 80, 161), [])
    assert scheduler.room.may_run(many, make_sequence(scheduler, 96, 145), [])
    assert not scheduler.room.may_run(many, make_sequence(scheduler, 97, 144), [])
    # All but any one of four fit into 90 pages on the host, not into 89.
    for swap, is_allowed in ((90, True), (89, False)):
        tight = replace(scheduler.room, swap=swap)
        assert tight.may_run(many, make_sequence(scheduler, 80, 161), []) == is_allowed


def test_one_that_comes_back_has_its_place_on_the_host_and_needs_only_the_margin(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(room_module, "MARGIN", 16)
    scheduler = replace(CONFIG, swap=0).scheduler()
    pair = [run_beside(scheduler, make_sequence(scheduler, 80, 161), 80) for _ in range(2)]
    new = make_sequence(scheduler, 80, 161)
    assert not scheduler.room.may_run(pair, new, [])
    # 20 pages are held and 4 due: 26 remain.
    new.num_cached = 192  # 24 pages, and 2 for the margin
    new.swapped = Swapped(retrieval=np.arange(24), streaming=np.arange(0))
    assert scheduler.room.may_run(pair, new, [])
    new.num_cached = 193
    assert not scheduler.room.may_run(pair, new, [])


def test_the_margin_is_a_call_at_least(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(room_module, "MARGIN", 1)
    for steps, is_allowed in ((80, True), (81, False)):
        scheduler = replace(CONFIG, swap=100, steps_per_call=steps).scheduler()
        one = run_beside(scheduler, make_sequence(scheduler, 80, 321), 80)
        # 10 pages are held; both take 10 more in a call, and the new one has 20 then.
        assert scheduler.room.may_run([one], make_sequence(scheduler, 160, 161), []) == is_allowed


def test_the_streaming_pool_holds_the_windows_of_all_and_nobody_swaps_for_it():
    config = replace(CONFIG, retrieval_pages=0, swap=1000)
    decode = most_streaming_pages(config.sink, config.local, config.steps_per_call, config.page_size)
    prefill = most_streaming_pages(config.sink, config.prefill_local, config.prefill_chunk, config.page_size)
    for missing in (0, 1):
        scheduler = replace(config, streaming_pages=2 * decode + prefill - missing).scheduler()
        running = [make_sequence(scheduler, 100, 200) for _ in range(2)]
        for one in running:
            one.num_cached = 100
        assert scheduler.room.may_run(running, make_sequence(scheduler, 100, 200), []) == (missing == 0)
    assert scheduler.room.may_run(running[:1], make_sequence(scheduler, 100, 200), [])


def test_the_last_in_the_order_of_service_leaves():
    scheduler = CONFIG.scheduler()
    running = []
    for number, priority in enumerate((0, 2, -1, 2, 1)):
        request = make_request(number, 10, 5, priority=priority)
        sequence = Sequence.from_request(request, max_model_len=400, page_size=8)
        sequence.number = number
        running.append(sequence)
    order = []
    while len(running) > 1:
        order.append(scheduler.room.victim(running).number)
        running = [one for one in running if one.number != order[-1]]
    assert order == [3, 1, 4, 0]
    with pytest.raises(AssertionError, match="a request that fits alone has room when it is alone"):
        scheduler.room.victim(running)
