"""Saved contexts: pages of a prompt go from the prefix cache to a file, and from a file into the prefix cache.

A restored context is a cached prefix like any other: the next prompt that begins with its tokens finds it, with the
same logits as if the model had read it, and it is evicted when other prompts need the pages.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import jax

from lserve_jax.config.digest import text_digest
from lserve_jax.config.errors import InputError
from lserve_jax.config.inference import InferenceConfig
from lserve_jax.engine.context_file import ContextFormat, SavedContext
from lserve_jax.engine.engine import Engine
from lserve_jax.engine.host_pages import HostPages
from lserve_jax.engine.pools import PagePool
from lserve_jax.engine.prefix_cache import Entry, PrefixCache
from lserve_jax.engine.setup import Setup
from lserve_jax.runtime.implementations import by_op
from lserve_jax.text.tokenizer import Tokenizer
from lserve_jax.weights.tensors import forms_digest

_READING = ("kv_write", "block_select", "prefill_attention", "quantized_matmul")
"""The ops on which the pages of a prompt depend."""


def context_format(setup: Setup, tokenizer: Tokenizer | None) -> ContextFormat:
    """Returns the format of the contexts that a model can save and load; reads the checkpoint's files for its digest.

    Args:
      setup: the model and its settings.
      tokenizer: made the tokens, and will make those that follow.
    """
    config, attention, sizes = setup.config, setup.config.attention, setup.sizes
    assert config.heads is not None
    implementations = by_op(setup.implementations)
    identity = {
        "model": setup.checkpoint.digest,
        "model_config": text_digest(repr(config.model)),
        "tokenizer": "none" if tokenizer is None else tokenizer.digest,
        "dtype": config.dtype,
        "weights": f"{setup.plan.weight_words} ({forms_digest(setup.params)})",
        "smoothing": "none" if setup.forms.smoothing is None else setup.forms.smoothing.digest,
        "heads": config.heads.digest or "all retrieval",
        "kv_dtype": config.kv_dtype,
        "page_size": str(attention.page_size),
        "sub_page_size": str(attention.sub_page_size),
        "sink": str(attention.sink),
        "prefill_local": str(attention.prefill_local) + _blocks_read(config),
        "prefill_window": str(attention.prefill_window),
        "prefill_chunk": str(sizes.prefill_chunk),
        "implementation": " ".join(f"{op}={name}" for op, name in implementations.items() if op in _READING),
    }
    return ContextFormat(config=config, sizes=sizes, pools=setup.plan.pools, identity=identity)


def _blocks_read(config: InferenceConfig) -> str:
    """Returns what stands for the blocks of the history that each layer reads; nothing if it is all of them.

    No token of a context is the last one of a prompt.
    """
    rules = [kind.prefill.blocks and replace(kind.prefill.blocks, last=0) for kind in config.kinds]
    return f", of {text_digest(repr(rules))}" if any(rules) else ""


def require_prefix_cache(engine: Engine) -> PrefixCache:
    """Returns the engine's prefix cache; raises `InputError` if it has none."""
    cache = engine.scheduler.cache
    if cache is None:
        raise InputError(
            "saved contexts need the prefix cache: switch it on, and make prefill_chunk="
            f"{engine.sizes.prefill_chunk} a multiple of page_size={engine.config.attention.page_size}"
        )
    return cache


def is_cached(engine: Engine, contexts: ContextFormat, tokens: Sequence[int], *, salt: bytes = b"") -> bool:
    """Returns whether the prefix cache has the whole context of a prompt."""
    cache, boundary = require_prefix_cache(engine), contexts.boundary(len(tokens))
    return cache.match(cache.digests(tokens, salt), boundary + 1).num_chunks * cache.chunk == boundary


