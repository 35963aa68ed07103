"""A point of the bench: one model call at one preset, context and batch, and how it is measured."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from bench.e2e.inputs import random_cache
from bench.e2e.programs import Jobs, Program
from bench.measure import timings
from bench.text import length_name, rounded
from lserve_jax.config.inference import InferenceConfig
from lserve_jax.config.sizes import PoolSizes, Sizes
from lserve_jax.engine.memory import dense_bf16_bytes, plan_memory, tree_bytes
from lserve_jax.models.llama import Params
from lserve_jax.runtime.cache import KVCache, init_cache

MEASURE_SECONDS, MOST_REPEATS = 1.0, 20


class Point(NamedTuple):
    """One measurement; ``preset`` is ``PRESET[:KV_DTYPE]``."""

    part: str
    preset: str
    context: int
    batch: int = 1

    def __str__(self) -> str:
        return f"{self.part} {self.preset} {length_name(self.context)} x{self.batch}"


class Measured:
    """A point's programs and arguments, which are not allocated before `measure`."""

    def __init__(self, point: Point, config: InferenceConfig, *, chunk: int, steps: int) -> None:
        self.point, self.config, self.steps = point, config, steps
        self.chunk = min(chunk, point.context)
        sizes = Sizes(
            max_model_len=point.context, max_num_seqs=point.batch, prefill_chunk=self.chunk, steps_per_call=steps
        )
        self.pools = PoolSizes.of(config, sizes)
        self.plan = partial(plan_memory, config, sizes)
        self.template: KVCache = jax.eval_shape(
            lambda: init_cache(
                config,
                max_num_seqs=point.batch,
                retrieval_pages=self.pools.retrieval,
                streaming_pages=self.pools.streaming,
            )
        )
        self._cache: KVCache | None = None

    def jobs(self) -> Jobs:
        """Returns the point's programs: ``step`` and ``attention``."""
        raise NotImplementedError

    def times(self, params: Params, programs: dict[str, Program], seconds: float) -> dict[str, Any]:
        """Returns the measured numbers; no single piece of work takes longer than ``seconds``."""
        raise NotImplementedError

    def measure(self, params: Params, programs: dict[str, Program], seconds: float) -> dict[str, Any]:
        """Returns the point's numbers, its memory and its compile times; frees the cache again."""
        self._cache = random_cache(self.template)
        jax.block_until_ready(self._cache)
        try:
            times = self.times(params, programs, seconds)
        finally:
            self._cache = None
        dense = self.point.batch * dense_bf16_bytes(self.config, self.point.context)
        memory = {
            "weight_bytes": tree_bytes(params),
            "cache_bytes": tree_bytes(self.template),
            "cache_over_dense_bf16": rounded(tree_bytes(self.template) / dense),
            "temporary_bytes": programs["step"].temporary_bytes,
            "peak_bytes_of_process": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
        }
        compile_s = {name: rounded(program.seconds) for name, program in programs.items()}
        return times | memory | {"compile_s": compile_s, "mosaic_kernels": programs["step"].mosaic_kernels}

    def _through(self, call: Callable[[KVCache], tuple[Any, ...]]) -> Any:
        """Returns a call's first result; its last is the donated cache, kept for the next call."""
        assert self._cache is not None
        result = call(self._cache)
        self._cache = result[-1]
        return result[0]


def repeated(call: Callable[[], Any]) -> np.ndarray:
    """Returns the seconds of each of as many calls as fit `MEASURE_SECONDS`, at least one, after a warm-up call."""
    first = timings(call, 1)
    more = min(MOST_REPEATS, int(MEASURE_SECONDS / first[0])) - 1
    return np.concatenate([first, timings(call, more)]) if more > 0 else first
