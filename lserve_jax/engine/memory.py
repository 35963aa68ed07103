"""The memory that a model, a context and a sparsity policy need, computed before anything is loaded."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from lserve_jax.config.checks import LARGEST_INT
from lserve_jax.config.errors import InputError
from lserve_jax.config.inference import InferenceConfig
from lserve_jax.config.pages import retrieval_pages
from lserve_jax.config.sizes import CacheSettings, PoolSizes, Sizes, most_pages
from lserve_jax.engine.host import host_memory
from lserve_jax.models.llama import Params
from lserve_jax.runtime.cache import KVCache, init_cache, padded
from lserve_jax.weights.tensors import abstract_params, describe_forms, tree_bytes

_GIB = 2**30
_HEADROOM = 0.9
"""Share of the free memory that weights and cache may use; the rest is for the temporaries of a step."""

_UNPADDED = 8
"""Pages of a pool that is never padded."""


def page_bytes(config: InferenceConfig) -> tuple[int, int]:
    """Returns the bytes of one retrieval page and of one streaming page, all layers together, statistics included."""
    cache = _smallest_cache(config)
    return (
        sum(tree_bytes(layer.kv.retrieval) for layer in cache) // _UNPADDED,
        sum(tree_bytes(layer.kv.streaming) for layer in cache) // _UNPADDED,
    )


def tail_bytes(config: InferenceConfig, max_num_seqs: int) -> int:
    """Returns the bytes of the open pages of all slots, all layers together."""
    cache = _smallest_cache(config)
    return max_num_seqs * sum(tree_bytes(layer.kv.tail) for layer in cache)


def _smallest_cache(config: InferenceConfig) -> KVCache:
    """Returns the shapes of a cache of one slot, with `_UNPADDED` pages in each pool."""
    pages = {"retrieval_pages": _UNPADDED, "streaming_pages": _UNPADDED}
    return jax.eval_shape(lambda: init_cache(config, max_num_seqs=1, **pages))


def dense_bf16_bytes(config: InferenceConfig, tokens: int) -> int:
    """Returns the bytes of the pages that ``tokens`` tokens of a sequence fill in bfloat16 without any sparsity.

    The last page counts whole: dense attention holds it too.
    """
    model, page = config.model, config.attention.page_size
    return (
        retrieval_pages(tokens, page)
        * page
        * model.num_layers
        * model.num_kv_heads
        * model.head_dim
        * 2
        * jnp.dtype(jnp.bfloat16).itemsize
    )


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes of weights and cache; see `plan_memory`.

    Attributes:
      cache: what the KV cache was asked to take and keep.
      weight_words: the types of the weights, such as "int8, bfloat16".
      retrieval_bytes, streaming_bytes, tail_bytes: of the two pools, and of the open pages of all slots.
      available_bytes: free memory of the device; None if it is not known.
      largest_context: tokens per sequence that fit; None if the memory is not known.
    """

    config: InferenceConfig
    sizes: Sizes
    pools: PoolSizes
    cache: CacheSettings
    weight_bytes: int
    weight_words: str
    retrieval_bytes: int
    streaming_bytes: int
    tail_bytes: int
    available_bytes: int | None
    largest_context: int | None

    @property
    def cache_bytes(self) -> int:
        """Returns the bytes of the KV cache: both pools, and the open page of every slot."""
        return self.retrieval_bytes + self.streaming_bytes + self.tail_bytes

    @property
    def total_bytes(self) -> int:
        """Returns the bytes of weights and KV cache."""
        return self.weight_bytes + self.cache_bytes

    @property
    def fits(self) -> bool:
        """Returns whether weights and cache leave enough memory for the steps, as far as is known."""
        return self.available_bytes is None or self.total_bytes <= self.available_bytes * _HEADROOM

    def require_fit(self) -> None:
        """Raises `InputError` if this context does not fit; the message names the largest one that does."""
        if self.available_bytes is None or self.fits:
            return
        usable = int(self.available_bytes * _HEADROOM)
        what = f"max_model_len={self.sizes.max_model_len} with {self.sizes.max_num_seqs} sequence(s)"
        remedy = f"the largest context that fits is {self.largest_context} tokens (max_model_len)"
        if not self.largest_context:
            remedy = "not even the weights and one page fit; weight_dtype int8 or int4 takes less"
        elif self.cache.kv_bytes is not None:
            what, remedy = f"kv_memory={self.cache.kv_bytes}", f"it may be {usable - self.weight_bytes} bytes"
        raise InputError(
            f"{what} needs {_gib(self.total_bytes)} for weights and KV cache, but {_gib(usable)} can be used: {remedy}"
        )

    def describe(self) -> str:
        """Returns the plan as a readable table."""
        config, length, sequences = self.config, self.sizes.max_model_len, self.sizes.max_num_seqs
        dense = sequences * dense_bf16_bytes(config, length)
        cache, pages = self.cache_bytes, self.retrieval_bytes + self.streaming_bytes
        retrieval, streaming = page_bytes(config)
        heads = config.model.num_layers * config.model.num_kv_heads
        kept = sum(config.num_retrieval)
        rows = [
            ("context", f"{length:,} tokens x {sequences} sequence(s)"),
            ("KV heads", f"{kept} retrieval + {heads - kept} streaming of {heads}"),
            ("weights", f"{self.weight_bytes:,} bytes ({_gib(self.weight_bytes)}, {self.weight_words})"),
            ("retrieval pages", f"{self.pools.retrieval:,} x {retrieval:,} = {self.retrieval_bytes:,} bytes"),
            ("streaming pages", f"{self.pools.streaming:,} x {streaming:,} = {self.streaming_bytes:,} bytes"),
            ("open pages", f"{sequences:,} x {self.tail_bytes // sequences:,} = {self.tail_bytes:,} bytes"),
            ("KV cache", f"{cache:,} bytes ({_gib(cache)}, {config.kv_dtype}), {pages / dense:.2f}x of dense bfloat16"),
            ("prefix cache", self._describe_prefix_cache()),
            ("swap", f"{self.pools.swap:,} retrieval pages in host memory" if self.pools.swap else "none"),
            ("total", f"{self.total_bytes:,} bytes ({_gib(self.total_bytes)})"),
            ("memory", self._describe_memory()),
        ]
        if self.largest_context is not None:
            rows.append(("largest context", f"{self.largest_context:,} tokens x {sequences} sequence(s)"))
        return "\n".join(f"{name + ':':<17} {value}" for name, value in rows)

    def _describe_prefix_cache(self) -> str:
        chunk, page = self.sizes.prefill_chunk, self.config.attention.page_size
        if not self.cache.prefix_cache:
            return "off"
        if not self.has_prefix_cache:
            return f"off, because prefill_chunk={chunk} is not a multiple of page_size={page}"
        windows = self.cache.prefix_windows
        return f"idle pages, in units of {chunk} tokens" + (f"; room for {windows} windows beyond" if windows else "")

    @property
    def has_prefix_cache(self) -> bool:
        """Returns whether prefixes of prompts are cached, which takes chunks of whole pages."""
        return self.cache.prefix_cache and self.sizes.prefill_chunk % self.config.attention.page_size == 0

    def _describe_memory(self) -> str:
        if self.available_bytes is None:
            return "not known: the device is not here"
        fits = "fits" if self.fits else "DOES NOT FIT"
        return f"{_gib(self.available_bytes)} free, {_HEADROOM:.0%} of it usable: {fits}"


