"""The ops and workloads by name."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from bench.kernels.cases import Case, decode_case, prefill_case, product_case, select_case, write_case
from bench.kernels.sizes import Sizes, decode_sizes, prefill_sizes, product_sizes, select_sizes, write_sizes
from pallas_kernels.core.workloads import BATCHED, PREFILL, PRODUCTS, SERVING, TINY, TINY_PRODUCTS, Product


class Op(NamedTuple):
    """An op to measure, on a `Workload` or a `Product`.

    Attributes:
      sizes: what a call moves.
      case: makes the arrays for a number of calls, and sets of page tables or weights.
    """

    sizes: Callable[[Any], Sizes]
    case: Callable[[Any, int, int], Case]


OPS: dict[str, Op] = {
    "decode_attention": Op(partial(decode_sizes, is_dense=False), partial(decode_case, is_dense=False)),
    "decode_dense": Op(partial(decode_sizes, is_dense=True), partial(decode_case, is_dense=True)),
    "page_select": Op(select_sizes, select_case),
    "kv_write_decode": Op(partial(write_sizes, tokens=1), partial(write_case, is_decode=True)),
    "kv_write_prefill": Op(lambda w: write_sizes(w, w.chunk), partial(write_case, is_decode=False)),
    "prefill_attention": Op(partial(prefill_sizes, is_dense=False), partial(prefill_case, is_dense=False)),
    "prefill_dense": Op(partial(prefill_sizes, is_dense=True), partial(prefill_case, is_dense=True)),
    "quantized_matmul": Op(product_sizes, product_case),
}
WORKLOADS: dict[str, Any] = {
    **SERVING,
    **BATCHED,
    **PREFILL,
    **PRODUCTS,
    **{f"tiny_{name}": w for name, w in (TINY | TINY_PRODUCTS).items()},
}


def inapplicable(op: str, w: Any) -> str | None:
    """Returns why an op is not measured on a workload, if it is not."""
    if isinstance(w, Product) != (op == "quantized_matmul"):
        return "it is an attention layer" if op == "quantized_matmul" else "it is a projection"
    if op in ("decode_attention", "page_select"):
        if not w.retrieval:
            return "no head selects pages"
        if w.num_selected >= w.max_pages:
            return "every page would be selected: see decode_dense"
    return None
