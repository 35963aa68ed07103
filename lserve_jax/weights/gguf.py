"""GGUF files: metadata as a Hugging Face configuration, tensors dequantised one block of rows at a time."""

import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np

from lserve_jax.config.errors import InputError
from lserve_jax.config.model import RopeConfig
from lserve_jax.models.rope import rope_frequencies
from lserve_jax.weights.rules import Naming, Tensor
from lserve_jax.weights.tensors import Inventory, ReadTensor

# Architectures by llama.cpp's name; Mistral's models are stored as "llama". `read_hf` refuses others.
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

# llama.cpp rotates neighbouring elements (2i, 2i + 1) in these, so its converter interleaves the halves of a head.
INTERLEAVED = ("llama",)

# Hugging Face's configuration keys by the metadata key below "<architecture>."; the second table may be absent.
REQUIRED_KEYS = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "context_length": "max_position_embeddings",
}
OPTIONAL_KEYS = {
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
}
INTEGER_KEYS = REQUIRED_KEYS.keys() - {"attention.layer_norm_rms_epsilon"} | {
    "attention.head_count_kv",
    "attention.key_length",
}
ROPE_SCALING_KEYS = {
    "rope.scaling.type": "rope_type",
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
}
# Metadata that changes what the model computes, with the one value for which it equals Hugging Face's model.
NEUTRAL_VALUES = {
    "expert_count": 0,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
    "rope.scale_linear": 1.0,
}
# Metadata that names a token at which generation ends: end of text, of turn, of message.
END_TOKENS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")

