"""Tiny models with everything on at once, and what tests of the engine ask of them."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lserve_jax import LLM, RequestOutput, SamplingParams
from lserve_jax.engine.plans import Plan, Swap
from lserve_jax.engine.pools import PagePool
from lserve_jax.runtime.cache import KVCache
from lserve_jax.runtime.programs import Call, Programs

MODEL = str(Path(__file__).parents[2] / "golden" / "tiny" / "llama3")
VOCABULARY = 128
MAX_LENGTH = 220
# 7 of up to 28 pages are read, the sink ends in the middle of a page, and windows are no multiples of one.
SPARSE: dict[str, Any] = {
    "attention": "lserve",
    "page_size": 8,
    "sub_page_size": 4,
    "token_budget": 56,
    "selector_interval": 3,
    "sink": 12,
    "local": 21,
    "prefill_local": 50,
    "prefill_chunk": 72,
    "max_num_seqs": 3,
    "steps_per_call": 4,
}
GATES = {"one of each": "1\t0\n0\t1\n", "all or none": "1\t1\n0\t0\n", "all different": "0.4\t0.3\n0.2\t0.1\n"}


def make_llm(folder: Path, gates: str | None = None, **settings: Any) -> LLM:
    """A float32 model of 2 layers with 2 KV heads."""
    (folder / "full_attention_heads.tsv").write_text(gates or "")
    settings = {"max_model_len": MAX_LENGTH} | ({"head_pattern": folder} if gates else {}) | settings
    return LLM(MODEL, dtype="float32", **settings)


def assert_idle(llm: LLM) -> None:
    """All slots are free, and all pages but those that the prefix cache alone holds."""
    scheduler = llm.engine.scheduler
    assert scheduler.is_idle
    for pool in (scheduler.allocator.retrieval, scheduler.allocator.streaming):
        assert pool is None or pool.num_free + pool.num_evictable == pool.num_pages
    assert scheduler.num_free_slots == llm.setup.sizes.max_num_seqs
    assert llm.session.is_idle


def prompt(length: int, seed: int = 0) -> list[int]:
    """Random tokens; shorter prompts of a seed begin longer ones."""
    return np.random.default_rng(seed).integers(5, VOCABULARY, length).tolist()


def generate(llm: LLM, tokens: list[int], params: SamplingParams, salt: bytes = b"") -> RequestOutput:
    """The output of one request."""
    generation = llm.request(tokens, params, salt=salt)
    for _ in llm.session.run([generation]):
        pass
    return llm.output(generation)


def same(one: RequestOutput, other: RequestOutput) -> bool:
    """Whether two outputs are the same to the last bit, times apart."""
    names = ("token_ids", "text", "finish_reason", "logprobs", "top_logprobs", "prompt_logprobs", "prompt_top_logprobs")
    return all(getattr(one, name) == getattr(other, name) for name in names)


@contextmanager
def programs_run(act: Callable[[Call, Any], None] | None = None) -> Iterator[Counter[str]]:
    """Counts the runs of each program by name; ``act`` sees each call and its result."""
    counts: Counter[str] = Counter()
    run = Programs.run

    def counted(self: Programs, call: Call) -> Any:
        result = run(self, call)
        counts[call.name] += 1
        if act is not None:
            act(call, result)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Programs, "run", counted)
        yield counts


def prefills(counts: Counter[str]) -> dict[str, int]:
    """The prefill programs among those that ran."""
    return {name: count for name, count in counts.items() if name.startswith("prefill")}


@contextmanager
def poisoned(llm: LLM) -> Iterator[None]:
    """Before each call, all pages that are free, and those just taken whatever they held, hold NaN."""
    scheduler, engine = llm.engine.scheduler, llm.engine
    taken: dict[int, set[int]] = {}
    take, schedule = PagePool.take, scheduler.schedule

    def watched_take(self: PagePool, count: int) -> list[int]:
        pages = take(self, count)
        taken.setdefault(id(self), set()).update(pages)
        return pages

    def poisoning() -> Plan | None:
        plan = schedule()
        leaving = isinstance(plan, Swap) and plan.is_out
        masks = []
        for name in ("retrieval", "streaming"):
            pool: PagePool | None = getattr(scheduler.allocator, name)
            if pool is None:
                masks.append(np.zeros(0, bool))
                continue
            bad = set(pool._free) | taken.pop(id(pool), set())
            mask = np.zeros(getattr(engine._pools, name), bool)
            mask[list(bad - set(getattr(plan, name) if leaving else ()))] = True
            masks.append(mask)
        engine.cache = _poison(engine.cache, *masks)
        return plan

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PagePool, "take", watched_take)
        patch.setattr(scheduler, "schedule", poisoning)
        yield


@jax.jit
def _poison(cache: KVCache, retrieval: jax.Array, streaming: jax.Array) -> KVCache:
    def spoil(pool: Any, mask: jax.Array) -> Any:
        def one(x: jax.Array) -> jax.Array:
            bad = jnp.array(255, x.dtype) if x.dtype == jnp.uint8 else jnp.array(jnp.nan, x.dtype)
            rows = jnp.zeros(x.shape[0], bool).at[: mask.shape[0]].set(mask)
            return jnp.where(rows.reshape(-1, *[1] * (x.ndim - 1)), bad, x)

        return jax.tree.map(one, pool)

    return tuple(
        layer._replace(
            kv=layer.kv._replace(
                retrieval=spoil(layer.kv.retrieval, retrieval), streaming=spoil(layer.kv.streaming, streaming)
            )
        )
        for layer in cache
    )


def logits_of(llm: LLM, tokens: Sequence[int], params: SamplingParams) -> tuple[RequestOutput, list[np.ndarray]]:
    """The output of one request, and every array of logits or of generated tokens that its calls returned, in order.

    Logits of chunks before the last one are left out: a hit does not compute them.
    """
    found: list[np.ndarray] = []

    def keep(call: Call, result: Any) -> None:
        if call.name.startswith("prefill"):
            if int(call.args[3][0] + call.args[4][0]) == len(tokens):
                found.append(np.asarray(result[0]))
        elif call.name == "sample":
            found.extend(np.asarray(x) for x in result if x is not None)
        elif call.name == "decode":
            (slot,) = np.flatnonzero(call.args[2].remaining)
            found.extend(np.asarray(x)[:, slot] for x in result[0] if x is not None)

    with programs_run(keep):
        output = generate(llm, list(tokens), params)
    return output, found
