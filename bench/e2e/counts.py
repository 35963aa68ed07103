"""What a decode step must read and a prompt must compute."""

import jax
import jax.numpy as jnp
import numpy as np

from lserve_jax.config.inference import InferenceConfig
from lserve_jax.engine.memory import tree_bytes
from lserve_jax.engine.reads import PageReads
from lserve_jax.runtime.cache import init_cache
from lserve_jax.weights import abstract_params
from pallas_kernels import PagedKV, QuantizedKeys


def weight_bytes_read(config: InferenceConfig) -> int:
    """Returns the bytes of weights that a decode step reads: all except an embedding of which it reads one row."""
    params = abstract_params(config.model, jnp.dtype(config.dtype))
    return tree_bytes(params) - (0 if config.model.tie_embeddings else tree_bytes(params["embed"]))


def cache_bytes_read(config: InferenceConfig, lengths: range) -> float:
    """Returns the mean bytes of pages and statistics that a decode step of one sequence reads over its ``lengths``."""
    attention, kv_heads = config.attention, config.model.num_kv_heads
    template = jax.eval_shape(lambda: init_cache(config, max_num_seqs=1, retrieval_pages=1, streaming_pages=1))
    held = float(np.mean([-(-length // attention.page_size) for length in lengths]))

    def bytes_of(pools: list[PagedKV | None], heads: list[tuple[int, int, bool]]) -> float:
        """Returns the bytes of a class; ``heads`` has the numbers of each layer, and whether it selects."""
        pool = next((pool for pool in pools if pool is not None), None)
        if pool is None:
            return 0.0
        reads = PageReads(attention=attention, heads=tuple(heads))
        ratio = reads.ratio(lengths.start - 1, len(lengths))
        assert ratio is not None
        is_quantized = isinstance(pool.k, QuantizedKeys)  # codes of keys need the bounds, which others are selected by
        head_page = tree_bytes(pool if is_quantized else (pool.k, pool.v)) // pool.num_kv_heads
        return ratio * held * sum(n + m for n, m, _ in heads) * head_page

    subs = attention.page_size // attention.sub_page_size
    head_statistics = 2 * subs * config.model.head_dim * jnp.dtype(config.dtype).itemsize
    chosen = [kind.decode.num_selected for kind in config.kinds]
    kept = [(n, pages is not None) for n, pages in zip(config.num_retrieval, chosen, strict=True)]
    retrieval = bytes_of([layer.kv.retrieval for layer in template], [(n, 0, selects) for n, selects in kept])
    streaming = bytes_of(
        [layer.kv.streaming for layer in template], [(0, kv_heads - n, selects) for n, selects in kept]
    )
    budget = held if attention.num_selected is None else attention.budgets(np.asarray(held))
    selecting = sum(n for n, selects in kept if selects and budget < held)
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
