"""A tiny model run step by step through its pages, and the same model under a dense masked attention as reference."""

import math
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lserve_jax import HeadClasses, InferenceConfig, from_preset, init_cache, open_checkpoint
from lserve_jax.models.llama import Llama
from lserve_jax.runtime.cache import KVCache
from lserve_jax.runtime.steps import decode_step, prefill_step
from pallas_kernels import PageTables, dequantize, quantize, rotate

TINY = Path(__file__).parents[2] / "golden" / "tiny"
MODEL = "llama3"  # 2 layers, 4 query heads, 2 KV heads of 16, vocabulary 128
BITS = {"int8": 8, "int4": 4}


def classes(*order: tuple[int, ...], num_retrieval: tuple[int, ...]) -> HeadClasses:
    """Head classes, one order a layer."""
    return HeadClasses(order=order, num_retrieval=num_retrieval)


def tiny_config(
    preset: str = "lserve", heads: HeadClasses | None = None, model: str = MODEL, **fields: Any
) -> InferenceConfig:
    """A float32 model with pages of 16 and windows that are no multiples of them; `fields` override."""
    small = {"page_size": 16, "sub_page_size": 4, "sink": 20, "local": 40, "prefill_local": 100, "kv_dtype": "float32"}
    policy = from_preset(preset, **(small | fields))
    return InferenceConfig(
        model=open_checkpoint(str(TINY / model)).config, attention=policy, heads=heads, dtype="float32"
    )


