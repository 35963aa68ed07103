"""Chains of calls."""

import jax
import numpy as np
import pytest

from bench.kernels.chain import chain, rotation
from bench.kernels.ops import OPS, WORKLOADS
from bench.measure import L2_BYTES
from tests.bench.kernels.workloads import LLAMA, SMALL, case


def test_calls_of_a_chain_are_all_made_each_on_its_own_arguments():
    found = case("decode_attention", SMALL["plain"])
    results = chain(found, "xla")()
    assert len(results) == 2
    for own, result in zip(found.own, results, strict=True):
        np.testing.assert_allclose(result, found.call(found.shared, own, implementation="xla"), atol=1e-6)
    written = case("kv_write_decode", SMALL["plain"])
    before = jax.device_get(written.shared)
    run = chain(written, "xla")
    after = jax.device_get(run())
    assert not np.array_equal(before.tail.k, after.tail.k)
    assert not np.array_equal(before.retrieval.k, after.retrieval.k)
    run()  # the donated pools of the call before


def test_inputs_rotate_until_the_cache_of_a_gpu_is_cold_and_fit_its_memory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("bench.kernels.chain.is_gpu", lambda: True)
    gpu = 140 * 2**30
    for op in OPS:
        sizes = OPS[op].sizes(WORKLOADS["llama3_8b_gate_up_b8_w4g128"] if op == "quantized_matmul" else LLAMA)
        calls, sets = rotation(sizes, memory=gpu)
        assert sizes.pools * sets + 2 * sizes.own * calls <= gpu
        if op != "kv_write_decode":  # so little that 40 calls do not fill the cache
            assert min(calls * sizes.moved, sets * sizes.pools) >= 2 * L2_BYTES
    with pytest.raises(MemoryError, match=r"bytes, 1.72e\+09 are free"):
        rotation(OPS["decode_dense"].sizes(LLAMA), memory=2**31)
