"""Whole-model times: `python -m bench.e2e --out DIR [--minutes 9] [--contexts 128k,8k] [--presets lserve,dense] …`.

Weights and cached pages are random and made on the device: a decode step at 512K tokens needs no prefill. Parts:

  values    greedy tokens and logits of a real checkpoint in bfloat16 here, against float32 on the CPU
  compile   seconds to compile prefill and decode, cold and from JAX's persistent cache
  decode    ms a token, and what reading weights and cache would take at this device's copy bandwidth
  prefill   seconds of a prompt: of all its chunks ("measured": "whole"), or interpolated between chunks that were timed
            at several history lengths from none to all ("measured": "chunks")
  peer      `transformers` with SDPA, random weights of the same shape, in a process of its own

One JSON line a result goes to DIR/e2e.jsonl at once. What stands there for this device, jax, code and setting is not
measured again, so a run that its minutes ended goes on where it stopped. Contexts are measured in the order given.
"""

import argparse
import dataclasses
import datetime
import gc
import hashlib
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, cached_property, partial
from itertools import batched
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from bench.measure import ROOT, Log, commit, copy_bandwidth, provenance, sources, timings
from lserve_jax.config.attention import from_preset
from lserve_jax.config.heads import classify
from lserve_jax.config.hf import read_hf
from lserve_jax.config.inference import InferenceConfig
from lserve_jax.config.model import ModelConfig
from lserve_jax.config.pages import visible_pages
from lserve_jax.engine.memory import PoolSizes, dense_bf16_bytes, free_memory, plan_memory, tree_bytes
from lserve_jax.engine.reads import PageReads
from lserve_jax.engine.setup import DEFAULT_MODEL, prepare
from lserve_jax.models.known import known_configs
from lserve_jax.models.llama import Params, abstract_params
from lserve_jax.runtime.attend import decode_attend, prefill_attend
from lserve_jax.runtime.cache import KVCache, init_cache
from lserve_jax.runtime.sampling import SamplingState
from lserve_jax.runtime.steps import DecodeState, decode_loop, decode_step, prefill_step
from lserve_jax.text.tokenizer import open_tokenizer
from lserve_jax.weights.load import open_checkpoint
from pallas_kernels import NO_PAGE, PagedKV, PageTables, QuantizedArray

PARTS = ("values", "compile", "decode", "prefill", "peer")
TRANSFORMERS = "transformers SDPA"

TINY = "tiny"
TINY_MODEL = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 2**20,
    "rms_norm_eps": 1e-5,
    "vocab_size": 256,
}
TINY_ATTENTION = {"page_size": 16, "sub_page_size": 4, "sink": 16, "local": 32, "prefill_local": 64}
TINY_BUDGET = 96
GPU_MODEL = "llama-3.1-8b"
CONTEXTS, TINY_CONTEXTS = "128k,32k,256k,8k,512k,longest", "256,512"
PEER_CONTEXTS = (8192, 32768, 131072)
LONGEST = 2**20
"""`longest` is the longest context that fits, but no longer than this."""

MEASURE_SECONDS, MOST_REPEATS = 1.0, 20
PEER_SHARE = 0.25
"""Of the minutes, for the peer."""
VALUES_PROMPT, VALUES_STEPS = 900, 64
VALUES_ATTENTION = {"dense": {}, "lserve": {"token_budget": 512, "sink": 64, "local": 256, "prefill_local": 256}}
BF16_ERROR, XLA_MARGIN = 0.05, 1.5
"""Relative errors of bfloat16 logits that pass: this, or where XLA's own is known, so many times that."""

type Jobs = dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]]
"""Programs by name: a jitted function, its arguments (abstract will do), its static arguments."""


class Point(NamedTuple):
    """One measurement; ``preset`` is ``PRESET[:KV_DTYPE]``."""

    part: str
    preset: str
    context: int
    batch: int = 1

    def __str__(self) -> str:
        return f"{self.part} {self.preset} {tokens_text(self.context)} x{self.batch}"


# --- models, weights and pages ----------------------------------------------------------------------------------------


@cache
def model_config(model: str) -> ModelConfig:
    """Returns the shapes of a model: ``tiny``, or whatever `open_checkpoint` knows."""
    return read_hf(TINY_MODEL, source=TINY) if model == TINY else open_checkpoint(model).config


@cache
def inference_config(model: str, preset: str, implementation: str) -> InferenceConfig:
    """Returns the static settings of ``PRESET[:KV_DTYPE]``; as many heads stream in one layer as in another."""
    name, _, kv_dtype = preset.partition(":")
    shapes, policy = model_config(model), from_preset(name, kv_dtype=kv_dtype or None)
    if model == TINY:
        policy = dataclasses.replace(policy, token_budget=policy.token_budget and TINY_BUDGET, **TINY_ATTENTION)
    gates = np.random.default_rng(0).random((shapes.num_layers, shapes.num_kv_heads))
    return InferenceConfig(
        model=shapes,
        attention=policy,
        heads=classify(gates, policy.static_sparsity, quota="layer"),
        dtype="bfloat16",
        implementation=backend(implementation),
    )


