"""Workloads small enough for a CPU."""

from bench.kernels.cases import Case
from bench.kernels.ops import OPS, WORKLOADS
from pallas_kernels.core.workloads import TINY, TINY_PRODUCTS, Product, Workload

SMALL = {
    "plain": TINY["mixed"],
    "int8": Workload(
        context=512, retrieval=1, streaming=1, group=2, head_dim=16, num_selected=5, bits=(8, 4), chunk=80
    ),
}
"""Of layers."""
PRODUCT = TINY_PRODUCTS["w4g32"]


LLAMA = WORKLOADS["llama3_8b_128k_b8_int8"]


def case(op: str, w: Workload | Product) -> Case:
    return OPS[op].case(w, 2, 1)
