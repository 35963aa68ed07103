import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from lserve_jax.weights import open_checkpoint
from tests.lserve_jax.checkpoints import assert_same_tree, manual_params, random_tensors, tiny_config, write_folder
from tests.lserve_jax.weights.test_rules import CONFIGS, Heads

CONFIG = tiny_config()
INDEX = "model.safetensors.index.json"


def error_of(folder: Path) -> str:
    """The one line that loading the folder fails with."""
    checkpoint = open_checkpoint(str(folder))
    with pytest.raises(ValueError, match=r"\A.+\Z") as caught:
        checkpoint.load_params("float32")
    return str(caught.value)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("shards", [0, 3])
def test_single_file_and_shards_load_into_the_model_layout(name: str, shards: int, tmp_path: Path):
    config, tensors = CONFIGS[name], random_tensors(CONFIGS[name])
    write_folder(tmp_path, config, tensors, shards=shards)
    params = open_checkpoint(str(tmp_path)).load_params("float32")
    assert_same_tree(params, manual_params(config, tensors))


@pytest.mark.parametrize("name", CONFIGS)
def test_heads_are_permuted_as_by_hand(name: str, tmp_path: Path):
    config, tensors = CONFIGS[name], random_tensors(CONFIGS[name])
    orders = ((2, 0, 1), (0, 1, 2), (1, 0, 2))
    write_folder(tmp_path, config, tensors)
    params = open_checkpoint(str(tmp_path)).load_params("float32", Heads(*orders))
    assert_same_tree(params, manual_params(config, tensors, orders))


@pytest.mark.parametrize("held", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_every_float_type_is_read_into_every_dtype(held: str, wanted: str, tmp_path: Path):
    types: dict[str, Any] = {"bfloat16": ml_dtypes.bfloat16}
    tensors = {name: tensor.astype(types.get(held, held)) for name, tensor in random_tensors(CONFIG).items()}
    write_folder(tmp_path, CONFIG, tensors)
    params = open_checkpoint(str(tmp_path)).load_params(wanted)
    assert_same_tree(params, manual_params(CONFIG, tensors), wanted)


def test_matrices_larger_than_a_tile_are_transposed_right(tmp_path: Path):
    config = tiny_config(hidden_size=300, intermediate_size=517, num_hidden_layers=1)
    tensors = random_tensors(config)
    write_folder(tmp_path, config, tensors)
    assert_same_tree(open_checkpoint(str(tmp_path)).load_params("float32"), manual_params(config, tensors))


def test_harmless_tensors_are_ignored(tmp_path: Path):
    config = CONFIGS["tied"]
    tensors = random_tensors(config)
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32),
        "lm_head.weight": tensors["model.embed_tokens.weight"],
    }
    write_folder(tmp_path, config, tensors | extra)
    assert_same_tree(open_checkpoint(str(tmp_path)).load_params("float32"), manual_params(config, tensors))


def test_missing_unexpected_and_misshapen_tensors_are_all_named_at_once(tmp_path: Path):
    tensors = random_tensors(CONFIG)
    del tensors["lm_head.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.9.mlp.up_proj.weight"] = np.ones((2, 2), np.float32)
    tensors["model.norm.weight"] = np.ones(33, np.float32)
    tensors["model.layers.0.self_attn.k_proj.weight"] = np.ones((24, 32), np.float32)
    message = error_of(write_folder(tmp_path, CONFIG, tensors))
    assert message.startswith(f"{tmp_path / 'model.safetensors'}: ")
    assert message.removeprefix(f"{tmp_path / 'model.safetensors'}: ").split("; ") == [
        "missing tensor model.layers.1.mlp.up_proj.weight [64, 32]",
        "missing tensor lm_head.weight [40, 32]",
        "unexpected tensor model.layers.9.mlp.up_proj.weight",
        "tensor model.layers.0.self_attn.k_proj.weight has shape [24, 32], expected [12, 32]",
        "tensor model.norm.weight has shape [33], expected [32]",
    ]


