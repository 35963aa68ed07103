"""What Prometheus reads of the server: requests, tokens, times, memory. Names follow vLLM's, after an own prefix."""

import re
from collections.abc import Mapping
from dataclasses import replace

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from lserve_jax.config.errors import InputError, shown
from lserve_jax.engine.prefix_cache import CacheCounts
from lserve_jax.engine.scheduler import Scheduler

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
"""Upper ends of the buckets of times. A prompt of a million tokens takes minutes."""


class Metrics:
    """The metrics of one server, in a registry of their own. Any thread may count."""

    def __init__(self, prefix: str = "lserve_") -> None:
        """Creates the metrics, all 0.

        Args:
          prefix: what their names begin with; "vllm:" suits what expects vLLM, as llm-d does.

        Raises:
          InputError: if no name of a metric may begin so.
        """
        if not re.fullmatch(r"[a-zA-Z_:][a-zA-Z0-9_:]*", prefix):
            raise InputError(
                f"metrics_prefix={shown(prefix)} must be letters, digits, _ and :, and begin with no digit"
            )
        self.registry = CollectorRegistry()
        self._counted = CacheCounts()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(prefix + name, text, labels, registry=self.registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(prefix + name, text, labels, registry=self.registry)

        def seconds(name: str, text: str) -> Histogram:
            return Histogram(prefix + name, text, buckets=_SECONDS, registry=self.registry)

        self.running = gauge("num_requests_running", "Requests that have a slot.")
        self.waiting = gauge("num_requests_waiting", "Requests that wait for a slot.")
        self.cache_usage = gauge("kv_cache_usage_perc", "Share of the pages in use, of the fuller pool, 0 to 1.")
        self.pool_usage = gauge("kv_pool_usage_perc", "Share of the pages in use, 0 to 1.", "pool")
        self.pool_pages = gauge("kv_pool_pages", "Pages of the pool.", "pool")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts that were read, cached ones included.")
        self.generation_tokens = counter("generation_tokens", "Generated tokens.")
        self.prefix_queries = counter("prefix_cache_queries", "Tokens of prompts that were looked up in the cache.")
        self.prefix_hits = counter("prefix_cache_hits", "Tokens of prompts that were found in the cache.")
        self.cached_chunks = gauge("prefix_cache_chunks", "Prefill chunks in the prefix cache.")
        self.cached_windows = gauge("prefix_cache_windows", "Boundaries at which streaming heads can go on.")
        self.evictions = gauge("prefix_cache_evictions", "Entries given up so far.", "kind")
        self.swapped = gauge("num_requests_swapped", "Requests whose pages are in host memory.")
        self.swaps = gauge("num_swaps", "How often a request has left for host memory so far.")
        self.queue_seconds = seconds("request_queue_time_seconds", "From arrival to the first call.")
        self.first_token_seconds = seconds("time_to_first_token_seconds", "From arrival to the first token.")
        self.token_seconds = seconds(
            "inter_token_latency_seconds", "From one token of a request to the next, on average."
        )
        self.request_seconds = seconds("e2e_request_latency_seconds", "From arrival to the end.")
        self.succeeded = counter("request_success", "Requests that finished.", "finished_reason")
        self.failed = counter("request_failure", "Requests that did not finish.", "reason")
        self.refused = counter("request_refused", "Requests that were not accepted.", "reason")
        self.device_calls = counter("device_calls", "Calls of the device.", "kind")
        self.device_seconds = counter("device_seconds", "Time in calls of the device.", "kind")
        self.device_failures = counter("device_failures", "Calls of the device that failed.")
        self.http_requests = counter("http_requests", "Answered HTTP requests.", "route", "status")

    def count_call(self, kind: str, seconds: float) -> None:
        """Counts a call of the device."""
        self.device_calls.labels(kind=kind).inc()
        self.device_seconds.labels(kind=kind).inc(seconds)

    def count_prompt(self, tokens: int, waited_s: float) -> None:
        """Counts a prompt at its first call."""
        self.queue_seconds.observe(waited_s)
        self.prompt_tokens.inc(tokens)

    def count_tokens(self, count: int, seconds: float, *, is_first: bool) -> None:
        """Counts tokens that one call has brought ``seconds`` after those before, or after the request's arrival."""
        self.generation_tokens.inc(count)
        if is_first:
            self.first_token_seconds.observe(seconds)
            return
        for _ in range(count):
            self.token_seconds.observe(seconds / count)

    def count_finished(self, reason: str, seconds: float) -> None:
        """Counts a request that finished, ``seconds`` after it came."""
        self.succeeded.labels(finished_reason=reason).inc()
        self.request_seconds.observe(seconds)

    def set_requests(self, *, running: int, waiting: int) -> None:
        """Sets how many requests are open."""
        self.running.set(running)
        self.waiting.set(waiting)

    def set_pools(self, pools: Mapping[str, tuple[int, int]]) -> None:
        """Sets the use of the pools from their free pages and all their pages."""
        used = {name: 1 - free / pages for name, (free, pages) in pools.items()}
        for name, (_, pages) in pools.items():
            self.pool_pages.labels(pool=name).set(pages)
            self.pool_usage.labels(pool=name).set(used[name])
        self.cache_usage.set(max(used.values(), default=0.0))

    def begin(self, scheduler: Scheduler) -> None:
        """Leaves out of the counts what the prefix cache has done so far."""
        if scheduler.cache is not None:
            self._counted = replace(scheduler.cache.counts)

    def set_engine(self, scheduler: Scheduler) -> None:
        """Sets what the prefix cache holds and has done, and what has moved to host memory."""
        self.swapped.set(len(scheduler.swapped))
        self.swaps.set(scheduler.num_swaps)
        if (cache := scheduler.cache) is not None:
            self.cached_chunks.set(cache.num_entries)
            self.cached_windows.set(cache.num_windows)
            self.prefix_queries.inc(cache.counts.queries - self._counted.queries)
            self.prefix_hits.inc(cache.counts.hits - self._counted.hits)
            self._counted = replace(cache.counts)
            self.evictions.labels(kind="chunk").set(cache.counts.evicted_entries)
            self.evictions.labels(kind="window").set(cache.counts.evicted_windows)

    def http(self, route: str, status: int) -> None:
        """Counts an answered request; ``route`` is one of the server's own, never text of a client."""
        self.http_requests.labels(route=route, status=str(status)).inc()

    def render(self) -> bytes:
        """Returns all metrics as Prometheus reads them: text in its format 0.0.4."""
        return generate_latest(self.registry)
