import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from lserve_jax.weights import open_checkpoint, orbax
from tests.lserve_jax.checkpoints import assert_same_tree, manual_params, random_tensors, tiny_config, write_folder
from tests.lserve_jax.weights.test_rules import CONFIGS, Heads


def write_others(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


def saved(tmp_path: Path, config: dict[str, Any], **changes: Any) -> Path:
    """A folder that `orbax.save` wrote from a Hugging Face folder of random tensors."""
    source = open_checkpoint(str(write_folder(tmp_path / "source", config, random_tensors(config))))
    arguments: dict[str, Any] = {
        "hf_config": source.hf_config,
        "generation_config": {"eos_token_id": [3, 4]},
        "write_others": write_others,
    }
    orbax.save(tmp_path / "out", source.load_params("float32"), **arguments | changes)
    return tmp_path / "out"


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_saved_is_restored_in_the_dtype_asked_for(name: str, dtype: str, tmp_path: Path):
    config = CONFIGS[name]
    checkpoint = open_checkpoint(str(saved(tmp_path, config)))
    assert checkpoint.config.architecture == config["model_type"]
    assert checkpoint.config.eos_token_ids == (3, 4)
    assert checkpoint.tokenizer_source == tmp_path / "out"
    assert_same_tree(checkpoint.load_params(dtype), manual_params(config, random_tensors(config)), dtype)


def test_heads_are_permuted_when_restored(tmp_path: Path):
    config = CONFIGS["biased"]
    orders = ((2, 0, 1), (0, 1, 2), (1, 0, 2))
    params = open_checkpoint(str(saved(tmp_path, config))).load_params("float32", Heads(*orders))
    assert_same_tree(params, manual_params(config, random_tensors(config), orders))


def test_folder_holds_everything_and_nothing_is_left_beside_it(tmp_path: Path):
    folder = saved(tmp_path, tiny_config())
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "generation_config.json", "tokenizer.json", "params", "params.json"}
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}


def test_failure_while_saving_leaves_nothing(tmp_path: Path):
    def fail(folder: Path) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        saved(tmp_path, tiny_config(), write_others=fail)
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch])
def test_existing_target_is_refused_unless_it_is_an_empty_folder(make: Callable[[Path], None], tmp_path: Path):
    make(tmp_path / "out")
    if (tmp_path / "out").is_dir():
        saved(tmp_path, tiny_config())
        shutil.rmtree(tmp_path / "source")
    with pytest.raises(ValueError, match=r"out: (the folder is not empty|exists and is not a folder)"):
        saved(tmp_path, tiny_config())


def test_missing_unexpected_and_misshapen_parameters_are_all_named_at_once(tmp_path: Path):
    folder = saved(tmp_path, tiny_config())
    config = json.loads((folder / "config.json").read_text())
    config |= {"vocab_size": 41, "num_hidden_layers": 4, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="missing tensor") as caught:
        open_checkpoint(str(folder)).load_params("float32")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{folder / 'params.json'}: missing tensor layers_3.input_norm.scale [32]; ")
    assert "unexpected tensor lm_head.kernel" in message
    assert message.endswith("tensor embed.embedding has shape [40, 32], expected [41, 32]")


def damage_nothing_but_delete(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def truncate_data(folder: Path) -> None:
    files = [*folder.rglob("d/*")]
    assert files
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def break_metadata(folder: Path) -> None:
    (folder / "_METADATA").write_text("{")


@pytest.mark.parametrize("damage", [damage_nothing_but_delete, truncate_data, break_metadata])
def test_damaged_parameters_are_named_in_one_line(damage: Callable[[Path], None], tmp_path: Path):
    folder = saved(tmp_path, tiny_config())
    damage(folder / "params")
    with pytest.raises(ValueError, match="params: damaged or not an orbax checkpoint") as caught:
        open_checkpoint(str(folder)).load_params("float32")
    assert "\n" not in str(caught.value)
    gc.collect()  # an exception that another thread could not raise would fail this test


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1}', '{"a": ["x"]}'])
def test_damaged_list_of_parameters_is_named(text: str, tmp_path: Path):
    folder = saved(tmp_path, tiny_config())
    (folder / "params.json").write_text(text)
    with pytest.raises(ValueError, match=r"\A.*params\.json: not a list of parameters .*\Z"):
        open_checkpoint(str(folder)).load_params("float32")


def test_array_of_another_shape_than_listed_is_named(tmp_path: Path):
    folder = saved(tmp_path, tiny_config())
    (folder / "params.json").write_text((folder / "params.json").read_text().replace("40", "41"))
    (folder / "config.json").write_text((folder / "config.json").read_text().replace(": 40", ": 41"))
    with pytest.raises(ValueError, match=r"embed\.embedding has shape \(40, 32\), but params\.json says \(41, 32\)"):
        open_checkpoint(str(folder)).load_params("float32")


def test_restored_parameters_are_jax_arrays_on_the_device(tmp_path: Path):
    params = open_checkpoint(str(saved(tmp_path, tiny_config()))).load_params(jnp.bfloat16)
    assert (params["embed"]["embedding"] + 1).dtype == jnp.bfloat16
    assert np.asarray(params["embed"]["embedding"]).shape == (40, 32)
