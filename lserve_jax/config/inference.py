"""Everything static about a compiled step: model, sparsity, head classes, number types and kernels."""

import warnings
from dataclasses import dataclass, field
from functools import cached_property

from lserve_jax.config.attention import TILE, AttentionConfig
from lserve_jax.config.errors import InputError
from lserve_jax.config.heads import HeadClasses
from lserve_jax.config.model import ModelConfig

DTYPES = ("bfloat16", "float32")
WEIGHT_DTYPES = ("auto", *DTYPES, "int8", "int4")


@dataclass(frozen=True, kw_only=True)
class Storage:
    """How a layer stores the pages of one class of KV heads, independent of what it reads.

    Attributes:
      num_kv_heads: heads with such pages, at least 1.
      dtype: element type: "bfloat16", "float32", "int8" or "int4".
      sub_page_size: tokens whose keys have their bounds stored, which page selection and quantised keys need; None if
        neither does.
      has_means: whether pages have the means of their keys and values, which the choice of blocks needs.
    """

    num_kv_heads: int
    dtype: str
    sub_page_size: int | None
    has_means: bool = False


@dataclass(frozen=True, kw_only=True)
class BlockRule:
    """Which blocks of the history retrieval heads read; the fields are options of `pallas_kernels.block_select`."""

    queries: int
    keys: int
    threshold: float | None
    sink: int
    local: int
    last: int
    least: int
    has_means: bool


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What one query reads of the stored pages.

    Attributes:
      sink: first tokens that streaming heads see.
      local: newest tokens that streaming heads see, the current one included.
      num_selected: pages per selection of retrieval heads; None reads all pages.
      blocks: what a prompt's tokens read of their history; None for all of it.
    """

    sink: int
    local: int
    num_selected: int | None
    blocks: BlockRule | None = None


@dataclass(frozen=True, kw_only=True)
class LayerKind:
    """What a layer stores and what it reads. Layers of one kind share one trace and one cache shape.

    Attributes:
      retrieval: storage of retrieval heads, which keep every page of a sequence; None if the layer has none.
      streaming: storage of streaming heads, which keep the pages of sink and window; None if the layer has none.
      prefill: what a token of a prompt reads.
      decode: what a generated token reads.
    """

    retrieval: Storage | None
    streaming: Storage | None
    prefill: Reading
    decode: Reading

    @property
    def num_retrieval(self) -> int:
        """Returns how many KV heads of the layer are retrieval heads."""
        return 0 if self.retrieval is None else self.retrieval.num_kv_heads

    @property
    def num_streaming(self) -> int:
        """Returns how many KV heads of the layer are streaming heads."""
        return 0 if self.streaming is None else self.streaming.num_kv_heads


@dataclass(frozen=True, kw_only=True)
class InferenceConfig:
    """The static argument of `init_cache`, `prefill_step` and `decode_step`; hashable.

    Attributes:
      model: the checkpoint's dimensions and switches.
      attention: the sparsity policy.
      heads: the class of every KV head; None makes all of them retrieval heads.
      dtype: type of weights and activations, "bfloat16" or "float32"; "auto" is the checkpoint's.
      implementation: name of the kernels' backend; None takes the first that accepts.
    """

    model: ModelConfig
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    heads: HeadClasses | None = None
    dtype: str = "auto"
    implementation: str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", *DTYPES):
            raise InputError(f"dtype={self.dtype!r} must be auto or one of {', '.join(DTYPES)}")
        if self.dtype == "auto":
            object.__setattr__(self, "dtype", self.model.dtype)
        if self.heads is None:
            heads = HeadClasses.all_retrieval(self.model.num_layers, self.model.num_kv_heads)
            object.__setattr__(self, "heads", heads)
        self._check_layers()

    def _check_layers(self) -> None:
        layers, heads = self.model.num_layers, self.model.num_kv_heads
        assert self.heads is not None
        given = self.heads
        if (given.num_layers, given.num_kv_heads) != (layers, heads):
            raise InputError(
                f"head classes of {given.num_layers} layers of {given.num_kv_heads} KV heads do not fit a model of "
                f"{layers} layers of {heads}"
            )
        first = self.attention.prefill_first_layer
        named = {name: getattr(self.attention, name) for name in ("dense_layers", "uncorrected_layers")}
        for name, members in (named | {"prefill_first_layer": () if first is None else (first,)}).items():
            beyond = [layer for layer in members if layer >= layers]
            if beyond:
                raise InputError(f"{name}={beyond} do not exist: the model has layers 0 … {layers - 1}")

    @property
    def num_retrieval(self) -> tuple[int, ...]:
        """Returns the number of retrieval heads of each layer."""
        assert self.heads is not None
        return self.heads.num_retrieval

    @property
    def kv_dtype(self) -> str:
        """Returns the element type of retrieval heads' pages: "bfloat16", "float32", "int8" or "int4"."""
        return self.dtype if self.attention.kv_dtype == "auto" else self.attention.kv_dtype

    @property
    def streaming_dtype(self) -> str:
        """Returns the element type of streaming heads' pages: 8 bits if that of retrieval heads has 4.

        These pages hold only sink and window, so 4 bits would save nothing that grows with the context.
        """
        return "int8" if self.kv_dtype == "int4" else self.kv_dtype

    @property
    def is_rotated(self) -> bool:
        """Returns whether pages hold rotated values (`pallas_kernels.rotate`): with "int4", for all heads."""
        return self.kv_dtype == "int4"

    def num_selected(self, layer: int) -> int | None:
        """Deprecated: ``kind(layer).decode.num_selected``."""
        warnings.warn(
            "InferenceConfig.num_selected is deprecated: say kind(layer).decode.num_selected",
            FutureWarning,
            stacklevel=2,
        )
        return self.kind(layer).decode.num_selected

    @cached_property
    def kinds(self) -> tuple[LayerKind, ...]:
        """Returns the kind of every layer."""
        return tuple(map(self._kind, range(self.model.num_layers)))

    def kind(self, layer: int) -> LayerKind:
        """Returns the kind of one layer."""
        return self.kinds[layer]

    def _kind(self, layer: int) -> LayerKind:
        attention, retrieval = self.attention, self.num_retrieval[layer]
        streaming = self.model.num_kv_heads - retrieval
        num_selected = None if layer in attention.dense_layers or not retrieval else attention.num_selected
        blocks = self._blocks(layer) if retrieval else None

        def storage(heads: int, dtype: str, *, is_selected: bool, has_means: bool) -> Storage | None:
            needs_bounds = is_selected or dtype in ("int8", "int4")
            size = self.sub_page_size if needs_bounds else None
            return Storage(num_kv_heads=heads, dtype=dtype, sub_page_size=size, has_means=has_means) if heads else None

        has_means = blocks is not None and (blocks.has_means or blocks.threshold is not None)
        return LayerKind(
            retrieval=storage(retrieval, self.kv_dtype, is_selected=num_selected is not None, has_means=has_means),
            streaming=storage(streaming, self.streaming_dtype, is_selected=False, has_means=False),
            prefill=Reading(sink=attention.sink, local=attention.prefill_local, num_selected=None, blocks=blocks),
            decode=Reading(sink=attention.sink, local=attention.local, num_selected=num_selected),
        )

    def _blocks(self, layer: int) -> BlockRule | None:
        """Returns what the retrieval heads of a layer read of a prompt's history; None for all of it."""
        attention = self.attention
        is_triangle = attention.prefill_sparsity == "triangle"
        first = self.model.num_layers // 2 if is_triangle else 2
        first = first if attention.prefill_first_layer is None else attention.prefill_first_layer
        if attention.prefill_sparsity == "none" or layer < first or layer in attention.dense_layers:
            return None
        return BlockRule(
            queries=TILE,
            keys=attention.prefill_block,
            threshold=None if is_triangle else attention.prefill_threshold,
            sink=attention.sink,
            local=attention.prefill_near,
            last=attention.num_last,
            least=attention.prefill_from,
            has_means=not is_triangle and attention.is_prefill_corrected and layer not in attention.uncorrected_layers,
        )

    @property
    def sub_page_size(self) -> int:
        """Returns the tokens per sub-page of pools that have bounds: whole pages for 8-bit keys that nobody selects.

        Such keys lose little within the bounds of a page; keys of 4 bits lose over twice as much as with 16 tokens.
        """
        attention = self.attention
        is_small = attention.num_selected is not None or self.kv_dtype == "int4"
        return attention.sub_page_size if is_small else attention.page_size
