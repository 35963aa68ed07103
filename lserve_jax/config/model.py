"""What a checkpoint says about its model: dimensions, rotary embedding, special tokens."""

import importlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from lserve_jax.config.checks import LARGEST_INT, LARGEST_NUMBER
from lserve_jax.config.errors import InputError

ROPE_KINDS = ("default", "linear", "llama3", "yarn")

# The type that "auto" computes in, by the dtype of the checkpoint. float16 becomes bfloat16, which has the range that
# long residual streams need. A checkpoint that names no dtype is float32, as in transformers.
AUTO_DTYPES = {"bfloat16": "bfloat16", "float16": "bfloat16", "float32": "float32"}


DEFAULT_THETA = 10000.0
LARGEST_COUNT = 1 << 16  # of layers and of heads, which are counted one by one; far above any model


def is_positive_int(value: object) -> bool:
    """Returns whether a value is a whole number from 1 that fits into an int32."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= LARGEST_INT


def is_positive_number(value: object) -> bool:
    """Returns whether a value is a finite number above 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= LARGEST_NUMBER


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding of a checkpoint: its kind and the numbers that kind needs.

    ``kind`` is "default", "linear", "llama3" or "yarn". llama3 and yarn set ``original_max_position`` (tokens), llama3
    uses ``low_freq_factor`` and ``high_freq_factor``, and yarn uses the fields after them. If ``attention_factor`` is
    None, yarn derives it from ``factor`` (and ``mscale`` over ``mscale_all_dim`` if both are given).

    Raises:
      InputError: if the kind is unknown, or cannot have these numbers.
    """

    kind: str = "default"
    theta: float = DEFAULT_THETA
    factor: float = 1.0
    original_max_position: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.kind not in ROPE_KINDS:
            raise InputError(f"RoPE kind {self.kind!r} is not supported; known kinds: {', '.join(ROPE_KINDS)}")
        problems = [
            f"RoPE {name} must be a positive number, got {value!r}"
            for name in ("theta", "factor", "beta_fast", "beta_slow")
            if not is_positive_number(value := getattr(self, name))
        ]
        if self.kind in ("llama3", "yarn") and not is_positive_int(self.original_max_position):
            value = self.original_max_position
            problems.append(f"RoPE original_max_position must be a positive integer for {self.kind}, got {value!r}")
        if self.kind == "llama3" and not self.low_freq_factor < self.high_freq_factor:
            got = f"{self.low_freq_factor} and {self.high_freq_factor}"
            problems.append(f"RoPE low_freq_factor must be below high_freq_factor, got {got}")
        if problems:
            raise InputError("; ".join(problems))


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A model's dimensions and switches, hashable, so that it can be a static argument of a jitted function.

    ``max_context`` counts tokens. It is the checkpoint's ``max_position_embeddings``. Yarn raises it to at least
    ``factor`` times the original range, to which it stretches the rotary embedding. An active sliding window bounds it,
    because full attention and sliding-window attention are the same function up to the window. ``dtype`` is the type
    that "auto" computes in.

    Raises:
      InputError: if sizes are not positive integers or do not divide; every problem in one line.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_context: int
    tie_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    dtype: str
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        problems = [
            f"{field.name} must be a positive integer, got {value!r}"
            for field in fields(self)
            if field.type is int and not is_positive_int(value := getattr(self, field.name))
        ]
        problems += [
            f"{name} must be at most {LARGEST_COUNT}, got {value}"
            for name in ("num_layers", "num_heads", "num_kv_heads")
            if not problems and (value := getattr(self, name)) > LARGEST_COUNT
        ]
        if not problems and self.num_heads % self.num_kv_heads:
            problems.append(f"num_kv_heads ({self.num_kv_heads}) must divide num_heads ({self.num_heads})")
        if not problems and self.head_dim % 2:
            problems.append(f"head_dim must be even for rotary embeddings, got {self.head_dim}")
        if not (isinstance(self.rms_norm_eps, int | float) and 0 < self.rms_norm_eps < 1):
            problems.append(f"rms_norm_eps must lie between 0 and 1, got {self.rms_norm_eps!r}")
        if self.dtype not in AUTO_DTYPES.values():
            problems.append(f"dtype must be bfloat16 or float32, got {self.dtype!r}")
        if problems:
            raise InputError("; ".join(problems))

    @classmethod
    def from_hf(
        cls, config: Mapping[str, Any], *, source: str, generation_config: Mapping[str, Any] | None = None
    ) -> "ModelConfig":
        """Deprecated name of `lserve_jax.read_hf`."""
        warnings.warn("ModelConfig.from_hf is deprecated: call lserve_jax.read_hf", FutureWarning, stacklevel=2)
        # Imported by name, because `lserve_jax.config.hf` imports this module.
        reader = importlib.import_module("lserve_jax.config.hf")
        return reader.read_hf(config, source=source, generation_config=generation_config)