# The converter stores Llama 3.1's frequency scaling as one factor per frequency; published models use these parameters.
ROPE_FACTORS = "rope_freqs.weight"
LLAMA3_ROPES = tuple(
    {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    for factor in (8.0, 32.0)
)

# The types of weights that `gguf.dequantize` can read.
TENSOR_TYPES = (
    *("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
    *("TQ1_0", "TQ2_0", "MXFP4"),
)
CHUNK_BYTES = 16 << 20  # of float32 per dequantised block of rows
SPLIT_NAME = re.compile(r".*-\d{5}-of-(\d{5})\.gguf")


class _Stored(NamedTuple):
    """A tensor as stored in the file: rows of blocks, mapped but not read."""

    data: np.ndarray
    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]


class _Reader(gguf.GGUFReader):
    """A reader that reads each array of metadata at once; the base class takes two seconds for a vocabulary."""

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
        if raw_type != gguf.GGUFValueType.ARRAY or self.byte_order != "I":
            return super()._get_field_parts(orig_offs, raw_type)
        begin = orig_offs + 12
        kind, count = struct.unpack("<IQ", self.data[orig_offs:begin].tobytes())
        kind = gguf.GGUFValueType(kind)
        if kind in self.gguf_scalar_to_np:
            parts = [self._get(begin, self.gguf_scalar_to_np[kind], count)]
            if len(parts[0]) < count:
                raise InputError(f"array of {count} values is cut off")
            size = int(parts[0].nbytes)
        elif kind == gguf.GGUFValueType.STRING:
            parts, size = _strings(self.data[begin:].view(np.ndarray), count)
        else:
            return super()._get_field_parts(orig_offs, raw_type)
        return begin - orig_offs + size, parts, list(range(len(parts))), [gguf.GGUFValueType.ARRAY, kind]


def _strings(data: np.ndarray, count: int) -> tuple[list[np.ndarray], int]:
    """Returns ``count`` strings as bytes, and the bytes that they and the lengths before them take in ``data``."""
    strings, at = [], 0
    for _ in range(count):
        begin = at + 8
        at = begin + int.from_bytes(data[at:begin].tobytes(), "little")
        if at > data.size:
            raise InputError(f"array of {count} strings is cut off")
        strings.append(data[begin:at])
    return strings, at


class Metadata(dict[str, Any]):
    """The metadata of a GGUF file, plain Python values by key.

    Attributes:
      location: the path of the file, for messages.
    """

    def __init__(self, values: Mapping[str, Any], location: str) -> None:
        super().__init__(values)
        self.location = location


class GGUFFile:
    """A GGUF file with its header read and its tensors mapped.

    ``metadata`` has plain Python values by GGUF key.

    Raises:
      InputError: if the file is not a GGUF file, is truncated, or is one part of a split one.
    """

    naming: Naming = "gguf"

    def __init__(self, path: Path) -> None:
        self.path = path
        split = SPLIT_NAME.fullmatch(path.name)
        if split and int(split[1]) > 1:
            raise InputError(f"{path}: split GGUF files are not read; join them with llama-gguf-split --merge")
        try:
            reader = _Reader(path)
            # The reader adds those that begin with "GGUF.".
            fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
            self.metadata = Metadata({name: _plain(field) for name, field in fields.items()}, str(path))
        except (ValueError, IndexError, KeyError, OverflowError, struct.error) as error:
            # The reader checks nothing: a truncated file raises whichever of these comes first.
            raise InputError(f"{path}: truncated or not a GGUF file ({error!r})") from None
        if reader.byte_order != "I":
            raise InputError(f"{path}: written in the other byte order; convert it with gguf-convert-endian")
        if self.metadata.get("split.count", 1) not in (0, 1):
            raise InputError(f"{path}: split GGUF files are not read; join them with llama-gguf-split --merge")
        self.tensors = {
            tensor.name: _Stored(tensor.data, tensor.tensor_type, tuple(reversed(tensor.shape.tolist())))
            for tensor in reader.tensors
        }

    @property
    def location(self) -> str:
        """Returns the path of the file."""
        return str(self.path)

    @property
    def architecture(self) -> str:
        """Returns llama.cpp's name of the architecture."""
        return str(self.metadata.get("general.architecture"))

    def hf_config(self) -> dict[str, Any]:
        """Returns the metadata as a ``config.json``.

        Raises:
          InputError: if metadata is missing, or needs what Hugging Face's model of that name does not support.
        """
        return _hf_config(self)

    def inventory(self) -> Inventory:
        """Returns the shape of every tensor, with a problem for each type that cannot be dequantised."""
        unreadable = {
            name: stored.kind for name, stored in self.tensors.items() if stored.kind.name not in TENSOR_TYPES
        }
        return Inventory(
            shapes={name: None if name in unreadable else stored.shape for name, stored in self.tensors.items()},
            problems=[f"tensor {name} has type {kind.name}, which is not read" for name, kind in unreadable.items()],
        )

    @contextmanager
    def open(self) -> Iterator[ReadTensor]:
        """Yields a function that dequantises one tensor into Hugging Face's layout and the given dtype."""

        def read(tensor: Tensor, dtype: np.dtype) -> np.ndarray:
            array = _dequantize(self.tensors[tensor.names["gguf"]], dtype)
            if tensor.is_rotary and self.architecture in INTERLEAVED:
                head_dim = tensor.shape[tensor.axes.index("H")]
                array = _undo_interleaving(array, head_dim)
            return array

        yield read


def _dequantize(stored: _Stored, dtype: np.dtype) -> np.ndarray:
    """Returns the tensor in ``dtype``, dequantised one block of rows at a time to avoid a float32 copy of the whole."""
    array = np.empty(stored.shape, dtype)
    rows = len(stored.data) if stored.data.ndim > 1 else stored.data.size
    step = max(1, CHUNK_BYTES // 4 * rows // max(array.size, 1))
    for start in range(0, rows, step):
        array[start : start + step] = gguf.dequantize(np.asarray(stored.data[start : start + step]), stored.kind)
    return array


def _undo_interleaving(array: np.ndarray, head_dim: int) -> np.ndarray:
    """Returns the rows of every head in Hugging Face's order (0, 1, 2, …), from llama.cpp's (0, H/2, 1, H/2 + 1, …)."""
    pairs = array.reshape(-1, head_dim // 2, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)


def _plain(field: gguf.ReaderField) -> Any:
    """Returns a metadata value; a float32 as its shortest decimal (1e-05, not 9.999999747378752e-06)."""
    value = field.contents()
    if field.types == [gguf.GGUFValueType.FLOAT32]:
        return float(str(np.float32(value)))
    return value


def _hf_config(file: GGUFFile) -> dict[str, Any]:
    architecture, metadata = file.architecture, file.metadata
    if architecture not in ARCHITECTURES:
        return {"architectures": [architecture]}  # `read_hf` refuses it and lists the known ones
    own = _architecture_metadata(file)
    config: dict[str, Any] = {"architectures": [ARCHITECTURES[architecture]], "model_type": architecture}
    config |= {name: own[key] for key, name in (REQUIRED_KEYS | OPTIONAL_KEYS).items() if key in own}
    config["num_key_value_heads"] = own.get("attention.head_count_kv", own["attention.head_count"])
    tokens = metadata.get("tokenizer.ggml.tokens")
    config["vocab_size"] = own.get("vocab_size", len(tokens) if isinstance(tokens, list) else None)
    config["rope_scaling"] = _rope_scaling(file, own)
    config["tie_word_embeddings"] = "output.weight" not in file.tensors
    config["attention_bias"] = _has_any(file, r"attn_(q|k|v|output)\.bias")
    config["mlp_bias"] = _has_any(file, r"ffn_(gate|up|down)\.bias")
    is_float32 = all(stored.kind.name == "F32" for stored in file.tensors.values())
    config["torch_dtype"] = "float32" if is_float32 else "bfloat16"
    config["bos_token_id"] = metadata.get("tokenizer.ggml.bos_token_id")
    config["eos_token_id"] = list(dict.fromkeys(metadata[key] for key in END_TOKENS if key in metadata)) or None
    return config


def _has_any(file: GGUFFile, pattern: str) -> bool:
    return any(re.fullmatch(rf"blk\.\d+\.{pattern}", name) for name in file.tensors)


def _architecture_metadata(file: GGUFFile) -> dict[str, Any]:
    """Returns the metadata below the architecture's name; a list of equal values per layer becomes one value."""
    prefix = f"{file.architecture}."
    own = {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}
    problems = []
    missing = [prefix + key for key in REQUIRED_KEYS if key not in own]
    if missing:
        problems.append(f"missing required metadata: {', '.join(missing)}")
    for key, value in own.items():
        if isinstance(value, list) and len(set(value)) == 1:
            own[key] = value[0]
    for key in INTEGER_KEYS & own.keys():
        if isinstance(own[key], list):
            problems.append(f"{prefix}{key} differs between layers, which is not supported")
        elif not isinstance(own[key], int) or own[key] < 1:
            problems.append(f"{prefix}{key} must be a positive integer, got {own[key]!r}")
    problems += [
        f"{prefix}{key} = {own[key]!r} is not supported"
        for key, neutral in NEUTRAL_VALUES.items()
        if own.get(key, neutral) != neutral
    ]
    if not problems:
        head_dim = own.get("attention.key_length") or own["embedding_length"] // own["attention.head_count"]
        problems += [
            f"{prefix}{key} must equal the head size {head_dim}, got {own[key]}"
            for key in ("attention.value_length", "rope.dimension_count")
            if own.get(key, head_dim) != head_dim
        ]
    if problems:
        raise InputError(f"{file.path}: {'; '.join(problems)}")
    return own


def _rope_scaling(file: GGUFFile, own: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the ``rope_scaling`` section: linear or yarn from the metadata, llama3 from the tensor of factors."""
    scaling = {name: own[key] for key, name in ROPE_SCALING_KEYS.items() if key in own}
    is_scaled = scaling.get("rope_type", "none") != "none"
    if ROPE_FACTORS not in file.tensors:
        return scaling if is_scaled else None
    factors = _dequantize(file.tensors[ROPE_FACTORS], np.dtype(np.float32))
    if np.all(factors == 1.0):
        return scaling if is_scaled else None
    theta = own.get("rope.freq_base", RopeConfig().theta)
    for candidate in LLAMA3_ROPES:
        if not is_scaled and _matches(factors, candidate, theta):
            return dict(candidate)
    wanted = " or ".join(f"{rope['factor']:g}/1/4/8192" for rope in LLAMA3_ROPES)
    raise InputError(
        f"{file.path}: the factors in {ROPE_FACTORS} are not those of a known Llama 3 RoPE ({wanted}: factor, "
        "low_freq_factor, high_freq_factor, original_max_position_embeddings)"
    )


def _matches(factors: np.ndarray, candidate: Mapping[str, Any], theta: float) -> bool:
    """Returns whether ``candidate`` divides the plain frequencies by these factors."""
    head_dim = 2 * factors.size
    rope = RopeConfig(
        kind="llama3",
        theta=theta,
        factor=candidate["factor"],
        low_freq_factor=candidate["low_freq_factor"],
        high_freq_factor=candidate["high_freq_factor"],
        original_max_position=candidate["original_max_position_embeddings"],
    )
    plain, _ = rope_frequencies(RopeConfig(theta=theta), head_dim)
    scaled, _ = rope_frequencies(rope, head_dim)
    return bool(np.allclose(plain / scaled, factors, rtol=1e-3))
