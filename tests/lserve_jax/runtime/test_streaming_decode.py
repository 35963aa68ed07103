"""The host's page tables and the ops together: what heads see while sequences prefill and decode side by side.

Published code rotates the streaming page table twice, so that after a page crossing most keys of a head are wrong, and
lets the pages of some prompts alias the sink.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.typing import NDArray

from lserve_jax.config.pages import most_streaming_pages
from lserve_jax.engine.allocator import PageAllocator, PagePool, stack_tables
from lserve_jax.engine.request import Request, Sequence
from pallas_kernels import LayerKV, PagedKV, PageTables, Tail, decode_attention, kv_write, prefill_attention

pytestmark = pytest.mark.slow

PROMPTS = (1, 63, 64, 65, 100, 127, 128, 129, 200, 256, 257, 300, 384, 385, 448, 449, 512, 1000)
STEPS, CHUNK = 300, 256
PAGE, HEAD_DIM = 64, 4
LONGEST = max(PROMPTS) + STEPS
TABLE_PAGES = -(-LONGEST // PAGE)


class Window(NamedTuple):
    sink: int
    local: int
    prefill_local: int

    @property
    def prefill_reach(self) -> int:
        """What a prefill keeps: the first decode step looks back on it, too."""
        return max(self.local, self.prefill_local)


DEFAULTS = Window(sink=128, local=256, prefill_local=300)
ODD = Window(sink=100, local=149, prefill_local=77)


@dataclass(frozen=True)
class Limits:
    max_tokens: int
    stop_token_ids: tuple[int, ...] = ()
    is_stepwise: bool = False


@pytest.fixture(scope="module")
def tokens() -> tuple[NDArray[np.float32], ...]:
    """Queries [B, S, 4, H], keys and values [B, S, 2, H] of every token that the sequences will ever have."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(len(PROMPTS), LONGEST, heads, HEAD_DIM)) for heads in (4, 2, 2))
    return q.astype(np.float32), k.astype(np.float32), v.astype(np.float32)


def dense(tokens: tuple[NDArray[np.float32], ...], b: int, window: Window) -> NDArray[np.float64]:
    """Attention [S, 4, H] of one sequence in float64 under section 2's masks, the prompt's with the prefill window."""
    prompt = PROMPTS[b]
    q, k, v = (x[b, : prompt + STEPS].astype(np.float64) for x in tokens)
    i, j = np.arange(len(q))[:, None], np.arange(len(q))
    local = np.where(i < prompt, window.prefill_local, window.local)
    causal = j <= i
    visible = np.stack([causal, causal & ((j > i - local) | (j < window.sink))])
    grouped = q.reshape(-1, 2, 2, HEAD_DIM)
    weights = np.exp(np.einsum("tkgh,skh->gkts", grouped, k) / np.sqrt(HEAD_DIM)) * visible
    return np.einsum("gkts,skh->tkgh", weights / weights.sum(-1, keepdims=True), v).reshape(q.shape)


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def step(
    window: Window, kv: LayerKV, tables: PageTables, is_held: Any, starts: jax.Array, counts: jax.Array, *qkv: jax.Array
) -> tuple[jax.Array, LayerKV]:
    """Outputs [B, T, N, H] of a chunk, or of one token, and the pools with NaN in whatever nobody holds."""
    pools = [
        jax.tree.map(lambda x, held=held: jnp.where(held[:, None, None, None], x, jnp.nan), pool)
        for pool, held in zip(kv[:2], is_held, strict=True)
    ]
    q, k, v = qkv
    kv = kv_write(k, v, kv._replace(retrieval=pools[0], streaming=pools[1]), tables, starts, counts)
    if q.shape[1] == 1:
        lengths = jnp.where(counts > 0, starts + 1, 0)
        return decode_attention(q[:, 0], kv, tables, lengths, None, sink=window.sink, local=window.local)[:, None], kv
    return prefill_attention(q, k, v, kv, tables, starts, counts, sink=window.sink, local=window.prefill_local), kv


