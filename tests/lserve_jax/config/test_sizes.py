import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lserve_jax import AttentionConfig
from lserve_jax.config.pages import NO_PAGE, retrieval_pages
from lserve_jax.config.sizes import Sizes, most_pages

SIZES = Sizes(max_model_len=1000, max_num_seqs=3, prefill_chunk=32, steps_per_call=8)
ATTENTION = AttentionConfig(token_budget=None, page_size=8, sub_page_size=8, sink=10, local=20, prefill_local=40)


def test_every_size_that_is_no_whole_number_from_1_is_named_in_one_line():
    message = r"^max_model_len=12\.5 must be a whole number from 1; prefill_chunk=0 must be a whole number from 1$"
    with pytest.raises(ValueError, match=message):
        Sizes(max_model_len=12.5, prefill_chunk=0)  # type: ignore[arg-type]


@given(st.integers(1, 2000), st.data())
def test_a_pool_never_needs_more_pages_than_a_sequence_has_and_a_prefill_never_fewer_than_decoding(
    length: int, data: st.DataObject
):
    prompt = data.draw(st.integers(1, length))
    every = retrieval_pages(length, ATTENTION.page_size)
    assert most_pages(ATTENTION, SIZES, length, prompt, keeps_all=True) == every
    decode, prefill = (most_pages(ATTENTION, SIZES, length, tokens, keeps_all=False) for tokens in (0, prompt))
    assert decode <= prefill <= every


def test_a_longer_context_makes_the_pool_of_windows_no_larger():
    found = {most_pages(ATTENTION, SIZES, length, length, keeps_all=False) for length in (500, 1000, 10**6)}
    assert len(found) == 1


def test_the_host_and_the_kernels_mean_the_same_by_no_page():
    from pallas_kernels import NO_PAGE as OF_KERNELS

    assert NO_PAGE == OF_KERNELS


def test_sizes_are_one_static_argument():
    assert hash(SIZES) == hash(dataclasses.replace(SIZES))
