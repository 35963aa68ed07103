"""The points of prompts, which are read in chunks."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.e2e.attention import attention_chunk
from bench.e2e.counts import prefill_flops
from bench.e2e.inputs import attention_inputs, page_tables
from bench.e2e.points import Measured, repeated
from bench.e2e.programs import Jobs, Program
from bench.measure import timed
from bench.text import rounded
from lserve_jax.models.llama import Params
from lserve_jax.runtime.steps import prefill_step
from lserve_jax.weights import abstract_params
from pallas_kernels import PageTables


class Prefill(Measured):
    """A prompt in chunks."""

    def jobs(self) -> Jobs:
        config, params = self.config, abstract_params(self.config.model, jnp.dtype(self.config.dtype))
        inputs = jax.eval_shape(lambda: attention_inputs(config, 1, self.chunk))
        static = {"config": config}
        return {
            "step": (prefill_step, (params, self.template, self._tokens(), *self._span(0)), static),
            "attention": (attention_chunk, (self.template, *inputs, *self._span(0)), static),
        }

    def _tokens(self) -> np.ndarray:
        tokens = np.random.default_rng(0).integers(0, self.config.model.vocab_size, (1, self.chunk))
        return tokens.astype(np.int32)

    def _span(self, start: int) -> tuple[np.ndarray, np.ndarray, PageTables]:
        attention, count = self.config.attention, min(self.chunk, self.point.context - start)
        tables = page_tables(
            *(self.config, self.pools),
            slots=1,
            context=self.point.context,
            span=range(start, start + count),
            window=max(attention.local, attention.prefill_local),
        )
        return np.array([start], np.int32), np.array([count], np.int32), tables

    def times(self, params: Params, programs: dict[str, Program], seconds: float) -> dict[str, Any]:
        step, attention = (programs[name].call for name in ("step", "attention"))
        tokens, inputs = self._tokens(), attention_inputs(self.config, 1, self.chunk)

        def model(start: int) -> Any:
            return self._through(lambda cache: step(params, cache, tokens, *self._span(start)))

        def alone(start: int) -> Any:
            return self._through(lambda cache: attention(cache, *inputs, *self._span(start)))

        def at(call: Callable[[int], Any]) -> dict[int, float]:
            return {start: float(np.median(repeated(partial(call, start)))) for start in histories.tolist()}

        starts = np.arange(0, self.point.context, self.chunk)
        histories = np.unique(np.linspace(0, len(starts) - 1, 5).astype(int)) * self.chunk
        chunk_s, attention_s = at(model), at(alone)
        estimate, attention_total = (interpolated(times, starts) for times in (chunk_s, attention_s))
        is_whole = estimate <= seconds
        prefill_s = timed(lambda: [model(start) for start in starts.tolist()][-1])[0] if is_whole else estimate
        return {
            "measured": "whole" if is_whole else "chunks",
            "prefill_s": rounded(prefill_s),
            "tokens_per_s": rounded(self.point.context / prefill_s),
            "tflop_per_s": rounded(prefill_flops(self.config, self.point.context) / prefill_s / 1e12),
            "interpolated_s": rounded(estimate),
            "attention_s": rounded(attention_total),
            "attention_share": rounded(attention_total / estimate),
            "chunk_ms": {str(start): rounded(s * 1e3) for start, s in chunk_s.items()},
            "attention_chunk_ms": {str(start): rounded(s * 1e3) for start, s in attention_s.items()},
        }


def interpolated(seconds: Mapping[int, float], starts: np.ndarray) -> float:
    """Returns the summed seconds of the chunks at ``starts``, from those of the first, the last and some between."""
    return float(np.interp(starts, list(seconds), list(seconds.values())).sum())
