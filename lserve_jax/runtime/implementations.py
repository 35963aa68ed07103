"""Which implementation each op takes in the compiled steps, and why others refused, found by tracing."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from lserve_jax.config.inference import InferenceConfig, LayerKind
from lserve_jax.config.pages import retrieval_pages
from lserve_jax.config.sizes import PoolSizes, Sizes
from lserve_jax.models.layers import project
from lserve_jax.models.llama import Attend, Params
from lserve_jax.runtime.attend import decode_attend, prefill_attend
from lserve_jax.runtime.cache import LayerCache, empty_cache
from pallas_kernels import Choice, PageTables, QuantizedMatrix, observe_choices
from pallas_kernels.core.quantized_matrix import quantized_matrices


def implementations(
    config: InferenceConfig, sizes: Sizes, pools: PoolSizes, params: Params | None = None
) -> tuple[Choice, ...]:
    """Returns the implementations of each op in a prefill and in a decode step, each once.

    Traces the attention of one layer of each kind with the shapes of the engine, and one product with each kind of
    quantised matrix; compiles and runs nothing.

    Args:
      config: static settings.
      sizes: sequences, context and calls.
      pools: pages.
      params: the parameter tree, of `jax.ShapeDtypeStruct`; None for numbers alone.

    Raises:
      NotImplementedError: if the implementation that ``config`` names refuses, with its reason.
    """
    with observe_choices() as choices:
        cache = jax.eval_shape(lambda: empty_cache(config, sizes, pools))
        for kind, layer in dict(zip(config.kinds, cache, strict=True)).items():
            _trace(config, sizes, kind, layer, _prefill_attend, batch=1, tokens=sizes.prefill_chunk)
            _trace(config, sizes, kind, layer, decode_attend, batch=sizes.max_num_seqs, tokens=1)
        _trace_products(config, sizes, params or {})
    return tuple(dict.fromkeys(choices))


def by_op(choices: Sequence[Choice]) -> dict[str, str]:
    """Returns the implementation of each op; "+" joins the names if kinds of layers differ."""
    found: dict[str, list[str]] = {}
    for choice in choices:
        names = found.setdefault(choice.op, [])
        if choice.implementation not in names:
            names.append(choice.implementation)
    return {op: "+".join(names) for op, names in found.items()}


def refusals(choices: Sequence[Choice]) -> dict[str, list[str]]:
    """Returns the reasons, each once, why an implementation that comes before the chosen one refused."""
    found: dict[str, list[str]] = {}
    for name, reason in dict.fromkeys(refusal for choice in choices for refusal in choice.refusals):
        found.setdefault(name, []).append(reason)
    return found


def describe(choices: Sequence[Choice], *, with_ops: bool = False) -> str:
    """Returns one readable line: which ops each implementation computes, and why others refused."""
    ops: dict[str, list[str]] = {}
    for op, names in by_op(choices).items():
        ops.setdefault(names, []).append(op)
    refused = [f"{name} refused: {reason}" for name, reasons in refusals(choices).items() for reason in reasons]
    taken = ", ".join(f"{names} for {', '.join(members)}" for names, members in ops.items())
    if len(ops) == 1 and not with_ops:
        taken = next(iter(ops))
    return "; ".join([taken, *refused])


def _prefill_attend(config: InferenceConfig, tables: PageTables, starts: jax.Array, counts: jax.Array) -> Attend:
    return prefill_attend(config, tables, starts, counts, ends=starts)


def _trace(
    config: InferenceConfig,
    sizes: Sizes,
    kind: LayerKind,
    cache: LayerCache,
    attend_with: Callable[..., Attend],
    *,
    batch: int,
    tokens: int,
) -> None:
    def attend(q: jax.Array, k: jax.Array, state: Any, table: jax.Array, ones: jax.Array) -> Any:
        return attend_with(config, PageTables(table, table), ones, ones)(kind, q, k, k, state)

    q, k = (
        jax.ShapeDtypeStruct((batch, tokens, heads, config.model.head_dim), config.dtype)
        for heads in (config.model.num_heads, config.model.num_kv_heads)
    )
    pages = retrieval_pages(sizes.max_model_len, config.attention.page_size)
    table, ones = (jax.ShapeDtypeStruct(shape, "int32") for shape in ((batch, pages), (batch,)))
    jax.eval_shape(attend, q, k, cache, table, ones)


def _trace_products(config: InferenceConfig, sizes: Sizes, params: Params) -> None:
    """Traces `project` for each shape and layout of a quantised matrix: in layers for both steps, for logits in one."""

    def product(x: jax.Array, kernel: QuantizedMatrix) -> jax.Array:
        return project(x, kernel.reshape(-1))

    layers = {name: entry for name, entry in params.items() if name.startswith("layers_")}
    logits = params.get("embed" if config.model.tie_embeddings else "lm_head")
    for tree, rows in ((layers, sizes.prefill_chunk), (layers, sizes.max_num_seqs), (logits, sizes.max_num_seqs)):
        for matrix in dict.fromkeys(quantized_matrices(tree)):
            jax.eval_shape(product, jax.ShapeDtypeStruct((rows, matrix.shape[-1]), config.dtype), matrix)
