"""LServe's attention as ops on arrays: page write, prefill, page selection and decode over a paged KV cache.

Also the choice of the blocks that a prefill reads, and the product of rows with weights in 8 or 4 bits. Each op is one
function with a definition in its docstring and several implementations (`reference`, `xla`, …). The package depends on
no models, configurations or devices.
"""

from pallas_kernels.block_select import block_select
from pallas_kernels.core.dispatch import BACKENDS, Choice, observe_choices
from pallas_kernels.core.paging import NO_PAGE, LayerKV, PagedKV, PageTables, Tail
from pallas_kernels.core.quantization import (
    QuantizedArray,
    QuantizedKeys,
    dequantize,
    dequantize_keys,
    quantize,
    quantize_keys,
    rotate,
)
from pallas_kernels.core.quantized_matrix import QuantizedMatrix
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.kv_write import kv_write
from pallas_kernels.page_select import Selection, choose_pages, page_select, selection_width
from pallas_kernels.prefill_attention import (
    BlockList,
    BlockMeans,
    BlockRanges,
    Walk,
    prefill_attention,
    visible_walk,
)
from pallas_kernels.quantized_matmul import quantized_matmul

__all__ = [
    "BACKENDS",
    "NO_PAGE",
    "BlockList",
    "BlockMeans",
    "BlockRanges",
    "Choice",
    "LayerKV",
    "PageTables",
    "PagedKV",
    "QuantizedArray",
    "QuantizedKeys",
    "QuantizedMatrix",
    "Selection",
    "Tail",
    "Walk",
    "block_select",
    "choose_pages",
    "decode_attention",
    "dequantize",
    "dequantize_keys",
    "kv_write",
    "observe_choices",
    "page_select",
    "prefill_attention",
    "quantize",
    "quantize_keys",
    "quantized_matmul",
    "rotate",
    "selection_width",
    "visible_walk",
]
