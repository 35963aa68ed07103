"""The points of decode steps."""

from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.e2e.attention import attention_loop
from bench.e2e.counts import cache_bytes_read, weight_bytes_read
from bench.e2e.inputs import attention_inputs, page_tables
from bench.e2e.points import Measured, Point, repeated
from bench.e2e.programs import Jobs, Program
from bench.measure import copy_bandwidth
from bench.spread import spread
from bench.text import rounded
from lserve_jax.config.inference import InferenceConfig
from lserve_jax.models.llama import Params
from lserve_jax.runtime.sampling import SamplingState
from lserve_jax.runtime.steps import DecodeState, decode_loop
from lserve_jax.weights import abstract_params
from pallas_kernels import PageTables


class Decode(Measured):
    """``steps`` decode steps in one call, as in the engine, with as many selections as happen there."""

    def __init__(self, point: Point, config: InferenceConfig, *, chunk: int, steps: int) -> None:
        super().__init__(point, config, chunk=chunk, steps=steps)
        if point.context < steps:
            raise ValueError(f"a context of {point.context} tokens is too short for {steps} steps")
        self.lengths = np.full(point.batch, point.context - steps + 1, np.int32)

    @cached_property
    def tables(self) -> PageTables:
        """The page tables of all steps."""
        return page_tables(
            *(self.config, self.pools),
            slots=self.point.batch,
            context=self.point.context,
            span=range(self.point.context - self.steps, self.point.context),
            window=self.config.attention.local,
        )

    def jobs(self) -> Jobs:
        config, params = self.config, abstract_params(self.config.model, jnp.dtype(self.config.dtype))
        inputs = jax.eval_shape(lambda: attention_inputs(config, self.point.batch, 1))
        steps = {"config": config, "steps": self.steps}
        return {
            "step": (
                decode_loop,
                (params, self.template, *self._arguments()),
                {"config": config, "max_steps": self.steps},
            ),
            "attention": (attention_loop, (self.template, *inputs, self.lengths, self.tables), steps),
        }

    def _arguments(self) -> tuple[Any, ...]:
        batch = self.point.batch
        rows: list[Any] = [
            np.arange(batch, dtype=np.int32) % self.config.model.vocab_size,
            self.lengths,
            np.zeros(batch, np.int32),
            np.full(batch, self.steps, np.int32),
            np.full((batch, 1), -1, np.int32),
        ]
        return DecodeState(*rows), self.tables, SamplingState.from_params([None] * batch), np.int32(self.steps)

    def times(self, params: Params, programs: dict[str, Program], seconds: float) -> dict[str, Any]:
        arguments, inputs = self._arguments(), attention_inputs(self.config, self.point.batch, 1)
        step, attention = (programs[name].call for name in ("step", "attention"))
        whole = repeated(lambda: self._through(lambda cache: step(params, cache, *arguments))) / self.steps
        alone = repeated(lambda: self._through(lambda cache: attention(cache, *inputs, self.lengths, self.tables)))
        median, low, high, _ = spread(whole)
        attention_s = float(np.median(alone)) / self.steps
        lengths = range(int(self.lengths[0]), self.point.context + 1)
        weights = weight_bytes_read(self.config)
        cached = self.point.batch * cache_bytes_read(self.config, lengths)
        limit = (weights + cached) / copy_bandwidth()
        return {
            "measured": "whole",
            "ms_per_token": rounded(median * 1e3),
            "quartiles_ms": [rounded(low * 1e3), rounded(high * 1e3)],
            "tokens_per_s": rounded(self.point.batch / median),
            "attention_ms": rounded(attention_s * 1e3),
            "attention_share": rounded(attention_s / median),
            "weight_bytes_read": weights,
            "cache_bytes_read": round(cached),
            "limit_ms": rounded(limit * 1e3),
            "over_limit": rounded(median / limit),
        }
