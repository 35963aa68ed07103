import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lserve_jax import AttentionConfig
from lserve_jax.config.errors import InputError
from lserve_jax.config.pages import NO_PAGE, retrieval_pages
from lserve_jax.config.sizes import CacheSettings, Sizes, most_pages

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


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("kv_memory", "all", "kv_memory='all' must be a number of bytes, fit or free"),
        ("kv_memory", 0, "kv_memory=0 must be a whole number of bytes from 1"),
        ("kv_memory", 1.5, r"kv_memory=1\.5 must be a whole number of bytes from 1"),
        ("kv_memory", True, "kv_memory=True must be a whole number of bytes from 1"),
        ("swap_memory", -1, "swap_memory=-1 must be a whole number of bytes from 0"),
        ("swap_memory", False, "swap_memory=False must be a whole number of bytes from 0"),
        ("swap_memory", None, "swap_memory=None must be a whole number of bytes from 0"),
        ("swap_memory", "fit", "swap_memory='fit' must be a whole number of bytes from 0"),
        ("prefix_cache", 1, "prefix_cache=1 must be true or false"),
        ("prefix_windows", -1, "prefix_windows=-1 must be a whole number from 0"),
    ],
)
def test_cache_settings_out_of_range_are_refused_in_one_line(field: str, value: object, message: str):
    with pytest.raises(InputError, match=f"^{message}$"):
        CacheSettings(**{field: value})  # type: ignore[arg-type]


def test_bytes_are_known_only_if_they_are_given_as_such():
    assert [CacheSettings(kv_memory=value).kv_bytes for value in (None, "fit", "free", 5)] == [None, None, None, 5]
