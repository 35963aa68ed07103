"""The ops and workloads by name."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from bench.kernels.cases import Case, decode_case, prefill_case, select_case, write_case
from bench.kernels.sizes import Sizes, decode_sizes, prefill_sizes, select_sizes, write_sizes
from pallas_kernels.core.workloads import BATCHED, PREFILL, SERVING, TINY, Workload


class Op(NamedTuple):
    """An op to measure: what a call moves, and how to make its arrays for a number of calls and sets of tables."""

    sizes: Callable[[Workload], Sizes]
    case: Callable[[Workload, int, int], Case]


OPS: dict[str, Op] = {
    "decode_attention": Op(partial(decode_sizes, is_dense=False), partial(decode_case, is_dense=False)),
    "decode_dense": Op(partial(decode_sizes, is_dense=True), partial(decode_case, is_dense=True)),
    "page_select": Op(select_sizes, select_case),
    "kv_write_decode": Op(partial(write_sizes, tokens=1), partial(write_case, is_decode=True)),
    "kv_write_prefill": Op(lambda w: write_sizes(w, w.chunk), partial(write_case, is_decode=False)),
    "prefill_attention": Op(partial(prefill_sizes, is_dense=False), partial(prefill_case, is_dense=False)),
    "prefill_dense": Op(partial(prefill_sizes, is_dense=True), partial(prefill_case, is_dense=True)),
}
WORKLOADS = SERVING | BATCHED | PREFILL | {f"tiny_{name}": w for name, w in TINY.items()}


def inapplicable(op: str, w: Workload) -> str | None:
    """Returns why an op is not measured on a workload, if it is not."""
    if op in ("decode_attention", "page_select"):
        if not w.retrieval:
            return "no head selects pages"
        if w.num_selected >= w.max_pages:
            return "every page would be selected: see decode_dense"
    return None
