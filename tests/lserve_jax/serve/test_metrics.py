"""The metrics: readable for Prometheus, named as what reads vLLM's expects."""

from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from lserve_jax.config.errors import InputError
from lserve_jax.engine.prefix_cache import CacheCounts, PrefixCache
from lserve_jax.serve.metrics import Metrics


def samples(metrics: Metrics) -> dict[tuple[str, ...], float]:
    """Every sample by its name and the values of its labels."""
    families = text_string_to_metric_families(metrics.render().decode())
    return {(one.name, *one.labels.values()): one.value for family in families for one in family.samples}


def test_the_names_are_those_of_vllm_after_its_prefix():
    found = {name for name, *_ in samples(Metrics("vllm:"))}
    wanted = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prompt_tokens_total")
    wanted += ("generation_tokens_total", "prefix_cache_queries_total", "prefix_cache_hits_total")
    for name in ("time_to_first_token", "inter_token_latency", "e2e_request_latency", "request_queue_time"):
        wanted += (f"{name}_seconds_sum", f"{name}_seconds_count", f"{name}_seconds_bucket")
    assert {f"vllm:{name}" for name in wanted} <= found


def test_what_is_counted_is_read():
    metrics = Metrics()
    metrics.http("/v1/models", 200)
    metrics.http("/v1/models", 200)
    metrics.count_call("decode", 0.25)
    metrics.count_prompt(100, 1.5)
    cache = PrefixCache(64, None, None, CacheCounts(queries=40, hits=30))
    scheduler: Any = SimpleNamespace(cache=cache, swapped=[], num_swaps=0)
    metrics.begin(scheduler)
    cache.counts.queries, cache.counts.hits = 140, 94
    metrics.set_engine(scheduler)
    metrics.set_engine(scheduler)  # counts once
    metrics.count_tokens(1, 2.0, is_first=True)
    metrics.count_tokens(4, 0.4, is_first=False)
    metrics.count_finished("stop", 3.0)
    metrics.set_requests(running=3, waiting=2)
    metrics.set_pools({"retrieval": (25, 100), "streaming": (30, 40)})
    found = samples(metrics)
    expected = {
        ("lserve_http_requests_total", "/v1/models", "200"): 2,
        ("lserve_device_calls_total", "decode"): 1,
        ("lserve_device_seconds_total", "decode"): 0.25,
        ("lserve_prompt_tokens_total",): 100,
        ("lserve_prefix_cache_queries_total",): 100,
        ("lserve_prefix_cache_hits_total",): 64,
        ("lserve_request_queue_time_seconds_sum",): 1.5,
        ("lserve_generation_tokens_total",): 5,
        ("lserve_time_to_first_token_seconds_sum",): 2.0,
        ("lserve_inter_token_latency_seconds_count",): 4,
        ("lserve_inter_token_latency_seconds_sum",): pytest.approx(0.4),
        ("lserve_request_success_total", "stop"): 1,
        ("lserve_e2e_request_latency_seconds_sum",): 3.0,
        ("lserve_num_requests_running",): 3,
        ("lserve_num_requests_waiting",): 2,
        ("lserve_kv_pool_usage_perc", "retrieval"): 0.75,
        ("lserve_kv_pool_usage_perc", "streaming"): 0.25,
        ("lserve_kv_pool_pages", "streaming"): 40,
        ("lserve_kv_cache_usage_perc",): 0.75,
    }
    assert {name: found.get(name) for name in expected} == expected


def test_two_servers_in_one_process_count_apart():
    one, other = Metrics(), Metrics()
    one.http("/health", 200)
    assert ("lserve_http_requests_total", "/health", "200") in samples(one)
    assert ("lserve_http_requests_total", "/health", "200") not in samples(other)


@pytest.mark.parametrize("prefix", ["", "1x", "a b", "a-b", "é", "a\n"])
def test_a_prefix_that_no_name_may_have_is_refused_in_one_line(prefix: str):
    with pytest.raises(
        InputError, match=r"^metrics_prefix=.* must be letters, digits, _ and :, and begin with no digit$"
    ):
        Metrics(prefix)
