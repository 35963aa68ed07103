"""Named shapes shared by tests, benches and tuning: an attention layer or a projection at one moment."""

from dataclasses import dataclass
from typing import Any

type Bits = tuple[int | None, int | None]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One layer's attention; an op uses the fields that it needs.

    Attributes:
      batch: sequences of a decode step; a prefill call has one.
      context: tokens of each sequence, the newest included.
      chunk: tokens of a prefill call.
      retrieval, streaming: KV heads of each class.
      group: query heads per KV head.
      head_dim, page_size, sub_page_size: sizes.
      dtype: of queries, and of pages that are not quantised.
      bits: 8 or 4 for quantised keys and values (in this order); None stores ``dtype``.
      streaming_bits: the same of streaming heads; None stores them as the others.
      sink, local, prefill_local: tokens that streaming heads see.
      num_selected: pages per selection.
      interval: decode steps from one selection to the next.
      has_means: whether the pages of retrieval heads have means.
    """

    batch: int = 1
    context: int
    chunk: int = 512
    retrieval: int
    streaming: int
    group: int
    head_dim: int
    page_size: int = 64
    sub_page_size: int = 16
    dtype: str = "bfloat16"
    bits: Bits = (None, None)
    streaming_bits: Bits | None = None
    sink: int = 128
    local: int = 256
    prefill_local: int = 4096
    num_selected: int = 64
    interval: int = 4
    has_means: bool = False

    def __post_init__(self) -> None:
        if self.page_size % self.sub_page_size:
            raise ValueError(f"{self.page_size=} must be a multiple of {self.sub_page_size=}")
        if self.retrieval + self.streaming < 1:
            raise ValueError("retrieval and streaming heads must be at least 1 together")

    @property
    def num_kv_heads(self) -> int:
        """K, the KV heads of both classes."""
        return self.retrieval + self.streaming

    @property
    def num_heads(self) -> int:
        """N, the query heads."""
        return self.num_kv_heads * self.group

    @property
    def bits_by_class(self) -> tuple[Bits, Bits]:
        """Bits of retrieval and of streaming heads."""
        return self.bits, self.streaming_bits or self.bits

    @property
    def max_pages(self) -> int:
        """Pages that the context fills."""
        return -(-self.context // self.page_size)


_MODELS: dict[str, dict[str, Any]] = {
    "llama3_8b": {"retrieval": 4, "streaming": 4, "group": 4, "head_dim": 128},
    "llama2_7b": {"retrieval": 16, "streaming": 16, "group": 1, "head_dim": 128},
    "smollm2_135m": {"retrieval": 2, "streaming": 1, "group": 3, "head_dim": 64},
}
_CONTEXTS = {"llama3_8b": (8, 32, 64, 128, 256, 512), "llama2_7b": (4, 16, 64), "smollm2_135m": (1, 8)}
_STORAGE: dict[str, dict[str, Bits]] = {
    "": {},
    "_int8": {"bits": (8, 8)},
    "_int4": {"bits": (4, 4), "streaming_bits": (8, 8)},
}

SERVING = {
    f"{model}_{context}k{suffix}": Workload(context=context * 1024, **bits, **_MODELS[model])
    for model, contexts in _CONTEXTS.items()
    for context in contexts
    for suffix, bits in _STORAGE.items()
}
"""A layer of real models, half of its heads streaming, by ``model_context[_storage]``: for benches and tuning."""

BATCHED = {
    f"{model}_{context}k_b{batch}{suffix}": Workload(batch=batch, context=context * 1024, **bits, **_MODELS[model])
    for batch in (8, 32)
    for model, contexts in _CONTEXTS.items()
    for context in contexts
    for suffix, bits in _STORAGE.items()
}
"""The same with several sequences, by ``model_context_batch[_storage]``."""

PREFILL = {
    f"{model}_{context}k_{name}{suffix}": Workload(context=context * 1024, chunk=chunk, **bits, **_MODELS[model])
    for model, contexts in _CONTEXTS.items()
    for context in contexts
    for name, chunk in (("chunk2k", 2048), ("chunk8k", 8192), ("whole", context * 1024))
    if chunk < context * 1024 or name == "whole"
    for suffix, bits in _STORAGE.items()
}
"""The last 2K or 8K tokens of a context, or all of them at once, by ``model_context_chunk[_storage]``."""

_TINY: dict[str, Any] = {
    "batch": 4,
    "context": 96,
    "chunk": 24,
    "group": 2,
    "head_dim": 8,
    "page_size": 16,
    "sub_page_size": 4,
    "dtype": "float32",
    "sink": 5,
    "local": 21,
    "prefill_local": 30,
    "num_selected": 4,
}

TINY = {
    "mixed": Workload(retrieval=2, streaming=1, **_TINY),
    "all_retrieval": Workload(retrieval=2, streaming=0, **_TINY),
    "all_streaming": Workload(retrieval=0, streaming=2, **_TINY),
}
"""Workloads of tests, in which no size is a multiple of another one unless it must be."""


@dataclass(frozen=True, kw_only=True)
class Product:
    """One projection of a decode step with quantised weights.

    Attributes:
      batch: rows of inputs.
      outputs, inputs: the shape of the matrix.
      bits: 8 or 4 of a code.
      group: inputs per scale (float16); None for one scale per output (float32).
      has_low: whether groups have offsets.
      input_bits: see `QuantizedMatrix`.
      dtype: of the inputs.
    """

    batch: int
    outputs: int
    inputs: int
    bits: int
    group: int | None = None
    has_low: bool = False
    input_bits: int | None = None
    dtype: str = "bfloat16"


_PROJECTIONS = {
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
    "logits": (128256, 4096),
}
_WEIGHTS: dict[str, dict[str, Any]] = {
    "w8a8": {"bits": 8, "input_bits": 8},
    "w8": {"bits": 8},
    "w4g128": {"bits": 4, "group": 128, "has_low": True},
    "w4g32": {"bits": 4, "group": 32, "has_low": True},
}

PRODUCTS = {
    f"llama3_8b_{name}_b{batch}_{storage}": Product(batch=batch, outputs=outputs, inputs=inputs, **weights)
    for name, (outputs, inputs) in _PROJECTIONS.items()
    for batch in (1, 8)
    for storage, weights in _WEIGHTS.items()
}
"""Projections of Llama 3 8B, by ``model_projection_batch_storage``."""

TINY_PRODUCTS = {
    storage: Product(batch=3, outputs=48, inputs=256, dtype="float32", **weights)
    for storage, weights in _WEIGHTS.items()
}
"""Products of tests."""