def plan_memory(
    config: InferenceConfig,
    sizes: Sizes,
    *,
    available_bytes: int | None,
    cache: CacheSettings | None = None,
    params: Params | None = None,
) -> MemoryPlan:
    """Returns the memory for ``sizes.max_num_seqs`` sequences of ``sizes.max_model_len`` tokens. Loads nothing.

    Args:
      config: model, sparsity and number types.
      sizes: sequences, context and calls.
      available_bytes: memory to plan for; None if it is not known, and then the plan does not say what fits.
      cache: what the KV cache takes and keeps; None takes the defaults of `CacheSettings`.
      params: the parameter tree, of `jax.ShapeDtypeStruct`; None for numbers of ``config.dtype``.

    Raises:
      InputError: if ``cache.kv_memory`` does not hold one sequence of full length.
    """
    cache = cache or CacheSettings()
    params = abstract_params(config.model, config.dtype) if params is None else params
    weights = tree_bytes(params)
    usable = None if available_bytes is None else int(available_bytes * _HEADROOM)
    share = _Share(config, sizes, cache, *page_bytes(config), tail_bytes(config, sizes.max_num_seqs))
    full = share.full(sizes.max_model_len)
    pools, kv_memory = full, share.kv_memory(full, None if usable is None else usable - weights)
    if kv_memory is not None:
        pools = share.within(kv_memory)
    pools = replace(pools, swap=share.swap)
    largest = None
    if usable is not None:
        page = config.attention.page_size
        limit = usable - weights if kv_memory is None else min(kv_memory, usable - weights)
        least = share.full if kv_memory is None else share.least
        # Lengths are int32.
        largest = page * _last(LARGEST_INT // page, lambda pages: share.size(least(pages * page)) <= limit)
    return MemoryPlan(
        config=config,
        sizes=sizes,
        pools=pools,
        cache=cache,
        weight_bytes=weights,
        weight_words=describe_forms(params),
        retrieval_bytes=pools.retrieval * share.retrieval_page,
        streaming_bytes=pools.streaming * share.streaming_page,
        tail_bytes=share.tail,
        available_bytes=available_bytes,
        largest_context=largest,
    )


@dataclass(frozen=True)
class _Share:
    """How memory becomes pages; the bytes of a page are those of all layers."""

    config: InferenceConfig
    sizes: Sizes
    cache: CacheSettings
    retrieval_page: int
    streaming_page: int
    tail: int

    def size(self, pools: PoolSizes) -> int:
        """Returns the bytes of pools and of the open pages."""
        return pools.retrieval * self.retrieval_page + pools.streaming * self.streaming_page + self.tail

    def full(self, length: int) -> PoolSizes:
        """Returns the pools that hold every slot at a length."""
        sizes = replace(self.sizes, max_model_len=length)
        return padded(self.config, PoolSizes.of(self.config, sizes, windows=self.cache.prefix_windows))

    def least(self, length: int) -> PoolSizes:
        """Returns the pools that hold one slot at a length, and the windows of all."""
        one = most_pages(self.config.attention, self.sizes, length, 0, keeps_all=True)
        full = self.full(length)
        return padded(self.config, replace(full, retrieval=min(full.retrieval, one)))

    def kv_memory(self, full: PoolSizes, left: int | None) -> int | None:
        """Returns the bytes that the KV cache may take; None for those that it takes with ``full``."""
        asked = self.cache.kv_memory
        if not isinstance(asked, str):
            return asked
        return None if left is None or (asked == "fit" and self.size(full) <= left) else left

    def within(self, kv_memory: int) -> PoolSizes:
        """Returns the pools that fill a memory: the streaming pool for all slots, the rest for retrieval pages.

        Windows of the prefix cache take up to a quarter of it. What the device has left may be too little for one
        sequence; the plan then does not fit.
        """
        least = self.least(self.sizes.max_model_len)
        without = self._with_windows(0).least(self.sizes.max_model_len)
        spare = min(kv_memory // 4, kv_memory - self.size(without)) // max(self.streaming_page, 1)
        least = replace(least, streaming=min(least.streaming, without.streaming + max(spare, 0)))
        if self.size(least) > kv_memory and self.cache.kv_bytes is not None:
            raise InputError(
                f"kv_memory of {_gib(kv_memory)} is too small for one sequence of max_model_len="
                f"{self.sizes.max_model_len} tokens, which takes {_gib(self.size(least))}: give more, or lower "
                "max_model_len or max_num_seqs"
            )
        if not least.retrieval:
            return least
        most = (kv_memory - self.tail - least.streaming * self.streaming_page) // self.retrieval_page
        unit = padded(self.config, replace(least, retrieval=1)).retrieval
        return replace(least, retrieval=max(least.retrieval, min(most, LARGEST_INT) // unit * unit))

    def _with_windows(self, count: int) -> "_Share":
        return replace(self, cache=replace(self.cache, prefix_windows=count))

    @property
    def swap(self) -> int:
        """Returns the retrieval pages for which the host has room, beside the streaming pages of all slots."""
        streaming = self.full(self.sizes.max_model_len).streaming * self.streaming_page
        return max(0, self.cache.swap_memory - streaming) // self.retrieval_page if self.retrieval_page else 0


def _last(most: int, fits: Callable[[int], bool]) -> int:
    """Returns the largest number up to ``most`` that fits; 0 always does."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def free_memory() -> int:
    """Returns the free bytes of the default device: within a GPU's limit, or of the host (`host_memory`)."""
    statistics = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" in statistics:
        return statistics["bytes_limit"] - statistics.get("bytes_in_use", 0)
    return host_memory()


def _gib(size: float) -> str:
    return f"{size / _GIB:.2f} GiB"
