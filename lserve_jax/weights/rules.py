"""Tables of every tensor of a file and every parameter of our tree: paths, shapes, names, and which belong together."""

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
    """One tensor of the model or of each layer; a row of the tables below.

    ``shape`` uses the letters of `_sizes`. ``N H | D`` is the kernel of a linear map from D to N heads of H; files
    store it as one matrix, outputs times inputs. ``N H |`` is its bias, one flat vector in files. Without a bar, files
    store the tensor unchanged. ``when`` says which models have it; ``is_rotary`` marks those whose outputs RoPE
    rotates.
    """

    path: str
    shape: str
    hf: str
    gguf: str
    when: Callable[[ModelConfig], bool] = _always
    is_rotary: bool = False


BEFORE_LAYERS = (Rule("embed.embedding", "V | D", "model.embed_tokens.weight", "token_embd.weight"),)
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


class Join(NamedTuple):
    """Linear maps of the same inputs whose kernels, and biases, are one parameter: one product instead of several.

    The rows of each part are brought into the shape ``axes``, in which ``axes[axis]`` is what remains (the query heads
    per KV head; 1 for a key, a value, a gate), and the parts follow each other along that axis.
    """

    parts: tuple[str, ...]
    axes: str
    axis: int


# By the path of the joined map in a layer. Heads are grouped by KV head: they move, and are sharded, together.
JOINS = {
    "attention.qkv_proj": Join(("attention.q_proj", "attention.k_proj", "attention.v_proj"), "K S H", 1),
    "mlp.gate_up_proj": Join(("mlp.gate_proj", "mlp.up_proj"), "P F", 0),
}
_JOINED = {part: path for path, join in JOINS.items() for part in join.parts}

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
    """One tensor of one model's files: a rule with its layer and sizes filled in.

    ``shape`` has one axis for each letter of ``outputs`` and ``inputs``, and ``file_shape`` is the shape in a file,
    which stores the same numbers in the same order. Only kernels and the embedding have inputs.
    """

    path: tuple[str, ...]
    outputs: tuple[str, ...]
    inputs: tuple[str, ...]
    shape: tuple[int, ...]
    file_shape: tuple[int, ...]
    names: dict[Naming, str]
    layer: int | None
    is_rotary: bool

    @property
    def size(self) -> int:
        """Returns the number of elements."""
        return math.prod(self.shape)

    @property
    def axes(self) -> tuple[str, ...]:
        """Returns the letters of ``shape``."""
        return (*self.outputs, *self.inputs)

    @property
    def is_matrix(self) -> bool:
        """Returns whether it is a linear map, or the embedding: what may be quantised."""
        return bool(self.inputs)

    @property
    def flat_shape(self) -> tuple[int, ...]:
        """Returns the shape as outputs times inputs, or as one axis without inputs."""
        split = len(self.outputs)
        return tuple(math.prod(axes) for axes in (self.shape[:split], self.shape[split:]) if axes)


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One leaf of the model's parameter tree, made of one tensor or of several joined ones.

    Attributes:
      path: its place in the tree.
      parts: the tensors, in order.
      part_shapes: the shape that each gets; they follow each other along ``axis``.
      axis: the axis along which parts are joined.
      axes: the letters of ``shape``. All inputs are one axis, such as "N H".
      shape: the shape in the tree.
      num_kv_heads: blocks of which ``head_axis`` consists.
    """

    path: tuple[str, ...]
    parts: tuple[Tensor, ...]
    part_shapes: tuple[tuple[int, ...], ...]
    axis: int
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    num_kv_heads: int

    @property
    def layer(self) -> int | None:
        """Returns the number of its layer; None outside of the layers."""
        return self.parts[0].layer

    @property
    def size(self) -> int:
        """Returns the number of elements."""
        return math.prod(self.shape)

    @property
    def is_matrix(self) -> bool:
        """Returns whether the last axis holds inputs of a linear map, or a vector per word: what may be quantised."""
        return self.parts[0].is_matrix

    @property
    def head_axis(self) -> int | None:
        """Returns the axis that consists of one block per KV head, counted from the end for inputs; None without."""
        found = [axis for axis, letters in enumerate(self.axes) if letters[0] in "KN"]
        return next((-1 if axis and axis == len(self.axes) - 1 else axis for axis in found), None)


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
        outputs=tuple(outputs),
        inputs=tuple(inputs),
        shape=shape,
        file_shape=flat if bar else shape,
        names={"hf": hf, "gguf": gguf, "ours": path},
        layer=layer,
        is_rotary=rule.is_rotary,
    )


def parameters(config: ModelConfig, naming: Naming = "hf") -> list[Parameter]:
    """Returns every leaf of the model's parameter tree, in the order in which the model uses them."""
    grouped: dict[tuple[str, ...], list[Tensor]] = {}
    for tensor in expected_tensors(config, naming):
        *module, leaf = tensor.path
        before = module[: tensor.layer is not None]
        path = ".".join(module[len(before) :])
        grouped.setdefault((*before, *_JOINED.get(path, path).split("."), leaf), []).append(tensor)
    return [_parameter(path, tuple(parts), _sizes(config)) for path, parts in grouped.items()]


def _parameter(path: tuple[str, ...], parts: tuple[Tensor, ...], sizes: dict[str, int]) -> Parameter:
    join = JOINS.get(".".join(path[1:-1]), Join((), " ".join(parts[0].outputs), 0))
    letters = join.axes.split()
    shapes = []
    for part in parts:
        rows, *inputs = part.flat_shape
        others = [sizes[letter] for axis, letter in enumerate(letters) if axis != join.axis]
        shapes.append((*others[: join.axis], rows // math.prod(others), *others[join.axis :], *inputs))
    shape = list(shapes[0])
    shape[join.axis] = sum(part[join.axis] for part in shapes)
    axes = (*letters, *([" ".join(parts[0].inputs)] if parts[0].inputs else []))
    return Parameter(
        path=path,
        parts=parts,
        part_shapes=tuple(shapes),
        axis=join.axis,
        axes=axes,
        shape=tuple(shape),
        num_kv_heads=sizes["K"],
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


def head_order(parameter: Parameter, config: ModelConfig, heads: HeadOrder | None) -> np.ndarray | None:
    """Returns the checkpoint's KV head of each block of ``parameter.head_axis``; None if nothing moves.

    ``heads.order`` permutes the KV heads. Query heads move with their KV head and keep their order inside the group, so
    that grouped-query attention computes the same function.
    """
    if heads is None or parameter.layer is None or parameter.head_axis is None:
        return None
    order = np.asarray(heads.order[parameter.layer])
    return None if np.array_equal(order, np.arange(config.num_kv_heads)) else order
