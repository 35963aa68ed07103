"""Bytes and operations, counted by hand."""

import pytest

from bench.e2e.counts import cache_bytes_read, prefill_flops, weight_bytes_read
from bench.e2e.models import inference_config


@pytest.mark.parametrize("preset", ["dense", "lserve", "qserve", "lserve:int8", "lserve:int4"])
def test_bytes_read_are_those_of_llama_3_8b_counted_by_hand(preset: str):
    config = inference_config("llama-3.1-8b", preset, "auto")
    assert weight_bytes_read(config) == pytest.approx(2 * 7.504e9, rel=1e-3)
    four, eight = 164.0, 292.0
    token = {"dense": 512.0, "lserve": 512.0, "qserve": four, "lserve:int8": eight, "lserve:int4": four}[preset]
    first, steps = 128 * 1024 - 7, 8
    read = cache_bytes_read(config, range(first, first + steps))
    pages = 2048
    if config.attention.token_budget is None:
        assert read == pytest.approx(32 * 8 * pages * 64 * token)
        return
    statistics = pages * 2 * 4 * 128 * 2  # 4 sub-pages, min and max, at every step
    retrieval, streaming = 64 * 64 * token + statistics, 6.5 * 64 * (eight if preset == "lserve:int4" else token)
    assert read == pytest.approx(32 * 4 * (retrieval + streaming), rel=0.01 if preset == "lserve:int4" else 0.02)


def test_flops_of_a_prompt_are_two_a_weight_and_the_visible_products():
    dense, lserve = (inference_config("llama-3.1-8b", preset, "auto") for preset in ("dense", "lserve"))
    tokens = 32 * 1024
    layers = 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    attention = 4 * 32 * 32 * 128 * tokens * (tokens + 1) / 2
    assert prefill_flops(dense, tokens) == pytest.approx(2 * layers * tokens + attention)
    assert prefill_flops(lserve, tokens) < 2 * layers * tokens + 0.75 * attention
