"""Bytes and operations that a call must move and compute."""

from bench.kernels.ops import OPS, WORKLOADS
from bench.kernels.sizes import stored_bytes
from pallas_kernels.core.workloads import TINY
from tests.bench.kernels.workloads import LLAMA, SMALL


def test_bytes_count_every_number_that_must_move():
    w = SMALL["int8"]
    token = (16 + 2 * 16 * 2 // 16) + (8 + 4)
    assert stored_bytes(w, 3, 2) == 5 * token
    assert stored_bytes(TINY["mixed"], 1, 0) == 2 * 8 * 4
    four = WORKLOADS["llama3_8b_128k_b8_int4"]
    assert stored_bytes(four, 1, 10) == 164 + 10 * 292
    vectors, newest = 2 * 4 * 16 * 2, 64 * 2 * 16 * 2
    assert OPS["decode_attention"].sizes(w).moved == (4 * 64 + 128 + 192) * token + 2 * newest + vectors
    vectors, newest = 2 * 32 * 128 * 2, 64 * 512
    assert OPS["decode_dense"].sizes(LLAMA).moved == 8 * (8 * ((2**17 - 64) * 292 + newest) + vectors)
    selected, window = 4 * 63 * 64, 4 * (128 + 192)
    assert OPS["decode_attention"].sizes(LLAMA).moved == 8 * ((selected + window) * 292 + 8 * newest + vectors)
    statistics = 8 * 4 * 2 * 2**13 * 128 * 2
    assert OPS["page_select"].sizes(LLAMA).moved == statistics + 8 * 16 * 128 * 2


def test_bytes_of_a_write_are_the_new_tokens_the_tail_and_what_is_sealed():
    """A decoded token is read again when its page is sealed."""
    assert OPS["kv_write_decode"].sizes(LLAMA).moved == 8 * 8 * (3 * 512 + 292)
    chunk = OPS["kv_write_prefill"].sizes(WORKLOADS["llama3_8b_128k_chunk8k_int4"]).moved
    assert chunk == 8 * (8192 + 64) * 512 + 4 * 8192 * (164 + 292)
    plain = OPS["kv_write_prefill"].sizes(WORKLOADS["llama3_8b_128k_chunk8k"]).moved
    assert plain == 8 * (2 * 8192 + 64) * 512 + 4 * 8192 * 32


def test_a_product_moves_its_weights_with_their_scales():
    moved = OPS["quantized_matmul"].sizes(WORKLOADS["llama3_8b_o_b8_w4g128"]).moved
    assert moved == 4096 * (4096 // 2 + 32 * 2 * 2) + 8 * (4096 + 4096) * 2
    assert OPS["quantized_matmul"].sizes(WORKLOADS["llama3_8b_o_b1_w8a8"]).pools == 4096 * (4096 + 4)


def test_flops_of_prefill_are_those_of_visible_keys():
    w = WORKLOADS["llama3_8b_32k_whole"]
    assert OPS["prefill_dense"].sizes(w).flops == 4 * 32 * 128 * (2**15 * (2**15 + 1) // 2)
    seen = sum(min(i + 1, w.sink + w.prefill_local) for i in range(2**15))
    half = 4 * 16 * 128 * (2**15 * (2**15 + 1) // 2 + seen)
    assert OPS["prefill_attention"].sizes(w).flops == half


def test_batches_and_chunks_are_in_the_names():
    assert (LLAMA.batch, LLAMA.bits, LLAMA.context) == (8, (8, 8), 2**17)
    assert WORKLOADS["llama3_8b_512k_b32"].batch == 32
    chunked, whole = (WORKLOADS[f"llama3_8b_128k_{name}"] for name in ("chunk8k_int4", "whole"))
    assert (chunked.chunk, chunked.bits, whole.chunk) == (8192, (4, 4), 2**17)