def test_tensor_that_is_no_float_is_named(tmp_path: Path):
    tensors: dict[str, Any] = random_tensors(CONFIG)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int8)
    message = error_of(write_folder(tmp_path, CONFIG, tensors))
    assert message.endswith(": tensor model.norm.weight has dtype I8, expected one of F64, F32, F16, BF16")


@pytest.mark.parametrize("kept", [0.0, 0.05, 0.5, 0.99])
def test_truncated_file_is_named(kept: float, tmp_path: Path):
    path = write_folder(tmp_path, CONFIG, random_tensors(CONFIG)) / "model.safetensors"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    assert "model.safetensors is truncated or not a safetensors file" in error_of(tmp_path)


def test_folder_without_weights_is_refused_and_pickles_are_not_read(tmp_path: Path):
    write_folder(tmp_path, CONFIG, random_tensors(CONFIG))
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    message = error_of(tmp_path)
    assert message.startswith(f"{tmp_path}: holds neither model.safetensors nor {INDEX}")
    assert "pickled weights" in message


def test_missing_truncated_and_misnamed_shards_are_all_named_at_once(tmp_path: Path):
    write_folder(tmp_path, CONFIG, random_tensors(CONFIG), shards=4)
    files = sorted(tmp_path.glob("model-*.safetensors"))
    files[0].unlink()
    files[1].write_bytes(files[1].read_bytes()[:-8])
    message = error_of(tmp_path)
    assert message.startswith(f"{tmp_path / INDEX}: {files[0].name} is missing; {files[1].name} is truncated")
    assert "missing tensor" not in message  # what the two files hold is accounted for


def test_shard_that_the_index_leaves_out_is_named_with_its_tensors(tmp_path: Path):
    write_folder(tmp_path, CONFIG, random_tensors(CONFIG), shards=3)
    index = json.loads((tmp_path / INDEX).read_text())
    name = "model-00002-of-00003.safetensors"
    gone = [tensor for tensor, file in index["weight_map"].items() if file == name]
    index["weight_map"] = {tensor: file for tensor, file in index["weight_map"].items() if file != name}
    (tmp_path / INDEX).write_text(json.dumps(index))
    message = error_of(tmp_path)
    assert f"{name} lies in the folder but not in the index" in message
    assert gone
    assert all(f"missing tensor {tensor} " in message for tensor in gone)


def test_index_that_puts_a_tensor_into_the_wrong_shard_is_named(tmp_path: Path):
    write_folder(tmp_path, CONFIG, random_tensors(CONFIG), shards=2)
    index = json.loads((tmp_path / INDEX).read_text())
    right = index["weight_map"]["model.norm.weight"]
    wrong = next(file for file in index["weight_map"].values() if file != right)
    index["weight_map"]["model.norm.weight"] = wrong
    (tmp_path / INDEX).write_text(json.dumps(index))
    message = error_of(tmp_path)
    assert f"{wrong} does not hold model.norm.weight, which the index puts there" in message
    assert f"{right} holds model.norm.weight, which the index does not put there" in message


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {"a": "../model.safetensors"}}',
        '{"weight_map": {"a": 1}}',
    ],
)
def test_bad_index_is_named(text: str, tmp_path: Path):
    write_folder(tmp_path, CONFIG, random_tensors(CONFIG), shards=2)
    (tmp_path / INDEX).write_text(text)
    assert error_of(tmp_path).startswith(f"{tmp_path / INDEX}: ")


def test_single_file_wins_over_an_index_as_in_transformers(tmp_path: Path):
    tensors = random_tensors(CONFIG)
    write_folder(tmp_path, CONFIG, random_tensors(CONFIG, seed=1), shards=2)
    save_file(tensors, tmp_path / "model.safetensors")
    assert_same_tree(open_checkpoint(str(tmp_path)).load_params("float32"), manual_params(CONFIG, tensors))
