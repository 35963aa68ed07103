"""The pages that decoding reads: the closed form against a count, step by step."""

from typing import Any

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from lserve_jax.config.pages import visible_pages
from lserve_jax.engine.reads import PageReads


def counted(reads: PageReads, prompt: int, steps: int) -> float:
    """The ratio by its definition: every step, layer and class of heads one by one."""
    read = dense = 0
    for step in range(steps):
        length = prompt + 1 + step
        selected_at = length - step % reads.selector_interval
        held, at_selection = (-(-tokens // reads.page_size) for tokens in (length, selected_at))
        windows = visible_pages(
            length - 1, 1, sink=reads.sink, window=reads.local, page_size=reads.page_size, num_pages=held
        )
        for retrieval, streaming, chosen in reads.heads:
            begun_since = held - at_selection
            read += retrieval * (held if chosen is None else min(chosen, at_selection) + begun_since)
            read += streaming * int(np.sum(windows))
            dense += (retrieval + streaming) * held
    return read / dense


HEADS = st.tuples(st.integers(0, 4), st.integers(0, 4), st.none() | st.integers(1, 30)).filter(lambda h: h[0] + h[1])


@st.composite
def page_reads(draw: st.DrawFn) -> PageReads:
    return PageReads(
        page_size=draw(st.integers(1, 70)),
        sink=draw(st.integers(0, 200)),
        local=draw(st.integers(1, 200)),
        selector_interval=draw(st.integers(1, 20) | st.sampled_from([64, 1000])),
        heads=tuple(draw(st.lists(HEADS, min_size=1, max_size=3))),
    )


DEFAULTS: dict[str, Any] = {"page_size": 64, "sink": 128, "local": 256, "selector_interval": 4}


@given(page_reads(), st.integers(1, 700), st.integers(1, 150))
@example(PageReads(**DEFAULTS, heads=((4, 4, 64), (8, 0, None))), 3990, 300)
@example(PageReads(**DEFAULTS, heads=((0, 8, None),)), 1, 900)
def test_the_ratio_equals_a_count_of_every_step(reads: PageReads, prompt: int, steps: int):
    assert reads.ratio(prompt, steps) == counted(reads, prompt, steps)


def test_the_ratio_of_lengths_that_no_loop_could_count_takes_no_time():
    """A billion steps after a billion tokens: in the limit a head reads its budget of 1.5 billion tokens on average."""
    reads = PageReads(**DEFAULTS, heads=((1, 1, 64),))
    ratio = reads.ratio(10**9, 10**9)
    assert ratio is not None
    budget, window, mean = 64 * 64, 128 + 256, 1.5e9
    assert abs(ratio * 2 * mean - (budget + window)) < 2 * 64


def test_without_a_step_there_is_no_ratio():
    assert PageReads(**DEFAULTS, heads=((1, 0, None),)).ratio(100, 0) is None