def read_context(engine: Engine, contexts: ContextFormat, tokens: Sequence[int], *, salt: bytes = b"") -> SavedContext:
    """Returns the context of a prompt whose whole chunks the engine has just read.

    Args:
      engine: the engine.
      contexts: gives the boundary of the whole chunks.
      tokens: the prompt.
      salt: that of the request that read it.

    Raises:
      InputError: if its pages are not all in the prefix cache.
    """
    cache, boundary = require_prefix_cache(engine), contexts.boundary(len(tokens))
    hit = cache.match(cache.digests(tokens, salt), boundary + 1)
    if hit.num_chunks * cache.chunk != boundary:
        raise InputError(
            f"the cache has kept {hit.num_chunks * cache.chunk} of the prompt's first {boundary} tokens, and a context "
            "needs all of them: the pools need more room, or the prompt is as short as those that share a call"
        )
    window = contexts.window(len(tokens))
    retrieval = hit.retrieval if cache.retrieval is not None else []
    pages = engine.read_pages(retrieval, [hit.window[page] for page in window])
    return SavedContext(tuple(tokens), pages)


def restore_context(engine: Engine, contexts: ContextFormat, context: SavedContext, *, salt: bytes = b"") -> None:
    """Puts a context into the prefix cache, for requests with the same salt; chunks that are there already stay.

    Raises:
      InputError: if requests that run use too many pages; nothing has changed then.
    """
    cache = require_prefix_cache(engine)
    digests = cache.digests(context.tokens, salt)
    if is_cached(engine, contexts, context.tokens, salt=salt):
        return
    known = cache.chain(digests)
    window = contexts.window(len(context.tokens))
    first = len(known) * cache.chunk // engine.config.attention.page_size
    missing = jax.tree.map(lambda x: x[first:], context.pages.retrieval)
    num_missing = contexts.num_retrieval(len(context.tokens)) - first if cache.retrieval is not None else 0
    with _held(cache.retrieval, known), _taken(engine, {"retrieval": num_missing, "streaming": len(window)}) as pages:
        engine.write_pages(HostPages(missing, context.pages.streaming), pages["retrieval"], pages["streaming"])
        _enter(cache, digests, known, pages["retrieval"], dict(zip(window, pages["streaming"], strict=True)))


def _enter(
    cache: PrefixCache,
    digests: Sequence[bytes],
    known: Sequence[Entry],
    retrieval: Sequence[int],
    window: dict[int, int],
) -> None:
    """Enters the chunks that are not known yet, and the window at the end of the last one."""
    entry, count = (known[-1] if known else None), len(digests) - len(known)
    each = len(retrieval) // count if count else 0
    for number, digest in enumerate(digests[len(known) :]):
        entry = cache.insert(digest, entry, retrieval[number * each : (number + 1) * each])
    assert entry is not None
    cache.keep_window(entry, window)


@contextmanager
def _held(pool: PagePool | None, entries: Sequence[Entry]) -> Iterator[None]:
    """Keeps the pages of entries from being evicted."""
    pages = [page for entry in entries for page in entry.retrieval] if pool is not None else []
    if pool is not None:
        pool.share(pages)
    try:
        yield
    finally:
        if pool is not None:
            pool.give_back(pages)


@contextmanager
def _taken(engine: Engine, counts: dict[str, int]) -> Iterator[dict[str, list[int]]]:
    """Yields new pages of each pool, which go back at the end: who wants to keep them shares them before."""
    pools, cache = dict(engine.scheduler.allocator.pools), require_prefix_cache(engine)
    for name, pool in pools.items():
        lacking = counts[name] - pool.num_free - pool.num_evictable
        if lacking > 0:
            raise InputError(
                f"the context needs {counts[name]} {name} pages, {lacking} more than are free: "
                "running requests use the others"
            )
    pages: dict[str, list[int]] = {name: [] for name in counts}
    try:
        for name, pool in pools.items():
            cache.evict(pool, counts[name] - pool.num_free)
            pages[name] = pool.take(counts[name])
        yield pages
    finally:
        for name, pool in pools.items():
            pool.give_back(pages[name])
