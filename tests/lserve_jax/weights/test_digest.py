"""A digest stands for the content of a checkpoint, and for nothing else."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lserve_jax.convert import convert
from lserve_jax.weights import open_checkpoint
from lserve_jax.weights.digest import content_digest
from tests.lserve_jax.checkpoints import random_tensors, tiny_config, write_folder, write_gguf

CONFIG = tiny_config()


def digest(model: Path | str) -> str:
    return open_checkpoint(str(model)).digest


def single(path: Path, seed: int) -> Path:
    return write_folder(path, CONFIG, random_tensors(CONFIG, seed))


def sharded(path: Path, seed: int) -> Path:
    return write_folder(path, CONFIG, random_tensors(CONFIG, seed), shards=3)


def quantised(path: Path, seed: int) -> Path:
    path.mkdir()
    return write_gguf(path / "model.gguf", CONFIG, random_tensors(CONFIG, seed))


def converted(path: Path, seed: int) -> Path:
    convert(str(single(path.with_name(f"{path.name}-source"), seed)), path)
    return path


@pytest.mark.parametrize("write", [single, sharded, quantised, converted])
def test_another_training_step_of_the_same_shapes_has_another_digest(write: Callable[..., Path], tmp_path: Path):
    digests = [digest(write(tmp_path / f"{seed}", seed)) for seed in (0, 1)]
    assert digests[0] != digests[1]
    assert all(len(one) == 16 and int(one, 16) >= 0 for one in digests)


@pytest.mark.parametrize("write", [single, sharded, quantised, converted])
def test_a_model_that_was_copied_touched_or_named_otherwise_has_the_same_digest(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = write(tmp_path / "model", 0)
    before = digest(model)
    copy = tmp_path / "elsewhere" / f"copy{model.suffix}"
    copy.parent.mkdir()
    (shutil.copytree if model.is_dir() else shutil.copyfile)(model, copy)
    for path in [copy, *copy.rglob("*")]:
        os.utime(path, (1, 1))
    monkeypatch.chdir(copy.parent)
    assert {before, digest(copy), digest(f"./{copy.name}")} == {before}


def test_configuration_counts(tmp_path: Path):
    before = digest(single(tmp_path / "model", 0))
    changed = write_folder(tmp_path / "other", {**CONFIG, "rope_theta": 1e6}, random_tensors(CONFIG))
    ending = write_folder(tmp_path / "ending", CONFIG, random_tensors(CONFIG), generation_config={"eos_token_id": 9})
    assert len({before, digest(changed), digest(ending)}) == 3


def test_a_checkpoint_without_its_weights_has_no_digest(tmp_path: Path):
    (single(tmp_path / "model", 0) / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors: cannot be read \(No such file or directory\)"):
        digest(tmp_path / "model")


def test_a_large_file_is_sampled_and_every_mebibyte_of_it_counts(tmp_path: Path):
    path, mebibyte = tmp_path / "large", 1 << 20
    content = np.zeros(24 * mebibyte + 5, np.uint8)

    def changed(*places: int) -> str:
        again = content.copy()
        again[list(places)] = 1
        path.write_bytes(again.tobytes())
        return content_digest([path])

    same = changed()
    assert all(changed(place) != same for place in (0, 16 * mebibyte - 1))  # read whole
    for start in range(16, 24):  # a change of a whole mebibyte, wherever it begins
        assert changed(*range(start * mebibyte, (start + 1) * mebibyte, 97)) != same
    assert changed(len(content) - 1) != same  # the last bytes begin a mebibyte
    path.write_bytes(content[:-1].tobytes())
    assert content_digest([path]) != same


def test_where_one_file_ends_and_the_next_begins_counts(tmp_path: Path):
    for name, text in {"a": "1", "b": "23", "c": "12", "d": "3"}.items():
        (tmp_path / name).write_text(text)
    assert content_digest([tmp_path / "a", tmp_path / "b"]) != content_digest([tmp_path / "c", tmp_path / "d"])
