import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from lserve_jax.config.errors import InputError
from lserve_jax.weights import open_checkpoint, orbax
from lserve_jax.weights.finite import CHUNK, is_finite
from tests.lserve_jax.checkpoints import gguf_name, random_tensors, tiny_config, write_folder, write_gguf

CONFIG = tiny_config()
NORM, DOWN = "model.norm.weight", "model.layers.1.mlp.down_proj.weight"
TYPES: dict[str, Any] = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float64": float}


def every_float(dtype: Any) -> np.ndarray:
    """All 65,536 floats of 16 bits; of wider types those whose other bits are 0, and then those whose are 1."""
    high = np.arange(1 << 16, dtype=np.uint64)
    size = np.dtype(dtype).itemsize
    low = 8 * size - 16
    return np.concatenate([high << low, (high << low) | ((1 << low) - 1)]).astype(f"u{size}").view(dtype)


@pytest.mark.parametrize("name", TYPES)
def test_every_float_is_judged_as_numpy_judges_it(name: str):
    numbers = every_float(TYPES[name])
    finite = np.isfinite(numbers)
    assert 0 < finite.sum() < numbers.size
    assert is_finite(numbers[finite])
    for number in numbers[~finite]:
        assert not is_finite(np.array([1, number, -1], TYPES[name]))


@pytest.mark.parametrize("number", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, CHUNK - 1, CHUNK, 2 * CHUNK + 1])
def test_one_number_is_found_wherever_it_stands(number: float, place: int):
    weights = np.full((2, CHUNK + 1), -0.5, np.float32)
    assert is_finite(weights)
    weights.reshape(-1)[place] = number
    assert not is_finite(weights)


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> tuple[Path, Callable[[str], str]]:
    return write_folder(path, CONFIG, tensors), str


def write_shards(path: Path, tensors: dict[str, np.ndarray]) -> tuple[Path, Callable[[str], str]]:
    return write_folder(path, CONFIG, tensors, shards=3), str


def write_one_gguf(path: Path, tensors: dict[str, np.ndarray]) -> tuple[Path, Callable[[str], str]]:
    return write_gguf(path.with_suffix(".gguf"), CONFIG, tensors), gguf_name


def write_orbax(path: Path, tensors: dict[str, np.ndarray]) -> tuple[Path, Callable[[str], str]]:
    whole = open_checkpoint(str(write_folder(path.with_name("source"), CONFIG, random_tensors(CONFIG))))
    params = whole.load_params("float32")
    params["final_norm"]["scale"] = tensors[NORM]
    params["layers_1"]["mlp"]["down_proj"]["kernel"] = tensors[DOWN]
    orbax.save(
        path, params, config=whole.config, hf_config=CONFIG, generation_config={}, write_others=lambda folder: None
    )
    return path, {NORM: "final_norm.scale", DOWN: "layers_1.mlp.down_proj.kernel"}.__getitem__


FORMATS = [write_safetensors, write_shards, write_one_gguf, write_orbax]


@pytest.mark.parametrize("write", FORMATS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_are_not_finite_are_named_with_their_file(write: Any, dtype: str, tmp_path: Path):
    tensors = random_tensors(CONFIG)
    tensors[DOWN][3, 5], tensors[DOWN][4, :2] = np.nan, np.inf
    tensors[NORM][7] = -np.inf
    path, name = write(tmp_path / "model", tensors)
    with pytest.raises(InputError, match=r"\A.+\Z") as caught:
        open_checkpoint(str(path)).load_params(dtype)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert f": 2 of 30 tensors are not finite as {dtype}: {name(DOWN)} (1 NaN, 2 infinite of 2048), " in message
    assert f"{name(NORM)} (1 infinite of 32); " in message


def test_of_many_tensors_the_first_are_named_and_all_are_counted(tmp_path: Path):
    tensors = {name: np.full_like(tensor, np.nan) for name, tensor in random_tensors(CONFIG).items()}
    with pytest.raises(
        InputError, match=r"30 of 30 tensors are not finite.*\(1280 NaN of 1280\).*, …; every"
    ) as caught:
        open_checkpoint(str(write_folder(tmp_path, CONFIG, tensors))).load_params("float32")
    assert str(caught.value).count(" NaN of ") == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_numbers_beyond_the_range_of_the_dtype_are_not_finite(dtype: str, tmp_path: Path):
    tensors = {name: tensor.astype(np.float64) for name, tensor in random_tensors(CONFIG).items()}
    tensors[DOWN][3, 5] = 1e39
    with pytest.raises(InputError, match=rf"1 of 30 tensors are not finite as {dtype}: {DOWN} \(1 infinite of 2048\)"):
        open_checkpoint(str(write_folder(tmp_path, CONFIG, tensors))).load_params(dtype)


def test_the_largest_numbers_are_loaded_without_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    tensors = random_tensors(CONFIG)
    tensors[DOWN][0] = float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)
    tensors[DOWN][1] = np.finfo(np.float32).smallest_subnormal
    with caplog.at_level(logging.DEBUG, "lserve_jax"):
        params = open_checkpoint(str(write_folder(tmp_path, CONFIG, tensors))).load_params("bfloat16")
    assert bool(np.isfinite(np.asarray(params["layers_1"]["mlp"]["down_proj"]["kernel"])).all())
    assert not caplog.records
