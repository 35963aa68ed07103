"""Tiny checkpoints for the tests of loading, written without the tables under test.

`tiny_config` and `random_tensors` describe a model as Hugging Face does, `write_folder` and `write_gguf` put it on
disk, `manual_params` lays it out as our model wants it.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
from safetensors.numpy import save_file

HF_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def tiny_config(family: str = "llama", /, **changes: Any) -> dict[str, Any]:
    """A `config.json` with 3 layers, 6 query heads of 4, 3 KV heads, width 32; None in `changes` drops a key."""
    config = {
        "architectures": [HF_CLASSES[family]],
        "model_type": family,
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 4,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 256,
        "rope_theta": 10000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config |= changes
    return {key: value for key, value in config.items() if value is not None or key == "sliding_window"}


def random_tensors(config: Mapping[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Float32 tensors by Hugging Face's names, as that architecture saves them."""
    D, F, V = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    H = config["head_dim"]
    queries, keys = config["num_attention_heads"] * H, config["num_key_value_heads"] * H
    is_qwen2 = config["model_type"] == "qwen2"
    attention_bias = config.get("attention_bias", False)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (V, D)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        linears = {
            "self_attn.q_proj": (queries, D, is_qwen2 or attention_bias),
            "self_attn.k_proj": (keys, D, is_qwen2 or attention_bias),
            "self_attn.v_proj": (keys, D, is_qwen2 or attention_bias),
            "self_attn.o_proj": (D, queries, attention_bias and not is_qwen2),
            "mlp.gate_proj": (F, D, config.get("mlp_bias", False)),
            "mlp.up_proj": (F, D, config.get("mlp_bias", False)),
            "mlp.down_proj": (D, F, config.get("mlp_bias", False)),
        }
        for name, (outputs, inputs, has_bias) in linears.items():
            shapes[f"{prefix}{name}.weight"] = (outputs, inputs)
            if has_bias:
                shapes[f"{prefix}{name}.bias"] = (outputs,)
        shapes[f"{prefix}input_layernorm.weight"] = (D,)
        shapes[f"{prefix}post_attention_layernorm.weight"] = (D,)
        if config["model_type"] == "qwen3":
            shapes[f"{prefix}self_attn.q_norm.weight"] = (H,)
            shapes[f"{prefix}self_attn.k_norm.weight"] = (H,)
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def write_folder(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], *, shards: int = 0, **extra: Any
) -> Path:
    """A folder with `config.json` and `model.safetensors`, or `shards` files and an index; `extra` are JSON files."""
    folder.mkdir(parents=True, exist_ok=True)
    for stem, value in {"config": config, **extra}.items():
        (folder / f"{stem}.json").write_text(json.dumps(value))
    if not shards:
        save_file(dict(tensors), folder / "model.safetensors")
        return folder
    weight_map = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[shard::shards]}
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor that Hugging Face calls `name`."""
    stem, _, kind = name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, layer, rest = stem.split(".", 3)
        return f"blk.{layer}.{GGUF_NAMES[rest]}.{kind}"
    return f"{GGUF_NAMES[stem]}.{kind}"


def write_gguf(
    path: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    *,
    architecture: str = "llama",
    kind: str = "F32",
    metadata: Mapping[str, Any] | None = None,
    drop: tuple[str, ...] = (),
) -> Path:
    """A GGUF file as llama.cpp's converter writes it: matrices in `kind`, vectors in float32, q and k interleaved."""
    writer = gguf.GGUFWriter(path, architecture)
    values = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": config["rope_theta"],
        "rope.dimension_count": config["head_dim"],
        "vocab_size": config["vocab_size"],
    }
    own = {f"{architecture}.{key}": value for key, value in values.items() if key not in drop}
    own |= {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
    for key, value in (own | dict(metadata or {})).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add.get(type(value), writer.add_array)(key, value)
    for name, tensor in tensors.items():
        stored = tensor
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            stored = interleave(tensor, config["head_dim"])
        add_tensor(writer, gguf_name(name), stored, kind if tensor.ndim == 2 else "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tensor(writer: gguf.GGUFWriter, name: str, tensor: np.ndarray, kind: str) -> None:
    """Adds a float32 tensor in the type `kind`."""
    qtype = gguf.GGMLQuantizationType[kind]
    if kind == "F32":
        writer.add_tensor(name, tensor)
    elif kind == "F16":
        writer.add_tensor(name, tensor.astype(np.float16))
    else:
        writer.add_tensor(name, gguf.quantize(tensor, qtype), raw_dtype=qtype)


def interleave(tensor: np.ndarray, head_dim: int) -> np.ndarray:
    """The rows of each head in llama.cpp's order: row 2i is the head's row i, row 2i + 1 its row i + H/2."""
    rows = tensor.copy()
    half = head_dim // 2
    for start in range(0, len(tensor), head_dim):
        for i in range(half):
            rows[start + 2 * i] = tensor[start + i]
            rows[start + 2 * i + 1] = tensor[start + half + i]
    return rows


def manual_params(
    config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], orders: tuple[tuple[int, ...], ...] | None = None
) -> dict[str, Any]:
    """Our parameter tree as numpy arrays, laid out by hand; `orders` are each layer's KV heads in their new places."""
    D, H = config["hidden_size"], config["head_dim"]
    N, K = config["num_attention_heads"], config["num_key_value_heads"]
    group = N // K

    def kernel(name: str) -> np.ndarray:
        return tensors[f"{name}.weight"]

    def with_bias(leaf: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
        return leaf | ({"bias": tensors[f"{name}.bias"]} if f"{name}.bias" in tensors else {})

    def joined(names: list[str], rows: Callable[[np.ndarray, int], np.ndarray], axis: int) -> dict[str, np.ndarray]:
        parts = [with_bias({"kernel": kernel(name)}, name) for name in names]
        return {
            leaf: np.concatenate([rows(part[leaf], index) for index, part in enumerate(parts)], axis)
            for leaf in parts[0]
        }

    params: dict[str, Any] = {
        "embed": {"embedding": tensors["model.embed_tokens.weight"]},
        "final_norm": {"scale": tensors["model.norm.weight"]},
    }
    if "lm_head.weight" in tensors:
        params["lm_head"] = {"kernel": tensors["lm_head.weight"]}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        kv = list(orders[layer]) if orders else list(range(K))
        queries = [head * group + j for head in kv for j in range(group)]

        def by_kv_head(rows: np.ndarray, part: int, kv: list[int] = kv) -> np.ndarray:
            return rows.reshape(K, group if part == 0 else 1, H, *rows.shape[1:])[kv]

        output = f"{prefix}self_attn.o_proj"
        attention = {
            "qkv_proj": joined([f"{prefix}self_attn.{name}_proj" for name in "qkv"], by_kv_head, 1),
            "o_proj": with_bias({"kernel": kernel(output).reshape(D, N, H)[:, queries].reshape(D, N * H)}, output),
        }
        for norm in ("q_norm", "k_norm"):
            if f"{prefix}self_attn.{norm}.weight" in tensors:
                attention[norm] = {"scale": tensors[f"{prefix}self_attn.{norm}.weight"]}
        mlp = {
            "gate_up_proj": joined(
                [f"{prefix}mlp.{name}_proj" for name in ("gate", "up")], lambda rows, part: rows[None], 0
            ),
            "down_proj": with_bias({"kernel": kernel(f"{prefix}mlp.down_proj")}, f"{prefix}mlp.down_proj"),
        }
        params[f"layers_{layer}"] = {
            "input_norm": {"scale": tensors[f"{prefix}input_layernorm.weight"]},
            "attention": attention,
            "post_attention_norm": {"scale": tensors[f"{prefix}post_attention_layernorm.weight"]},
            "mlp": mlp,
        }
    return params


def assert_same_tree(got: Mapping[str, Any], expected: Mapping[str, Any], dtype: str = "float32") -> None:
    """Asserts that two parameter trees have the same paths and, bit for bit, the same values of `dtype`."""
    got_leaves, got_tree = jax.tree.flatten(got)
    expected_leaves, expected_tree = jax.tree.flatten(expected)
    assert got_tree == expected_tree
    for mine, theirs in zip(got_leaves, expected_leaves, strict=True):
        assert isinstance(mine, jax.Array)
        assert mine.dtype == dtype
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(theirs).astype(dtype))


def assert_same_bits(got: Any, expected: Any) -> None:
    """Two trees with the same classes and the same bits in every leaf."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert mine.dtype == theirs.dtype
        assert np.asarray(mine).tobytes() == np.asarray(theirs).tobytes()
