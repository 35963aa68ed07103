"""The pages that decoding reads: all steps at once against a count, step by step."""

import math

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from lserve_jax.config.attention import AttentionConfig
from lserve_jax.config.pages import visible_pages
from lserve_jax.engine.reads import PageReads


def counted(reads: PageReads, prompt: int, steps: int) -> float:
    """The ratio by its definition: every step, layer and class of heads one by one."""
    attention, read, dense = reads.attention, 0, 0
    for step in range(steps):
        length = prompt + 1 + step
        selected_at = length - step % attention.selector_interval
        held, at_selection = (-(-tokens // attention.page_size) for tokens in (length, selected_at))
        windows = visible_pages(
            length - 1, 1, sink=attention.sink, window=attention.local, page_size=attention.page_size, num_pages=held
        )
        for retrieval, streaming, is_selecting in reads.heads:
            begun_since = held - at_selection
            chosen = budget(attention, at_selection)
            read += retrieval * (min(chosen, at_selection) + begun_since if is_selecting else held)
            read += streaming * int(np.sum(windows))
            dense += (retrieval + streaming) * held
    return read / dense


def budget(attention: AttentionConfig, pages: int) -> int:
    """The pages of a selection from so many, by its definition."""
    assert attention.token_budget is not None and attention.num_selected is not None
    share = math.ceil(float(np.float32(pages) * np.float32(attention.budget_share)))
    return min(max(attention.token_budget // attention.page_size, share), attention.num_selected)


HEADS = st.tuples(st.integers(0, 4), st.integers(0, 4), st.booleans()).filter(lambda h: h[0] + h[1])


@st.composite
def page_reads(draw: st.DrawFn) -> PageReads:
    page_size, interval = draw(st.integers(1, 70)), draw(st.integers(1, 20) | st.sampled_from([64, 1000]))
    forced = 1 + (interval + page_size - 2) // page_size + 1
    budget = (forced + draw(st.integers(0, 30))) * page_size
    attention = AttentionConfig(
        page_size=page_size,
        sub_page_size=page_size,
        sink=draw(st.integers(0, 200)),
        local=draw(st.integers(1, 200)),
        selector_interval=interval,
        token_budget=budget,
        budget_share=draw(st.sampled_from([0.0, 0.1, 1 / 3, 1.0])),
        budget_cap=budget + draw(st.integers(0, 30)) * page_size,
    )
    return PageReads(attention=attention, heads=tuple(draw(st.lists(HEADS, min_size=1, max_size=3))))


DEFAULT = AttentionConfig()


@given(page_reads(), st.integers(1, 700), st.integers(1, 150))
@example(PageReads(attention=DEFAULT, heads=((4, 4, True), (8, 0, False))), 3990, 300)
@example(PageReads(attention=DEFAULT, heads=((0, 8, False),)), 1, 900)
def test_the_ratio_equals_a_count_of_every_step(reads: PageReads, prompt: int, steps: int):
    assert reads.ratio(prompt, steps) == counted(reads, prompt, steps)


def test_without_a_step_there_is_no_ratio():
    assert PageReads(attention=DEFAULT, heads=((1, 0, True),)).ratio(100, 0) is None
