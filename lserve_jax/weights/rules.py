"""Tables of every parameter: its path and shape in our tree, its names in Hugging Face and GGUF files, its layout."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Literal, NamedTuple, Protocol

import numpy as np

from lserve_jax.config.errors import InputError
from lserve_jax.config.model import ModelConfig

# The convention for the names and layout of a file's tensors; GGUF files have Hugging Face's layout.
Naming = Literal["hf", "gguf", "ours"]


def _always(config: ModelConfig) -> bool:
    return True


def _has_lm_head(config: ModelConfig) -> bool:
    return not config.tie_embeddings


_has_qkv_bias = attrgetter("qkv_bias")
_has_o_bias = attrgetter("o_bias")
_has_mlp_bias = attrgetter("mlp_bias")
_has_qk_norm = attrgetter("qk_norm")


class Rule(NamedTuple):
    """One parameter of the model or of each layer; a row of the tables below.

    ``shape`` uses the letters of `_sizes`. ``N H | D`` is the kernel of a linear map from D to N heads of H; files
    store it as one matrix, outputs times inputs. ``N H |`` is its bias, one flat vector in files. Without a bar, files
    store the parameter unchanged. ``when`` says which models have it; ``is_rotary`` marks those whose outputs RoPE
    rotates.
    """

    path: str
    shape: str
    hf: str
    gguf: str
    when: Callable[[ModelConfig], bool] = _always
    is_rotary: bool = False


BEFORE_LAYERS = (Rule("embed.embedding", "V D", "model.embed_tokens.weight", "token_embd.weight"),)
# Names of layer i begin with these prefixes.
LAYER_PREFIXES = ("layers_{i}.", "model.layers.{i}.", "blk.{i}.")
IN_LAYER = (
    Rule("input_norm.scale", "D", "input_layernorm.weight", "attn_norm.weight"),
    Rule("attention.q_proj.kernel", "N H | D", "self_attn.q_proj.weight", "attn_q.weight", is_rotary=True),
    Rule("attention.k_proj.kernel", "K H | D", "self_attn.k_proj.weight", "attn_k.weight", is_rotary=True),
    Rule("attention.v_proj.kernel", "K H | D", "self_attn.v_proj.weight", "attn_v.weight"),
    Rule("attention.o_proj.kernel", "D | N H", "self_attn.o_proj.weight", "attn_output.weight"),
    Rule("attention.q_proj.bias", "N H |", "self_attn.q_proj.bias", "attn_q.bias", when=_has_qkv_bias, is_rotary=True),
    Rule("attention.k_proj.bias", "K H |", "self_attn.k_proj.bias", "attn_k.bias", when=_has_qkv_bias, is_rotary=True),
    Rule("attention.v_proj.bias", "K H |", "self_attn.v_proj.bias", "attn_v.bias", when=_has_qkv_bias),
    Rule("attention.o_proj.bias", "D |", "self_attn.o_proj.bias", "attn_output.bias", when=_has_o_bias),
    Rule("attention.q_norm.scale", "H", "self_attn.q_norm.weight", "attn_q_norm.weight", when=_has_qk_norm),
    Rule("attention.k_norm.scale", "H", "self_attn.k_norm.weight", "attn_k_norm.weight", when=_has_qk_norm),
    Rule("post_attention_norm.scale", "D", "post_attention_layernorm.weight", "ffn_norm.weight"),
    Rule("mlp.gate_proj.kernel", "F | D", "mlp.gate_proj.weight", "ffn_gate.weight"),
    Rule("mlp.up_proj.kernel", "F | D", "mlp.up_proj.weight", "ffn_up.weight"),
    Rule("mlp.down_proj.kernel", "D | F", "mlp.down_proj.weight", "ffn_down.weight"),
    Rule("mlp.gate_proj.bias", "F |", "mlp.gate_proj.bias", "ffn_gate.bias", when=_has_mlp_bias),
    Rule("mlp.up_proj.bias", "F |", "mlp.up_proj.bias", "ffn_up.bias", when=_has_mlp_bias),
    Rule("mlp.down_proj.bias", "D |", "mlp.down_proj.bias", "ffn_down.bias", when=_has_mlp_bias),
)
AFTER_LAYERS = (
    Rule("final_norm.scale", "D", "model.norm.weight", "output_norm.weight"),
    Rule("lm_head.kernel", "V | D", "lm_head.weight", "output.weight", when=_has_lm_head),
)

# Tensors that some files have and no model needs: tables of the rotary embedding, a second copy of a tied embedding.
HARMLESS: dict[Naming, str] = {
    "hf": r".*\.rotary_emb\.inv_freq",
    "gguf": r"rope_freqs\.weight|blk\.\d+\.attn_rot_embd\.weight",
}
HARMLESS_TIED: dict[Naming, str] = {"hf": r"lm_head\.weight", "gguf": r"output\.weight"}


def _sizes(config: ModelConfig) -> dict[str, int]:
    return {
        "V": config.vocab_size,
        "D": config.hidden_size,
        "F": config.intermediate_size,
        "N": config.num_heads,
        "K": config.num_kv_heads,
        "H": config.head_dim,
    }


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """One parameter of one model: a rule with its layer and sizes filled in.

    ``shape`` is the shape in our tree, ``axes`` are its letters, and ``file_shape`` is the shape in a file, which
    stores the same numbers in the same order.
    """

    path: tuple[str, ...]
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    file_shape: tuple[int, ...]
    names: dict[Naming, str]
    layer: int | None
    is_rotary: bool

    @property
    def size(self) -> int:
        """Returns the number of elements."""
        return math.prod(self.shape)


def expected_tensors(config: ModelConfig, naming: Naming = "hf") -> list[Tensor]:
    """Returns every parameter of the model that ``config`` describes, in the order in which the model uses them."""
    in_layers = [(rule, layer) for layer in range(config.num_layers) for rule in IN_LAYER]
    order = [*((rule, None) for rule in BEFORE_LAYERS), *in_layers, *((rule, None) for rule in AFTER_LAYERS)]
    tensors = [_fill_in(rule, layer, config) for rule, layer in order if rule.when(config)]
    if naming == "ours":
        return [replace(tensor, file_shape=tensor.shape) for tensor in tensors]
    return tensors


def _fill_in(rule: Rule, layer: int | None, config: ModelConfig) -> Tensor:
    sizes = _sizes(config)
    outputs, bar, inputs = (part.split() for part in rule.shape.partition("|"))
    shape = tuple(sizes[axis] for axis in outputs + inputs)
    flat = tuple(math.prod(sizes[axis] for axis in axes) for axes in (outputs, inputs) if axes)
    prefixes = ("", "", "") if layer is None else (prefix.format(i=layer) for prefix in LAYER_PREFIXES)
    path, hf, gguf = (prefix + name for prefix, name in zip(prefixes, (rule.path, rule.hf, rule.gguf), strict=True))
    return Tensor(
        path=tuple(path.split(".")),
        axes=(*outputs, *inputs),
        shape=shape,
        file_shape=flat if bar else shape,
        names={"hf": hf, "gguf": gguf, "ours": path},
        layer=layer,
        is_rotary=rule.is_rotary,
    )


class HeadOrder(Protocol):
    """The part of `lserve_jax.config.heads.HeadClasses` that loading needs."""

    @property
    def order(self) -> tuple[tuple[int, ...], ...]:
        """Returns, per layer, the checkpoint's KV heads in the order of the loaded model."""
        ...


