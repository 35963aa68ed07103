"""Pages are free, or held by so many; wrong returns are refused before anything changes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lserve_jax.engine.pools import PagePool


def test_a_page_pool_refuses_double_and_foreign_returns_and_changes_nothing():
    pool = PagePool(4, keeps_all=True)
    pages = pool.take(3)
    with pytest.raises(ValueError, match=r"page 4 is not of this pool, whose ids are 0 to 3"):
        pool.give_back([pages[0], 4])
    with pytest.raises(ValueError, match=r"page -1 is not of this pool"):
        pool.give_back([-1])
    with pytest.raises(ValueError, match=r"given back twice in one call"):
        pool.give_back([pages[0], pages[0]])
    assert pool.num_free == 1
    pool.give_back(pages[:1])
    with pytest.raises(ValueError, match=f"page {pages[0]} is given back, but it is free already"):
        pool.give_back(pages)
    assert pool.num_free == 2
    with pytest.raises(ValueError, match=r"cannot take 3 pages: 2 of 4 are free"):
        pool.take(3)
    with pytest.raises(ValueError, match=r"num_pages=0 must be a whole number from 1"):
        PagePool(0, keeps_all=True)


def test_a_page_is_free_when_its_last_holder_has_given_it_back():
    pool = PagePool(3, keeps_all=True)
    pages = pool.take(2)
    pool.share(pages[:1])
    pool.give_back(pages)
    assert pool.num_free == 2
    assert set(pool.take(2)).isdisjoint(pages[:1])
    pool.give_back(pages[:1])
    assert pool.num_free == 1
    with pytest.raises(ValueError, match=f"page {pages[0]} is given back, but it is free already"):
        pool.give_back(pages[:1])


def test_what_the_cache_holds_alone_is_evictable():
    pool = PagePool(5, keeps_all=True)
    first, second, third = pages = pool.take(3)
    pool.share([first, second], is_cached=True)
    pool.share([first], is_cached=True)
    assert (pool.num_evictable, pool.count_evictable(pages)) == (0, 0)
    pool.give_back(pages)
    assert (pool.num_free, pool.num_evictable) == (3, 2)
    pool.share([second])
    assert (pool.num_evictable, pool.count_evictable([first, second]), pool.count_evictable([])) == (1, 1, 0)
    pool.give_back([first], is_cached=True)
    assert (pool.num_free, pool.num_evictable) == (3, 1)
    pool.give_back([first], is_cached=True)
    assert pool.num_free == 4
    assert third != second


@pytest.mark.parametrize("is_cached", [False, True])
def test_free_foreign_and_repeated_pages_are_not_shared(is_cached: bool):
    pool = PagePool(4, keeps_all=True)
    (page,) = pool.take(1)
    free = (page + 1) % 4
    for pages, message in (
        ([page, free], f"page {free} is shared, but it is free already"),
        ([page, 4], "page 4 is not of this pool"),
        ([page, page], "pages are shared twice in one call"),
    ):
        with pytest.raises(ValueError, match=message):
            pool.share(pages, is_cached=is_cached)
    pool.give_back([page])
    assert pool.num_free == 4


def test_the_cache_and_sequences_give_back_only_what_is_theirs():
    pool = PagePool(4, keeps_all=True)
    pages = pool.take(2)
    with pytest.raises(ValueError, match="the prefix cache does not hold all of these pages"):
        pool.give_back(pages, is_cached=True)
    pool.share(pages[:1], is_cached=True)
    with pytest.raises(ValueError, match="the prefix cache does not hold all of these pages"):
        pool.give_back(pages, is_cached=True)
    pool.give_back(pages)
    with pytest.raises(ValueError, match="only the prefix cache holds some of these pages"):
        pool.give_back(pages[:1])
    pool.give_back(pages[:1], is_cached=True)
    assert pool.num_free == 4


@given(st.lists(st.tuples(st.sampled_from(["take", "share", "back"]), st.booleans(), st.integers(0, 5)), max_size=60))
def test_counts_are_those_of_a_list_of_holders(actions: list[tuple[str, bool, int]]):
    pool = PagePool(6, keeps_all=True)
    holders: list[tuple[int, bool]] = []
    for action, is_cached, number in actions:
        held = {page for page, _ in holders}
        if action == "take":
            count = min(number, 6 - len(held))
            pages = pool.take(count)
            assert len(set(pages)) == count
            assert held.isdisjoint(pages)
            holders += [(page, False) for page in pages]
        elif action == "share" and number in held:
            pool.share([number], is_cached=is_cached)
            holders.append((number, is_cached))
        elif action == "back" and (number, is_cached) in holders:
            pool.give_back([number], is_cached=is_cached)
            holders.remove((number, is_cached))
        held = {page for page, _ in holders}
        alone = held - {page for page, is_of_cache in holders if not is_of_cache}
        assert (pool.num_free, pool.num_evictable) == (6 - len(held), len(alone))
        assert pool.count_evictable(range(3)) == len(alone & {0, 1, 2})
