"""Everything static about a compiled step: model, sparsity, head classes, number types and kernels."""

from dataclasses import dataclass, field

from lserve_jax.config.attention import AttentionConfig
from lserve_jax.config.heads import HeadClasses
from lserve_jax.config.model import ModelConfig

DTYPES = ("bfloat16", "float32")


@dataclass(frozen=True, kw_only=True)
class InferenceConfig:
    """The static argument of `init_cache`, `prefill_step` and `decode_step`; hashable.

    Attributes:
      model: what the checkpoint says.
      attention: the sparsity policy.
      heads: which KV heads are retrieval and which streaming heads; None makes all retrieval heads.
      dtype: of weights and activations, "bfloat16" or "float32"; "auto" is the checkpoint's.
      implementation: kernels' backend name; None takes the first that accepts.
    """

    model: ModelConfig
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    heads: HeadClasses | None = None
    dtype: str = "auto"
    implementation: str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", *DTYPES):
            raise ValueError(f"dtype={self.dtype!r} must be auto or one of {', '.join(DTYPES)}")
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
            raise ValueError(
                f"head classes of {given.num_layers} layers of {given.num_kv_heads} KV heads do not fit a model of "
                f"{layers} layers of {heads}"
            )
        beyond = [layer for layer in self.attention.dense_layers if layer >= layers]
        if beyond:
            raise ValueError(f"dense_layers={beyond} do not exist: the model has layers 0 … {layers - 1}")

    @property
    def num_retrieval(self) -> tuple[int, ...]:
        """Retrieval KV heads, layer by layer."""
        assert self.heads is not None
        return self.heads.num_retrieval

    @property
    def kv_dtype(self) -> str:
        """Element type of retrieval heads' pages: "bfloat16", "float32", "int8" or "int4"."""
        return self.dtype if self.attention.kv_dtype == "auto" else self.attention.kv_dtype

    @property
    def streaming_dtype(self) -> str:
        """Element type of streaming heads' pages: of 8 bits where others have 4.

        They hold sink and window alone, so that the other half of the bits would save nothing that grows.
        """
        return "int8" if self.kv_dtype == "int4" else self.kv_dtype

    @property
    def is_rotated(self) -> bool:
        """Whether pages hold keys and values rotated (`pallas_kernels.rotate`): with "int4", those of all heads."""
        return self.kv_dtype == "int4"

    def num_selected(self, layer: int) -> int | None:
        """Returns how many pages a retrieval head of the layer reads for one token; None for all."""
        return None if layer in self.attention.dense_layers else self.attention.num_selected