def backend(implementation: str) -> str | None:
    """Returns what the ops call it."""
    return None if implementation == "auto" else implementation


@partial(jax.jit, static_argnames=("shape", "dtype"))
def _normal(key: jax.Array, shape: tuple[int, ...], dtype: np.dtype, deviation: float) -> jax.Array:
    return jax.random.normal(key, shape, dtype) * jnp.asarray(deviation, dtype)


@partial(jax.jit, static_argnames=("shape",))
def _codes(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.bits(key, shape, jnp.uint8)


def _filled(tree: Any, fill: Callable[[str, jax.Array, Any], Any]) -> Any:
    """Returns a tree of abstract arrays made real on the device, leaf by leaf: no leaf's temporaries meet another's."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: isinstance(x, QuantizedArray))
    keys = jax.random.split(jax.random.key(0, impl="rbg"), len(leaves))
    named = [(jax.tree_util.keystr(path[-1:], simple=True), leaf) for path, leaf in leaves]
    return structure.unflatten(fill(name, key, leaf) for (name, leaf), key in zip(named, keys, strict=True))


def random_params(config: InferenceConfig) -> Params:
    """Returns normal weights of deviation 0.02, and norms of 1."""

    def fill(name: str, key: jax.Array, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.ones(leaf.shape, leaf.dtype) if name == "scale" else _normal(key, leaf.shape, leaf.dtype, 0.02)

    return _filled(abstract_params(config.model, jnp.dtype(config.dtype)), fill)


def random_cache(template: KVCache) -> KVCache:
    """Returns pages of standard normal keys and values, and bounds around zero as their statistics."""

    def fill(name: str, key: jax.Array, leaf: Any) -> Any:
        if isinstance(leaf, QuantizedArray):  # codes of all bits, evenly: from about -3 to 3
            levels = 2**leaf.bits - 1
            scale, zero = (jnp.full(leaf.scale.shape, value, leaf.scale.dtype) for value in (6 / levels, levels / 2))
            return QuantizedArray(codes=_codes(key, leaf.codes.shape), scale=scale, zero=zero, bits=leaf.bits)
        match name:
            case "selected":
                return jnp.full(leaf.shape, NO_PAGE, leaf.dtype)
            case "k_min" | "k_max":
                bound = jnp.abs(_normal(key, leaf.shape, leaf.dtype, 1.0))
                return -bound if name == "k_min" else bound
        return _normal(key, leaf.shape, leaf.dtype, 1.0)

    return _filled(template, fill)


def page_tables(
    config: InferenceConfig, pools: PoolSizes, *, slots: int, context: int, span: range, window: int
) -> PageTables:
    """Returns random page tables of ``slots`` sequences for a call of the queries ``span``.

    The streaming table holds the pages that they see and no others, as the engine's does. Pages go round in a ring, so
    that what successive calls both see stays where it is.
    """
    attention, rng = config.attention, np.random.default_rng(0)
    width = -(-context // attention.page_size)
    retrieval = rng.permutation(pools.retrieval)[: slots * width].reshape(slots, width)
    each = pools.streaming // slots
    own = rng.permutation(pools.streaming)[: each * slots].reshape(slots, each)
    logical, sinks = np.arange(width), min(-(-attention.sink // attention.page_size), each)
    ring = np.where(logical < sinks, logical, sinks + (logical - sinks) % max(each - sinks, 1))
    is_seen = visible_pages(
        span.start, len(span), sink=attention.sink, window=window, page_size=attention.page_size, num_pages=width
    )
    return PageTables(retrieval.astype(np.int32), np.where(is_seen, own[:, ring], NO_PAGE).astype(np.int32))


# --- what a step must read and compute --------------------------------------------------------------------------------


def weight_bytes_read(config: InferenceConfig) -> int:
    """Returns the bytes of weights that a decode step reads: all but an embedding of which it reads a row."""
    params = abstract_params(config.model, jnp.dtype(config.dtype))
    return tree_bytes(params) - (0 if config.model.tie_embeddings else tree_bytes(params["embed"]))


def cache_bytes_read(config: InferenceConfig, lengths: range) -> float:
    """Returns the bytes of pages and statistics that a decode step of one sequence reads, mean over its ``lengths``."""
    attention, kv_heads = config.attention, config.model.num_kv_heads
    template = jax.eval_shape(lambda: init_cache(config, slots=1, retrieval_pages=1, streaming_pages=1))
    held = float(np.mean([-(-length // attention.page_size) for length in lengths]))

    def bytes_of(pools: list[PagedKV | None], heads: list[tuple[int, int, int | None]]) -> float:
        """Bytes of one class's pages; of each layer, retrieval and streaming heads, and the pages selected."""
        pool = next((pool for pool in pools if pool is not None), None)
        if pool is None:
            return 0.0
        reads = PageReads(
            page_size=attention.page_size,
            sink=attention.sink,
            local=attention.local,
            selector_interval=attention.selector_interval,
            heads=tuple(heads),
        )
        ratio = reads.ratio(lengths.start - 1, len(lengths))
        assert ratio is not None
        head_page = tree_bytes((pool.k, pool.v)) // pool.num_kv_heads
        return ratio * held * sum(n + m for n, m, _ in heads) * head_page

    subs = attention.page_size // attention.sub_page_size
    head_statistics = 2 * subs * config.model.head_dim * jnp.dtype(config.dtype).itemsize
    chosen = [config.num_selected(layer) for layer in range(config.model.num_layers)]
    kept = list(zip(config.num_retrieval, chosen, strict=True))
    retrieval = bytes_of([layer.kv.retrieval for layer in template], [(n, 0, pages) for n, pages in kept])
    streaming = bytes_of([layer.kv.streaming for layer in template], [(0, kv_heads - n, pages) for n, pages in kept])
    selecting = sum(n for n, pages in kept if pages is not None and pages < held)
    return retrieval + streaming + selecting * held * head_statistics / attention.selector_interval


def prefill_flops(config: InferenceConfig, tokens: int) -> float:
    """Returns the floating-point operations of a prompt: projections, and attention over what each query sees."""
    model, attention = config.model, config.attention
    layers = [v for k, v in abstract_params(model, jnp.dtype(config.dtype)).items() if k.startswith("layers")]
    weights = sum(leaf.size for leaf in jax.tree.leaves(layers) if leaf.ndim > 1)
    window = min(attention.sink + attention.prefill_local, tokens)
    everything = tokens * (tokens + 1) / 2
    streaming = window * (window + 1) / 2 + (tokens - window) * window
    kept = sum(config.num_retrieval)
    seen = kept * everything + (model.num_layers * model.num_kv_heads - kept) * streaming
    return 2.0 * weights * tokens + 4.0 * model.head_dim * (model.num_heads // model.num_kv_heads) * seen


# --- the attention of all layers alone: the model's own seam, without the model ---------------------------------------


@partial(jax.jit, static_argnames=("config", "steps"), donate_argnames="cache")
def attention_loop(
    cache: KVCache,
    q: jax.Array,
    kv: jax.Array,
    lengths: jax.Array,
    tables: PageTables,
    *,
    config: InferenceConfig,
    steps: int,
) -> tuple[Any, KVCache]:
    """Returns the outputs of the last of ``steps`` decode steps' write, selection and attention, and the cache."""

    def step(index: jax.Array, carry: tuple[Any, KVCache]) -> tuple[Any, KVCache]:
        attend = decode_attend(config, tables, lengths + index, jnp.full_like(lengths, index))
        return _all_layers(attend, carry[1], q, kv)

    return jax.lax.fori_loop(0, steps, step, ((jnp.zeros_like(q),) * len(cache), cache))


@partial(jax.jit, static_argnames="config", donate_argnames="cache")
def attention_chunk(
    cache: KVCache,
    q: jax.Array,
    kv: jax.Array,
    starts: jax.Array,
    counts: jax.Array,
    tables: PageTables,
    *,
    config: InferenceConfig,
) -> tuple[Any, KVCache]:
    """Returns the outputs of every layer's write and attention for a chunk, and the cache."""
    return _all_layers(prefill_attend(config, tables, starts, counts), cache, q, kv)


def _all_layers(attend: Any, cache: KVCache, q: jax.Array, kv: jax.Array) -> tuple[Any, KVCache]:
    outs, layers = zip(*(attend(layer, q, kv, kv, state) for layer, state in enumerate(cache)), strict=True)
    return outs, layers


def _attention_inputs(config: InferenceConfig, batch: int, count: int) -> tuple[jax.Array, jax.Array]:
    """Returns random queries [B, T, N, H] and keys, which serve as values too, [B, T, K, H]."""
    model, keys = config.model, jax.random.split(jax.random.key(1, impl="rbg"))
    q, kv = (
        _normal(key, (batch, count, heads, model.head_dim), jnp.dtype(config.dtype), 1.0)
        for key, heads in zip(keys, (model.num_heads, model.num_kv_heads), strict=True)
    )
    return q, kv


# --- compilation ------------------------------------------------------------------------------------------------------


class Program(NamedTuple):
    """A compiled program, its seconds, the bytes beside its arguments, and how many of its calls are Mosaic kernels."""

    call: Any
    seconds: float
    temporary_bytes: int | None
    mosaic_kernels: int


def _compiled(job: tuple[Any, tuple[Any, ...], dict[str, Any]]) -> Program | Exception:
    step, args, static = job
    begin = time.perf_counter()
    try:
        program = step.lower(*args, **static).compile()
    except Exception as error:  # noqa: BLE001 - one program that does not compile must not end the run
        return error
    seconds = time.perf_counter() - begin
    memory = program.memory_analysis()
    kernels = sum("custom-call(" in line and "mosaic_gpu" in line for line in program.as_text().splitlines())
    return Program(program, seconds, getattr(memory, "temp_size_in_bytes", None), kernels)


def compiled(jobs: Jobs) -> dict[str, Program | Exception]:
    """Returns each job's program, or what went wrong; compiled side by side, about a core each."""
    with ThreadPoolExecutor(min(len(jobs), os.cpu_count() or 1)) as threads:
        return dict(zip(jobs, threads.map(_compiled, jobs.values()), strict=True))


def raise_failure(programs: Mapping[str, Any]) -> Any:
    """Raises what went wrong with the first program that does not exist."""
    for program in programs.values():
        if isinstance(program, Exception):
            raise program


@contextmanager
def fresh_compilation_cache() -> Iterator[None]:
    """Around compilations that a persistent cache, empty at first, is to remember, whatever they take."""
    names = ("dir", "min_compile_time_secs", "min_entry_size_bytes")
    options = ["jax_compilation_cache_dir", *(f"jax_persistent_cache_{name}" for name in names[1:])]
    before = [getattr(jax.config, option) for option in options]
    with tempfile.TemporaryDirectory() as folder:
        try:
            for option, value in zip(options, (folder, 0.0, -1), strict=True):
                jax.config.update(option, value)
            compilation_cache.reset_cache()
            yield
        finally:
            for option, value in zip(options, before, strict=True):
                jax.config.update(option, value)
            compilation_cache.reset_cache()


# --- points -----------------------------------------------------------------------------------------------------------


class Measured:
    """A point's programs and arguments: nothing is allocated before `measure`."""

    def __init__(self, point: Point, config: InferenceConfig, *, chunk: int, steps: int) -> None:
        self.point, self.config, self.steps = point, config, steps
        self.chunk = min(chunk, point.context)
        sizes = {"max_model_len": point.context, "slots": point.batch}
        self.pools = PoolSizes.of(config, **sizes, prefill_chunk=self.chunk, steps_per_call=steps)
        self.plan = partial(plan_memory, config, **sizes, prefill_chunk=self.chunk, steps_per_call=steps)
        self.template: KVCache = jax.eval_shape(
            lambda: init_cache(
                config,
                slots=point.batch,
                retrieval_pages=self.pools.retrieval,
                streaming_pages=self.pools.streaming,
            )
        )
        self._cache: KVCache | None = None

    def jobs(self) -> Jobs:
        """Returns the point's programs: ``step`` and ``attention``."""
        raise NotImplementedError

    def times(self, params: Params, programs: dict[str, Program], seconds: float) -> dict[str, Any]:
        """Returns the measured numbers; nothing that takes longer than ``seconds`` is done in one go."""
        raise NotImplementedError

    def measure(self, params: Params, programs: dict[str, Program], seconds: float) -> dict[str, Any]:
        """Returns the point's numbers, its memory and its compile times; frees the cache again."""
        self._cache = random_cache(self.template)
        jax.block_until_ready(self._cache)
        try:
            times = self.times(params, programs, seconds)
        finally:
            self._cache = None
        tokens = self.point.batch * self.point.context
        memory = {
            "weight_bytes": tree_bytes(params),
            "cache_bytes": tree_bytes(self.template),
            "cache_over_dense_bf16": rounded(tree_bytes(self.template) / dense_bf16_bytes(self.config, tokens)),
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


class Decode(Measured):
    """``steps`` decode steps in one call, as the engine makes them: a selection counts as often as it happens."""

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
        inputs = jax.eval_shape(lambda: _attention_inputs(config, self.point.batch, 1))
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
        arguments, inputs = self._arguments(), _attention_inputs(self.config, self.point.batch, 1)
        step, attention = (programs[name].call for name in ("step", "attention"))
        whole = repeated(lambda: self._through(lambda cache: step(params, cache, *arguments))) / self.steps
        alone = repeated(lambda: self._through(lambda cache: attention(cache, *inputs, self.lengths, self.tables)))
        median, attention_s = float(np.median(whole)), float(np.median(alone)) / self.steps
        lengths = range(int(self.lengths[0]), self.point.context + 1)
        weights = weight_bytes_read(self.config)
        cached = self.point.batch * cache_bytes_read(self.config, lengths)
        limit = (weights + cached) / copy_bandwidth()
        return {
            "measured": "whole",
            "ms_per_token": rounded(median * 1e3),
            "quartiles_ms": [rounded(float(x) * 1e3) for x in np.percentile(whole, [25, 75])],
            "tokens_per_s": rounded(self.point.batch / median),
            "attention_ms": rounded(attention_s * 1e3),
            "attention_share": rounded(attention_s / median),
            "weight_bytes_read": weights,
            "cache_bytes_read": round(cached),
            "limit_ms": rounded(limit * 1e3),
            "over_limit": rounded(median / limit),
        }


class Prefill(Measured):
    """A prompt in chunks."""

    def jobs(self) -> Jobs:
        config, params = self.config, abstract_params(self.config.model, jnp.dtype(self.config.dtype))
        inputs = jax.eval_shape(lambda: _attention_inputs(config, 1, self.chunk))
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
        tokens, inputs = self._tokens(), _attention_inputs(self.config, 1, self.chunk)

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
        prefill_s = seconds_of(lambda: [model(start) for start in starts.tolist()][-1]) if is_whole else estimate
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


KINDS: dict[str, type[Measured]] = {"decode": Decode, "prefill": Prefill}


def repeated(call: Callable[[], Any]) -> np.ndarray:
    """Returns the seconds of as many calls as fit `MEASURE_SECONDS`, at least one, after one that does not count."""
    first = timings(call, 1)
    more = min(MOST_REPEATS, int(MEASURE_SECONDS / first[0])) - 1
    return np.concatenate([first, timings(call, more)]) if more > 0 else first


def interpolated(seconds: Mapping[int, float], starts: np.ndarray) -> float:
    """Returns the sum over chunks at ``starts`` of seconds that are known at the first, the last and some between."""
    return float(np.interp(starts, list(seconds), list(seconds.values())).sum())


def seconds_of(call: Callable[[], Any]) -> float:
    """Returns the seconds of one call."""
    begin = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - begin


# --- results ----------------------------------------------------------------------------------------------------------


class Journal:
    """DIR/e2e.jsonl; ``identity`` is what, besides its settings, a result is a result of."""

    def __init__(self, folder: Path, identity: dict[str, Any], *, is_retrying: bool) -> None:
        self._log, self._identity = Log(folder / "e2e.jsonl"), identity
        self._done = {line.get("id") for line in self._log.lines() if not (is_retrying and "error" in line)}

    def has(self, settings: dict[str, Any]) -> bool:
        """Whether the result of these settings is there."""
        return self._id(settings) in self._done

    def add(self, settings: dict[str, Any], result: dict[str, Any]) -> None:
        """Appends a result at once."""
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._log.write({**settings, **result, **self._identity, "date": date, "id": self._id(settings)})
        self._done.add(self._id(settings))

    def _id(self, settings: dict[str, Any]) -> str:
        # Not the commit: a tree with changes has none of its own. The digest of the sources stands for it.
        identity = {k: v for k, v in self._identity.items() if k not in ("commit", "date", "python")}
        return hashlib.sha256(json.dumps([settings, identity], sort_keys=True).encode()).hexdigest()[:16]


def rounded(x: float) -> float:
    """Returns five significant digits."""
    return float(f"{x:.5g}")


def one_line(error: BaseException) -> str:
    """Returns an exception's first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def tokens_text(count: int) -> str:
    """Returns 131072 as 128K."""
    return f"{count // 1024}K" if count % 1024 == 0 else str(count)


# --- the parts of a run -----------------------------------------------------------------------------------------------


class Run:
    """One run on this device: its journal, its clock, and what its parts share."""

    def __init__(self, args: argparse.Namespace, deadline: float) -> None:
        self.args, self._deadline = args, deadline
        self.available = free_memory()
        self._limits = {"copy_gb_per_s": rounded(copy_bandwidth() / 1e9)}
        self.journal = Journal(args.out, provenance() | {"sources": sources()}, is_retrying=args.retry)
        self._programs: dict[str, Program | Exception] = {}
        self._params: Params | None = None
        self.left: list[Point] = []
        self.is_right = True

    @property
    def seconds_left(self) -> float:
        """Seconds until the run should end."""
        return self._deadline - time.monotonic()

    def settings(self, part: str, **fields: Any) -> dict[str, Any]:
        """Returns what names a result."""
        return {"part": part, "model": self.args.model, "implementation": self.args.implementation, **fields}

    def params(self) -> Params:
        """Returns the random weights, made on first use; no preset changes their shapes."""
        if self._params is None:
            self._params = random_params(inference_config(self.args.model, "dense", self.args.implementation))
        return self._params

    def subject(self, point: Point) -> Measured:
        """Returns what a point measures."""
        config = inference_config(self.args.model, point.preset, self.args.implementation)
        return KINDS[point.part](point, config, chunk=self.args.chunk, steps=self.args.steps)

    def record(self, settings: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> None:
        """Writes a result that the journal lacks, or why there is none, and its short form to the terminal."""
        if self.journal.has(settings):
            return
        try:
            result = measure()
        except Exception as error:  # noqa: BLE001 - out of memory, say: recorded, and the next one begins
            result = {"error": one_line(error)}
        gc.collect()
        self.journal.add(settings, result | self._limits)
        named = ("part", "preset", "context", "batch", "checkpoint")
        shown = ("error", "measured", "ms_per_token", "over_limit", "prefill_s", "tflop_per_s", "attention_share")
        shown += ("cold_s", "cached_s", "first_difference", "relative_error", "is_within_bf16_error")
        name = " ".join(str(settings[field]) for field in named if field in settings)
        print(f"{name}:", ", ".join(f"{field} {result[field]}" for field in shown if field in result), flush=True)

    def values(self) -> None:
        """Compares a real checkpoint's greedy tokens and logits in bfloat16 here with float32 on the CPU."""
        for preset, overrides in VALUES_ATTENTION.items():
            checkpoint = self.args.values_model
            settings = self.settings("values", preset=preset, checkpoint=checkpoint, **overrides)

            def measure(preset: str = preset, overrides: dict[str, Any] = overrides) -> dict[str, Any]:
                result = compared(self.args.values_model, preset, overrides, self.args.implementation)
                self.is_right = self.is_right and result["is_within_bf16_error"]
                return result

            self.record(settings, measure)

    def compile(self) -> None:
        """Measures the compilation of the first preset's prefill and decode, cold and from the persistent cache."""
        preset, sizes = self.args.presets[0], {"chunk": self.args.chunk, "steps": self.args.steps}
        context = self.context(self.args.contexts[0], preset, 1)

        def measure() -> dict[str, Any]:
            points = [Point(part, preset, context) for part in KINDS]
            jobs = {f"{point}/step": self.subject(point).jobs()["step"] for point in points}
            with fresh_compilation_cache():
                cold, programs = _timed(lambda: compiled(jobs))
                jax.clear_caches()
                cached, _ = _timed(lambda: compiled(jobs))
            self._programs |= programs
            raise_failure(programs)
            seconds = {f"{name.split()[0]}_s": rounded(program.seconds) for name, program in programs.items()}
            return {"cold_s": rounded(cold), "cached_s": rounded(cached), **seconds, "cores": os.cpu_count()}

        self.record(self.settings("compile", preset=preset, context=context, **sizes), measure)

    def context(self, name: str, preset: str, batch: int) -> int:
        """Returns the tokens that ``8k``, ``1m`` or ``longest`` stand for."""
        if name != "longest":
            unit = {"k": 2**10, "m": 2**20}.get(name[-1].lower(), 1)
            return int(name if unit == 1 else name[:-1]) * unit
        shortest = self.subject(Point("prefill", preset, self.args.chunk, batch))
        longest = min(shortest.plan(available_bytes=self.available).largest_context, LONGEST)
        return max(longest // 2**16 * 2**16, self.args.chunk)

    def points(self) -> list[Point]:
        """Returns the points in the order of their usefulness: that of the batches, contexts and presets asked for."""
        found = [
            Point(part, preset, self.context(context, preset, batch), batch)
            for batch in self.args.batch
            for context in self.args.contexts
            for part in KINDS
            for preset in self.args.presets
            if part in self.args.parts and (part == "decode" or batch == self.args.batch[0])
        ]
        return list(dict.fromkeys(point._replace(batch=1) if point.part == "prefill" else point for point in found))

    def point_settings(self, point: Point) -> dict[str, Any]:
        """Returns what names a point's result."""
        size = {"steps": self.args.steps} if point.part == "decode" else {"chunk": self.args.chunk}
        return self.settings(**point._asdict(), **size)

    def measure(self) -> None:
        """Measures the points that the journal lacks, in waves whose programs compile side by side."""
        missing = [point for point in self.points() if not self.journal.has(self.point_settings(point))]
        fitting = [point for point in missing if self._fits(point)]
        wave_size, slowest = max(1, (os.cpu_count() or 1) // 4), 0.0
        for wave in batched(fitting, wave_size):
            begin = time.monotonic()
            if self.seconds_left < slowest:
                self.left += wave
                continue
            self._measure_wave(wave)
            slowest = max(slowest, time.monotonic() - begin)

    def _fits(self, point: Point) -> bool:
        """Whether a point fits into memory; records that it does not."""
        try:
            self.subject(point).plan(available_bytes=self.available).require_fit()
        except ValueError as error:
            self.record(self.point_settings(point), partial(raise_failure, {"": error}))
            return False
        return True

    def _measure_wave(self, wave: Sequence[Point]) -> None:
        jobs = {f"{point}/{kind}": job for point in wave for kind, job in self.subject(point).jobs().items()}
        missing = {name: job for name, job in jobs.items() if name not in self._programs}
        self._programs |= compiled(missing)
        for point in wave:
            programs = {kind: self._programs.pop(f"{point}/{kind}") for kind in ("step", "attention")}
            if self.seconds_left < 0:
                self.left.append(point)
            else:
                self.record(self.point_settings(point), partial(self._measured, point, programs, len(missing)))

    def _measured(self, point: Point, programs: dict[str, Any], together: int) -> dict[str, Any]:
        raise_failure(programs)
        subject = self.subject(point)
        result = subject.measure(self.params(), programs, min(self.args.whole_seconds, self.seconds_left))
        policy = {"kv_dtype": subject.config.kv_dtype, "attention": dataclasses.asdict(subject.config.attention)}
        return result | policy | {"compiled_side_by_side": together}

    def summary(self) -> str:
        """Returns what was left."""
        if not self.left:
            return "everything asked for stands in the file"
        return "left for another run: " + ", ".join(map(str, self.left))


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    result = call()
    return time.perf_counter() - begin, result


# --- values -----------------------------------------------------------------------------------------------------------


def compared(checkpoint: str, preset: str, overrides: dict[str, Any], implementation: str) -> dict[str, Any]:
    """Returns how far bfloat16 logits on this device are from float32 on the CPU, and where greedy tokens part.

    The device is fed the CPU's tokens, so the first step whose likeliest tokens differ is where free runs would part;
    the gap there is what float32 sees between the two. XLA's own bfloat16 error, where it is another run, is the
    measure of what bfloat16 costs.
    """
    here, cpu = jax.devices()[0], jax.devices("cpu")[0]
    reference, forced = _logits(checkpoint, preset, overrides, "float32", "xla", cpu, None)
    here_logits, _ = _logits(checkpoint, preset, overrides, "bfloat16", implementation, here, forced)
    error = _errors(here_logits, reference)
    others = {}
    if here.platform != "cpu" and implementation != "xla":
        xla, _ = _logits(checkpoint, preset, overrides, "bfloat16", "xla", here, forced)
        others = {"xla": _errors(xla, reference)}
    limit = XLA_MARGIN * others["xla"]["relative_error"] if others else BF16_ERROR
    prompt = len(reference) - VALUES_STEPS
    parts = np.flatnonzero(here_logits[prompt:].argmax(1) != reference[prompt:].argmax(1))
    first = int(parts[0]) if parts.size else None
    at = None if first is None else prompt + first
    gap = 0.0 if at is None else float(reference[at].max() - reference[at, here_logits[at].argmax()])
    return {
        **error,
        **others,
        "prompt_tokens": prompt + 1,
        "steps": VALUES_STEPS,
        "first_difference": first,
        "gap_at_difference": rounded(gap),
        "is_near_tie": gap <= 2 * (others["xla"] if others else error)["largest_error"],
        "is_within_bf16_error": error["relative_error"] <= limit,
    }


def _errors(actual: np.ndarray, expected: np.ndarray) -> dict[str, Any]:
    difference = actual - expected
    relative = np.linalg.norm(difference) / np.linalg.norm(expected)
    return {"relative_error": rounded(float(relative)), "largest_error": rounded(float(np.abs(difference).max()))}


def _logits(
    checkpoint: str,
    preset: str,
    overrides: dict[str, Any],
    dtype: str,
    implementation: str,
    device: Any,
    forced: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the logits [T, V] of a prompt and of the tokens after it, and these: the likeliest if none are given."""
    setup = prepare(checkpoint, attention=preset, dtype=dtype, implementation=implementation, **overrides)
    config, prompt = setup.config, _prompt(setup)
    context, page = len(prompt) + VALUES_STEPS, config.attention.page_size
    pages = -(-context // page)
    with jax.default_device(device):  # and committed there, so that the steps run there
        params = jax.device_put(setup.checkpoint.load_params(dtype, config.heads), device)
        cache = jax.device_put(init_cache(config, slots=1, retrieval_pages=pages, streaming_pages=pages), device)
    rng = np.random.default_rng(0)
    tables = PageTables(*(rng.permutation(pages).astype(np.int32)[None] for _ in range(2)))
    start, count = np.zeros(1, np.int32), np.array([len(prompt)], np.int32)
    logits, cache = prefill_step(params, cache, prompt[None], start, count, tables, config=config, has_all_logits=True)
    rows = [np.asarray(logits)[0]]
    chosen = []
    for step in range(VALUES_STEPS):
        token = rows[-1][-1].argmax() if forced is None else forced[step]
        chosen.append(token)
        values = (np.array([x], np.int32) for x in (token, len(prompt) + step + 1, step))
        logits, cache = decode_step(params, cache, *values, tables, config=config)
        rows.append(np.asarray(logits))
    # The last prompt token's logits choose the first token: they are the first of the steps.
    return np.concatenate(rows)[:-1], np.array(chosen, np.int32)


def _prompt(setup: Any) -> np.ndarray:
    """Returns the first tokens of the document that ships with the package; random ones where they are too few."""
    tokenizer, vocabulary = open_tokenizer(setup.checkpoint.tokenizer_source), setup.config.model.vocab_size
    text = (ROOT / "lserve_jax" / "data" / "demo.md").read_text(encoding="utf-8")
    ids = np.array(tokenizer.encode(text) if tokenizer else [], np.int32)[:VALUES_PROMPT]
    if len(ids) < VALUES_PROMPT:
        ids = np.random.default_rng(0).integers(0, vocabulary, VALUES_PROMPT).astype(np.int32)
    return ids


# --- the peer, in a process of its own: two frameworks do not share a GPU's memory ------------------------------------


def peer(args: argparse.Namespace) -> None:
    """Measures `transformers` with SDPA, or says in one line why not. Touches no JAX device."""
    name = args.model or GPU_MODEL
    try:
        torch, transformers = (importlib.import_module(name) for name in ("torch", "transformers"))
        facts = known_configs()[name]
        device = torch.cuda.get_device_name()
    except KeyError:
        return print(f"peer: left out: the configuration of {name} is not known by name")
    except (ImportError, RuntimeError, AssertionError) as error:
        return print(f"peer: left out: {one_line(error)}")
    versions = {
        "device": device,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit(),
    }
    journal = Journal(args.out, versions, is_retrying=args.retry)
    settings = [{"part": "peer", "peer": TRANSFORMERS, "model": name, "context": n, "batch": 1} for n in PEER_CONTEXTS]
    missing = [one for one in settings if not journal.has(one)]
    if not missing:
        return None
    unused = ("torch_dtype", "architectures", "rope_scaling", "model_type")
    shapes = {name: value for name, value in facts.items() if name not in unused}
    config = transformers.AutoConfig.for_model(facts["model_type"], **shapes)
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
    for one in missing:
        try:
            with torch.inference_mode():
                result = _peer_times(torch, model, one["context"])
        except RuntimeError as error:  # torch's out of memory is one
            result = {"error": one_line(error)}
        torch.cuda.empty_cache()
        journal.add(one, result)
        print("peer:", one["context"], result, flush=True)
    return None


def _peer_times(torch: Any, model: Any, context: int) -> dict[str, Any]:
    def timed(ids: Any, past: Any) -> tuple[float, Any]:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        out = model(ids, past_key_values=past, use_cache=True, logits_to_keep=1)
        torch.cuda.synchronize()
        return time.perf_counter() - begin, out.past_key_values

    torch.cuda.reset_peak_memory_stats()
    ids = torch.randint(0, model.config.vocab_size, (1, context), device="cuda")
    timed(ids[:, :1024], None)
    prefill_s, past = timed(ids, None)
    steps = []
    for _ in range(10):
        seconds, past = timed(ids[:, :1], past)
        steps.append(seconds)
    return {
        "measured": "whole",
        "prefill_s": rounded(prefill_s),
        "ms_per_token": rounded(float(np.median(steps[2:])) * 1e3),
        "peak_bytes_of_process": torch.cuda.max_memory_allocated(),
    }


def peer_process(args: argparse.Namespace) -> None:
    """Runs the part ``peer`` alone in another process, before JAX takes the GPU's memory."""
    absent = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if absent:
        return print(f"peer: left out: {' and '.join(absent)} not installed", flush=True)
    command = [sys.executable, "-m", "bench.e2e", "--out", str(args.out.resolve()), "--parts", "peer"]
    command += (["--model", args.model] if args.model else []) + (["--retry"] if args.retry else [])
    seconds = args.minutes * 60 * PEER_SHARE
    try:
        code = subprocess.run(command, cwd=ROOT, timeout=seconds, check=False).returncode
    except subprocess.TimeoutExpired:
        return print(f"peer: stopped after {seconds:.0f} s", flush=True)
    return print(f"peer: ended with status {code}", flush=True) if code else None


# --- the command line -------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the settings of a run; those that suit the device are None here."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def names(text: str) -> list[str]:
        return text.split(",")

    def numbers(text: str) -> list[int]:
        return [int(name) for name in names(text)]

    parser.add_argument("--out", type=Path, required=True, help="folder of e2e.jsonl")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--parts", type=names, default=list(PARTS), help=",".join(PARTS))
    parser.add_argument("--model", help=f"a name or folder; {GPU_MODEL} on a GPU, {TINY} on a CPU")
    parser.add_argument("--contexts", type=names, help=f"{CONTEXTS}; the first ones first")
    parser.add_argument(
        "--presets", type=names, default=names("lserve,dense,streaming,qserve"), help="PRESET[:KV_DTYPE],…"
    )
    parser.add_argument("--batch", type=numbers, default=[1, 8], help="sequences of a decode step; prefill takes one")
    parser.add_argument("--implementation", default="auto")
    parser.add_argument("--chunk", type=int, default=2048, help="prompt tokens a prefill call")
    parser.add_argument(
        "--steps", type=int, default=8, help="decode steps a call, a multiple of the selector's interval"
    )
    parser.add_argument("--whole-seconds", type=float, default=15.0, help="longer prompts are measured by chunks")
    parser.add_argument("--values-model", default=DEFAULT_MODEL)
    parser.add_argument("--retry", action="store_true", help="measure again what failed")
    args = parser.parse_args(arguments)
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"--parts {','.join(unknown)}: choose from {','.join(PARTS)}")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is asked for; 1 if values were wrong."""
    begin, args = time.monotonic(), parse(arguments)
    if args.parts == ["peer"]:
        peer(args)
        return 0
    if "peer" in args.parts:
        peer_process(args)
    # Before the first use of the device: the longest contexts need nearly all of its memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.93")
    args.model = args.model or (TINY if jax.default_backend() == "cpu" else GPU_MODEL)
    args.contexts = args.contexts or (TINY_CONTEXTS if args.model == TINY else CONTEXTS).split(",")
    run = Run(args, begin + args.minutes * 60)
    for part in ("values", "compile"):
        if part in args.parts:
            getattr(run, part)()
    run.measure()
    print(run.summary())
    return 0 if run.is_right else 1


if __name__ == "__main__":
    sys.exit(main())