@dataclass(frozen=True)
class Stepper:
    """One sequence in slot 0 of a cache whose unused memory holds NaN, its pages a random permutation."""

    config: InferenceConfig
    max_pages: int
    slots: int = 1
    model: str = MODEL

    @cached_property
    def params(self) -> dict[str, Any]:
        return open_checkpoint(str(TINY / self.model)).load_params("float32", self.config.heads)

    @cached_property
    def tables(self) -> PageTables:
        rng = np.random.default_rng(7)
        ids = (rng.permutation(self.slots * self.max_pages).astype(np.int32) for _ in range(2))
        return PageTables(*(table.reshape(self.slots, -1) for table in ids))

    def cache(self) -> KVCache:
        """An empty cache: floating-point memory is NaN, codes are random."""
        pages = self.slots * self.max_pages
        cache = init_cache(self.config, max_num_seqs=self.slots, retrieval_pages=pages, streaming_pages=pages)
        rng = np.random.default_rng(8)

        def dirty(leaf: jax.Array) -> jax.Array:
            if leaf.dtype == jnp.uint8:
                return jnp.asarray(rng.integers(0, 256, leaf.shape, np.uint8))
            return leaf if leaf.dtype == jnp.int32 else jnp.full_like(leaf, jnp.nan)

        return jax.tree.map(dirty, cache)

    def prefill(self, cache: KVCache, tokens: np.ndarray, chunk: int) -> tuple[np.ndarray, KVCache]:
        """The logits [T, V] of a prompt fed chunk by chunk."""
        tables = jax.tree.map(lambda table: table[:1], self.tables)
        parts = []
        for start in range(0, len(tokens), chunk):
            piece = np.zeros((1, chunk), np.int32)
            count = min(chunk, len(tokens) - start)
            piece[0, :count] = tokens[start : start + count]
            starts, counts = (np.array([value], np.int32) for value in (start, count))
            logits, cache = prefill_step(
                *(self.params, cache, piece, starts, counts, tables, np.array([len(tokens)], np.int32)),
                config=self.config,
                has_all_logits=True,
            )
            parts.append(np.asarray(logits)[0, :count])
        return np.concatenate(parts), cache

    def decode(self, cache: KVCache, token: int, length: int, step: int) -> tuple[np.ndarray, KVCache]:
        """The logits [V] after one more token, which makes the sequence `length` long."""
        values = np.zeros((3, self.slots), np.int32)
        values[:, 0] = token, length, step
        logits, cache = decode_step(self.params, cache, *values, self.tables, config=self.config)
        return np.asarray(logits)[0], cache

    def run(self, prompt: np.ndarray, chunk: int, forced: np.ndarray) -> np.ndarray:
        """The logits [T, V] of a prompt and of tokens that are then fed one by one, whatever the model would choose."""
        logits, cache = self.prefill(self.cache(), prompt, chunk)
        rows = [logits]
        for step, token in enumerate(forced.tolist()):
            row, cache = self.decode(cache, token, len(prompt) + step + 1, step)
            rows.append(row[None])
        return np.concatenate(rows)

    def greedy(self, prompt: np.ndarray, chunk: int, steps: int) -> list[int]:
        """The tokens that the model chooses."""
        logits, cache = self.prefill(self.cache(), prompt, chunk)
        chosen = [int(logits[-1].argmax())]
        for step in range(steps - 1):
            row, cache = self.decode(cache, chosen[-1], len(prompt) + step + 1, step)
            chosen.append(int(row.argmax()))
        return chosen

    def dense(self, prompt_length: int, chunk: int, tokens: np.ndarray) -> np.ndarray:
        """What `run` must give, by dense attention in the checkpoint's own head order with a mask a KV head.

        Retrieval heads see all that came before, streaming heads what section 2 of the algorithm says, with the prefill
        window in the prompt and the decode window after it. In a quantised cache, what a query reads of sealed pages is
        rounded; the open page and its own chunk of the prompt are not.
        """
        config, count = self.config, len(tokens)
        policy, order = config.attention, config.heads
        assert order is not None
        query, key = np.arange(count)[:, None], np.arange(count)
        is_prompt = query < prompt_length
        local = np.where(is_prompt, policy.prefill_local, policy.local)
        causal = key <= query
        window = causal & ((key > query - local) | (key < policy.sink))
        page, start = policy.page_size, query // chunk * chunk
        opened, end = start // page * page, np.minimum(start + chunk, prompt_length)
        own = np.where(is_prompt, np.where(end <= opened + page, opened, start), query // page * page)
        is_rounded = key < own
        kept = [set(heads[:n]) for heads, n in zip(order.order, order.num_retrieval, strict=True)]

        def attend(layer: int, q: jax.Array, k: jax.Array, v: jax.Array, state: None) -> tuple[jax.Array, None]:
            groups = q.shape[2] // k.shape[2]
            seen = jnp.asarray(np.stack([causal if head in kept[layer] else window for head in range(k.shape[2])]))
            stored = (self._stored(x, kept[layer], kind) for x, kind in ((k, "k"), (v, "v")))
            (k_old, v_old), repeat = stored, partial(jnp.repeat, repeats=groups, axis=2)
            scores = [jnp.einsum("btnh,bsnh->bnts", q, repeat(x)) / math.sqrt(q.shape[3]) for x in (k_old, k)]
            scores = jnp.where(is_rounded, *scores)
            weights = jax.nn.softmax(jnp.where(jnp.repeat(seen, groups, axis=0), scores, -jnp.inf), axis=-1)
            parts = ((jnp.where(is_rounded, weights, 0.0), v_old), (jnp.where(is_rounded, 0.0, weights), v))
            return sum(jnp.einsum("bnts,bsnh->btnh", w, repeat(x)) for w, x in parts), state  # type: ignore[return-value]

        model = Llama(config.model, jnp.dtype("float32"))
        variables = {"params": open_checkpoint(str(TINY / self.model)).load_params("float32", None)}
        rows = jnp.asarray(tokens, jnp.int32)[None]

        def forward(variables: Any, rows: jax.Array) -> Any:
            positions = jnp.arange(count, dtype=jnp.int32)[None]
            hidden, _ = model.apply(variables, rows, positions, (None,) * config.model.num_layers, attend)
            return model.apply(variables, hidden, method="unembed")

        return np.asarray(forward(variables, rows))[0]

    def _stored(self, x: jax.Array, kept: set[int], part: str) -> jax.Array:
        """Keys or values [B, T, K, H] as they come back from the cache, of retrieval heads `kept` and of the others."""
        config, rounded = self.config, self._rounded_keys if part == "k" else self._rounded_values
        retrieval, streaming = (rounded(x, kind) for kind in (config.kv_dtype, config.streaming_dtype))
        is_kept = np.isin(np.arange(x.shape[2]), sorted(kept))
        return jnp.where(is_kept[:, None], retrieval, streaming)

    def _rounded_keys(self, k: jax.Array, kind: str) -> jax.Array:
        """Keys within the bounds of their sub-pages; those of a page that is not full are never read so."""
        if kind not in BITS:
            return k.astype(kind).astype(jnp.float32)
        (batch, tokens, heads, size), (storage, *_) = k.shape, [x.retrieval or x.streaming for x in self.config.kinds]
        assert storage is not None and storage.sub_page_size is not None
        pages = jnp.pad(k, ((0, 0), (0, -tokens % storage.sub_page_size), (0, 0), (0, 0)))
        by_sub = pages.reshape(batch, -1, storage.sub_page_size, heads, size)
        low, high = (x(by_sub, axis=2, keepdims=True) for x in (jnp.min, jnp.max))
        step = (high - low) / (2 ** BITS[kind] - 1)
        codes = jnp.round((by_sub - low) / jnp.where(step > 0, step, 1.0))
        return (codes * step + low).reshape(pages.shape)[:, :tokens]

    def _rounded_values(self, v: jax.Array, kind: str) -> jax.Array:
        if kind not in BITS:
            return v.astype(kind).astype(jnp.float32)
        turned = rotate(v) if self.config.is_rotated else v
        rounded = dequantize(quantize(turned, BITS[kind]), jnp.dtype("float32"))
        return rotate(rounded) if self.config.is_rotated else rounded