def check_heads(heads: HeadOrder | None, config: ModelConfig) -> None:
    """Raises `InputError` unless every layer of ``heads`` has each of the model's KV heads once."""
    if heads is None:
        return
    last = config.num_kv_heads - 1
    if len(heads.order) != config.num_layers:
        raise InputError(f"the head order has {len(heads.order)} layers, the model has {config.num_layers}")
    for layer, order in enumerate(heads.order):
        if sorted(order) != list(range(config.num_kv_heads)):
            raise InputError(f"the head order of layer {layer} must hold each KV head 0 to {last} once, got {order}")


def head_index(tensor: Tensor, config: ModelConfig, heads: HeadOrder | None) -> tuple[int, np.ndarray] | None:
    """Returns the axis along which ``tensor`` is permuted and the old index of each new one; None if nothing changes.

    ``heads.order`` permutes the KV heads. Query heads move with their KV head and keep their order inside the group, so
    that grouped-query attention computes the same function.
    """
    if heads is None or tensor.layer is None:
        return None
    order = np.asarray(heads.order[tensor.layer])
    if np.array_equal(order, np.arange(config.num_kv_heads)):
        return None
    if "K" in tensor.axes:
        return tensor.axes.index("K"), order
    if "N" in tensor.axes:
        group = config.num_heads // config.num_kv_heads
        return tensor.axes.index("N"), (order[:, None] * group + np.arange(group)).reshape(-1)
    return None
