"""The memory that a model, a context and a sparsity policy need, computed before anything is loaded."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from lserve_jax.config.checks import LARGEST_INT
from lserve_jax.config.errors import InputError
from lserve_jax.config.inference import InferenceConfig
from lserve_jax.config.pages import retrieval_pages
from lserve_jax.config.sizes import PoolSizes, Sizes
from lserve_jax.engine.host import host_memory
from lserve_jax.runtime.cache import init_cache, padded
from lserve_jax.weights.tensors import abstract_params

_GIB = 2**30
_HEADROOM = 0.9
"""Share of the free memory that weights and cache may use; the rest is for the temporaries of a step."""


def tree_bytes(tree: object) -> int:
    """Returns the bytes of all arrays of a pytree; `jax.ShapeDtypeStruct` leaves count as arrays."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def page_bytes(config: InferenceConfig) -> tuple[int, int]:
    """Returns the bytes of one retrieval page and of one streaming page, all layers together, statistics included."""
    pages = 8  # a pool of eight is never padded
    cache = jax.eval_shape(lambda: init_cache(config, max_num_seqs=1, retrieval_pages=pages, streaming_pages=pages))
    return (
        sum(tree_bytes(layer.kv.retrieval) for layer in cache) // pages,
        sum(tree_bytes(layer.kv.streaming) for layer in cache) // pages,
    )


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
      available_bytes: free memory of the device; None if it is not known.
      largest_context: tokens per sequence that fit; None if the memory is not known.
    """

    config: InferenceConfig
    sizes: Sizes
    pools: PoolSizes
    weight_bytes: int
    retrieval_bytes: int
    streaming_bytes: int
    available_bytes: int | None
    largest_context: int | None

    @property
    def total_bytes(self) -> int:
        """Returns the bytes of weights and both pools."""
        return self.weight_bytes + self.retrieval_bytes + self.streaming_bytes

    @property
    def fits(self) -> bool:
        """Returns whether weights and cache leave enough memory for the steps, as far as is known."""
        return self.available_bytes is None or self.total_bytes <= self.available_bytes * _HEADROOM

    def require_fit(self) -> None:
        """Raises `InputError` if this context does not fit; the message names the largest one that does."""
        if self.available_bytes is None or self.fits:
            return
        remedy = (
            f"the largest context that fits is {self.largest_context} tokens (max_model_len)"
            if self.largest_context
            else "not even the weights and one page fit"
        )
        raise InputError(
            f"max_model_len={self.sizes.max_model_len} with {self.sizes.max_num_seqs} sequence(s) needs "
            f"{_gib(self.total_bytes)} for weights and KV cache, but "
            f"{_gib(self.available_bytes * _HEADROOM)} can be used: {remedy}"
        )

    def describe(self) -> str:
        """Returns the plan as a readable table."""
        config, length, sequences = self.config, self.sizes.max_model_len, self.sizes.max_num_seqs
        dense = sequences * dense_bf16_bytes(config, length)
        cache = self.retrieval_bytes + self.streaming_bytes
        retrieval, streaming = page_bytes(config)
        heads = config.model.num_layers * config.model.num_kv_heads
        kept = sum(config.num_retrieval)
        rows = [
            ("context", f"{length:,} tokens x {sequences} sequence(s)"),
            ("KV heads", f"{kept} retrieval + {heads - kept} streaming of {heads}"),
            ("weights", f"{self.weight_bytes:,} bytes ({_gib(self.weight_bytes)}, {config.dtype})"),
            ("retrieval pages", f"{self.pools.retrieval:,} x {retrieval:,} = {self.retrieval_bytes:,} bytes"),
            ("streaming pages", f"{self.pools.streaming:,} x {streaming:,} = {self.streaming_bytes:,} bytes"),
            ("KV cache", f"{cache:,} bytes ({_gib(cache)}, {config.kv_dtype}), {cache / dense:.2f}x of dense bfloat16"),
            ("total", f"{self.total_bytes:,} bytes ({_gib(self.total_bytes)})"),
            ("memory", self._describe_memory()),
        ]
        if self.largest_context is not None:
            rows.append(("largest context", f"{self.largest_context:,} tokens x {sequences} sequence(s)"))
        return "\n".join(f"{name + ':':<17} {value}" for name, value in rows)

    def _describe_memory(self) -> str:
        if self.available_bytes is None:
            return "not known: the device is not here"
        fits = "fits" if self.fits else "DOES NOT FIT"
        return f"{_gib(self.available_bytes)} free, {_HEADROOM:.0%} of it usable: {fits}"


def plan_memory(config: InferenceConfig, sizes: Sizes, *, available_bytes: int | None) -> MemoryPlan:
    """Returns the memory for ``sizes.max_num_seqs`` sequences of ``sizes.max_model_len`` tokens. Loads nothing.

    Args:
      config: model, sparsity and number types.
      sizes: sequences, context and calls.
      available_bytes: memory to plan for; None if it is not known, and then the plan does not say what fits.
    """
    weights = tree_bytes(abstract_params(config.model, config.dtype))
    retrieval, streaming = page_bytes(config)

    def needed(length: int) -> int:
        pools = padded(config, PoolSizes.of(config, replace(sizes, max_model_len=length)))
        return weights + pools.retrieval * retrieval + pools.streaming * streaming

    page = config.attention.page_size
    low, high = 0, LARGEST_INT // page  # lengths are int32; in pages
    while available_bytes is not None and low < high:
        middle = (low + high + 1) // 2
        fits = needed(middle * page) <= available_bytes * _HEADROOM
        low, high = (middle, high) if fits else (low, middle - 1)
    pools = padded(config, PoolSizes.of(config, sizes))
    return MemoryPlan(
        config=config,
        sizes=sizes,
        pools=pools,
        weight_bytes=weights,
        retrieval_bytes=pools.retrieval * retrieval,
        streaming_bytes=pools.streaming * streaming,
        available_bytes=available_bytes,
        largest_context=None if available_bytes is None else low * page,
    )


def free_memory() -> int:
    """Returns the free bytes of the default device: within a GPU's limit, or of the host (`host_memory`)."""
    statistics = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" in statistics:
        return statistics["bytes_limit"] - statistics.get("bytes_in_use", 0)
    return host_memory()


def _gib(size: float) -> str:
    return f"{size / _GIB:.2f} GiB"