class Cache:
    """All sequences in one batch, their pages in the engine's hands."""

    def __init__(self, tokens: tuple[NDArray[np.float32], ...], window: Window) -> None:
        self.tokens, self.window = tokens, window
        retrieval, streaming = (
            PagePool(len(PROMPTS) * TABLE_PAGES, keeps_all=True),
            PagePool(13 * len(PROMPTS), keeps_all=False),
        )
        self.allocator = PageAllocator(retrieval=retrieval, streaming=streaming, sink=window.sink, page_size=PAGE)
        self.sequences = [
            Sequence.from_request(
                Request(id=b, prompt=(7,) * prompt, sampling=Limits(STEPS + 1)), max_model_len=2000, page_size=PAGE
            )
            for b, prompt in enumerate(PROMPTS)
        ]
        for slot, sequence in enumerate(self.sequences):
            sequence.slot = slot
        subs = PAGE // 16
        self.kv = LayerKV(
            retrieval=PagedKV(
                *(jnp.zeros((retrieval.num_pages, 1, rows, HEAD_DIM)) for rows in (PAGE, PAGE, subs, subs))
            ),
            streaming=PagedKV(*(jnp.zeros((streaming.num_pages, 1, PAGE, HEAD_DIM)) for _ in range(2))),
            tail=Tail(*(jnp.full((len(PROMPTS), 2, PAGE, HEAD_DIM), jnp.nan) for _ in range(2))),
        )

    def reserve(self, counts: NDArray[np.int_], window: int) -> None:
        for sequence, count in zip(self.sequences, counts.tolist(), strict=True):
            if count:
                assert self.allocator.reserve(sequence, sequence.num_cached, count, window)

    def run(self, counts: NDArray[np.int_], width: int) -> NDArray[np.float32]:
        """Outputs [B, width, 4, H] of the next tokens of every sequence."""
        tables = PageTables(*stack_tables(self.sequences, len(self.sequences), TABLE_PAGES))
        is_held = [
            np.isin(np.arange(pool.k.shape[0]), table)
            for pool, table in zip(self.kv[:2], tables[:2], strict=True)
            if pool
        ]
        starts = np.array([sequence.num_cached for sequence in self.sequences])
        index = np.minimum(starts[:, None] + np.arange(width), LONGEST - 1)
        qkv = (x[np.arange(len(starts))[:, None], index] for x in self.tokens)
        out, self.kv = step(
            self.window, self.kv, tables, is_held, starts.astype(np.int32), counts.astype(np.int32), *qkv
        )
        for sequence, count in zip(self.sequences, counts.tolist(), strict=True):
            sequence.num_cached += count
        return np.asarray(out)

    def release(self) -> None:
        """Gives back what nothing to come will see, as the scheduler does after every call."""
        for sequence in self.sequences:
            is_prefilling = sequence.num_cached < sequence.prompt_length
            reach = self.window.prefill_reach if is_prefilling else self.window.local
            self.allocator.release_unseen(sequence, sequence.num_cached, reach)


@pytest.mark.parametrize(("window", "steps_per_call"), [(DEFAULTS, 1), (ODD, 7)], ids=["defaults", "odd"])
def test_heads_see_the_keys_of_section_2_after_every_prompt_and_at_every_step(
    window: Window, steps_per_call: int, tokens: tuple[NDArray[np.float32], ...]
):
    """18 prompts around page boundaries, prefilled in chunks, then 300 decode steps; pages nobody holds are NaN."""
    cache, rows = Cache(tokens, window), np.arange(len(PROMPTS))
    out = np.full((len(PROMPTS), LONGEST, 4, HEAD_DIM), np.nan, np.float32)
    for start in range(0, max(PROMPTS), CHUNK):
        counts = np.clip(np.array(PROMPTS) - start, 0, CHUNK)
        cache.reserve(counts, window.prefill_reach)
        attended = cache.run(counts, CHUNK)
        for b, count in enumerate(counts):
            out[b, start : start + count] = attended[b, :count]
        cache.release()
    for done in range(0, STEPS, steps_per_call):
        steps = min(steps_per_call, STEPS - done)
        cache.reserve(np.full(len(PROMPTS), steps), window.local)
        for i in range(done, done + steps):
            out[rows, np.array(PROMPTS) + i] = cache.run(np.ones(len(PROMPTS), np.int_), 1)[:, 0]
        cache.release()
        held = max(np.sum(sequence.streaming_table >= 0) for sequence in cache.sequences)
        assert held <= most_streaming_pages(window.sink, window.local, 1, PAGE)
    for b, prompt in enumerate(PROMPTS):
        found = out[b, : prompt + STEPS]
        np.testing.assert_allclose(found, dense(tokens, b, window), rtol=0, atol=2e-6, err_msg=f"{prompt=}")
